"""
The `directory` store: a folder of sealed bundles, each with its metadata beside it.

    <root>/<attempt>.autobackup     the sealed bundle, 0600
    <root>/<attempt>.json           size, digest, properties; for people, `sha512sum` and `list`
    <root>/.partial-<attempt>*      a put that has not ended

An object exists when its bundle has its name. The bundle is synced, then its metadata, then both get their names,
then the folder is synced: a crash leaves a partial, which `delete` removes, or the whole.

The folder is the operator's: it is never created here, since a mount point that is not mounted looks just the same.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from autobackup import logs
from autobackup.errors import RecordDamaged, StoreRefused, StoreUnavailable
from autobackup.host.filesystems import sync_folder
from autobackup.host.priority import be_nice
from autobackup.model import AttemptId
from autobackup.stores.interface import Body, Chunk, Stored
from autobackup.units import MiB, format_bytes

_log = logs.get("stores.directory")
_SUFFIX: Final = ".autobackup"
_ATTEMPT: Final = re.compile(r"[0-9a-f-]{36}")
_SYNC_EVERY_BYTES: Final = 64 * MiB  # keeps the dirty pages of one put, and the last fsync, small
_STREAM_BYTES: Final = 1 * MiB  # one hop to a thread costs as much as 50 KiB
_HASH_PIECE_BYTES: Final = 1 * MiB
_HASH_CALL_BYTES: Final = 16 * MiB  # between two looks at the deadline and at a cancellation
_CALL_DEADLINE_S: Final = 120.0  # of one call into the filesystem; a dead NFS server blocks for ever
_GONE: Final = "is gone; mount it, or make the folder with: install -d -m 700"
_WORDS: Final = {
    errno.ENOSPC: "is full; make room there",
    errno.EDQUOT: "is over its quota; raise it or make room",
    errno.EROFS: "is read-only; remount it read-write",
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
}

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class DirectoryStore:
    """See `stores.interface.Store`."""

    digest_algorithm: Final = "sha512"

    def __init__(self, root: str, *, reserve_bytes: int = 0, must_be_mount: bool = False) -> None:
        self.root = root
        self._reserve_bytes = reserve_bytes
        self._must_be_mount = must_be_mount
        self._threads = ThreadPoolExecutor(8, "directory store", initializer=be_nice)

    async def check(self) -> None:
        await self._call(self._check)

    async def put(self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str]) -> None:
        await self._call(self._check)
        partial = _Partial(self._at(attempt, ".partial-"), self._bundle(attempt))
        try:
            await self._call(partial.open)
            async for chunk in body:
                await self._call(partial.write, chunk)
            metadata = {
                "attempt": attempt,
                "size_bytes": body.size_bytes,
                "digest_algorithm": self.digest_algorithm,
                "digest": body.digest,
                "properties": dict(properties),
            }
            await self._call(partial.commit, self._metadata(attempt), json.dumps(metadata, indent=1).encode() + b"\n")
        except BaseException:
            # in a thread, behind whatever call of ours is still in one: a file is not closed under a write
            discarded = asyncio.get_running_loop().run_in_executor(self._threads, partial.discard)
            await asyncio.wait({discarded}, timeout=_CALL_DEADLINE_S)
            raise

    async def stat(self, attempt: AttemptId) -> Stored:
        return await self._call(self._stat, attempt)

    async def digest(self, attempt: AttemptId) -> str:
        path = self._bundle(attempt)
        digest = hashlib.new(self.digest_algorithm)
        at = 0
        while count := await self._call(_hash_some, path, at, digest):
            at += count
        return digest.hexdigest()

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        return await self._call(_read, self._bundle(attempt), offset, length)

    async def stream(self, attempt: AttemptId, *, offset: int) -> AsyncGenerator[bytes, None]:
        while piece := await self.read(attempt, offset=offset, length=_STREAM_BYTES):
            yield piece
            offset += len(piece)

    async def delete(self, attempt: AttemptId) -> None:
        await self._call(self._delete, attempt)

    async def held(self) -> list[Stored]:
        return await self._call(self._held)

    async def unfinished(self, agent_id: str) -> list[AttemptId]:
        return []  # a partial does not say whose it is; each is deleted with its attempt

    # ---- in threads -------------------------------------------------------------------------------------

    async def _call(self, work: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """The one way into the filesystem: a thread, a deadline, and OSError translated."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CALL_DEADLINE_S):
                return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except TimeoutError:
            raise StoreUnavailable(f"{self.root}: no answer from the filesystem in {_CALL_DEADLINE_S:.0f} s") from None
        except FileNotFoundError as exc:
            await self._call(self._require_there)  # what is not mounted holds nothing, and that says nothing
            raise StoreRefused(f"{exc.filename or self.root}: not in this store") from exc
        except OSError as exc:
            raise StoreUnavailable(f"{self.root}: {_WORDS.get(exc.errno or 0, exc.strerror)}") from exc

    def _require_there(self) -> None:
        if not os.path.isdir(self.root):
            raise StoreUnavailable(f"{self.root}: {_GONE} {self.root}")
        if self._must_be_mount and not os.path.ismount(self.root):
            raise StoreUnavailable(f"{self.root}: nothing is mounted there, and must_be_mount is set; mount it")

    def _check(self) -> None:
        self._require_there()
        if os.stat(self.root).st_mode & 0o077:
            raise StoreUnavailable(f"{self.root}: others may look into it; run: chmod 700 {self.root}")
        room = os.statvfs(self.root)
        if room.f_flag & os.ST_RDONLY:
            raise StoreUnavailable(f"{self.root}: {_WORDS[errno.EROFS]}")
        free_bytes = room.f_bavail * room.f_frsize
        if free_bytes <= self._reserve_bytes:
            raise StoreUnavailable(
                f"{self.root}: is full: {format_bytes(free_bytes)} free, of which reserve = "
                f"{format_bytes(self._reserve_bytes)} is kept"
            )

    def _stat(self, attempt: AttemptId) -> Stored:
        size_bytes = os.stat(self._bundle(attempt), follow_symlinks=False).st_size
        path = self._metadata(attempt)
        try:
            with open(path, "rb") as file:
                words: Any = json.loads(file.read(MiB))
            properties = {str(key): str(value) for key, value in words["properties"].items()}
        except FileNotFoundError:
            properties = {}  # the bundle describes itself; the metadata is for convenience
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise RecordDamaged(f"{path}: not the metadata of a sealed bundle") from exc
        return Stored(attempt=attempt, size_bytes=size_bytes, properties=properties)

    def _delete(self, attempt: AttemptId) -> None:
        partial = self._at(attempt, ".partial-")
        self._require_there()
        for path in (self._bundle(attempt), self._metadata(attempt), partial, partial + ".json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        sync_folder(self.root)

    def _held(self) -> list[Stored]:
        self._require_there()
        found: list[tuple[int, Stored]] = []
        for name in os.listdir(self.root):
            attempt = AttemptId(name.removesuffix(_SUFFIX))
            if name.endswith(_SUFFIX) and _ATTEMPT.fullmatch(attempt):
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    stored = self._described(attempt)
                    found.append((os.lstat(self._bundle(attempt)).st_mtime_ns, stored))
        return [stored for _, stored in sorted(found, key=lambda one: (one[0], one[1].attempt))]

    def _described(self, attempt: AttemptId) -> Stored:
        """As `_stat`, but one damaged description does not hide what else is held."""
        try:
            return self._stat(attempt)
        except RecordDamaged as exc:
            _log.warning("metadata.damaged", error=str(exc), consequence="listed without its properties")
            size_bytes = os.stat(self._bundle(attempt), follow_symlinks=False).st_size
            return Stored(attempt=attempt, size_bytes=size_bytes, properties={})

    def _bundle(self, attempt: AttemptId) -> str:
        return self._at(attempt, suffix=_SUFFIX)

    def _metadata(self, attempt: AttemptId) -> str:
        return self._at(attempt, suffix=".json")

    def _at(self, attempt: AttemptId, prefix: str = "", *, suffix: str = "") -> str:
        if _ATTEMPT.fullmatch(attempt) is None:
            raise StoreRefused(f"{attempt!r} is not the id of a sealed bundle")
        return os.path.join(self.root, prefix + attempt + suffix)


class _Partial:
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

    def open(self) -> None:
        with self._lock:
            self._require_wanted()
            if os.path.lexists(self._final):
                raise StoreRefused(f"{self._final}: exists; an attempt id is used once")
            self._folder_fd = os.open(os.path.dirname(self._final), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._fd = self._make(os.path.basename(self._path))
            except FileExistsError:
                raise StoreRefused(f"{self._path}: exists; an attempt id is used once") from None

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


def _hash_some(path: str, offset: int, digest: "hashlib._Hash") -> int:
    """One call's worth of *path* into *digest*, through one small buffer; how much it was, 0 at the end."""
    buffer = memoryview(bytearray(_HASH_PIECE_BYTES))
    at = offset
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(fd, offset, _HASH_CALL_BYTES, os.POSIX_FADV_DONTNEED)  # see `_read`
        while at < offset + _HASH_CALL_BYTES and (count := os.preadv(fd, [buffer], at)):
            digest.update(buffer[:count])
            at += count
    finally:
        os.close(fd)
    return at - offset


def _read(path: str, offset: int, length: int) -> bytes:
    """Bytes from the medium rather than from our own writes: the cached pages are given up first."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        pieces = []
        while length > 0 and (piece := os.pread(fd, length, offset)):
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(fd)
