"""
Filesystems of our own for a test: ext4 or xfs in an image file, tmpfs, bind mounts;
and a scanner that looks for bytes in what they leave behind.
"""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.lab import mounts
from tests.lab.workspace import workspace

MiB: Final = 1 << 20

_MKFS: Final = {
    # No lazy initialisation: a kernel thread would go on writing to the loop device.
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
_SCAN_BYTES: Final = 4 * MiB


@dataclass(slots=True, kw_only=True)
class LoopFilesystem:
    """A filesystem in an image file; `unmount` it to look at the raw image within the test."""

    kind: Literal["ext4", "xfs"]
    image_path: Path
    mount_point: Path
    mount_options: tuple[str, ...] = ()
    mounted: bool = field(default=False, init=False)

    def mount(self) -> None:
        options = ",".join(("loop", *self.mount_options))
        mounts.mount("-t", self.kind, "-o", options, self.image_path, self.mount_point)
        self.mounted = True

    def unmount(self) -> None:
        """Unmount and wait for the loop device to let go; no error if that was done before."""
        if self.mounted:
            self.mounted = False
            mounts.unmount(self.mount_point)
            mounts.wait_until_detached(self.image_path)


@contextlib.contextmanager
def loop_filesystem(
    kind: Literal["ext4", "xfs"] = "ext4",
    size_bytes: int = 320 * MiB,
    *,
    mkfs_options: Sequence[str] = (),
    mount_options: Sequence[str] = (),
) -> Iterator[LoopFilesystem]:
    """A new filesystem in a sparse file. xfs needs 300 MiB at least and the package xfsprogs."""
    with workspace() as place:
        image_path = place.folder("image") / f"{kind}.img"
        with image_path.open("xb") as image:
            image.truncate(size_bytes)
        subprocess.run([*_MKFS[kind], *mkfs_options, str(image_path)], check=True, capture_output=True)
        filesystem = LoopFilesystem(
            kind=kind,
            image_path=image_path,
            mount_point=place.mount_point(kind),
            mount_options=tuple(mount_options),
        )
        try:
            filesystem.mount()
            filesystem.mount_point.chmod(0o755)
            yield filesystem
        finally:
            try:
                filesystem.unmount()
            finally:
                filesystem.mount_point.rmdir()
                image_path.unlink()
                image_path.parent.rmdir()


@contextlib.contextmanager
def tmpfs(size_bytes: int = 256 * MiB) -> Iterator[Path]:
    with workspace() as place:
        mount_point = place.mount_point("tmpfs")
        mounts.mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=0755", "tmpfs", mount_point)
        try:
            yield mount_point
        finally:
            try:
                mounts.unmount(mount_point)
            finally:
                mount_point.rmdir()


@contextlib.contextmanager
def bind_mount(src: Path, dst: Path) -> Iterator[Path]:
    """Mount the folder or file *src* on the existing *dst*."""
    mounts.mount("--bind", src, dst)
    try:
        yield dst
    finally:
        mounts.unmount(dst)


def scan_for(path: Path, needles: Sequence[bytes]) -> dict[bytes, list[int]]:
    """
    Find every needle in a file, a raw image, a block device, or each file below a folder.

    Offsets are within the file that has them; `scan_tree` says which file that is.
    """
    found: dict[bytes, list[int]] = {needle: [] for needle in needles}
    for hits in scan_tree(path, needles).values():
        for needle, offsets in hits.items():
            found[needle] += offsets
    return found


def scan_tree(path: Path, needles: Sequence[bytes]) -> dict[Path, dict[bytes, list[int]]]:
    """The files below *path* (or *path* itself) that hold a needle, each with its offsets."""
    if not needles or not all(any(needle) for needle in needles):
        raise ValueError("a needle must hold a byte that is not zero: holes are skipped")
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    found = {}
    for file in sorted(files):
        try:
            hits = _scan_file(file, needles)
        except FileNotFoundError:  # a folder in use: gone since it was listed
            continue
        if any(hits.values()):
            found[file] = hits
    return found


def _scan_file(path: Path, needles: Sequence[bytes]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {needle: [] for needle in needles}
    if not stat.S_ISREG(mode := path.lstat().st_mode) and not stat.S_ISBLK(mode):
        return found
    overlap_bytes = max(len(needle) for needle in needles) - 1
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in _data_ranges(source, around_bytes=overlap_bytes):
            tail = b""
            at = start
            while at < end and (chunk := os.pread(source, min(_SCAN_BYTES, end - at), at)):
                window = tail + chunk
                for needle, offsets in found.items():
                    _note(window, needle, at=at - len(tail), offsets=offsets)
                at += len(chunk)
                tail = window[-overlap_bytes:] if overlap_bytes else b""
    finally:
        os.close(source)
    return found


def _note(window: bytes, needle: bytes, *, at: int, offsets: list[int]) -> None:
    """Add the places of *needle* in *window*; those in the overlap were noted before."""
    index = window.find(needle)
    while index >= 0:
        if not offsets or at + index > offsets[-1]:
            offsets.append(at + index)
        index = window.find(needle, index + 1)


def _data_ranges(source: int, *, around_bytes: int) -> Iterator[tuple[int, int]]:
    """The ranges that may hold a needle: data, and the zeros beside it that one may reach into."""
    end = os.lseek(source, 0, os.SEEK_END)
    at = 0
    while at < end:
        try:
            data = os.lseek(source, at, os.SEEK_DATA)
            hole = os.lseek(source, data, os.SEEK_HOLE)
        except OSError:  # no data to the end; or a device that knows no holes
            if at == 0 and stat.S_ISBLK(os.fstat(source).st_mode):
                yield 0, end
            return
        yield max(0, data - around_bytes), min(end, hole + around_bytes)
        at = hole
