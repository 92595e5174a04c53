"""
Whatever Nova does with a server, on a real libvirtd and QEMU, the verdict on its disk is that of the table; and no
disk that Nova still names, or that somebody has open, is ever touched.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.demo_rules import last_line
from tests.lab.hypervisor import Hypervisor
from tests.lab.live_watch import LiveWatch
from tests.lab.nova_plays import Result, perform
from tests.lab.nova_scenarios import SCENARIOS
from tests.lab.workspace import Workspace

pytestmark = pytest.mark.timeout(300)  # all of them are played for the first


@pytest.fixture(scope="module")
def result(hypervisor: Hypervisor, workspace: Workspace) -> Result:
    """All scenarios, many at a time."""
    return perform(SCENARIOS, hypervisor, workspace)


@pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])
def test_the_verdict_is_that_of_the_table(result: Result, name: str) -> None:
    assert all(row.is_right for row in result.rows[name]), result.rows[name]


def test_no_living_disk_was_touched(result: Result) -> None:
    assert result.touched == []
    assert result.watched_count > len(SCENARIOS), "the watcher did not see the disks"


def test_the_demo_ends_with_its_line(result: Result) -> None:
    line = last_line(result)
    assert (line["wrong"], line["live_inodes_touched"]) == (0, 0)
    assert {one["name"] for one in line["scenarios"]} >= {scenario.name for scenario in SCENARIOS}
    assert all(one["verdict"] == one["expected"] for one in line["scenarios"])


# ---- the watcher can fail ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"what a guest wrote" * 1000)
    return path


@pytest.fixture
def claim(tmp_path: Path, disk: Path) -> Path:
    claim = tmp_path / "claim"
    os.link(disk, claim)
    return claim


@pytest.fixture
def watch(disk: Path, claim: Path) -> Iterator[LiveWatch]:
    """Of a disk with a name of Nova's and a claim."""
    with LiveWatch() as watch:
        watch.guard(disk, named=(disk.with_name("disk_del"),), held=(claim,))
        yield watch


def test_a_byte_written_to_a_living_disk_is_seen(watch: LiveWatch, claim: Path) -> None:
    with claim.open("r+b") as file:
        file.write(b"w")

    watch.look(hashed=True)

    assert [words.rpartition(": ")[2].split(" at ")[0] for words in watch.touched] == ["was written to"]


def test_a_scrub_that_sets_the_times_back_is_seen(watch: LiveWatch, disk: Path, claim: Path) -> None:
    before = disk.stat()
    claim.write_bytes(bytes(before.st_size))
    os.utime(claim, ns=(before.st_atime_ns, before.st_mtime_ns))

    watch.look(hashed=True)

    assert any("another content" in words for words in watch.touched)


def test_a_truncated_disk_is_seen(watch: LiveWatch, claim: Path) -> None:
    os.truncate(claim, 10)

    watch.look()

    assert any("has 10 bytes" in words for words in watch.touched)


def test_a_name_of_novas_that_somebody_takes_is_seen(watch: LiveWatch, disk: Path) -> None:
    disk.unlink()

    _look_a_while(watch)

    assert [words.rpartition(": ")[2] for words in watch.touched] == ["lost the name that Nova gave it"]


def test_a_held_disk_that_somebody_lets_go_is_seen(watch: LiveWatch, disk: Path, claim: Path) -> None:
    """Unlinked under its guest: the claim is the last name of what the guest still writes to."""
    watch.nova_takes(disk.stat().st_ino)
    disk.unlink()
    claim.unlink()

    _look_a_while(watch)

    assert [words.rpartition(": ")[2] for words in watch.touched] == ["lost its last name"]


def test_what_nova_and_its_guest_do_is_no_touch(watch: LiveWatch, disk: Path, claim: Path) -> None:
    inode, content = disk.stat().st_ino, disk.read_bytes()
    watch.guest_writes(inode)
    with disk.open("r+b") as file:
        file.write(content)
    watch.guest_rests(inode)
    disk.rename(disk.with_name("disk_del"))
    watch.look(hashed=True)
    watch.nova_takes(inode)
    disk.with_name("disk_del").unlink()
    _look_a_while(watch)
    watch.release(inode)
    claim.write_bytes(b"")
    claim.unlink()

    _look_a_while(watch)

    assert watch.touched == []


def test_a_guest_that_leaves_another_content_is_seen(watch: LiveWatch, disk: Path) -> None:
    """While a guest boots the agent might hide behind it."""
    inode = disk.stat().st_ino
    watch.guest_writes(inode)
    with disk.open("r+b") as file:
        file.write(b"somebody else's")
    watch.guest_rests(inode)

    assert any("another content" in words for words in watch.touched)


def _look_a_while(watch: LiveWatch) -> None:
    time.sleep(0.3)
    watch.look()
