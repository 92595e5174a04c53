"""An operator lets one destination go: which copy may be let go when, and what is still owed to the others."""

import asyncio
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.flows.rig import Rig, copy_of, rig_on

from autobackup.errors import Refused, StoreRefused, StoreUnavailable
from autobackup.model import (
    AttemptId,
    AttemptRecord,
    CopyRecord,
    CopyState,
    DestinationName,
    JobRecord,
    JobState,
)

DISK = os.urandom(200_000)
DOWN = StoreUnavailable("the store is down")
ONE, TWO = DestinationName("one"), DestinationName("two")
ATTEMPT = AttemptId("11111111-2222-3333-4444-555555555555")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path, destinations=("one", "two")) as both:
        yield both


def receipt(rig: Rig, record: JobRecord) -> dict[str, Any]:
    words: dict[str, Any] = json.loads((Path(rig.spool.path) / "receipts" / f"{record.job}.json").read_bytes())
    return words


def states(record: JobRecord) -> dict[str, str]:
    return {copy.destination: copy.state for copy in record.copies}


# ---- which, and when --------------------------------------------------------------------------------------------

WAITS = (JobState.QUEUED, JobState.PARKED)
OWED = (CopyState.QUEUED, CopyState.SENT, CopyState.PARKED)  # not proven, and nobody is sending it


def in_state(name: DestinationName, state: CopyState) -> CopyRecord:
    """With an attempt where there is one, one that is obsolete, and a pause."""
    has_attempt = state in (CopyState.SENDING, CopyState.SENT, CopyState.VERIFIED)
    attempt = AttemptRecord(attempt=ATTEMPT, started_at_s=1.0, digest_algorithm="sha512") if has_attempt else None
    return CopyRecord(
        destination=name, state=state, attempt=attempt, obsolete=(AttemptId("earlier"),), failure_count=3,
        not_before_s=9e9, last_error="down",
    )  # fmt: skip


async def test_a_copy_is_let_go_only_while_the_job_waits_it_is_owed_and_it_is_not_the_last(pair: Rig) -> None:
    """Every state of the job and of both copies. What is refused has changed nothing, here or in the journal."""
    record = await pair.new_job({"disk": DISK})
    allowed = 0
    for job_state, one, two in itertools.product(JobState, CopyState, CopyState):
        before = await pair.jobs.update(
            record.job, state=job_state, copies=(in_state(ONE, one), in_state(TWO, two)), not_before_s=9e9
        )
        journaled = pair.journaled(record.job)
        may = job_state in WAITS and one in OWED and two is not CopyState.DISCARDED
        if not may:
            with pytest.raises(Refused):
                await pair.jobs.order_discard_of(record.job, ONE)
            assert pair.jobs.get(record.job) == before
            assert pair.journaled(record.job) == journaled
            continue
        allowed += 1
        now = await pair.jobs.order_discard_of(record.job, ONE)
        assert now == pair.jobs.get(record.job)
        assert (now.state, now.not_before_s, now.failure_count) == (JobState.QUEUED, 0.0, 0)
        gone = copy_of(now, "one")
        assert (gone.state, gone.attempt) == (CopyState.DISCARDED, None)
        assert gone.obsolete == ("earlier", *((ATTEMPT,) if one is CopyState.SENT else ()))
        assert gone.last_error == "discarded by an operator"
        kept = in_state(TWO, CopyState.QUEUED if two is CopyState.PARKED else two)
        assert copy_of(now, "two") == replace(kept, not_before_s=0.0)
        assert json.loads(pair.journaled(record.job))["copies"][0]["state"] == "discarded"
    assert allowed == 2 * 3 * 5


async def test_a_refusal_says_what_may_be_done_instead(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})

    async def refusal(destination: str, **changes: object) -> str:
        await pair.jobs.update(record.job, **changes)
        with pytest.raises(Refused) as told:
            await pair.jobs.order_discard_of(record.job, DestinationName(destination))
        return str(told.value)

    assert "has no copy for 'three'; it has: one, two" in await refusal("three")
    assert "is sending; only while it is queued or parked can a copy be discarded" in await refusal(
        "one", state=JobState.SENDING
    )
    copies = (in_state(ONE, CopyState.VERIFIED), in_state(TWO, CopyState.PARKED))
    assert "the copy for 'one' is verified; there is nothing to discard" in await refusal(
        "one", state=JobState.PARKED, copies=copies
    )
    copies = (in_state(ONE, CopyState.PARKED), in_state(TWO, CopyState.DISCARDED))
    assert "'one' is the only destination that is left; discard the job, or retry it" in await refusal(
        "one", copies=copies
    )


