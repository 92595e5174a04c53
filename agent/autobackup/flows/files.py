"""
A folder that appears whole or not at all, and the members of a bundle on their way into it.

Everything is written into `<target>.partial`, which becomes `<target>` at the end; on any failure it is removed, so
that there is never half a disk to mistake for one (invariant 7).
"""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from autobackup.errors import Damaged, Refused, TargetExists
from autobackup.flows.workers import Workers
from autobackup.host.filesystems import sync_folder
from autobackup.units import KiB, MiB

_HOLE_BYTES: Final = 64 * KiB  # zeros of this length, aligned, become a hole again
_ZEROS: Final = bytes(_HOLE_BYTES)
_WRITE_BEHIND_BYTES: Final = 16 * MiB  # then the kernel is told to begin; the fsync at the end finds little to do


@asynccontextmanager
async def appearing(target: str, workers: Workers) -> AsyncIterator[str]:
    """
    The folder to write into; *target* is there when this is left without an error.

    Raises `TargetExists`, and `Refused` for what the filesystem refuses.
    """
    partial_path = f"{target.rstrip('/')}.partial"
    _make_partial(target, partial_path)  # here, not in a worker: nothing may come between making it and the `try`
    try:
        yield partial_path
        await workers.blocking(partial(_release, partial_path, target))
    except BaseException as exc:
        shutil.rmtree(partial_path, ignore_errors=True)
        if isinstance(exc, OSError):
            raise Refused(f"{target}: {exc.strerror or exc}; nothing was restored") from exc
        raise


class Files:
    """
    The sink that writes members as sparse files below one folder. Names were checked by the bundle reader.

    *place* says where a member goes, if not to its own name; None: nowhere. One that is not of *size_bytes*, where that
    is known, is `Damaged` before a byte of it is written.
    """

    def __init__(
        self, folder: str, *, place: Callable[[str], str | None] = lambda name: name, size_bytes: int | None = None
    ) -> None:
        self._folder = folder
        self._place = place
        self._size_bytes = size_bytes
        self._fd = -1
        self._at = 0
        self._begun_bytes = 0  # on their way to the disk already

    def start(self, name: str, size_bytes: int) -> None:
        place = self._place(name)
        if place is None:
            return
        if self._size_bytes not in (None, size_bytes):
            raise Damaged(f"{name} has {size_bytes} bytes, not {self._size_bytes}")
        path = os.path.join(self._folder, place)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._at = self._begun_bytes = 0
        os.ftruncate(self._fd, size_bytes)

    def write(self, data: memoryview) -> None:
        if self._fd < 0:
            return
        at = 0
        while at < len(data):
            # cut where the file's own 64 KiB blocks are, so that holes line up whatever comes in
            block = data[at : at + _HOLE_BYTES - (self._at % _HOLE_BYTES)]
            if bytes(block) != _ZEROS[: len(block)]:  # a memoryview compares item by item: 2 s/GiB of zeros, not 0.03
                _write_all(self._fd, block, self._at)
            at += len(block)
            self._at += len(block)
        if self._at - self._begun_bytes >= _WRITE_BEHIND_BYTES:
            with contextlib.suppress(OSError):  # advice; it also keeps a whole disk out of the page cache
                os.posix_fadvise(self._fd, self._begun_bytes, self._at - self._begun_bytes, os.POSIX_FADV_DONTNEED)
            self._begun_bytes = self._at

    def end(self, name: str) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, self._at)  # zeros at the end were not written
            os.fsync(self._fd)
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make_partial(target: str, partial_path: str) -> None:
    for path in (target, partial_path):
        if os.path.lexists(path):
            raise TargetExists(f"{path}: exists; name a folder that does not, or remove it")
    try:
        os.makedirs(partial_path, mode=0o700)
    except OSError as exc:
        raise Refused(f"{partial_path}: {exc.strerror}; nothing was restored") from exc


def _release(partial_path: str, target: str) -> None:
    for folder, _, names in os.walk(partial_path):
        for name in names:
            _sync(os.path.join(folder, name))  # qemu-img wrote to some of them, and does not sync
        sync_folder(folder)
    if os.path.lexists(target):
        raise TargetExists(f"{target}: appeared while restoring; nothing was put there")
    os.rename(partial_path, target)
    sync_folder(os.path.dirname(os.path.abspath(target)))


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], offset + at)
