"""The body of an upload: no byte more or less, never silent for long, given up when nobody takes it, and sent once."""

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.virtual_time import now_s, run

from autobackup.cloud.upload import Chunk, Upload
from autobackup.errors import CloudUnavailable, OverlayChanged

KiB = 1024
MiB = 1024 * KiB
LONGEST_SILENCE_S = 2.0  # servers cut at 10 s and up
KINDS = (bytes, bytearray, memoryview)


class Source:
    """Chunks, each after a pause; then *error*, if there is one. Notes whether somebody still waits for it."""

    def __init__(self, parts: Sequence[tuple[float, bytes]], *, error: BaseException | None = None) -> None:
        self.parts = parts
        self.error = error
        self.asked = 0
        self.is_waiting = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for n, (pause_s, chunk) in enumerate(self.parts):
            self.asked += 1
            await self._pause(pause_s)
            yield KINDS[n % 3](chunk)
        if self.error is not None:
            raise self.error

    async def _pause(self, pause_s: float) -> None:
        self.is_waiting = True
        try:
            await asyncio.sleep(pause_s)
        finally:
            self.is_waiting = False


async def taken(upload: Upload) -> list[tuple[float, bytes]]:
    return [(now_s(), bytes(piece)) async for piece in upload]


def joined(pieces: Sequence[tuple[float, bytes]]) -> bytes:
    return b"".join(piece for _, piece in pieces)


def upload_of(*parts: tuple[float, bytes], error: BaseException | None = None, stall_timeout_s: float = 60.0) -> Upload:
    return Upload(Source(parts, error=error), stall_timeout_s=stall_timeout_s)


def sent(*parts: tuple[float, bytes]) -> list[tuple[float, bytes]]:
    async def scenario() -> list[tuple[float, bytes]]:
        return await taken(upload_of(*parts))

    return run(scenario())


async def settled() -> set[str]:
    """The tasks that are still there when the loop has come round a few times, ours aside."""
    for _ in range(5):
        await asyncio.sleep(0)
    return {repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()}


# ---- the bytes --------------------------------------------------------------------------------------------------

