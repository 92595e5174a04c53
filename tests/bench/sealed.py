"""One disk and the outlets to seal it through, as `flows.send` builds them: real header, real key file, real stores."""

import asyncio
import hashlib
import secrets
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.harness import HOME, Sample

from autobackup.container import header as container_header
from autobackup.container.header import Header
from autobackup.container.manifest import DiskEntry, Manifest
from autobackup.container.seal import NONCE_PREFIX_BYTES, SALT_BYTES
from autobackup.errors import AutobackupError, StoreRefused
from autobackup.flows.contents import Contents, Member
from autobackup.flows.fanout import FanoutLimits, Outlet, Sent, fan_out
from autobackup.host.disks import HeldDisk
from autobackup.model import AttemptId, DestinationName
from autobackup.stores import Body, Store, Stored
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.keyfile import KeyFile, write_kek

KEYFILE: Final = HOME / "kek"
_INSTANCE: Final = "c0ffee00-0000-4000-8000-000000000000"
_SAMPLE_EVERY_S: Final = 0.02
_LOOKING: Final = "look"
_LEAST_SHARE: Final = 0.01  # of the wall; less is not worth a word


class NullStore:
    """Takes everything and keeps nothing: /dev/null with the interface of a store."""

    digest_algorithm: Final = "sha512"

    def __init__(self, before_chunk: Callable[[int], float] = lambda _at: 0.0) -> None:
        """*before_chunk*(offset) says how long to wait before each chunk; a slow store has reasons."""
        self._before_chunk = before_chunk
        self.taken_bytes = 0
        self.ended_s = 0.0

    async def check(self) -> None: ...

    async def put(self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str]) -> None:
        async for chunk in body:
            wait_s = self._before_chunk(self.taken_bytes)
            if wait_s:
                await asyncio.sleep(wait_s)
            self.taken_bytes += len(chunk)
        self.ended_s = time.perf_counter()

    async def stat(self, attempt: AttemptId) -> Stored:
        raise StoreRefused(f"{attempt}: nothing is kept")

    async def digest(self, attempt: AttemptId) -> str:
        raise StoreRefused(f"{attempt}: nothing is kept")

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        raise StoreRefused(f"{attempt}: nothing is kept")

    async def delete(self, attempt: AttemptId) -> None: ...

    async def held(self) -> list[Stored]:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadTime:
    """One thread of the data path."""

    cpu_s: float
    queued_s: float  # runnable, waiting for a CPU


