"""
Every store that the contract is run against, each with the hands of whoever can touch its medium.

A new store adds a function to `FACTORIES` and changes nothing else: `test_store_contract.py` knows no store by name.

Run as a program, it puts one object and can be killed meanwhile: `python -m tests.contract.stores SPEC ID BYTES STOP`.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab.filesystem import LoopFilesystem, loop_filesystem
from tests.lab.mounts import mount
from tests.lab.openstack.cloud import Cloud
from tests.lab.proxy import Proxy

from autobackup.cloud.session import ProjectSession
from autobackup.model import AttemptId
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.glance import GlanceStore
from autobackup.stores.interface import Chunk, Store

MiB: Final = 1 << 20
Outage = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreBench:
    """One store under test."""

    store: Store
    spec: str  # what `open_spec` opens in another process
    flip: Callable[[AttemptId, int], None]  # change one byte of what is held, behind the store's back
    damage_metadata: Callable[[AttemptId], None]
    outages: Mapping[str, Outage]  # name -> while inside, the store cannot take or give
    capacity_bytes: int | None = None  # a put of more than this cannot succeed


def new_attempt() -> AttemptId:
    return AttemptId(str(uuid.uuid4()))


class BodyOf:
    """A `Body` of bytes at hand. *before_chunk* may raise, wait or kill before a chunk is given."""

    def __init__(
        self,
        data: bytes,
        algorithm: str,
        *,
        chunk_bytes: int = MiB,
        before_chunk: Callable[[int], object] = lambda _index: None,
    ) -> None:
        self._chunks: list[Chunk] = [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]
        self._before_chunk = before_chunk
        self._hash = hashlib.new(algorithm)
        self._ended = False
        self._size_bytes = 0
        self.iterations = 0

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self.iterations += 1
        assert self.iterations == 1, "a body is iterated once"
        for index, chunk in enumerate(self._chunks):
            waiting = self._before_chunk(index)
            if asyncio.iscoroutine(waiting) or isinstance(waiting, asyncio.Future):
                await waiting
            self._hash.update(chunk)
            self._size_bytes += len(chunk)
            # every kind of buffer that the interface allows; ours is given away and never touched again
            yield (bytes, bytearray, memoryview)[index % 3](chunk)
        self._ended = True

    @property
    def announced_bytes(self) -> int | None:
        return None

    @property
    def size_bytes(self) -> int:
        if not self._ended:
            raise RuntimeError("the body has not been sent to its end")
        return self._size_bytes

    @property
    def digest(self) -> str:
        if not self._ended:
            raise RuntimeError("the body has not been sent to its end")
        return self._hash.hexdigest()


def pattern(size_bytes: int, seed: bytes = b"autobackup") -> bytes:
    return hashlib.shake_128(seed).digest(size_bytes)


# ---- the directory store ----------------------------------------------------------------------------------


def directory_bench(root: Path, *, filesystem: LoopFilesystem | None = None) -> StoreBench:
    root.mkdir(mode=0o700)
    outages: dict[str, Outage] = {"gone": lambda: _moved_away(root), "wrong mode": lambda: _open_to_all(root)}
    capacity_bytes = None
    if filesystem is not None:
        outages["read-only"] = lambda: _read_only(filesystem)
        room = os.statvfs(root)
        capacity_bytes = room.f_bfree * room.f_frsize  # root may use what is reserved for root
    return StoreBench(
        store=DirectoryStore(str(root)),
        spec=json.dumps({"directory": str(root)}),
        flip=lambda attempt, offset: _flip(root / f"{attempt}.autobackup", offset),
        damage_metadata=lambda attempt: _write(root / f"{attempt}.json", b"[" * 100_000),
        outages=outages,
        capacity_bytes=capacity_bytes,
    )


def open_spec(spec: str) -> Store:
    words = json.loads(spec)
    if "cloud" not in words:
        return DirectoryStore(words["directory"])
    return GlanceStore(_session(words))


def _session(words: Mapping[str, str]) -> ProjectSession:
    return ProjectSession(
        cloud=words["cloud"], project=words["project"], clouds_yaml=Path(words["clouds"]), call_timeout_s=5.0
    )


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@contextlib.contextmanager
def _moved_away(root: Path) -> Iterator[None]:
    aside = root.with_name(root.name + ".aside")
    root.rename(aside)
    try:
        yield
    finally:
        aside.rename(root)


@contextlib.contextmanager
def _open_to_all(root: Path) -> Iterator[None]:
    root.chmod(0o755)
    try:
        yield
    finally:
        root.chmod(0o700)


@contextlib.contextmanager
def _read_only(filesystem: LoopFilesystem) -> Iterator[None]:
    mount("-o", "remount,ro", filesystem.mount_point)
    try:
        yield
    finally:
        mount("-o", "remount,rw", filesystem.mount_point)


@contextlib.contextmanager
def _directory_on_ext4() -> Iterator[Callable[[], StoreBench]]:
    """Small enough to be filled."""
    with loop_filesystem("ext4", 48 * MiB) as filesystem:
        yield lambda: directory_bench(filesystem.mount_point / new_attempt(), filesystem=filesystem)


@contextlib.contextmanager
def _directory_on_xfs() -> Iterator[Callable[[], StoreBench]]:
    with loop_filesystem("xfs") as filesystem:
        yield lambda: directory_bench(filesystem.mount_point / new_attempt(), filesystem=filesystem)


# ---- the glance store -------------------------------------------------------------------------------------


class _Settling(GlanceStore):
    """As any, but a delete returns when the proxy, whose descriptors are this process's, has noticed its end."""

    def __init__(self, clouds_yaml: Path, proxy: Proxy) -> None:
        super().__init__(_session({"cloud": "autobackup", "project": "vault", "clouds": str(clouds_yaml)}))
        self._proxy = proxy

    async def delete(self, attempt: AttemptId) -> None:
        await super().delete(attempt)
        deadline_s = time.monotonic() + 5.0
        while self._proxy.open_count and time.monotonic() < deadline_s:
            await asyncio.sleep(0.005)