async def test_the_only_destination_of_a_job_cannot_be_let_go(tmp_path: Path) -> None:
    """That is another order, with another word: the last state of an instance goes with it."""
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        rig.doors["one"].shut = DOWN
        await rig.advance(record.job)
        with pytest.raises(Refused, match="only destination that is left"):
            await rig.jobs.order_discard_of(record.job, ONE)
        rig.doors["one"].shut = None
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        assert len(rig.doors["one"].held()) == 1


async def test_not_all_of_three_can_be_let_go_one_after_the_other(tmp_path: Path) -> None:
    with rig_on(tmp_path, destinations=("one", "two", "three")) as rig:
        record = await rig.new_job({"disk": DISK})
        for name in ("one", "three"):
            await rig.jobs.order_discard_of(record.job, DestinationName(name))
        with pytest.raises(Refused, match="only destination that is left"):
            await rig.jobs.order_discard_of(record.job, TWO)
        assert states(rig.jobs.get(record.job)) == {"one": "discarded", "two": "queued", "three": "discarded"}
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        assert [len(rig.doors[name].held()) for name in ("one", "two", "three")] == [0, 1, 0]
        assert receipt(rig, record)["outcome"] == (
            "verified in every destination but one, three (discarded by an operator), then scrubbed (zero)"
        )


# ---- what comes then --------------------------------------------------------------------------------------------


async def test_a_job_that_waits_for_one_destination_goes_on_without_it(pair: Rig) -> None:
    """The other has its proof already; the scrub follows, and the receipt says who got nothing."""
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = DOWN
    now = await pair.advance(record.job)
    assert now is not None
    assert states(now) == {"one": "verified", "two": "queued"}
    asked = len(pair.doors["two"].calls)

    await pair.jobs.order_discard_of(record.job, TWO)
    await pair.run_to_the_end(record.job)

    assert pair.is_gone(record.job)
    assert len(pair.doors["one"].held()) == 1
    assert pair.doors["two"].files() == []
    assert len(pair.doors["two"].calls) == asked, "what was let go is asked for nothing more"
    words = receipt(pair, record)
    assert words["outcome"] == "verified in every destination but two (discarded by an operator), then scrubbed (zero)"
    one, two = words["copies"]
    assert (one["destination"], one["state"], two["destination"], two["state"]) == (
        "one",
        "verified",
        "two",
        "discarded",
    )
    assert two["verified_at_s"] is None
    assert words["scrub"]["scrubbed"]


async def test_nothing_is_scrubbed_before_the_others_are_proven(pair: Rig) -> None:
    """Letting one go is no proof of another."""
    record = await pair.new_job({"disk": DISK})
    for door in pair.doors.values():
        door.shut = DOWN
    await pair.advance(record.job)
    await pair.jobs.order_discard_of(record.job, TWO)
    for shut in (DOWN, {"put": DOWN}, {"stat": DOWN}, {"digest": DOWN}):
        pair.doors["one"].shut = shut
        now = await pair.advance(record.job)
        assert now is not None
        assert now.state is JobState.QUEUED
        assert copy_of(now, "one").state in (CopyState.QUEUED, CopyState.SENT)
        assert pair.link(now).read_bytes() == DISK
        pair.clock.now_s = now.not_before_s + 0.001
    assert {JobState.VERIFIED, JobState.SCRUBBING}.isdisjoint(one.state for one in pair.journal)

    pair.doors["one"].shut = None
    pair.on_record = lambda now: None if now.state is not JobState.SCRUBBING else _require_proven(now)
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)
    assert JobState.SCRUBBING in [one.state for one in pair.journal]
    assert len(pair.doors["one"].held()) == 1


def _require_proven(record: JobRecord) -> None:
    assert states(record) == {"one": "verified", "two": "discarded"}


async def test_a_parked_copy_that_is_let_go_frees_its_job(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = {"put": StoreRefused("no")}
    await pair.run_to_the_end(record.job)
    now = pair.jobs.get(record.job)
    assert (now.state, states(now)) == (JobState.PARKED, {"one": "verified", "two": "parked"})

    now = await pair.jobs.order_discard_of(record.job, TWO)
    assert (now.state, now.last_error) == (JobState.QUEUED, "")
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)
    assert [call for call, _ in pair.doors["one"].calls].count("put") == 1, "what is proven is not sent again"


