"""
A sealed bundle on its way to its name in a folder: synced, with its metadata, whole or not at all.
"""

import contextlib
import os
import threading
from typing import Final

from autobackup.errors import StoreRefused, StoreUnavailable
from autobackup.stores.interface import Chunk
from autobackup.units import MiB

PARENTS_SUFFIX: Final = ".parents"
_SYNC_EVERY_BYTES: Final = 64 * MiB  # keeps the dirty pages of one put, and the last fsync, small


class Partial:
    """
    A file on its way to a name.

    One call at a time, whichever thread it comes from: who gave up waiting for one discards while it may still run.
    Names are relative to the folder as it was at the start: one that is unmounted or renamed in the middle gets the
    whole file or nothing, and what lies below the mount point gets nothing at all.
    """

    def __init__(self, path: str, final: str) -> None:
        self._path = path
        self._final = final
        self._lock = threading.Lock()
        self._fd = self._folder_fd = -1
        self._made: list[str] = []  # names of files of ours that have no name in the store yet
        self._is_discarded = False
        self._unsynced_bytes = self._synced_bytes = 0

    def open(self, *, parents: str) -> None:
        with self._lock:
            self._require_wanted()
            if os.path.lexists(self._final):
                raise StoreRefused(f"{self._final}: exists; an attempt id is used once")
            self._folder_fd = os.open(os.path.dirname(self._final), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._fd = self._make(os.path.basename(self._path))
            except FileExistsError:
                raise StoreRefused(f"{self._path}: exists; an attempt id is used once") from None
            if parents:
                name = os.path.basename(self._path) + PARENTS_SUFFIX
                with open(self._make(name), "w", encoding="ascii") as file:
                    file.write(parents)

    def write(self, chunk: Chunk) -> None:
        with self._lock, memoryview(chunk) as view:
            at = 0
            while at < len(view):
                at += os.write(self._fd, view[at:])
            self._unsynced_bytes += len(view)
            if self._unsynced_bytes >= _SYNC_EVERY_BYTES:
                self._sync()

    def commit(self, metadata_path: str, metadata: bytes) -> None:
        with self._lock:
            self._sync()
            name = os.path.basename(self._path)
            with open(self._make(name + ".json"), "wb") as file:
                file.write(metadata)
                file.flush()
                os.fsync(file.fileno())
            self._rename(name + ".json", os.path.basename(metadata_path))
            self._rename(name, os.path.basename(self._final))
            if name + PARENTS_SUFFIX in self._made:
                os.unlink(name + PARENTS_SUFFIX, dir_fd=self._folder_fd)  # its metadata has it
            self._made.clear()
            os.fsync(self._folder_fd)
            self._close()

    def discard(self) -> None:
        with self._lock:
            self._is_discarded = True
            for leftover in self._made:
                with contextlib.suppress(OSError):
                    os.unlink(leftover, dir_fd=self._folder_fd)
            self._close()

    def _make(self, name: str) -> int:
        self._require_wanted()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self._folder_fd)
        self._made.append(name)
        return fd

    def _require_wanted(self) -> None:
        if self._is_discarded:
            raise StoreUnavailable(f"{self._path}: given up before it was begun")

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)

    def _close(self) -> None:
        fds, self._fd, self._folder_fd = (self._fd, self._folder_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, self._synced_bytes, self._unsynced_bytes, os.POSIX_FADV_DONTNEED)
        self._synced_bytes += self._unsynced_bytes
        self._unsynced_bytes = 0
