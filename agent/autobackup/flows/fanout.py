"""
One read, any number of destinations: read, compress, seal, hash and send overlap in a bounded number of buffers.

    reader thread      pieces of plaintext -> compress pool -> futures, in order
    sealer thread      one per destination: future -> segment -> encrypt in place -> hash
    event loop         sends segments; it never touches a byte

Memory is bounded by construction: so many read buffers, so many frames waiting per destination, so many segments
on their way to the socket. A segment is a fresh buffer each time: a reused one is corrupted on the wire by asyncio
on Python >= 3.12. Threads run at nice +10 and take one of the process-wide CPU tokens round every heavy call, so
that the loop and the guests come first.

A destination that blocks the shared read longer than the limit, at once or little by little, while others could go on,
is detached; it is sent later by a read of its own. One that fails does not disturb the others. Whatever is raised
leaves no thread behind.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from autobackup.container.frames import FRAME_BYTES, FrameCompressor, stored_frame, zero_frame
from autobackup.errors import AutobackupError, SpoolUnavailable
from autobackup.flows.contents import Contents, Piece
from autobackup.flows.tap import POLL_S, FanoutLimits, Frame, Item, Outlet, Stopped, Tap
from autobackup.host.priority import be_nice
from autobackup.model import DestinationName

_READ_BUFFERS: Final = 4  # one being filled, two being compressed, one waiting
_FORGIVEN: Final = 1 / 2  # of all time: who lets the others wait for a larger part of it is detached in the end,
_PATIENCE: Final = 3  # when it has cost them so many times the limit; two equal ones on a busy host do not get there


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


class _Reader:
    """The shared read: pieces to frames, frames to every tap that is still open."""

    def __init__(self, contents: Contents, taps: Sequence[Tap], limits: FanoutLimits) -> None:
        self._contents = contents
        self._taps = taps
        self._limits = limits
        self._buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._compressors = threading.local()
        self._accounted_at_s = time.monotonic()
        for _ in range(_READ_BUFFERS):
            self._buffers.put(bytearray(FRAME_BYTES))

    def run(self) -> None:
        be_nice()
        pool = ThreadPoolExecutor(self._limits.compress_threads, "compress", initializer=self._start_compressor)
        last: Item = None
        try:
            for piece in self._contents.pieces(self._buffers):
                self._give(self._framed(piece, pool))
        except Stopped:
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
        except Stopped:
            return

    def _framed(self, piece: Piece, pool: ThreadPoolExecutor) -> "Future[Frame]":
        if piece.data is not None:
            return pool.submit(self._compress, piece)
        future: Future[Frame] = Future()
        future.set_result((zero_frame(piece.length), piece.length))
        return future

    def _compress(self, piece: Piece) -> Frame:
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

    def _give(self, item: Item) -> None:
        """Offer *item* to every open tap. With others waiting behind it, a tap that has no room is detached."""
        for tap in self._taps:
            began_s = time.monotonic()
            while tap.is_open and not tap.offer(item, wait_s=POLL_S):
                if not self._others_starve(tap):
                    began_s = time.monotonic()  # they are as slow: nobody has waited for it yet
                self._detach_if(tap, time.monotonic() - began_s)
            if self._others_starve(tap):
                tap.held_up_s += time.monotonic() - began_s
                self._detach_if(tap, tap.held_up_s / _PATIENCE)
        now_s = time.monotonic()
        for tap in self._taps:
            tap.held_up_s = max(0.0, tap.held_up_s - (now_s - self._accounted_at_s) * _FORGIVEN)
        self._accounted_at_s = now_s
        if not any(tap.is_open for tap in self._taps):
            raise Stopped

    def _others_starve(self, tap: Tap) -> bool:
        return any(other.starves for other in self._taps if other is not tap)

    def _detach_if(self, tap: Tap, held_up_s: float) -> None:
        if held_up_s >= self._limits.detach_after_s and sum(other.is_open for other in self._taps) > 1:
            tap.detach()


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