CHUNKS = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 3 * MiB).map(lambda n: bytes(range(256)) * (n // 256) + b"\x5a" * (n % 256)),
    st.sampled_from([KiB, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 256 * KiB, 320 * KiB, 320 * KiB + 1, MiB]).map(
        lambda n: b"\xa5" * n
    ),
)
PAUSES = st.sampled_from([0.0, 0.0, 0.001, 1.0, 1.999, 2.0, 2.001, 9.5, 120.0, 700.0])


@settings(max_examples=120, deadline=None)
@given(parts=st.lists(st.tuples(PAUSES, CHUNKS), max_size=6))
def test_no_byte_is_added_lost_or_moved_and_no_piece_is_large(parts: list[tuple[float, bytes]]) -> None:
    """uWSGI refuses an HTTP chunk of 1 MiB and over. An empty piece would be the end of a chunked body."""
    pieces = sent(*parts)
    assert joined(pieces) == b"".join(chunk for _, chunk in parts)
    assert all(1 <= len(piece) <= 256 * KiB for _, piece in pieces)


def test_what_comes_without_a_pause_goes_in_few_pieces() -> None:
    """Each is a call to the transport; a trickle is for waiting alone."""
    pieces = sent(*[(0.0, b"x" * MiB)] * 8)
    assert len(pieces) <= 8 * 6


# ---- never silent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [512, 4096, 64 * KiB, 300_000, MiB])
@pytest.mark.parametrize("pause_s", [3.0, 9.9, 60.0, 300.0, 500.0])
def test_while_the_source_waits_something_goes_out_every_two_seconds(chunk_bytes: int, pause_s: float) -> None:
    """A slow disk, a rate limit, another destination: for more than 8 minutes."""
    pieces = sent((0.0, b"a" * chunk_bytes), (pause_s, b"b" * chunk_bytes))
    gaps_s = [after[0] - before[0] for before, after in itertools.pairwise(pieces)]
    assert max(gaps_s) <= LONGEST_SILENCE_S + 0.01
    assert pieces[-1][0] - pieces[0][0] == pytest.approx(pause_s, abs=LONGEST_SILENCE_S + 0.01)
    assert joined(pieces) == b"a" * chunk_bytes + b"b" * chunk_bytes


def test_the_trickle_of_a_rate_limit_does_not_slow_it_down() -> None:
    """1 MiB every 8 s, as 128 KiB a second come: each chunk is out before the one after the next."""
    pieces = sent(*[(8.0, b"x" * MiB)] * 20)
    assert pieces[-1][0] - pieces[0][0] <= 19 * 8.0 + 0.1


async def test_on_a_real_clock_it_trickles_too() -> None:
    """The one test with a clock on the wall: two trickles of a small piece, and then the rest."""
    pieces = await taken(upload_of((0.0, b"x" * 4096), (4.5, b"y")))
    assert [len(piece) for _, piece in pieces] == [16, 16, 4096 - 32, 1]
    gaps_s = [after[0] - before[0] for before, after in itertools.pairwise(pieces)]
    assert gaps_s[0] >= 1.5


# ---- given up ---------------------------------------------------------------------------------------------------


def test_an_upload_whose_bytes_nobody_takes_is_given_up() -> None:
    async def scenario() -> None:
        upload = upload_of((0.0, b"x" * MiB), stall_timeout_s=30.0)
        began_s = now_s()

        async def hang() -> None:
            async with upload.watched():
                async for _ in upload:
                    await asyncio.sleep(3600)

        with pytest.raises(TimeoutError):
            await hang()
        assert upload.watched().expired()
        assert now_s() - began_s == pytest.approx(30.0, abs=0.1)
        assert (upload.is_begun, upload.is_whole) == (True, False)
        assert await settled() == set()

    run(scenario())


def test_neither_a_slow_peer_nor_a_slow_source_is_a_stall() -> None:
    """What is watched is the time that one piece takes, and not how long our own side makes everybody wait."""

    async def scenario() -> None:
        upload = upload_of((100.0, b"x" * 300_000), (400.0, b"y" * MiB), (50.0, b"z"), stall_timeout_s=30.0)
        async with upload.watched():
            async for _ in upload:
                await asyncio.sleep(29.0)
        assert upload.is_whole

    run(scenario())


def test_after_the_last_piece_nothing_is_watched_any_more() -> None:
    """How long the answer may take is another deadline than how long a piece may."""

    async def scenario() -> None:
        upload = upload_of((0.0, b"x"), stall_timeout_s=5.0)
        async with upload.watched():
            await taken(upload)
            await asyncio.sleep(600)
        assert upload.is_whole

    run(scenario())


def test_a_call_that_was_answered_early_does_not_end_the_process() -> None:
    """Glance answers 413 in the middle: the timeout is left while aiohttp still asks for a piece or two."""

    async def scenario() -> None:
        upload = upload_of(*[(0.0, b"x" * MiB)] * 3)
        pieces = aiter(upload)
        async with upload.watched():
            await anext(pieces)
        assert len([piece async for piece in pieces]) >= 3
        assert upload.is_whole

    run(scenario())


# ---- what came of it --------------------------------------------------------------------------------------------


def test_it_is_begun_with_the_first_look_and_whole_with_the_last_piece_taken() -> None:
    async def scenario() -> None:
        upload = upload_of((0.0, b"x" * 300_000), (0.0, b"y" * 300_000))
        assert (upload.is_begun, upload.is_whole) == (False, False)
        pieces, left = aiter(upload), 600_000
        while left:
            left -= len(await anext(pieces))
            assert (upload.is_begun, upload.is_whole) == (True, False), "the last piece may not have left yet"
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
        assert (upload.is_begun, upload.is_whole, upload.own_error) == (True, True, None)

    run(scenario())


def test_an_empty_body_is_whole() -> None:
    async def scenario() -> None:
        upload = upload_of()
        assert await taken(upload) == []
        assert upload.is_whole

    run(scenario())


@pytest.mark.parametrize("taken_bytes", [0, 1, 300_000, 600_000])
def test_a_body_is_sent_once(taken_bytes: int) -> None:
    """aiohttp before 3.14.4 sends what is left of it after a broken connection, and Glance calls that an image."""

    async def scenario() -> None:
        upload, left = upload_of((0.0, b"x" * 300_000), (0.0, b"y" * 300_000)), taken_bytes
        first = aiter(upload)
        while left > 0:
            left -= len(await anext(first))
        if not taken_bytes:  # looked at, and not one byte taken
            await anext(first)
        for _ in range(2):
            with pytest.raises(CloudUnavailable, match="sent twice"):
                await taken(upload)
        assert upload.own_error is None, "the refusal is not what ended the first"
        await first.aclose()  # type: ignore[attr-defined]

    run(scenario())


@pytest.mark.parametrize("error", [OverlayChanged("torn"), CloudUnavailable("no"), ZeroDivisionError(), KeyError("x")])
@pytest.mark.parametrize("parts", [(), ((0.0, b"x"),), ((0.0, b"x" * MiB), (5.0, b"y" * MiB))])
def test_what_ended_it_on_our_side_is_kept(error: Exception, parts: tuple[tuple[float, bytes], ...]) -> None:
    """aiohttp hides it behind an error of its own; and everything that came before it was sent."""

    async def scenario() -> None:
        upload = upload_of(*parts, error=error)
        pieces = []

        async def take() -> None:
            async for piece in upload:
                pieces.append(bytes(piece))

        with pytest.raises(type(error)) as told:
            await take()
        assert told.value is error
        assert upload.own_error is error
        assert b"".join(pieces) == b"".join(chunk for _, chunk in parts)
        assert (upload.is_begun, upload.is_whole) == (True, False)
        assert await settled() == set()

    run(scenario())


# ---- ended early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.5, 2.5, 9.0, 10.0, 11.0, 300.0])
def test_a_cancelled_upload_leaves_nothing_under_way(after_s: float) -> None:
    """Neither a task nor somebody who waits in the source; wherever it was cut."""

    async def scenario() -> None:
        source = Source([(10.0, b"x" * MiB), (3600.0, b"y")])
        upload = Upload(source, stall_timeout_s=60.0)
        task = asyncio.create_task(taken(upload))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert not upload.is_whole
        assert await settled() == set()
        assert not source.is_waiting
        if after_s:
            assert isinstance(upload.own_error, asyncio.CancelledError)

    run(scenario())


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_an_upload_that_the_other_side_drops_leaves_nothing_under_way(pieces: int) -> None:
    """A broken connection: aiohttp closes the iterator, or forgets it."""

    async def scenario(*, forget: bool) -> None:
        source = Source([(0.0, b"x" * MiB), (3600.0, b"y")])
        upload = Upload(source, stall_timeout_s=60.0)
        iterator = aiter(upload)
        for _ in range(pieces):
            await anext(iterator)
        await asyncio.sleep(0.1)
        assert source.is_waiting
        if forget:
            del iterator
            gc.collect()
        else:
            await iterator.aclose()  # type: ignore[attr-defined]
        assert await settled() == set()
        assert not source.is_waiting
        assert not upload.is_whole

    run(scenario(forget=False))
    run(scenario(forget=True))


@pytest.mark.parametrize("when", ["before", "while"])
def test_an_error_of_the_body_that_nobody_waits_for_any_more_is_not_shouted_about(when: str) -> None:
    """The connection broke first; asyncio would log "Task exception was never retrieved" for the rest."""
    shouts: list[object] = []

    class Late(Source):
        async def _pause(self, pause_s: float) -> None:
            try:
                await asyncio.sleep(pause_s)
            except asyncio.CancelledError:
                raise OverlayChanged("torn") from None

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: shouts.append(context))
        source = Late([(0.0, b"x" * MiB), (3600.0, b"y")])
        if when == "before":
            source = Late([(0.0, b"x" * MiB)], error=OverlayChanged("torn"))
        iterator = aiter(Upload(source, stall_timeout_s=60.0))
        await anext(iterator)
        await asyncio.sleep(1)
        await iterator.aclose()  # type: ignore[attr-defined]
        del iterator
        await asyncio.sleep(1)
        gc.collect()
        await asyncio.sleep(1)

    run(scenario())
    gc.collect()
    assert shouts == []