async def test_with_one_let_go_the_other_that_is_parked_is_tried_again(pair: Rig) -> None:
    """And if it is refused again, the job is parked again: it never ends with nothing proven."""
    record = await pair.new_job({"disk": DISK})
    for door in pair.doors.values():
        door.shut = {"put": StoreRefused("no")}
    await pair.run_to_the_end(record.job)
    await pair.jobs.order_discard_of(record.job, TWO)
    await pair.run_to_the_end(record.job)
    now = pair.jobs.get(record.job)
    assert (now.state, states(now)) == (JobState.PARKED, {"one": "parked", "two": "discarded"})
    assert pair.link(now).read_bytes() == DISK

    pair.doors["one"].shut = None
    await pair.jobs.order_retry(record.job)
    assert states(pair.jobs.get(record.job)) == {"one": "queued", "two": "discarded"}, "a retry brings nothing back"
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)


async def test_a_copy_that_was_sent_and_let_go_is_named_in_the_receipt(pair: Rig) -> None:
    """What the store has of it may be whole: whoever reads the receipt can find it, and delete it."""
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = {"stat": DOWN}
    now = await pair.advance(record.job)
    assert now is not None
    sent = copy_of(now, "two").attempt
    assert (copy_of(now, "two").state, sent is not None) == (CopyState.SENT, True)
    assert sent is not None
    await pair.jobs.order_discard_of(record.job, TWO)
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)
    _, two = receipt(pair, record)["copies"]
    left = pair.doors["two"].held()
    assert left in ([], [sent.attempt])
    assert two["attempt"] is None
    assert set(left) <= set(two["left_in_store"])


async def test_a_disk_that_changes_afterwards_is_not_sent_to_who_was_let_go(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = DOWN
    await pair.advance(record.job)
    await pair.jobs.order_discard_of(record.job, TWO)
    changed = os.urandom(len(DISK))
    pair.link(pair.jobs.get(record.job)).write_bytes(changed)
    pair.doors["two"].shut = None
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)
    assert pair.doors["two"].files() == []
    assert [call for call, _ in pair.doors["one"].calls].count("put") == 2, "the last state is the one that counts"


# ---- orders, crashes --------------------------------------------------------------------------------------------


async def test_what_was_let_go_stays_so_after_a_crash(tmp_path: Path) -> None:
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        record = await rig.new_job({"disk": DISK})
        await rig.jobs.order_discard_of(record.job, TWO)
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        assert states(rig.jobs.get(record.job)) == {"one": "queued", "two": "discarded"}
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        assert rig.doors["two"].files() == []


async def test_a_crash_in_the_middle_of_the_order_leaves_a_job_that_can_go_on(tmp_path: Path) -> None:
    """It takes two writes: the copy, then the job's way back to the queue."""

    class Crash(Exception):
        pass

    def crash(_record: JobRecord) -> None:
        raise Crash

    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        record = await rig.new_job({"disk": DISK})
        rig.doors["two"].shut = {"put": StoreRefused("no")}
        await rig.run_to_the_end(record.job)
        rig.on_record = crash
        with pytest.raises(Crash):
            await rig.jobs.order_discard_of(record.job, TWO)
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        now = rig.jobs.get(record.job)
        assert (now.state, states(now)) == (JobState.PARKED, {"one": "verified", "two": "discarded"})
        assert rig.link(now).read_bytes() == DISK
        with pytest.raises(Refused, match="there is nothing to discard"):
            await rig.jobs.order_discard_of(record.job, TWO)
        await rig.jobs.order_retry(record.job)
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)


async def test_no_copy_is_let_go_between_the_steps_of_a_job(pair: Rig) -> None:
    """An order decided on the state of before a step would be journaled over it."""
    record = await pair.new_job({"disk": DISK})
    refused: list[JobState] = []
    orders: list[asyncio.Task[object]] = []

    async def order(state: JobState) -> None:
        with pytest.raises(Refused):
            await pair.runner.order(record.job, partial(pair.jobs.order_discard_of, destination=TWO))
        refused.append(state)

    pair.on_record = lambda now: orders.append(asyncio.get_running_loop().create_task(order(now.state)))
    running = asyncio.create_task(pair.runner.run())
    async with asyncio.timeout(60):
        while not pair.is_gone(record.job):
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    await asyncio.gather(*orders)

    assert {JobState.SENDING, JobState.SCRUBBING} <= set(refused)
    assert [copy["state"] for copy in receipt(pair, record)["copies"]] == ["verified", "verified"]


async def test_an_order_wakes_a_job_that_waits_for_its_pause(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = DOWN
    now = await pair.advance(record.job)
    assert now is not None
    assert now.not_before_s > pair.clock()
    running = asyncio.create_task(pair.runner.run())
    await asyncio.sleep(0.05)
    await pair.runner.order(record.job, partial(pair.jobs.order_discard_of, destination=TWO))
    async with asyncio.timeout(30):
        while not pair.is_gone(record.job):
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    assert len(pair.doors["one"].held()) == 1
