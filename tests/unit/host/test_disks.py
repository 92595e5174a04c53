"""One held disk: who it is, who else has it open, where its data lies."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobackup.errors import AutobackupError, DiskBusy, OverlayChanged
from autobackup.host.disks import HeldDisk, lease_granted

MiB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(os.urandom(10_000))
    return tmp_path / "disk"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _symlink(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


@pytest.mark.parametrize("make", [_fifo, _symlink, _folder, _device])
def test_what_is_no_disk_is_refused_and_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AutobackupError) as told:
        HeldDisk(str(tmp_path / "x"))
    assert not isinstance(told.value, OverlayChanged)
    assert str(tmp_path / "x") in str(told.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_is_gone_is_another_disk(tmp_path: Path) -> None:
    with pytest.raises(OverlayChanged):
        HeldDisk(str(tmp_path / "absent"))


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_a_lease_is_for_the_only_opener(path: Path, flags: int) -> None:
    with HeldDisk(str(path)) as disk:
        disk.require_idle()
        other = os.open(path, flags)
        with pytest.raises(DiskBusy):
            disk.require_idle()
        os.close(other)
        disk.require_idle()


def test_another_process_is_seen_and_its_end_too(path: Path) -> None:
    script = "import os, sys; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with HeldDisk(str(path)) as disk:
        with pytest.raises(DiskBusy):
            disk.require_idle()
        other.communicate(timeout=30)
        disk.require_idle()


def test_the_lease_is_not_kept(path: Path) -> None:
    """A lease that is kept makes whoever opens the disk next wait up to 45 s."""
    with HeldDisk(str(path)) as disk:
        disk.require_idle()
        assert fcntl.fcntl(disk.fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_another_link_to_the_same_inode_is_seen_too(path: Path) -> None:
    os.link(path, path.with_name("other"))
    with HeldDisk(str(path)) as disk, path.with_name("other").open("rb"):
        assert not lease_granted(disk.fd)


def test_a_name_that_comes_again_is_another_inode(path: Path) -> None:
    """ext4 gives the same inode number again at once; the generation tells the two apart."""
    with HeldDisk(str(path)) as disk:
        first = disk.identity
    seen = set()
    for _ in range(20):
        path.unlink()
        path.write_bytes(os.urandom(10_000))
        with HeldDisk(str(path)) as disk:
            assert not disk.identity.same_inode(first)
            seen.add((disk.identity.inode, disk.identity.generation))
    assert first.generation is not None
    assert len(seen) == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 9999),
        lambda path: os.truncate(path, 10_001),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.write_bytes(path.read_bytes()),
    ],
)
def test_any_change_of_content_is_seen(path: Path, change: Callable[[Path], object]) -> None:
    with HeldDisk(str(path)) as disk:
        first = disk.identity
        disk.require_unchanged(first)
        os.link(path, path.with_name("other"))
        os.chmod(path, 0o640)
        disk.require_unchanged(first)  # names and owners are no content
        change(path)
        with pytest.raises(OverlayChanged):
            disk.require_unchanged(first)


PARTS = st.lists(st.tuples(st.booleans(), st.integers(1, 40).map(lambda n: n * 4096)), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=PARTS, tail=st.integers(0, 5000))
def test_the_ranges_are_in_order_inside_and_hold_all_that_is_not_zero(
    tmp_path: Path, parts: list[tuple[bool, int]], tail: int
) -> None:
    path, at = tmp_path / "disk", 0
    with path.open("wb") as file:
        for is_data, length in parts:
            if is_data:
                file.seek(at)
                file.write(b"x" * length)
            at += length
        size_bytes = at + tail
        file.truncate(size_bytes)
    content = path.read_bytes()
    with HeldDisk(str(path)) as disk:
        ranges = list(disk.data_ranges())

    covered, end = bytearray(size_bytes), 0
    for start, length in ranges:
        assert length > 0
        assert end <= start < start + length <= size_bytes
        end = start + length
        covered[start:end] = content[start:end]
    assert covered == content


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 5 * MiB + 3])
def test_a_disk_of_nothing_but_a_hole_has_no_range(tmp_path: Path, size_bytes: int) -> None:
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", size_bytes)
    with HeldDisk(str(tmp_path / "disk")) as disk:
        assert list(disk.data_ranges()) == []


def test_growth_is_ignored_and_an_early_end_is_not(path: Path) -> None:
    with HeldDisk(str(path)) as disk:
        with path.open("ab") as file:
            file.write(b"grown" * 4000)
        assert sum(length for _, length in disk.data_ranges()) == 10_000
        os.truncate(path, 5000)
        with pytest.raises(OverlayChanged):
            disk.read_into(memoryview(bytearray(10_000)), 0)


def test_reading_is_exact_at_every_offset(path: Path) -> None:
    content = path.read_bytes()
    with HeldDisk(str(path)) as disk:
        for offset in (0, 1, 4095, 4096, 9999):
            for length in (1, 4096, 10_000 - offset):
                if offset + length <= 10_000:
                    buffer = bytearray(length)
                    assert disk.read_into(memoryview(buffer), offset) == []
                    assert buffer == content[offset : offset + length]


def test_a_closed_disk_is_closed_once(path: Path) -> None:
    disk = HeldDisk(str(path))
    disk.close()
    other = os.open(path, os.O_RDONLY)  # takes the number that was freed
    disk.close()
    os.fstat(other)
    os.close(other)


def test_no_lease_can_be_had_without_the_right_to_it(tmp_path: Path) -> None:
    """Said as a refusal with the remedy, not as busy: waiting would not help."""
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    os.chown(path, 12345, 12345)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\n"
        "from autobackup.errors import Refused\n"
        "from autobackup.host.disks import lease_granted\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setuid(54321)\n"
        "try:\n"
        "    lease_granted(fd)\n"
        "except Refused as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "CAP_LEASE" in done.stdout
