"""The gates in front of the scrub, one at a time; and what is left on the medium when all were open."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from tests.lab.filesystem import LoopFilesystem, bind_mount, loop_filesystem, scan_for, tmpfs
from tests.unit.host.material import held_file, job_of, with_copy_state

from autobackup.errors import ConfigError, DiskBusy, Refused, ScrubRefused
from autobackup.host.scrub import load_methods, method_named, scrub_file
from autobackup.model import CopyState, HeldFile, JobRecord, JobState, VerdictKind

MiB = 1 << 20
Scene = tuple[JobRecord, HeldFile, str]  # what `scrub_file` is called with


def must_not_run(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
    pytest.fail("a gate was closed and the method ran")


@pytest.fixture
def link(tmp_path: Path) -> Path:
    path = tmp_path / "job" / "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e.disk.1"
    path.parent.mkdir()
    path.write_bytes(os.urandom(200_000))
    return path


# ---- each gate closed, all others open --------------------------------------------------------------------


@contextmanager
def _job_gate(link: Path, change: Callable[[JobRecord], JobRecord]) -> Iterator[Scene]:
    job = change(job_of({"disk": link}))
    yield job, job.files[0], str(link.parent)


def _identity(link: Path, **changes: object) -> AbstractContextManager[Scene]:
    def change(job: JobRecord) -> JobRecord:
        held = replace(job.files[0], identity=replace(job.files[0].identity, **changes))  # type: ignore[arg-type]
        return replace(job, files=(held,))

    return _job_gate(link, change)


@contextmanager
def _not_its_file(link: Path) -> Iterator[Scene]:
    other = link.with_name("other")
    other.write_bytes(b"other")
    held = held_file(link)
    yield job_of({"disk": other}), held, str(link.parent)


@contextmanager
def _second_name(link: Path) -> Iterator[Scene]:
    job = job_of({"disk": link})
    os.link(link, link.parent.parent / "disk")
    yield job, job.files[0], str(link.parent)


@contextmanager
def _opened(link: Path, flags: int) -> Iterator[Scene]:
    job = job_of({"disk": link})
    fd = os.open(link, flags)
    try:
        yield job, job.files[0], str(link.parent)
    finally:
        os.close(fd)


@contextmanager
def _opened_by_another_process(link: Path) -> Iterator[Scene]:
    job = job_of({"disk": link})
    script = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script, str(link)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        other.stdout.readline()
        yield job, job.files[0], str(link.parent)
    finally:
        other.communicate(timeout=30)


@contextmanager
def _replaced(link: Path) -> Iterator[Scene]:
    job = job_of({"disk": link})
    other = link.with_name("other")
    other.write_bytes(link.read_bytes())
    os.rename(other, link)
    yield job, job.files[0], str(link.parent)


@contextmanager
def _symlink(link: Path) -> Iterator[Scene]:
    job = job_of({"disk": link})
    target = link.parent.parent / "disk"
    os.rename(link, target)
    link.symlink_to(target)
    yield job, job.files[0], str(link.parent)


@contextmanager
def _another_device(link: Path) -> Iterator[Scene]:
    """A file of another filesystem, mounted over the link: its own inode, its own single name."""
    with ExitStack() as stack:
        elsewhere = stack.enter_context(tmpfs(16 * MiB)) / "disk"
        elsewhere.write_bytes(link.read_bytes())
        stack.enter_context(bind_mount(elsewhere, link))
        job = job_of({"disk": link})
        yield job, job.files[0], str(link.parent)


CLOSED: dict[str, Callable[[Path], AbstractContextManager[Scene]]] = {
    **{
        f"job is {state}": lambda link, state=state: _job_gate(link, lambda job: replace(job, state=state))
        for state in JobState
        if state is not JobState.SCRUBBING
    },
    **{
        f"verdict is {kind}": lambda link, kind=kind: _job_gate(link, lambda job: replace(job, verdict=kind))
        for kind in VerdictKind
        if kind is not VerdictKind.TERMINATED
    },
    **{
        f"a copy is {state}": lambda link, state=state: _job_gate(link, lambda job: with_copy_state(job, state))
        for state in CopyState
        if state not in (CopyState.VERIFIED, CopyState.DISCARDED)
    },
    "no copies": lambda link: _job_gate(link, lambda job: replace(job, copies=())),
    "all copies discarded": lambda link: _job_gate(
        link, lambda job: replace(job, copies=tuple(replace(c, state=CopyState.DISCARDED) for c in job.copies))
    ),
    "unreadable": lambda link: _job_gate(link, lambda job: replace(job, unreadable=True)),
    "inode": lambda link: _identity(link, inode=1),
    "generation": lambda link: _identity(link, generation=1),
    "no generation": lambda link: _identity(link, generation=None),
    "not its file": _not_its_file,
    "second name": _second_name,
    "opened for reading": lambda link: _opened(link, os.O_RDONLY),
    "opened for writing": lambda link: _opened(link, os.O_RDWR),
    "opened by another process": _opened_by_another_process,
    "replaced": _replaced,
    "a symbolic link": _symlink,
    "another device": _another_device,
}


@pytest.mark.parametrize("gate", CLOSED)
def test_one_closed_gate_is_enough(link: Path, gate: str) -> None:
    """And nothing was touched: not the bytes, not the name, not the times."""
    with CLOSED[gate](link) as (job, held, folder):
        before, content = os.stat(link), link.read_bytes()
        with pytest.raises((ScrubRefused, DiskBusy, Refused)):
            scrub_file(job, held, folder=folder, method=must_not_run)
        after = os.stat(link)
        assert link.read_bytes() == content
        assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
            before.st_mtime_ns, before.st_ctime_ns, before.st_size,
        )  # fmt: skip


def test_with_every_gate_open_it_is_scrubbed(link: Path) -> None:
    """The counterpart: none of the refusals above was for another reason."""
    job, ran = job_of({"disk": link}), []

    def method(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        ran.append((list(ranges), size_bytes))
        load_methods()["zero"](fd, ran[0][0], size_bytes)

    assert scrub_file(job, job.files[0], folder=str(link.parent), method=method)
    assert ran == [([(0, 200_704)], 200_000)] or ran == [([(0, 200_000)], 200_000)]
    assert not link.exists()
    assert not scrub_file(job, job.files[0], folder=str(link.parent), method=must_not_run), "gone already"


def test_a_copy_that_was_discarded_on_the_record_does_not_hold_it_back(link: Path) -> None:
    job = with_copy_state(job_of({"disk": link}), CopyState.DISCARDED)
    assert scrub_file(job, job.files[0], folder=str(link.parent), method=load_methods()["zero"])


def test_a_grown_or_rewritten_disk_is_still_the_same_inode(link: Path) -> None:
    """A scrub that a crash cut off has changed mtime and content; it must go on, not stop for good."""
    job = job_of({"disk": link})
    link.write_bytes(bytes(200_000))
    assert scrub_file(job, job.files[0], folder=str(link.parent), method=load_methods()["zero"])


def test_a_method_that_fails_leaves_the_link(link: Path) -> None:
    job = job_of({"disk": link})

    def method(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(Exception, match="Input/output error"):
        scrub_file(job, job.files[0], folder=str(link.parent), method=method)
    assert link.stat().st_size == 200_000


# ---- what is left on the medium ---------------------------------------------------------------------------

_XFS = pytest.param("xfs", marks=pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs xfsprogs"))


def scrub_on(filesystem: LoopFilesystem, method: str, write: Callable[[Path], None]) -> None:
    folder = filesystem.mount_point / "job"
    folder.mkdir(exist_ok=True)
    path = folder / "disk"
    write(path)
    os.sync()
    job = job_of({"disk": path})
    assert scrub_file(job, job.files[0], folder=str(folder), method=load_methods()[method])


@pytest.mark.parametrize("kind", ["ext4", _XFS])
@pytest.mark.parametrize("method", ["zero", "random", "unlink"])
def test_no_byte_of_it_is_left_on_the_raw_medium(kind: Literal["ext4", "xfs"], method: str) -> None:
    """
    A marker every 512 bytes, over a size that ends inside a block, with holes; looked for on the device itself.

    `unlink` is the control: what it leaves shows that the search would have found it.
    """
    marker = os.urandom(8).hex().encode()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for start in (0, 3 * MiB, 9 * MiB + 512):
                file.seek(start)
                for _ in range(3000):
                    file.write(marker.ljust(512, b"."))
            file.write(marker + b"tail")

    with loop_filesystem(kind, 320 * MiB if kind == "xfs" else 64 * MiB) as filesystem:
        scrub_on(filesystem, method, write)
        filesystem.unmount()
        left = scan_for(filesystem.image_path, [marker])[marker]
    assert bool(left) == (method == "unlink"), len(left)


@pytest.mark.parametrize("size_bytes", [0, 1, 511, 4095, 4096, 4097, 4 * MiB - 1, 4 * MiB, 4 * MiB + 1, 9 * MiB + 77])
@pytest.mark.parametrize("method", ["zero", "random"])
def test_every_byte_up_to_the_last_is_overwritten_and_none_behind_it(
    tmp_path: Path, method: str, size_bytes: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xa5" * size_bytes)
    with path.open("r+b") as file:
        load_methods()[method](file.fileno(), [(0, size_bytes)] if size_bytes else [], size_bytes)
    now = path.read_bytes()

    assert len(now) == size_bytes
    if method == "zero":
        assert now == bytes(size_bytes)
    else:
        assert all(now[at : at + 64] != b"\xa5" * 64 for at in range(0, max(0, size_bytes - 64), 64))
        if size_bytes > 8 * MiB:
            assert now[: 4 * MiB] != now[4 * MiB : 8 * MiB], "the same block of random bytes was used twice"


@pytest.mark.parametrize("method", ["zero", "random"])
def test_holes_stay_holes(tmp_path: Path, method: str) -> None:
    path = tmp_path / "job" / "disk"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(1 << 40)
        file.write(b"y" * 5000)
    job, seen = job_of({"disk": path}), []

    def watching(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        ranges = list(ranges)
        load_methods()[method](fd, ranges, size_bytes)
        seen.append((sum(length for _, length in ranges), os.fstat(fd).st_blocks * 512, os.fstat(fd).st_size))

    assert scrub_file(job, job.files[0], folder=str(path.parent), method=watching)
    ((overwritten, allocated, size_bytes),) = seen
    assert overwritten <= 16_384
    assert allocated <= 65_536
    assert size_bytes == (1 << 40) + 5000


def test_the_blocks_are_given_back_before_the_name_goes(link: Path) -> None:
    """A crash that loses the unlink must not leave a link on a disk full of zeros that looks like a disk."""
    job = job_of({"disk": link})
    reader = []

    def method(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        reader.append(os.dup(fd))

    scrub_file(job, job.files[0], folder=str(link.parent), method=method)
    assert os.fstat(reader[0]).st_size == 0
    assert os.fstat(reader[0]).st_nlink == 0
    os.close(reader[0])


# ---- methods of others ------------------------------------------------------------------------------------


def test_ours_are_installed_and_an_unknown_one_is_a_word_of_the_configuration() -> None:
    assert set(load_methods()) >= {"zero", "random", "unlink"}
    with pytest.raises(ConfigError, match=r"'shred'.*there are: random, unlink, zero"):
        method_named("shred", {name: load_methods()[name] for name in ("zero", "random", "unlink")})


def test_a_site_adds_its_own_by_an_entry_point(tmp_path: Path) -> None:
    """A package with one entry point and no code of ours: found by name, called with our contract."""
    (tmp_path / "site_scrub.py").write_text(
        "import os\n"
        "def ones(fd, ranges, size_bytes):\n"
        "    for start, length in ranges:\n"
        "        os.pwrite(fd, b'\\xff' * length, start)\n"
        "    os.ftruncate(fd, size_bytes)\n"
        "    os.fsync(fd)\n"
    )
    info = tmp_path / "site_scrub-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: site-scrub\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[autobackup.scrub]\nones = site_scrub:ones\n")
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 5000)
    script = (
        "import os, sys\n"
        "from autobackup.host.scrub import load_methods, method_named\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "method_named('ones', load_methods())(fd, [(0, 8192)], 5000)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(disk)], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert disk.read_bytes() == b"\xff" * 5000
