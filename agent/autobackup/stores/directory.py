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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from autobackup.errors import RecordDamaged, StoreRefused, StoreUnavailable
from autobackup.host.filesystems import sync_folder
from autobackup.model import AttemptId
from autobackup.stores.interface import Body, Chunk, Stored
from autobackup.units import MiB, format_bytes

_SUFFIX: Final = ".autobackup"
_ATTEMPT: Final = re.compile(r"[0-9a-f-]{36}")
_SYNC_EVERY_BYTES: Final = 64 * MiB  # keeps the dirty pages of one put, and the last fsync, small
_CALL_DEADLINE_S: Final = 120.0  # of one call into the filesystem; a dead NFS server blocks for ever
_WORDS: Final = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is over its quota",
    errno.EROFS: "is read-only",
    errno.ENOENT: "is gone",
    errno.ENOTDIR: "is gone",
    errno.ESTALE: "is gone",
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
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="directory store")

    async def check(self) -> None:
        await self._call(self._check)

    async def put(self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str]) -> None:
        await self._call(self._check)
        partial = await self._call(_Partial, self._at(f".partial-{attempt}"), self._bundle(attempt))
        try:
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
            # not awaited with a deadline: it must happen, cancelled or not, and only unlinks
            with contextlib.suppress(OSError):
                partial.discard()
            raise

    async def stat(self, attempt: AttemptId) -> Stored:
        return await self._call(self._stat, attempt)

    async def digest(self, attempt: AttemptId) -> str:
        path = self._bundle(attempt)
        digest = hashlib.new(self.digest_algorithm)
        at = 0
        while piece := await self._call(_read, path, at, 4 * MiB):
            await asyncio.get_running_loop().run_in_executor(self._threads, digest.update, piece)
            at += len(piece)
        return digest.hexdigest()

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        return await self._call(_read, self._bundle(attempt), offset, length)

    async def delete(self, attempt: AttemptId) -> None:
        await self._call(self._delete, attempt)

    async def held(self) -> list[Stored]:
        return await self._call(self._held)

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
            if await loop.run_in_executor(self._threads, os.path.isdir, self.root):
                raise StoreRefused(f"{exc.filename or self.root}: not in this store") from exc
            raise StoreUnavailable(f"{self.root}: is gone; mount it or make the folder") from exc
        except OSError as exc:
            raise StoreUnavailable(f"{self.root}: {_WORDS.get(exc.errno or 0, exc.strerror)}") from exc

    def _check(self) -> None:
        if not os.path.isdir(self.root):
            raise StoreUnavailable(
                f"{self.root}: is gone; mount it, or make the folder with: install -d -m 700 {self.root}"
            )
        if self._must_be_mount and not os.path.ismount(self.root):
            raise StoreUnavailable(f"{self.root}: nothing is mounted there, and must_be_mount is set; mount it")
        if os.stat(self.root).st_mode & 0o077:
            raise StoreUnavailable(f"{self.root}: others may look into it; run: chmod 700 {self.root}")
        room = os.statvfs(self.root)
        free_bytes = room.f_bavail * room.f_frsize
        if free_bytes < self._reserve_bytes:
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
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise RecordDamaged(f"{path}: not the metadata of a sealed bundle") from exc
        return Stored(attempt=attempt, size_bytes=size_bytes, properties=properties)

    def _delete(self, attempt: AttemptId) -> None:
        partial = self._at(f".partial-{attempt}")
        for path in (self._bundle(attempt), self._metadata(attempt), partial, partial + ".json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        sync_folder(self.root)

    def _held(self) -> list[Stored]:
        with os.scandir(self.root) as entries:
            names = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if entry.name.endswith(_SUFFIX)]
        attempts = [name.removesuffix(_SUFFIX) for _, name in sorted(names)]
        return [self._stat(AttemptId(attempt)) for attempt in attempts if _ATTEMPT.fullmatch(attempt)]

    def _bundle(self, attempt: AttemptId) -> str:
        return self._at(attempt + _SUFFIX)

    def _metadata(self, attempt: AttemptId) -> str:
        return self._at(attempt + ".json")

    def _at(self, name: str) -> str:
        if "/" in name:
            raise StoreRefused(f"{name!r} is not the id of a sealed bundle")
        return os.path.join(self.root, name)


class _Partial:
    """A file on its way to a name."""

    def __init__(self, path: str, final: str) -> None:
        if os.path.lexists(final):
            raise StoreRefused(f"{final}: exists; an attempt id is used once")
        self._path = path
        self._final = final
        self._unsynced_bytes = self._synced_bytes = 0
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, chunk: Chunk) -> None:
        with memoryview(chunk) as view:
            at = 0
            while at < len(view):
                at += os.write(self._fd, view[at:])
            self._unsynced_bytes += len(view)
        if self._unsynced_bytes >= _SYNC_EVERY_BYTES:
            self._sync()

    def commit(self, metadata_path: str, metadata: bytes) -> None:
        self._sync()
        os.close(self._fd)
        self._fd = -1
        fd = os.open(self._path + ".json", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(metadata)
            file.flush()
            os.fsync(fd)
        os.rename(self._path + ".json", metadata_path)
        os.rename(self._path, self._final)
        sync_folder(os.path.dirname(self._final))

    def discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for leftover in (self._path, self._path + ".json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, self._synced_bytes, self._unsynced_bytes, os.POSIX_FADV_DONTNEED)
        self._synced_bytes += self._unsynced_bytes
        self._unsynced_bytes = 0


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
