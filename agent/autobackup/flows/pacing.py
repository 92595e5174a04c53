"""
How fast a host may send, and how fast to one destination: bytes each second, through leaky buckets.

Pieces are small against the rate, so that a slow one is a trickle and never a silence that a server would cut.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Final

from aiolimiter import AsyncLimiter

from autobackup.stores import Body, Chunk
from autobackup.terms import Destination
from autobackup.units import KiB

_LARGEST_PIECE_BYTES: Final = 256 * KiB
_PIECES_PER_SECOND: Final = 8  # of the slowest limit, at least


class Pace:
    """The limits of one host: *host_rate_bytes* for everything, and each destination's own."""

    def __init__(self, host_rate_bytes: int | None = None) -> None:
        self._host = _limiter(host_rate_bytes)
        self._destinations: dict[str, AsyncLimiter | None] = {}

    def paced(self, body: Body, destination: Destination) -> Body:
        """*body*, held to the limits that there are."""
        if destination.name not in self._destinations:
            self._destinations[destination.name] = _limiter(destination.rate_bytes)
        limiters = [one for one in (self._destinations[destination.name], self._host) if one is not None]
        return Paced(body, limiters) if limiters else body


class Paced:
    """A `Body` that passes every byte of *body* through *limiters*."""

    def __init__(self, body: Body, limiters: Sequence[AsyncLimiter]) -> None:
        self._body = body
        self._limiters = tuple(limiters)
        slowest = min(int(one.max_rate) for one in limiters)
        self._piece_bytes = max(1, min(_LARGEST_PIECE_BYTES, slowest))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for chunk in self._body:
            view = memoryview(chunk)
            for at in range(0, len(view), self._piece_bytes):
                piece = view[at : at + self._piece_bytes]
                for one in self._limiters:
                    await one.acquire(len(piece))
                yield piece

    @property
    def announced_bytes(self) -> int | None:
        return self._body.announced_bytes

    @property
    def size_bytes(self) -> int:
        return self._body.size_bytes

    @property
    def digest(self) -> str:
        return self._body.digest


def _limiter(rate_bytes: int | None) -> AsyncLimiter | None:
    if rate_bytes is None:
        return None
    return AsyncLimiter(max(1, rate_bytes // _PIECES_PER_SECOND), 1 / _PIECES_PER_SECOND)
