"""
The body of one upload: small HTTP chunks, never silent for long, given up when nobody takes them, and sent once.

uWSGI refuses an HTTP chunk of 1 MiB and over, and servers cut a connection on which nothing came for 10 to 60 s. So
a chunk becomes pieces of at most 256 KiB, and the end of what is at hand is held back: while more is waited for (a
slow disk, a rate limit, another destination), it trickles.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final, Protocol

from autobackup.errors import CloudUnavailable
from autobackup.units import KiB

PIECE_BYTES: Final = 256 * KiB  # fastest, and far below uWSGI's limit
_HELD_BACK_BYTES: Final = 64 * KiB
_TRICKLE_EVERY_S: Final = 2.0  # servers cut at 10 s and up
_TRICKLES: Final = 256  # 8 minutes of waiting for our own side, in the smallest of pieces

Chunk = bytes | bytearray | memoryview


class Source(Protocol):
    """What is sent: chunks, once."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class Upload:
    """
    One body on its way; iterate it once, in the task that is inside `watched`.

    *is_begun* and *is_whole* say how much of it was taken; *own_error* is what ended it on our side, which aiohttp
    hides behind one of its own. aiohttp before 3.14.4 sends what is left of a body again after a broken connection, and
    Glance answers 204 to the truncated image: so a second iteration is refused.
    """

    def __init__(self, source: Source, *, stall_timeout_s: float) -> None:
        self._source = source
        self._stall_timeout_s = stall_timeout_s
        self._watch = asyncio.timeout(None)
        self.is_begun = False
        self.is_whole = False
        self.own_error: BaseException | None = None

    def watched(self) -> asyncio.Timeout:
        """Ends what is inside when no byte was taken for the stall timeout; `expired()` tells."""
        return self._watch

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        if self.is_begun:
            raise CloudUnavailable("an upload was to be sent twice; its body can be sent once")
        self.is_begun = True
        chunks = aiter(self._source)
        coming: asyncio.Future[Chunk | None] = asyncio.ensure_future(_next(chunks))
        try:
            while (chunk := await coming) is not None:
                coming = asyncio.ensure_future(_next(chunks))
                coming.add_done_callback(_noticed)
                async for piece in _pieces(chunk, coming):
                    self._allow(self._stall_timeout_s)
                    yield piece
                    self._allow(None)
                    await asyncio.sleep(0)  # a fast peer never makes aiohttp give way to the loop
            self.is_whole = True
        except BaseException as exc:
            self.own_error = exc
            raise
        finally:
            coming.cancel()

    def _allow(self, longest_s: float | None) -> None:
        # answered early: the call has ended, and this is about to; Python 3.11.2 asserts where later ones raise
        with contextlib.suppress(RuntimeError, AssertionError):
            self._watch.reschedule(None if longest_s is None else asyncio.get_running_loop().time() + longest_s)


def _noticed(done: "asyncio.Future[Chunk | None]") -> None:
    """An error of the body that comes after the connection broke is nobody's any more."""
    if not done.cancelled():
        done.exception()


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)


async def _pieces(chunk: Chunk, more: "asyncio.Future[Chunk | None]") -> AsyncIterator[Chunk]:
    """*chunk* in pieces; its end trickles until *more* is there."""
    view = memoryview(chunk)
    at, held_at = 0, max(0, len(view) - _HELD_BACK_BYTES)
    while at < held_at:
        end = min(at + PIECE_BYTES, held_at)
        yield view[at:end]
        at = end
    trickle_bytes = max(1, (len(view) - at) // _TRICKLES)
    while at < len(view):
        if not more.done():
            await asyncio.wait({more}, timeout=_TRICKLE_EVERY_S)
        end = len(view) if more.done() else at + trickle_bytes
        yield view[at:end]
        at = end
