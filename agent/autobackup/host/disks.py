"""
One held disk, opened once: who it is, whether anybody has it open, where its data lies, and its bytes.

A lease is per open file: a second open() of the same inode by ourselves makes our own F_SETLEASE fail, so a disk
is opened once and shared by its descriptor. The lease is asked for and dropped at once: a lease that is kept makes
another opener wait up to 45 s. The size is fixed at open; growth is ignored.

Invariant 2: nothing reads a disk before `require_idle` passed. Invariant 5: nothing here looks at content.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final, Self

from autobackup.errors import DiskBusy, OverlayChanged, Refused, SpoolUnavailable
from autobackup.model import DiskIdentity

_FS_IOC_GETVERSION: Final = 0x80087601  # _IOR('v', 1, long), linux/fs.h
_BLOCK_BYTES: Final = 4096  # how finely a range that fails with EIO is tried again


class HeldDisk:
    """An open descriptor on one of our links. Close it before anything else opens the same inode."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        self.path = path
        try:
            self._fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise Refused(f"{path}: is a symbolic link, not a disk that we linked") from exc
            if exc.errno == errno.ENOENT:
                raise OverlayChanged(f"{path}: is gone") from exc
            raise SpoolUnavailable(f"{path}: {exc.strerror}") from exc
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise Refused(f"{path}: is not a regular file")
            self.identity = identify(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        return self._fd

    def require_idle(self) -> None:
        """Raise `DiskBusy` unless nobody else has this inode open, for reading or writing."""
        if not lease_granted(self._fd):
            raise DiskBusy(f"{self.path}: somebody has it open")

    def require_unchanged(self, first: DiskIdentity) -> None:
        """Raise `OverlayChanged` unless inode, generation, size and mtime are still those of *first*."""
        now = identify(self._fd)
        if not now.same_content(first):
            raise OverlayChanged(f"{self.path}: changed since it was first read ({first} -> {now})")

    def link_count(self) -> int:
        return os.fstat(self._fd).st_nlink

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of every range that is not a hole, in order, by SEEK_DATA."""
        at, end = 0, self.identity.size_bytes
        while at < end:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                raise
            at = min(os.lseek(self._fd, start, os.SEEK_HOLE), end)
            if start < end:
                yield start, at - start

    def data_marks(self, piece_bytes: int) -> bytearray:
        """One byte for each *piece_bytes* of the disk: 0 where it is all hole."""
        marks = bytearray(-(-self.identity.size_bytes // piece_bytes))
        for start, length in self.data_ranges():
            for piece in range(start // piece_bytes, -(-(start + length) // piece_bytes)):
                marks[piece] = 1
        return marks

    def read_into(self, buffer: memoryview, offset: int) -> list[tuple[int, int]]:
        """
        Fill *buffer* from *offset*; returns the (offset, length) that could not be read and are zeros instead.

        A read that fails with EIO is tried again in 4 KiB steps, so that one bad sector costs one block. Pages
        are dropped from the cache behind the read: the guests on this host need it more.
        """
        lost: list[tuple[int, int]] = []
        at = 0
        while at < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[at:]], offset + at)
            except OSError as exc:
                if exc.errno != errno.EIO:
                    raise
                count = min(_BLOCK_BYTES, len(buffer) - at)
                if not self._read_block(buffer[at : at + count], offset + at):
                    lost.append((offset + at, count))
            if count == 0:
                raise OverlayChanged(f"{self.path}: ends at {offset + at}, had {self.identity.size_bytes} bytes")
            at += count
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return lost

    def _read_block(self, block: memoryview, offset: int) -> bool:
        try:
            if os.preadv(self._fd, [block], offset) == len(block):
                return True
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
        block[:] = bytes(len(block))
        return False


def identify(fd: int) -> DiskIdentity:
    """Who the inode behind *fd* is, and which content it has."""
    found = os.fstat(fd)
    return DiskIdentity(
        device=found.st_dev,
        inode=found.st_ino,
        generation=_generation(fd),
        size_bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
    )


def lease_granted(fd: int) -> bool:
    """Ask for a write lease and drop it at once. True: ours is the only open file on this inode."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        raise Refused(f"F_SETLEASE: {exc.strerror}; the agent needs CAP_LEASE, and a filesystem with leases") from exc
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _generation(fd: int) -> int | None:
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return None
    generation: int = struct.unpack("I", answer[:4])[0]
    return generation
