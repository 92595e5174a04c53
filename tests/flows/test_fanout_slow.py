"""
Who is too slow for the others: little by little as well as at once, and never who is no slower than all the rest.

Speeds are made of pauses between the chunks that an end takes; what is compared is who was
detached, not how long it took.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.flows.material import End, MiB, contents_of, limits, open_bundle, opened, our_threads, write_disk

from autobackup.errors import StoreUnavailable
from autobackup.flows.fanout import Sent, fan_out

DETACH_AFTER_S = 0.3
CHUNKS = 24  # of 1 MiB; a fan-out takes up about 8 of them before anybody waits for anybody


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def every(pause_s: float, *, most: int = 1000) -> Callable[[int], Awaitable[None]]:
    """Pauses before each chunk, *most* of them."""

    async def wait(index: int) -> None:
        if index < most:
            await asyncio.sleep(pause_s)

    return wait


async def who_was_detached(disk: Path, *ends: End, chunks: int = CHUNKS) -> set[str]:
    """Sends to *ends*; what was not detached must be whole."""
    content = write_disk(disk, [("data", chunks * MiB)])
    with opened(disk) as disks:
        outcomes = await fan_out(
            contents_of(disks), [end.outlet for end in ends], limits(level=None, detach_after_s=DETACH_AFTER_S)
        )
    detached = set()
    for end in ends:
        outcome = outcomes[end.outlet.destination]
        if isinstance(outcome, Sent):
            assert open_bundle(end.data, end.outlet.key)[0]["disks/disk"] == content
        else:
            assert isinstance(outcome, StoreUnavailable)
            assert "held up the shared read" in str(outcome)
            assert not end.got_all
            detached.add(str(end.outlet.destination))
    assert our_threads() == []
    return detached


# ---- while another starves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "slow_first"), [(0.9, True), (0.9, False), (0.7, True)])
async def test_one_that_is_a_little_too_slow_for_every_frame_is_detached_in_the_end(
    disk: Path, share: float, slow_first: bool
) -> None:
    """None of its pauses is as long as the limit: the others would wait for the whole of a disk, frame by frame."""
    slow, fast = End("slow", before_chunk=every(DETACH_AFTER_S * share)), End("fast")
    assert await who_was_detached(disk, *((slow, fast) if slow_first else (fast, slow))) == {"slow"}


async def test_it_is_detached_however_many_starve(disk: Path) -> None:
    slow = End("slow", before_chunk=every(DETACH_AFTER_S * 0.6))
    # that not all of three quick ones stay quick is the loaded machine's affair
    assert "slow" in await who_was_detached(disk, End("a"), slow, End("b"), End("c"))


async def test_both_that_are_too_slow_are_detached_for_one_that_is_not(disk: Path) -> None:
    slow = [End(f"slow{n}", before_chunk=every(DETACH_AFTER_S * 0.8)) for n in range(2)]
    assert await who_was_detached(disk, slow[0], End("fast"), slow[1]) == {"slow0", "slow1"}


async def test_one_that_is_slow_for_a_moment_now_and_then_is_forgiven(disk: Path) -> None:
    """Five times nearly the limit, and quick in between: a store that flushes its cache."""

    async def now_and_then(index: int) -> None:
        await asyncio.sleep(DETACH_AFTER_S * 0.8 if index % 9 == 2 else 0)

    assert await who_was_detached(disk, End("moody", before_chunk=now_and_then), End("quick"), chunks=46) == set()


# ---- while nobody does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "most"), [(0.8, 18), (2.0, 3)])
async def test_two_that_are_equally_slow_are_not_detached(disk: Path, share: float, most: int) -> None:
    """
    Neither could go on without the other, and two reads of the disk would take twice as long.

    Not even where each chunk takes longer than the limit, as under a rate limit: nobody waits for anybody then.
    """
    ends = [End(f"slow{n}", before_chunk=every(DETACH_AFTER_S * share, most=most)) for n in range(2)]
    assert await who_was_detached(disk, *ends) == set()


async def test_a_single_slow_one_never_is(disk: Path) -> None:
    end = End("alone", before_chunk=every(DETACH_AFTER_S * 2, most=2))
    assert await who_was_detached(disk, end) == set()


async def test_the_last_one_that_is_left_never_is(disk: Path) -> None:
    """The others failed, or were detached before it."""

    async def fail(index: int) -> None:
        if index == 3:
            raise StoreUnavailable("x: held up the shared read, in words of its own")

    slow = End("slow", before_chunk=every(DETACH_AFTER_S * 2, most=2))
    gone = End("gone", before_chunk=fail)
    assert await who_was_detached(disk, gone, slow) == {"gone"}
