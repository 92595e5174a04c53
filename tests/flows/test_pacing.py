"""A rate is held by everything that it is for, in small pieces, and without a byte more or less."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.virtual_time import now_s, run

from autobackup.flows.pacing import Pace
from autobackup.stores import Body, Chunk
from autobackup.terms import Destination

KiB = 1024
MiB = 1024 * KiB
RATES = [64 * KiB, 100_001, MiB, 2 * MiB, 5 * MiB, 100 * MiB]
KINDS = (bytes, bytearray, memoryview)


class Given:
    """A body of *chunks*; the three kinds of buffer take turns."""

    def __init__(self, chunks: Sequence[bytes], *, announced_bytes: int | None = None) -> None:
        self.chunks = chunks
        self.announced_bytes = announced_bytes
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for n, chunk in enumerate(self.chunks):
            yield KINDS[n % 3](chunk)
        self.ended = True

    @property
    def size_bytes(self) -> int:
        if not self.ended:
            raise RuntimeError("the body has not been sent to its end")
        return sum(map(len, self.chunks))

    @property
    def digest(self) -> str:
        return "a digest"


class Taken:
    """What came of a body, and when."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []

    async def all_of(self, body: Body) -> None:
        async for piece in body:
            self.pieces.append((now_s(), bytes(piece)))

    @property
    def data(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    @property
    def largest_bytes(self) -> int:
        return max(len(piece) for _, piece in self.pieces)


def to(name: str, rate_bytes: int | None = None) -> Destination:
    return Destination(name=name, store="directory", path=Path("/srv"), key="none", rate_bytes=rate_bytes)


def chunks_of(total_bytes: int) -> list[bytes]:
    """As a fan-out gives them: a header, segments of 1 MiB, a rest."""
    rest_bytes = (total_bytes - 4096) % MiB
    return [b"h" * 4096, *[b"s" * MiB] * ((total_bytes - 4096) // MiB), b"r" * rest_bytes]


async def send_all(bodies: Sequence[Body]) -> list[Taken]:
    taken = [Taken() for _ in bodies]
    async with asyncio.TaskGroup() as group:
        for one, body in zip(taken, bodies, strict=True):
            group.create_task(one.all_of(body))
    return taken


def require_rate(taken: Sequence[Taken], rate_bytes: int) -> None:
    """In no stretch of time, however short, more than the rate and the eighth of a second that a bucket holds."""
    pieces = sorted((at, len(piece)) for one in taken for at, piece in one.pieces)
    sums = [0, *itertools.accumulate(count for _, count in pieces)]
    worst = float("-inf")
    for n, (at_s, _) in enumerate(pieces):
        # sent from piece m to piece n, less what the time between allows: the worst m is kept, not looked for again
        worst = max(worst, rate_bytes * at_s - sums[n])
        assert sums[n + 1] - rate_bytes * at_s + worst <= rate_bytes / 8 + 1, n


# ---- the rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_bytes", RATES)
@pytest.mark.parametrize("whose", ["host", "destination", "both"])
def test_the_rate_is_held_and_used(rate_bytes: int, whose: str) -> None:
    """Over every stretch of time; and what is allowed is sent, within a quarter of a second."""
    total_bytes = max(3 * MiB, rate_bytes * 2)

    async def scenario() -> None:
        pace = Pace(rate_bytes if whose != "destination" else None)
        body = pace.paced(Given(chunks_of(total_bytes)), to("one", rate_bytes if whose != "host" else None))
        began_s = now_s()
        taken = await send_all([body])
        require_rate(taken, rate_bytes)
        assert total_bytes / rate_bytes - 0.25 <= now_s() - began_s <= total_bytes / rate_bytes + 0.25

    run(scenario())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_all_bodies_of_a_host_share_its_limit(count: int) -> None:
    """To one destination or to several, and whether they have limits of their own or none."""
    rate_bytes, each_bytes = 4 * MiB, 3 * MiB

    async def scenario(destinations: Sequence[Destination]) -> None:
        pace = Pace(rate_bytes)
        began_s = now_s()
        taken = await send_all([pace.paced(Given(chunks_of(each_bytes)), one) for one in destinations])
        assert all(len(one.data) == each_bytes for one in taken)
        require_rate(taken, rate_bytes)
        assert now_s() - began_s >= count * each_bytes / rate_bytes - 0.25

    run(scenario([to("one")] * count))
    run(scenario([to(f"d{n}") for n in range(count)]))
    run(scenario([to(f"d{n}", None if n % 2 else 100 * MiB) for n in range(count)]))


def test_all_bodies_to_a_destination_share_its_limit_and_no_other_does() -> None:
    """Two jobs at once are still one host to the store."""
    rate_bytes, each_bytes = MiB, 2 * MiB

    async def scenario() -> None:
        pace = Pace()
        slow, other = to("slow", rate_bytes), to("other", rate_bytes)
        began_s = now_s()
        first, second, third = await send_all(
            [pace.paced(Given(chunks_of(each_bytes)), one) for one in (slow, slow, other)]
        )
        require_rate([first, second], rate_bytes)
        require_rate([third], rate_bytes)
        assert third.pieces[-1][0] - began_s <= each_bytes / rate_bytes + 0.25
        assert first.pieces[-1][0] - began_s >= 2 * each_bytes / rate_bytes - 0.75

    run(scenario())


@pytest.mark.parametrize(("host", "own"), [(MiB, 4 * MiB), (4 * MiB, MiB), (MiB, MiB)])
def test_the_slower_of_two_limits_is_the_one_that_counts(host: int, own: int) -> None:
    async def scenario() -> None:
        taken = await send_all([Pace(host).paced(Given(chunks_of(4 * MiB)), to("one", own))])
        require_rate(taken, min(host, own))
        assert taken[0].largest_bytes <= min(host, own) // 8

    run(scenario())


async def test_on_a_real_clock_it_takes_its_time() -> None:
    """The one test with a clock on the wall; it can only be late."""
    pace, total_bytes, rate_bytes = Pace(8 * MiB), 4 * MiB, 8 * MiB
    began_s = time.monotonic()
    taken = await send_all([pace.paced(Given(chunks_of(total_bytes // 2)), to(name)) for name in ("one", "two")])
    assert time.monotonic() - began_s >= (total_bytes - rate_bytes / 8) / rate_bytes - 0.05
    assert sum(len(one.data) for one in taken) == total_bytes


def test_without_a_limit_nothing_stands_between() -> None:
    body = Given([b"x"])
    assert Pace().paced(body, to("one")) is body


# ---- the pieces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_bytes", RATES)
def test_a_piece_is_never_more_than_an_eighth_of_a_second_or_256_kib(rate_bytes: int) -> None:
    """A slow one is a trickle and never a silence, which a server would cut; and uWSGI refuses large HTTP chunks."""

    async def scenario() -> None:
        taken = await send_all([Pace(rate_bytes).paced(Given(chunks_of(2 * MiB)), to("one"))])
        (one,) = taken
        assert one.largest_bytes <= min(rate_bytes // 8, 256 * KiB)
        assert one.largest_bytes >= min(rate_bytes // 8, 256 * KiB) // 2, "many small pieces cost as many HTTP chunks"
        gaps_s = [after[0] - before[0] for before, after in itertools.pairwise(one.pieces)]
        assert max(gaps_s) <= 0.25

    run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 700_000).map(lambda n: b"\xa5" * n)), max_size=5),
    host=st.one_of(st.none(), st.sampled_from(RATES)),
    own=st.sampled_from(RATES),
)
def test_no_byte_is_added_lost_or_moved(chunks: list[bytes], host: int | None, own: int) -> None:
    """Empty chunks and single bytes included, whatever the kind of buffer."""

    async def scenario() -> None:
        body = Given(chunks)
        paced = Pace(host).paced(body, to("one", own))
        (taken,) = await send_all([paced])
        assert taken.data == b"".join(chunks)
        assert (paced.size_bytes, paced.digest) == (len(taken.data), "a digest")

    run(scenario())


def test_what_is_known_of_a_body_is_known_of_it_paced() -> None:
    for announced_bytes in (None, 0, 5):
        paced = Pace(MiB).paced(Given([b"12345"], announced_bytes=announced_bytes), to("one"))
        assert paced.announced_bytes == announced_bytes
        with pytest.raises(RuntimeError):
            _ = paced.size_bytes


# ---- ended early ------------------------------------------------------------------------------------------------


def test_a_body_that_is_cancelled_in_its_wait_leaves_the_limit_to_the_others() -> None:
    rate_bytes = 256 * KiB

    async def scenario() -> None:
        pace = Pace(rate_bytes)
        first, second = Taken(), Taken()
        going = asyncio.create_task(first.all_of(pace.paced(Given(chunks_of(8 * MiB)), to("one"))))
        await asyncio.sleep(1.0)
        waiting = asyncio.create_task(second.all_of(pace.paced(Given(chunks_of(MiB)), to("two"))))
        await asyncio.sleep(0.3)
        going.cancel()
        cancelled_at_s = now_s()
        await asyncio.wait({going, waiting})
        assert going.cancelled()
        assert first.pieces[-1][0] <= cancelled_at_s
        assert len(second.data) == MiB
        assert now_s() - cancelled_at_s <= MiB / rate_bytes + 0.25

    run(scenario())


def test_an_error_of_the_body_comes_through_as_it_is() -> None:
    class Broken(Given):
        async def __aiter__(self) -> AsyncIterator[Chunk]:
            yield b"x" * 100
            raise ZeroDivisionError

    async def scenario() -> None:
        taken = Taken()
        with pytest.raises(ZeroDivisionError):
            await taken.all_of(Pace(MiB).paced(Broken([]), to("one")))
        assert taken.data == b"x" * 100

    run(scenario())