_NOTHING: Final = ThreadTime(cpu_s=0, queued_s=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """One fan-out, measured from within. `attempts` is what to read back, in the order of the stores."""

    wall_s: float
    cpu_s: float
    outcomes: Sequence[Sent | AutobackupError]
    attempts: Sequence[AttemptId]
    threads: Mapping[str, ThreadTime]


async def seal(
    disk_path: Path, stores: Sequence[Store], *, zstd_level: int | None, detach_after_s: float = 3.0, cpus: int
) -> Sealing:
    """Seal one disk into every store."""
    HOME.mkdir(parents=True, exist_ok=True)
    if not KEYFILE.exists():
        write_kek(str(KEYFILE))
    limits = FanoutLimits(
        cpu_tokens=threading.BoundedSemaphore(cpus), zstd_level=zstd_level, detach_after_s=detach_after_s
    )
    with HeldDisk(str(disk_path)) as disk:
        attempts = [AttemptId(str(uuid.uuid4())) for _ in stores]
        outlets = [await _outlet(n, attempts[n], store) for n, store in enumerate(stores)]
        contents = _contents(disk)
        with thread_times() as threads:
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            outcomes = await fan_out(contents, outlets, limits)
            wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    return Sealing(
        wall_s=wall_s,
        cpu_s=cpu_s,
        outcomes=[outcomes[outlet.destination] for outlet in outlets],
        attempts=attempts,
        threads=threads,
    )


def directory_store(folder: Path) -> DirectoryStore:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return DirectoryStore(str(folder))


def keys() -> KeyFile:
    return KeyFile(str(KEYFILE))


async def _outlet(number: int, attempt: AttemptId, store: Store) -> Outlet:
    key = await keys().draw(attempt)
    name = DestinationName(f"store{number}")
    header = Header(
        job="bench", attempt=attempt, instance=_INSTANCE, destination=name, created_at_s=0, expires_at_s=None,
        key=key.header_words, parent=None,
    )  # fmt: skip
    return Outlet(
        destination=name,
        header=container_header.encode(header),
        key=key.key,
        salt=secrets.token_bytes(SALT_BYTES),
        nonce_prefix=secrets.token_bytes(NONCE_PREFIX_BYTES),
        digest_algorithm=store.digest_algorithm,
        send=partial(store.put, attempt, properties={}),
    )


def _contents(disk: HeldDisk) -> Contents:
    entry = DiskEntry(
        name="disk", member="disks/disk", format="raw", size_bytes=disk.identity.size_bytes, source_path=disk.path,
        inode=disk.identity.inode, mtime_ns=disk.identity.mtime_ns, backing=None, backing_path=None,
        chain_source="none",
    )  # fmt: skip
    manifest = Manifest(
        job="bench", instance=_INSTANCE, instance_name="bench", host="bench", captured_at_s=0, verdict="terminated",
        verdict_reason="bench", disks=(entry,), bases=(), files=(), not_captured=(), facts={},
    )  # fmt: skip
    member = Member(name="disks/disk", disk=disk, first=disk.identity)
    return Contents(manifest=manifest, members=[member], health=[], mtime_s=0)


@contextmanager
def thread_times(*, every_s: float = _SAMPLE_EVERY_S) -> Iterator[dict[str, ThreadTime]]:
    """CPU and run-queue time of every thread while this is entered, to within *every_s*. Those of one kind add up."""
    before = {thread.native_id: _thread_time(thread) for thread in threading.enumerate()}
    latest: dict[int | None, tuple[str, ThreadTime]] = {}
    times: dict[str, ThreadTime] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(every_s):
            for thread in threading.enumerate():
                spent = _thread_time(thread)
                if spent is not None:
                    latest[thread.native_id] = (thread.name.partition("_")[0], spent)

    looking = threading.Thread(target=look, name=_LOOKING)
    looking.start()
    try:
        yield times
    finally:
        done.set()
        looking.join()
        for native_id, (name, spent) in latest.items():
            had, sum_ = before.get(native_id) or _NOTHING, times.get(name, _NOTHING)
            times[name] = ThreadTime(
                cpu_s=sum_.cpu_s + spent.cpu_s - had.cpu_s, queued_s=sum_.queued_s + spent.queued_s - had.queued_s
            )


def _thread_time(thread: threading.Thread) -> ThreadTime | None:
    """None once it has ended."""
    with suppress(OSError, ValueError):
        text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text("ascii")
        cpu_ns, queued_ns, _ = (int(word) for word in text.split())
        return ThreadTime(cpu_s=cpu_ns / 1e9, queued_s=queued_ns / 1e9)
    return None


def thread_shares(ours: Sequence[Sample]) -> str:
    """
    What share of the wall each kind of thread computed, or stood ready and had no CPU. What is near 1 binds.

    A third number, its share of the time in which it was not kept waiting for a CPU, does not depend on who else ran.
    """
    parts = []
    for name in ours[0].said["threads"]:
        if name == _LOOKING:
            continue
        shares = []
        for sample in ours:
            spent, wall_s = sample.said["threads"].get(name, {"cpu_s": 0.0, "queued_s": 0.0}), sample.said["wall_s"]
            shares.append((spent["cpu_s"] / wall_s, spent["queued_s"] / wall_s))
        busy, queued = (statistics.median(values) for values in zip(*shares, strict=True))
        if busy < _LEAST_SHARE:
            continue
        alone = f", {busy / (1 - queued):.2f} of the rest" if queued < 1 and not name.startswith("compress") else ""
        parts.append(f"{'loop' if name == 'MainThread' else name} {busy:.2f} (+{queued:.2f} queued{alone})")
    return "thread CPU/wall: " + ", ".join(parts)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
