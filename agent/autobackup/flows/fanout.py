"""
One read, any number of destinations: read, compress, seal, hash and send overlap in a bounded number of buffers.

    reader thread      pieces of plaintext -> compress pool -> futures, in order
    sealer thread      one per destination: future -> segment -> encrypt in place -> hash
    event loop         sends segments; it never touches a byte

Memory is bounded by construction: so many read buffers, so many frames waiting per destination, so many segments
on their way to the socket. A segment is a fresh buffer each time: a reused one is corrupted on the wire by asyncio
on Python >= 3.12. Threads run at nice +10 and take one of the process-wide CPU tokens round every heavy call, so
that the loop and the guests come first.

A destination that blocks the shared read longer than the limit, while others could go on, is detached; it is sent
later by a read of its own. One that fails does not disturb the others. Whatever is raised leaves no thread behind.
"""

import asyncio
import contextlib
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from autobackup.container.frames import FRAME_BYTES, FrameCompressor, SeekTable, stored_frame, zero_frame
from autobackup.container.seal import Sealer
from autobackup.errors import AutobackupError, SpoolUnavailable, StoreUnavailable
from autobackup.flows.contents import Contents, Piece
from autobackup.host.priority import be_nice
from autobackup.model import DestinationName
from autobackup.stores import Chunk

_READ_BUFFERS: Final = 4  # one being filled, two being compressed, one waiting
_FRAMES_WAITING: Final = 4  # per destination, before it holds up the shared read
_SEGMENTS_IN_FLIGHT: Final = 4  # per destination, sealed and not yet sent
_POLL_S: Final = 0.25  # how soon a waiting thread sees that it was stopped

_Frame: TypeAlias = tuple[bytes, int]  # a zstd frame, and how much plaintext is in it
_Item: TypeAlias = "Future[_Frame] | BaseException | None"  # None: the end


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
    send: Callable[["Tap"], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What one destination was given, whole."""

    size_bytes: int
    digest: str


async def fan_out(
    contents: Contents, outlets: Sequence[Outlet], limits: FanoutLimits
) -> Mapping[DestinationName, Sent | AutobackupError]:
    """
    Read *contents* once and send it, sealed, through every outlet.

    Returns an outcome for each; what is not an `AutobackupError` is a bug and is raised. Cancellation is passed on
    after every thread has ended.
    """
    taps = {outlet.destination: Tap(outlet, limits) for outlet in outlets}
    reader = _Reader(contents, list(taps.values()), limits)
    outcomes: dict[DestinationName, Sent | AutobackupError] = {}

    async def send(outlet: Outlet) -> None:
        tap = taps[outlet.destination]
        try:
            async with tap.until_detached():
                await outlet.send(tap)
            outcomes[outlet.destination] = Sent(size_bytes=tap.size_bytes, digest=tap.digest)
        except AutobackupError as exc:
            outcomes[outlet.destination] = exc
        finally:
            tap.close()

    threads = [threading.Thread(target=reader.run, name="read")]
    threads += [threading.Thread(target=tap.run, name=f"seal {name}") for name, tap in taps.items()]
    try:
        for thread in threads:
            thread.start()
        async with asyncio.TaskGroup() as group:
            for outlet in outlets:
                group.create_task(send(outlet), name=f"send {outlet.destination}")
    finally:
        for tap in taps.values():
            tap.close()
        await _joined(threads)
    return outcomes


class Tap:
    """
    One destination's end of the shared read, and the `Body` that its store sends.

    Three sides: the reader offers futures, `run` seals in a thread of its own, the store iterates in the loop.
    """

    def __init__(self, outlet: Outlet, limits: FanoutLimits) -> None:
        self._outlet = outlet
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._frames: queue.Queue[_Item] = queue.Queue(maxsize=_FRAMES_WAITING)
        self._slots = threading.Semaphore(_SEGMENTS_IN_FLIGHT)
        self._segments: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self._closed = threading.Event()
        self._sending = asyncio.timeout(None)
        self._is_detached = False
        self._hash = hashlib.new(outlet.digest_algorithm)
        self._size_bytes = 0
        self._iterated = False
        self._ended = False

    # ---- the reader's side ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    def offer(self, item: _Item, *, wait_s: float) -> bool:
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
        except _Stopped:
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

    def _incoming(self) -> Iterator[_Frame]:
        while True:
            try:
                item = self._frames.get(timeout=_POLL_S)
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
        while not self._slots.acquire(timeout=_POLL_S):
            self._check_open()
        self._check_open()
        self._size_bytes += len(chunk)
        self._say(chunk)

    def _say(self, item: Chunk | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._segments.put_nowait, item)
        except RuntimeError:
            raise _Stopped from None  # the loop is closed: the process is ending

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise _Stopped

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


class _Reader:
    """The shared read: pieces to frames, frames to every tap that is still open."""

    def __init__(self, contents: Contents, taps: Sequence[Tap], limits: FanoutLimits) -> None:
        self._contents = contents
        self._taps = taps
        self._limits = limits
        self._buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._compressors = threading.local()
        for _ in range(_READ_BUFFERS):
            self._buffers.put(bytearray(FRAME_BYTES))

    def run(self) -> None:
        be_nice()
        pool = ThreadPoolExecutor(self._limits.compress_threads, "compress", initializer=self._start_compressor)
        last: _Item = None
        try:
            for piece in self._contents.pieces(self._buffers):
                self._give(self._framed(piece, pool))
        except _Stopped:
            return
        except OSError as exc:
            last = SpoolUnavailable(f"reading a held disk: {exc.strerror or exc}")
            last.__cause__ = exc
        except BaseException as exc:
            last = exc
        finally:
            pool.shutdown(wait=True)
        try:
            self._give(last)
        except _Stopped:
            return

    def _framed(self, piece: Piece, pool: ThreadPoolExecutor) -> "Future[_Frame]":
        if piece.data is not None:
            return pool.submit(self._compress, piece)
        future: Future[_Frame] = Future()
        future.set_result((zero_frame(piece.length), piece.length))
        return future

    def _compress(self, piece: Piece) -> _Frame:
        assert piece.data is not None
        try:
            with self._limits.cpu_tokens:
                if self._limits.zstd_level is None:
                    return stored_frame(piece.data), piece.length
                return self._compressors.zstd.compress(piece.data), piece.length
        finally:
            if piece.buffer is not None:
                self._buffers.put(piece.buffer)

    def _start_compressor(self) -> None:
        be_nice()
        if self._limits.zstd_level is not None:
            self._compressors.zstd = FrameCompressor(self._limits.zstd_level)

    def _give(self, item: _Item) -> None:
        """Offer *item* to every open tap. With others waiting behind it, a tap that has no room is detached."""
        for tap in self._taps:
            waited_s = 0.0
            while tap.is_open and not tap.offer(item, wait_s=_POLL_S):
                waited_s += _POLL_S
                others_wait = sum(other.is_open for other in self._taps) > 1
                if others_wait and waited_s >= self._limits.detach_after_s:
                    tap.detach()
        if not any(tap.is_open for tap in self._taps):
            raise _Stopped


class _Stopped(Exception):
    pass


async def _joined(threads: Sequence[threading.Thread]) -> None:
    """Wait for *threads* to end, even while being cancelled: they hold open disks."""

    def join() -> None:
        for thread in threads:
            if thread.ident is not None:  # else it could not be started
                thread.join()

    waiting = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(None, join))
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
