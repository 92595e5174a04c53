"""
The `directory` store: a folder of sealed bundles, each with its metadata beside it.

    <root>/<attempt>.autobackup     the sealed bundle, 0600
    <root>/<attempt>.json           size, digest, properties; for people, `sha512sum` and `list`
    <root>/.partial-<attempt>*      a put that has not ended; `….parents` tells what it will stand on
    <root>/<attempt>.retired        a base that nothing new is to stand on

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
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from autobackup import logs
from autobackup.errors import StoreRefused, StoreUnavailable
from autobackup.host.filesystems import sync_folder
from autobackup.host.priority import be_nice
from autobackup.model import AttemptId
from autobackup.stores.interface import BASE, PARENTS, Begun, Body, Stored
from autobackup.stores.partial_file import PARENTS_SUFFIX, Partial
from autobackup.units import MiB, format_bytes

_log = logs.get("stores.directory")
_SUFFIX: Final = ".autobackup"
_PARTIAL: Final = ".partial-"
_ATTEMPT: Final = re.compile(r"[0-9a-f-]{36}")
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

    async def put(
        self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None
    ) -> None:
        await self._call(self._check)
        partial = Partial(self._at(attempt, _PARTIAL), self._bundle(attempt))
        try:
            await self._call(partial.open, parents=properties.get(PARENTS, ""))
            if begun is not None:
                await begun()
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

    async def children(self, parent: str) -> list[AttemptId]:
        return await self._call(self._children, parent)

    async def link(self, attempt: AttemptId, parent: str) -> None:
        await self._call(self._set_parents, attempt, lambda known: {**known, parent: None})

    async def unlink(self, attempt: AttemptId, parent: str) -> None:
        await self._call(self._set_parents, attempt, lambda known: {one: None for one in known if one != parent})

    async def everything(self) -> list[AttemptId]:
        return [stored.attempt for stored in await self.held()]

    async def bases(self, content: str | None = None) -> list[Stored]:
        return [
            stored
            for stored in await self.held()
            if (
                BASE in stored.properties
                if content is None
                else stored.properties.get(BASE) == content and not stored.retired
            )
        ]

    async def retire(self, attempt: AttemptId) -> None:
        await self._call(self._retire, attempt)

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
        found = os.stat(self._bundle(attempt), follow_symlinks=False)
        path = self._metadata(attempt)
        try:
            with open(path, "rb") as file:
                words: Any = json.loads(file.read(MiB))
            properties = {str(key): str(value) for key, value in words["properties"].items()}
        except FileNotFoundError:
            properties = {}  # the bundle describes itself; the metadata is for convenience
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            words = f"{path}: not the metadata of a sealed bundle"
            _log.warning("metadata.damaged", error=words, consequence="known without its properties")
            properties = {}
        retired = os.path.lexists(self._retired(attempt))
        return Stored(
            attempt=attempt, size_bytes=found.st_size, properties=properties, retired=retired,
            version=f"{found.st_ino}.{found.st_mtime_ns}",
        )  # fmt: skip

    def _children(self, parent: str) -> list[AttemptId]:
        found = set()
        for name in os.listdir(self.root):
            if name.startswith(_PARTIAL) and name.endswith(PARENTS_SUFFIX):
                with (
                    contextlib.suppress(FileNotFoundError),
                    open(os.path.join(self.root, name), encoding="ascii") as file,
                ):
                    if parent in file.read().split():
                        found.add(AttemptId(name.removeprefix(_PARTIAL).removesuffix(PARENTS_SUFFIX)))
        # after what is under way: a put that ends meanwhile is in either
        found |= {stored.attempt for stored in self._held() if parent in stored.properties.get(PARENTS, "").split()}
        return sorted(found)

    def _set_parents(self, attempt: AttemptId, change: Callable[[dict[str, None]], dict[str, None]]) -> None:
        properties = dict(self._stat(attempt).properties)
        properties[PARENTS] = " ".join(change(dict.fromkeys(properties.get(PARENTS, "").split())))
        path = self._metadata(attempt)
        with open(path, "rb") as file:
            words = json.loads(file.read(MiB))
        with open(path + ".new", "wb") as file:
            file.write(json.dumps(words | {"properties": properties}, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        sync_folder(self.root)

    def _retire(self, attempt: AttemptId) -> None:
        self._require_there()
        with open(self._retired(attempt), "wb") as file:
            os.fsync(file.fileno())
        sync_folder(self.root)

    def _delete(self, attempt: AttemptId) -> None:
        partial = self._at(attempt, _PARTIAL)
        self._require_there()
        for path in (
            self._bundle(attempt), self._metadata(attempt), self._retired(attempt),
            partial, partial + ".json", partial + PARENTS_SUFFIX,
        ):  # fmt: skip
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
                    stored = self._stat(attempt)
                    found.append((os.lstat(self._bundle(attempt)).st_mtime_ns, stored))
        return [stored for _, stored in sorted(found, key=lambda one: (one[0], one[1].attempt))]

    def _bundle(self, attempt: AttemptId) -> str:
        return self._at(attempt, suffix=_SUFFIX)

    def _retired(self, attempt: AttemptId) -> str:
        return self._at(attempt, suffix=".retired")

    def _metadata(self, attempt: AttemptId) -> str:
        return self._at(attempt, suffix=".json")

    def _at(self, attempt: AttemptId, prefix: str = "", *, suffix: str = "") -> str:
        if _ATTEMPT.fullmatch(attempt) is None:
            raise StoreRefused(f"{attempt!r} is not the id of a sealed bundle")
        return os.path.join(self.root, prefix + attempt + suffix)


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