def glance_bench(cloud: Cloud, clouds_yaml: Path, proxy: Proxy, *, capacity_bytes: int) -> StoreBench:
    spec = json.dumps({"cloud": "autobackup", "project": "vault", "clouds": str(clouds_yaml)})
    return StoreBench(
        store=_Settling(clouds_yaml, proxy),
        spec=spec,
        flip=lambda attempt, offset: _flip(cloud.image_file(_image_of(cloud, attempt)), offset),
        damage_metadata=lambda attempt: _edit_properties(cloud, attempt),
        outages={
            "gone": lambda: _behind(proxy, proxy.refuse),
            "silent": lambda: _behind(proxy, proxy.stall),
            "not consented": lambda: _without_role(cloud),
        },
        capacity_bytes=capacity_bytes,
    )


def _image_of(cloud: Cloud, attempt: AttemptId) -> str:
    found = cloud.call("vera", "vault", "GET", f"{cloud.glance_url}/v2/images?tag=autobackup:{attempt}").json()
    return str(found["images"][0]["id"])


def _edit_properties(cloud: Cloud, attempt: AttemptId) -> None:
    """As any member of the project may."""
    answer = cloud.call(
        "vera", "vault", "PATCH", f"{cloud.glance_url}/v2/images/{_image_of(cloud, attempt)}",
        data=json.dumps([{"op": "replace", "path": "/autobackup_attempt", "value": "mine"}]).encode(),
        headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
    )  # fmt: skip
    assert answer.status == 200, answer


@contextlib.contextmanager
def _behind(proxy: Proxy, fault: Callable[[], None]) -> Iterator[None]:
    fault()
    try:
        yield
    finally:
        proxy.heal()


@contextlib.contextmanager
def _without_role(cloud: Cloud) -> Iterator[None]:
    cloud.revoke("autobackup", "vault", "autobackup")
    try:
        yield
    finally:
        cloud.grant("autobackup", "vault", "autobackup")


@contextlib.contextmanager
def _glance() -> Iterator[Callable[[], StoreBench]]:
    """A real one, with a quota that a test can fill, behind a wire that a test can cut."""
    capacity_bytes = 24 * MiB
    with (
        tempfile.TemporaryDirectory() as folder,
        Cloud() as cloud,
        cloud.glance_with(user_storage_quota=str(capacity_bytes)) as url,
        Proxy.to(url) as proxy,
    ):
        clouds_yaml = cloud.clouds_with(Path(folder), image=proxy.url)
        yield lambda: glance_bench(cloud, clouds_yaml, proxy, capacity_bytes=capacity_bytes)


FACTORIES: Final[Mapping[str, Callable[[], AbstractContextManager[Callable[[], StoreBench]]]]] = {
    "directory-ext4": _directory_on_ext4,
    "directory-xfs": _directory_on_xfs,
    "glance": _glance,
}


# ---- one put in a process that can be killed --------------------------------------------------------------


async def _put_until(spec: str, attempt: AttemptId, size_bytes: int, stop_before_chunk: int) -> None:
    """Put, and die by SIGKILL right before the given chunk; with -1, right after the put returned."""

    def before_chunk(index: int) -> None:
        if index == stop_before_chunk:
            os.kill(os.getpid(), signal.SIGKILL)

    store = open_spec(spec)
    await store.put(
        attempt,
        BodyOf(pattern(size_bytes), store.digest_algorithm, before_chunk=before_chunk),
        properties={"from": "child"},
    )
    if stop_before_chunk == -1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(_put_until(sys.argv[1], AttemptId(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
