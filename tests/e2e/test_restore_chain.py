"""
Backups that stand on sealed bases, from the command line: put together again and proven, or nothing at all.

Each of two backups has two disks on one chain: an overlay of their own, a middle one, a raw base. No cloud is needed.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from tests.flows.rig import Rig, rig_on
from tests.flows.test_verify_restore import keep
from tests.unit.qcow2.material import KiB, MiB, needs_qemu_img, qemu_img, qemu_reads, write_at_random

from autobackup.errors import AutobackupError, Damaged, Refused
from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Wanted, restore
from autobackup.flows.verify import open_sealed
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId, ChainLink
from autobackup.stores import OpenDestination
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.keyfile import KeyFile
from autobackup.terms import Destination

pytestmark = needs_qemu_img
SIZE: Final = 4 * MiB
DISKS: Final = ("disk", "disk.eph0")


@dataclass(frozen=True)
class Backup:
    """One that is in the store, what its guests saw, and the files that it stands on as they were on the host."""

    attempt: str
    seen: dict[str, bytes]
    bases: tuple[Path, ...]  # the lowest first


@dataclass(frozen=True)
class Copy:
    """The store for one test to damage, and its two backups."""

    folder: Path
    first: Backup
    second: Backup

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def target(self) -> Path:
        return self.folder / "restored"

    def command(self, name: str, *more: str) -> list[str]:
        where = ["--from", str(self.store), "--keyfile", str(self.folder / "kek")]
        return [sys.executable, "-m", "autobackup.service.cli", name, *more, *where]

    def cli(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(name, *more), capture_output=True, text=True, check=False)

    def restore(self, *more: str, to: str = "restored") -> subprocess.CompletedProcess[str]:
        return self.cli("restore", self.first.attempt, "--to", str(self.folder / to), *more)

    def sealed_bases(self, backup: Backup) -> list[Path]:
        """The files in the store, as its description of the backup names them."""
        words = json.loads((self.store / f"{backup.attempt}.json").read_text())
        return [self.store / f"{one}.autobackup" for one in words["properties"]["autobackup_parents"].split()]

    def assert_nothing(self) -> None:
        assert sorted(os.listdir(self.folder)) == ["kek", "store"]


async def back_up(rig: Rig, folder: Path, seed: int) -> Backup:
    folder.mkdir()
    base, middle = folder / "base", folder / "middle"
    data = bytearray(random.Random(seed).randbytes(SIZE))
    data[MiB : 2 * MiB + 5] = bytes(MiB + 5)
    base.write_bytes(data)
    overlay(middle, base, "raw", cluster_bytes=4 * KiB, seed=seed)
    for number, name in enumerate(DISKS):
        overlay(folder / name, middle, "qcow2", cluster_bytes=64 * KiB, seed=seed + number + 1)
    seen = {name: qemu_reads(folder / name) for name in DISKS}
    chain = (ChainLink(path=str(middle), format="qcow2"), ChainLink(path=str(base), format="raw"))
    for link in chain:
        assert rig.spool.bases.hold(link.path)
    held = await keep(
        rig, {name: (folder / name).read_bytes() for name in DISKS}, format_name="qcow2", chain=chain
    )  # fmt: skip
    return Backup(attempt=held.sent.attempt, seen=seen, bases=(base, middle))


def overlay(path: Path, below: Path, below_format: str, *, cluster_bytes: int, seed: int) -> None:
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_bytes}", "-b", below, "-F", below_format, path
    )  # fmt: skip
    write_at_random(path, virtual_bytes=SIZE, cluster_bytes=cluster_bytes, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backup, Backup]:
    """The files of the chains lie aside, not where the host had them: nobody finds them by accident."""
    folder = tmp_path_factory.mktemp("made")

    async def make() -> list[Backup]:
        with rig_on(folder / "rig") as rig:
            return [await back_up(rig, folder / f"host-{seed}", seed) for seed in (100, 200)]

    moved = []
    for number, backup in enumerate(asyncio.run(make())):
        aside = folder / f"aside-{number}"
        backup.bases[0].parent.rename(aside)
        moved.append(Backup(backup.attempt, backup.seen, tuple(aside / path.name for path in backup.bases)))
    return folder / "rig", moved[0], moved[1]


@pytest.fixture
def copy(made: tuple[Path, Backup, Backup], tmp_path: Path) -> Copy:
    rig, first, second = made
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copytree(rig / "one", folder / "store")
    (folder / "store").chmod(0o700)
    shutil.copy2(rig / "one.kek", folder / "kek")
    copy = Copy(folder, first, second)
    assert len({*copy.sealed_bases(first), *copy.sealed_bases(second)}) == 4
    return copy


def guest_sees(path: Path, disk_format: str) -> bytes:
    if disk_format == "raw":
        return path.read_bytes()
    return qemu_reads(path)


# ---- whole ------------------------------------------------------------------------------------------------


def test_a_chain_is_put_together_and_each_base_is_there_once(copy: Copy) -> None:
    done = copy.restore("-f", "json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    moved = copy.target.rename(copy.folder / "moved")  # nothing in it says where it was
    for one in said["disks"]:
        path = moved / Path(one["path"]).relative_to(copy.target)
        assert guest_sees(path, one["format"]) == copy.first.seen[path.name]
        assert len(one["backing"]) == 2
    assert len(list((moved / "bases").iterdir())) == 2
    assert sorted(os.listdir(copy.folder)) == ["kek", "moved", "store"]


def test_one_disk_alone_and_flat_ones(copy: Copy) -> None:
    """What is not asked for does not come, and a disk in one file needs no other."""
    wanted: dict[str, tuple[Sequence[str], Sequence[str], str, int]] = {
        "alone": (["--disk", "disk.eph0"], ["disk.eph0"], "qcow2", 2),
        "flat": (["--flatten"], DISKS, "qcow2", 0),
        "raw": (["--flatten", "--format", "raw", "--disk", "disk"], ["disk"], "raw", 0),
    }
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda name: copy.restore(*wanted[name][0], "-f", "json", to=name), wanted))
    for done, (name, (_, disks, disk_format, bases)) in zip(results, wanted.items(), strict=True):
        assert done.returncode == 0, done.stderr
        folder = copy.folder / name
        assert sorted(os.listdir(folder / "disks")) == sorted(disks)
        said = {Path(one["path"]).name: one for one in json.loads(done.stdout)["disks"]}
        assert {one["format"] for one in said.values()} == {disk_format}
        assert {len(one["backing"]) for one in said.values()} == {bases}
        assert (folder / "bases").exists() == bool(bases)
        for disk in disks:
            assert guest_sees(folder / "disks" / disk, disk_format) == copy.first.seen[disk]
            if not bases and disk_format == "qcow2":
                assert "backing" not in qemu_img("info", "-f", "qcow2", folder / "disks" / disk)


def test_files_at_hand_are_as_good_as_sealed_bases(copy: Copy) -> None:
    """Known by their bytes, whatever they are called and in whatever order; and rather taken than what is damaged."""
    base, middle = copy.sealed_bases(copy.first)
    base.unlink()
    flip(middle, at=-100)
    options = [word for path in (*copy.second.bases, *copy.first.bases) for word in ("--parent", str(path))]
    done = copy.restore(*options)
    assert done.returncode == 0, done.stderr
    for disk in DISKS:
        assert guest_sees(copy.target / "disks" / disk, "qcow2") == copy.first.seen[disk]


# ---- not whole --------------------------------------------------------------------------------------------


def flip(path: Path, *, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(copy: Copy, base: Path) -> None:
    os.truncate(base, base.stat().st_size // 2)


def swap_for_anothers(copy: Copy, base: Path) -> None:
    """Whole, sealed by us, and a base: of another backup."""
    number = copy.sealed_bases(copy.first).index(base)
    shutil.copy2(copy.sealed_bases(copy.second)[number], base)


def swap_for_the_other(copy: Copy, base: Path) -> None:
    """As above, and even of this one."""
    [other] = [one for one in copy.sealed_bases(copy.first) if one != base]
    shutil.copy2(other, base)


def swap_for_the_backup(copy: Copy, base: Path) -> None:
    shutil.copy2(copy.store / f"{copy.first.attempt}.autobackup", base)


HARMS: Final[Sequence[tuple[Callable[[Copy, Path], object], type[AutobackupError]]]] = (
    (lambda _copy, base: flip(base, at=60), AutobackupError),  # it may name another key then
    (lambda _copy, base: flip(base, at=4096 + 99), Damaged),
    (lambda _copy, base: flip(base, at=base.stat().st_size // 2), Damaged),
    (lambda _copy, base: flip(base, at=-1), Damaged),
    (cut, Damaged),
    (swap_for_anothers, Damaged),
    (swap_for_the_other, Damaged),
    (swap_for_the_backup, Damaged),
    (lambda _copy, base: base.unlink(), Refused),
)


def error_of(copy: Copy, *files: Path, flat: bool = False) -> AutobackupError | None:
    """What a restore in this process raises; None if it succeeds, and then its target is removed."""

    async def go() -> None:
        workers = Workers()
        place = OpenDestination(
            destination=Destination(name="store", store="directory", path=copy.store, key="none"),
            store=DirectoryStore(str(copy.store)), keys=KeyFile(str(copy.folder / "kek")),
        )  # fmt: skip
        try:
            sealed = await open_sealed(place.store, place.keys, AttemptId(copy.first.attempt))
            await restore(
                sealed, target=str(copy.target), wanted=Wanted(flat="qcow2" if flat else None), workers=workers,
                origins=Origins(places=[place], files=[str(path) for path in files]), show=_silent,
            )  # fmt: skip
        finally:
            workers.close()

    try:
        asyncio.run(go())
    except AutobackupError as exc:
        return exc
    shutil.rmtree(copy.target)
    return None


@contextlib.contextmanager
def _silent(_what: str, _size_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda _count: None


@pytest.mark.parametrize("number", [0, 1])
def test_what_its_bases_are_not_leaves_nothing(copy: Copy, number: int) -> None:
    """Whichever of the two it is, with the other as it should be, and files at hand that are bases and not these."""
    base = copy.sealed_bases(copy.first)[number]
    good = base.read_bytes()
    for harm, kind in HARMS:
        for files in ((), copy.second.bases):
            harm(copy, base)
            error = error_of(copy, *files, flat=bool(number))
            assert isinstance(error, AutobackupError if files else kind), (harm, error)
            copy.assert_nothing()
            base.write_bytes(good)
    assert error_of(copy) is None


def test_the_exit_status_and_the_words_tell_damage_from_absence(copy: Copy) -> None:
    base = copy.sealed_bases(copy.first)[0]
    for harm, status in ((swap_for_anothers, 4), (lambda _copy, base: base.unlink(), 3)):
        harm(copy, base)
        done = copy.restore()
        assert done.returncode == status, done.stderr
        assert done.stderr.startswith("autobackup: ")
        assert "Traceback" not in done.stderr
        assert "--parent" in done.stderr, "what would help is said"
        copy.assert_nothing()


def test_orders_that_make_no_sense_are_refused_before_anything_is_written(copy: Copy) -> None:
    orders: dict[tuple[str, ...], int] = {
        ("--format", "raw"): 2,
        ("--disk", "disk.eph1"): 3,
        ("--parent", str(copy.store)): 2,
    }
    with ThreadPoolExecutor(3) as pool:
        for order, done in zip(orders, pool.map(lambda words: copy.restore(*words), orders), strict=True):
            assert done.returncode == orders[order], (order, done.stderr)
            assert "Traceback" not in done.stderr, order
    copy.assert_nothing()


# ---- interrupted ------------------------------------------------------------------------------------------


def disk_is_there(partial: Path) -> bool:
    return partial.exists()


def base_is_there(partial: Path) -> bool:
    return (partial / "bases").exists()


def flat_is_there(partial: Path) -> bool:
    return any((partial / "disks").glob("*.flat"))


@pytest.mark.parametrize("moment", [disk_is_there, base_is_there, flat_is_there])
def test_an_end_by_signal_leaves_nothing(copy: Copy, moment: Callable[[Path], bool]) -> None:
    command = copy.command("restore", copy.first.attempt, "--to", str(copy.target), "--flatten")
    partial = copy.target.with_name("restored.partial")
    for _ in range(10):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not moment(partial) and process.poll() is None:
                time.sleep(0.0005)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        if process.returncode != 0:
            break
        shutil.rmtree(copy.target)  # it was faster than the signal
    assert process.returncode != 0
    assert b"Traceback" not in said
    copy.assert_nothing()
    assert list(processes_on(copy.folder)) == []


def processes_on(folder: Path) -> Iterator[str]:
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in words:
            yield words.replace(b"\0", b" ").decode(errors="replace")


# ---- links ------------------------------------------------------------------------------------------------


def links(copy: Copy, name: str, *more: str) -> dict[str, Any]:
    done = copy.cli("links", name, "-f", "json", *more)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_what_stands_on_what_is_shown_from_both_ends(copy: Copy) -> None:
    bases = [path.name.removesuffix(".autobackup") for path in copy.sealed_bases(copy.first)]
    up = links(copy, copy.first.attempt)
    assert (up["id"], up["kind"], up["children"]) == (copy.first.attempt, "backup", [])
    assert {(one["id"], one["kind"]) for one in up["parents"]} == {(base, "base") for base in bases}
    down = links(copy, bases[0])
    assert (down["kind"], down["parents"]) == ("base", [])
    assert [(one["id"], one["kind"]) for one in down["children"]] == [(copy.first.attempt, "backup")]

    tree = copy.cli("links", copy.first.attempt)
    assert tree.returncode == 0, tree.stderr
    rows = [row for row in tree.stdout.splitlines() if row.strip()]
    assert len(rows) == 3
    assert all(base in "".join(rows[:2]) for base in bases)
    assert copy.first.attempt in rows[2]


def test_what_is_gone_is_shown_as_gone(copy: Copy) -> None:
    base = copy.sealed_bases(copy.first)[0]
    base.unlink()
    states = {one["id"]: one["state"] for one in links(copy, copy.first.attempt)["parents"]}
    assert states[base.name.removesuffix(".autobackup")] == "gone"
    said = links(copy, base.name.removesuffix(".autobackup"))
    assert (said["state"], [one["id"] for one in said["children"]]) == ("gone", [copy.first.attempt])
