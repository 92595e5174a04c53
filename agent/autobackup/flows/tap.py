"""
One destination's end of a fan-out: frames in, sealed segments out, and a `Body` that its store sends.

Memory is bounded: so many frames wait to be sealed, so many segments wait to be sent. A segment is a fresh buffer
each time: a reused one is corrupted on the wire by asyncio on Python >= 3.12.
"""

import asyncio
import contextlib
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from autobackup.container.frames import SeekTable
from autobackup.container.seal import Sealer
from autobackup.errors import StoreUnavailable
from autobackup.host.priority import be_nice
from autobackup.model import DestinationName
from autobackup.stores import Chunk

POLL_S: Final = 0.25  # how soon a waiting thread sees that it was stopped
_FRAMES_WAITING: Final = 4  # before it holds up the shared read
_SEGMENTS_IN_FLIGHT: Final = 4  # sealed and not yet sent

Frame: TypeAlias = tuple[bytes, int]  # a zstd frame, and how much plaintext is in it
Item: TypeAlias = "Future[Frame] | BaseException | None"  # None: the end


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutLimits:
    """How hard one fan-out may work. *cpu_tokens* is shared by the whole process."""

    cpu_tokens: threading.BoundedSemaphore
    zstd_level: int | None = -1  # None: stored frames
    compress_threads: int = 2
    detach_after_s: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlet:
    """One destination's end: the header and key of its attempt, and how its store takes the bytes."""

    destination: DestinationName
    header: bytes
    key: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    nonce_prefix: bytes = field(repr=False)
    digest_algorithm: str
    announced_bytes: int | None = None
    send: Callable[["Tap"], Coroutine[Any, Any, None]]


class Tap:
    """
    One destination's end of the shared read, and the `Body` that its store sends.

    Three sides: the reader offers futures, `run` seals in a thread of its own, the store iterates in the loop.
    """

    def __init__(self, outlet: Outlet, limits: FanoutLimits) -> None:
        self._outlet = outlet
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._frames: queue.Queue[Item] = queue.Queue(maxsize=_FRAMES_WAITING)
        self._slots = threading.Semaphore(_SEGMENTS_IN_FLIGHT)
        self._segments: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self._closed = threading.Event()
        self._sending = asyncio.timeout(None)
        self._is_detached = False
        self.held_up_s = 0.0  # the reader's account of it
        self._hash = hashlib.new(outlet.digest_algorithm)
        self._size_bytes = 0
        self._iterated = False
        self._ended = False

    # ---- the reader's side ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    @property
    def starves(self) -> bool:
        """It could seal, and has nothing to seal."""
        return self.is_open and self._frames.empty()

    def offer(self, item: Item, *, wait_s: float) -> bool:
        """Hand over the next frame; False if there is no room for it within *wait_s*."""
        try:
            self._frames.put(item, timeout=wait_s)
        except queue.Full:
            return False
        return True

    def detach(self) -> None:
        """Drop this destination from the shared read."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._end_sending)

    def close(self) -> None:
        self._closed.set()

    # ---- the sealer's side ------------------------------------------------------------------------------

    def run(self) -> None:
        """Seal until the end, an error, or `close`. Errors reach the store through the iterator."""
        be_nice()
        try:
            self._seal()
        except Stopped:
            pass
        except BaseException as exc:
            self._say(exc)

    def _seal(self) -> None:
        sealer = Sealer(
            key=self._outlet.key,
            associated_data=self._outlet.header,
            salt=self._outlet.salt,
            nonce_prefix=self._outlet.nonce_prefix,
        )
        table = SeekTable()
        self._emit(self._outlet.header)
        for frame, plain_bytes in self._incoming():
            table.add(frame_bytes=len(frame), plain_bytes=plain_bytes)
            self._push(sealer, frame)
        self._push(sealer, table.encode())
        with self._limits.cpu_tokens:
            last = sealer.finish()
        self._emit(last)
        self._say(None)

    def _incoming(self) -> Iterator[Frame]:
        while True:
            try:
                item = self._frames.get(timeout=POLL_S)
            except queue.Empty:
                self._check_open()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item.result()

    def _push(self, sealer: Sealer, data: bytes) -> None:
        segments = sealer.push(data)
        while True:
            with self._limits.cpu_tokens:
                segment = next(segments, None)
                if segment is None:
                    return
                self._hash.update(segment)
            self._pass_on(segment)

    def _emit(self, chunk: Chunk) -> None:
        self._hash.update(chunk)
        self._pass_on(chunk)

    def _pass_on(self, chunk: Chunk) -> None:
        while not self._slots.acquire(timeout=POLL_S):
            self._check_open()
        self._check_open()
        self._size_bytes += len(chunk)
        self._say(chunk)

    def _say(self, item: Chunk | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._segments.put_nowait, item)
        except RuntimeError:
            raise Stopped from None  # the loop is closed: the process is ending

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Stopped

    # ---- the loop's side --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def until_detached(self) -> AsyncIterator[None]:
        """Sending, which `detach` ends wherever it waits: the others are not settled before their slowest."""
        try:
            async with asyncio.timeout(0 if self._is_detached else None) as self._sending:
                yield
        except TimeoutError:
            if not self._sending.expired():
                raise
            raise StoreUnavailable(
                f"{self._outlet.destination}: held up the shared read for {self._limits.detach_after_s:g} s; "
                f"it is sent later, by a read of its own"
            ) from None

    def _end_sending(self) -> None:
        self._is_detached = True
        with contextlib.suppress(RuntimeError):  # it has not begun, or has just ended by itself
            self._sending.reschedule(self._loop.time())

    # ---- the store's side: see stores.interface.Body ----------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        if self._iterated:
            raise StoreUnavailable(f"{self._outlet.destination}: the body was asked for twice; it can be sent once")
        self._iterated = True
        while True:
            item = await self._segments.get()
            if item is None:
                self._ended = True
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            self._slots.release()

    @property
    def announced_bytes(self) -> int | None:
        return self._outlet.announced_bytes

    @property
    def size_bytes(self) -> int:
        self._require_end()
        return self._size_bytes

    @property
    def digest(self) -> str:
        self._require_end()
        return self._hash.hexdigest()

    def _require_end(self) -> None:
        if not self._ended:
            raise RuntimeError("the body has not been sent to its end")


class Stopped(Exception):
    """Nobody takes any more; ends a thread of the fan-out, and is seen by nobody else."""
