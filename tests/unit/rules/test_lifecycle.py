"""
The two tables of states, enumerated whole: what is allowed, what is out of reach, and what it takes to scrub.

The expected moves are written down here a second time, as the architecture has them. A change of the life cycle is
made in both places, or it is an accident.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pytest

from autobackup.errors import AutobackupError
from autobackup.model import (
    CopyRecord,
    CopyState,
    DestinationName,
    InstanceId,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    VerdictKind,
)
from autobackup.rules.lifecycle import (
    COPY_MOVES,
    JOB_MOVES,
    CopyEvent,
    IllegalTransition,
    JobEvent,
    all_settled,
    move_copy,
    move_job,
    only_parked_left,
    retry_delay_s,
    scrub_refusal,
)

JOB = """
    queued      started             sending
    queued      gave_up             parked
    queued      discard_ordered     discarded
    sending     all_verified        verified
    sending     interrupted         queued
    sending     changed             queued
    sending     gave_up             parked
    verified    scrub_begun         scrubbing
    verified    not_to_be_scrubbed  kept
    verified    changed             queued
    verified    gave_up             parked
    scrubbing   scrubbed            scrubbed
    scrubbing   not_to_be_scrubbed  kept
    scrubbed    receipted           done
    kept        name_gone           done
    parked      retry_ordered       queued
    parked      discard_ordered     discarded
    discarded   receipted           done
"""
COPY = """
    queued      started          sending
    queued      gave_up          parked
    queued      discard_ordered  discarded
    sending     sent             sent
    sending     interrupted      queued
    sending     gave_up          parked
    sent        proven           verified
    sent        not_proven       queued
    sent        outdated         queued
    sent        gave_up          parked
    sent        discard_ordered  discarded
    verified    outdated         queued
    parked      retry_ordered    queued
    parked      discard_ordered  discarded
"""

State = TypeVar("State", JobState, CopyState)
Event = TypeVar("Event", JobEvent, CopyEvent)
Moves = dict[tuple[State, Event], State]


def walked(states: type[State], events: type[Event], move: Callable[[State, Event], State]) -> Moves[State, Event]:
    """What *move* allows, asked for every state and every event."""
    moves = {}
    for state, event in itertools.product(states, events):
        with contextlib.suppress(IllegalTransition):
            moves[state, event] = move(state, event)
    return moves


JOB_WALK = walked(JobState, JobEvent, move_job)
COPY_WALK = walked(CopyState, CopyEvent, move_copy)


def reachable(
    start: State,
    moves: Moves[State, Event],
    *,
    without: Iterable[State] = (),
    without_events: Iterable[Event] = (),
) -> set[State]:
    """Every state that can be had from *start*, itself included, when the others are taken away."""
    closed, events = set(without), set(without_events)
    seen, left = {start}, [start]
    while left:
        here = left.pop()
        for (state, event), after in moves.items():
            if state is here and event not in events and after not in closed | seen:
                seen.add(after)
                left.append(after)
    return seen


def ways_into(state: State, moves: Moves[State, Event]) -> set[tuple[State, Event]]:
    return {step for step, after in moves.items() if after is state}


def ways_out(state: State, moves: Moves[State, Event]) -> set[Event]:
    return {event for before, event in moves if before is state}


# ---- the tables ---------------------------------------------------------------------------------------------


def test_a_job_makes_exactly_the_moves_of_the_architecture() -> None:
    wanted = {(JobState(a), JobEvent(e)): JobState(b) for a, e, b in map(str.split, JOB.strip().splitlines())}
    assert wanted == JOB_WALK
    assert dict(JOB_MOVES) == JOB_WALK


def test_a_copy_makes_exactly_the_moves_of_the_architecture() -> None:
    wanted = {(CopyState(a), CopyEvent(e)): CopyState(b) for a, e, b in map(str.split, COPY.strip().splitlines())}
    assert wanted == COPY_WALK
    assert dict(COPY_MOVES) == COPY_WALK


def test_every_event_means_something() -> None:
    assert {event for _, event in JOB_WALK} == set(JobEvent)
    assert {event for _, event in COPY_WALK} == set(CopyEvent)


def test_an_event_is_called_in_errors_what_it_is_called_here() -> None:
    for kind in (JobEvent, CopyEvent):
        assert [member.value for member in kind] == [member.name.lower() for member in kind]


def test_the_tables_cannot_be_changed_at_run_time() -> None:
    with pytest.raises(TypeError):
        JOB_MOVES[JobState.QUEUED, JobEvent.RECEIPTED] = JobState.DONE  # type: ignore[index]
    with pytest.raises(TypeError):
        COPY_MOVES[CopyState.QUEUED, CopyEvent.PROVEN] = CopyState.VERIFIED  # type: ignore[index]


def test_an_illegal_move_is_a_bug_that_nobody_handles() -> None:
    """The job runner stops an `AutobackupError`; this one ends the process."""
    assert not issubclass(IllegalTransition, AutobackupError)
    with pytest.raises(IllegalTransition, match="receipted in state queued"):
        move_job(JobState.QUEUED, JobEvent.RECEIPTED)
    with pytest.raises(IllegalTransition, match="proven in state queued"):
        move_copy(CopyState.QUEUED, CopyEvent.PROVEN)


# ---- jobs: invariants 1 and 4 -------------------------------------------------------------------------------


def test_no_job_ends_unless_it_was_verified_or_discarded_by_an_operator() -> None:
    """Take VERIFIED and the order to discard away, and DONE must be out of reach."""
    assert JobState.DONE in reachable(JobState.QUEUED, JOB_WALK)
    assert JobState.DONE not in reachable(JobState.QUEUED, JOB_WALK, without={JobState.VERIFIED, JobState.DISCARDED})
    assert JobState.DONE not in reachable(
        JobState.QUEUED, JOB_WALK, without={JobState.VERIFIED}, without_events={JobEvent.DISCARD_ORDERED}
    )


def test_an_operator_can_end_what_was_never_verified() -> None:
    assert JobState.DONE in reachable(JobState.QUEUED, JOB_WALK, without={JobState.VERIFIED})


def test_only_an_order_discards() -> None:
    assert {event for _, event in ways_into(JobState.DISCARDED, JOB_WALK)} == {JobEvent.DISCARD_ORDERED}
    assert {event for _, event in ways_into(CopyState.DISCARDED, COPY_WALK)} == {CopyEvent.DISCARD_ORDERED}


def test_no_disk_is_scrubbed_unless_it_was_verified() -> None:
    for state in JobState:
        if state not in (JobState.VERIFIED, JobState.SCRUBBING):
            assert JobState.SCRUBBING not in reachable(state, JOB_WALK, without={JobState.VERIFIED}), state
    assert ways_into(JobState.SCRUBBING, JOB_WALK) == {(JobState.VERIFIED, JobEvent.SCRUB_BEGUN)}


def test_verified_is_had_only_from_a_job_that_was_sending() -> None:
    assert ways_into(JobState.VERIFIED, JOB_WALK) == {(JobState.SENDING, JobEvent.ALL_VERIFIED)}


def test_nothing_is_scrubbed_that_was_not_journaled_as_scrubbing() -> None:
    assert ways_into(JobState.SCRUBBED, JOB_WALK) == {(JobState.SCRUBBING, JobEvent.SCRUBBED)}


def test_from_the_first_overwritten_byte_there_is_no_way_back() -> None:
    """The disk cannot be captured again."""
    onward = {JobState.SCRUBBING, JobState.SCRUBBED, JobState.KEPT, JobState.DONE}
    for state in onward:
        assert reachable(state, JOB_WALK) <= onward
    assert reachable(JobState.SCRUBBING, JOB_WALK) == onward


def test_what_was_discarded_is_not_scrubbed_or_sent() -> None:
    assert reachable(JobState.DISCARDED, JOB_WALK) == {JobState.DISCARDED, JobState.DONE}


def test_a_job_that_is_being_read_cannot_be_discarded_under_its_readers() -> None:
    assert {state for state, event in JOB_WALK if event is JobEvent.DISCARD_ORDERED} == {
        JobState.QUEUED,
        JobState.PARKED,
    }


@pytest.mark.parametrize("state", list(JobState))
def test_every_job_can_still_end(state: JobState) -> None:
    assert JobState.DONE in reachable(state, JOB_WALK)


@pytest.mark.parametrize("state", list(JobState))
def test_every_state_of_a_job_can_come_about(state: JobState) -> None:
    assert state in reachable(JobState.QUEUED, JOB_WALK)


def test_done_is_the_end_and_the_only_one() -> None:
    assert [state for state in JobState if not ways_out(state, JOB_WALK)] == [JobState.DONE]


def test_a_parked_job_waits_for_an_operator() -> None:
    assert ways_out(JobState.PARKED, JOB_WALK) == {JobEvent.RETRY_ORDERED, JobEvent.DISCARD_ORDERED}


def test_a_disk_that_changed_is_captured_again() -> None:
    """Torn reads are seen while sending and before the scrub; both lead back to the queue."""
    changed = {state: after for (state, event), after in JOB_WALK.items() if event is JobEvent.CHANGED}
    assert changed == {JobState.SENDING: JobState.QUEUED, JobState.VERIFIED: JobState.QUEUED}


def test_a_kept_job_was_verified_and_ends_when_the_name_goes() -> None:
    assert {state for state, _ in ways_into(JobState.KEPT, JOB_WALK)} == {JobState.VERIFIED, JobState.SCRUBBING}
    assert ways_out(JobState.KEPT, JOB_WALK) == {JobEvent.NAME_GONE}


# ---- copies -------------------------------------------------------------------------------------------------


def test_no_copy_is_verified_unless_it_was_sent_and_proven() -> None:
    assert ways_into(CopyState.VERIFIED, COPY_WALK) == {(CopyState.SENT, CopyEvent.PROVEN)}
    assert ways_into(CopyState.SENT, COPY_WALK) == {(CopyState.SENDING, CopyEvent.SENT)}
    for state in set(CopyState) - {CopyState.SENT, CopyState.VERIFIED}:
        assert CopyState.VERIFIED not in reachable(state, COPY_WALK, without={CopyState.SENT}), state


@pytest.mark.parametrize("state", list(CopyState))
def test_every_copy_that_is_owed_can_still_be_verified(state: CopyState) -> None:
    assert (CopyState.VERIFIED in reachable(state, COPY_WALK)) is (state is not CopyState.DISCARDED)


@pytest.mark.parametrize("state", list(CopyState))
def test_every_state_of_a_copy_can_come_about(state: CopyState) -> None:
    assert state in reachable(CopyState.QUEUED, COPY_WALK)


def test_a_proven_copy_is_given_up_for_nothing_but_a_newer_reading() -> None:
    assert ways_out(CopyState.VERIFIED, COPY_WALK) == {CopyEvent.OUTDATED}
    assert move_copy(CopyState.VERIFIED, CopyEvent.OUTDATED) is CopyState.QUEUED


def test_a_copy_that_was_not_proven_is_sent_again_as_a_new_attempt() -> None:
    for event in (CopyEvent.NOT_PROVEN, CopyEvent.OUTDATED):
        assert move_copy(CopyState.SENT, event) is CopyState.QUEUED


def test_a_parked_copy_waits_for_an_operator() -> None:
    assert ways_out(CopyState.PARKED, COPY_WALK) == {CopyEvent.RETRY_ORDERED, CopyEvent.DISCARD_ORDERED}


def test_whatever_is_under_way_can_be_parked() -> None:
    assert {state for state, event in COPY_WALK if event is CopyEvent.GAVE_UP} == {
        CopyState.QUEUED,
        CopyState.SENDING,
        CopyState.SENT,
    }


def test_a_copy_is_discarded_only_while_it_is_not_proven_and_nobody_sends_it() -> None:
    """A proven copy is no longer anybody's to let go; one under way would go on under the order."""
    assert {state for state, event in COPY_WALK if event is CopyEvent.DISCARD_ORDERED} == {
        CopyState.QUEUED,
        CopyState.SENT,
        CopyState.PARKED,
    }


def test_what_an_operator_discarded_stays_so() -> None:
    assert ways_out(CopyState.DISCARDED, COPY_WALK) == set()


# ---- settled, or stuck --------------------------------------------------------------------------------------


def copies(states: Iterable[CopyState]) -> tuple[CopyRecord, ...]:
    return tuple(CopyRecord(destination=DestinationName(f"d{n}"), state=state) for n, state in enumerate(states))


def combinations(most: int) -> Iterator[tuple[CopyState, ...]]:
    for count in range(most + 1):
        yield from itertools.product(CopyState, repeat=count)


COMBINATIONS = list(combinations(3))


def test_the_combinations_are_all_of_them() -> None:
    assert len(COMBINATIONS) == 1 + 6 + 6**2 + 6**3


def test_settled_is_one_proven_copy_at_least_and_nothing_owed() -> None:
    for states in COMBINATIONS:
        proven = sum(state is CopyState.VERIFIED for state in states)
        discarded = sum(state is CopyState.DISCARDED for state in states)
        assert all_settled(copies(states)) is (proven >= 1 and proven + discarded == len(states)), states


def test_stuck_is_one_parked_copy_at_least_and_none_that_can_move_by_itself() -> None:
    for states in COMBINATIONS:
        parked = any(state is CopyState.PARKED for state in states)
        moving = any(state in (CopyState.QUEUED, CopyState.SENDING, CopyState.SENT) for state in states)
        assert only_parked_left(copies(states)) is (parked and not moving), states


def test_no_job_is_settled_and_stuck() -> None:
    for states in COMBINATIONS:
        assert not (all_settled(copies(states)) and only_parked_left(copies(states))), states


def test_copies_are_looked_at_once() -> None:
    """A generator will do."""
    assert all_settled(copy for copy in copies([CopyState.VERIFIED, CopyState.DISCARDED]))
    assert only_parked_left(copy for copy in copies([CopyState.PARKED, CopyState.VERIFIED]))


# ---- the gates in front of the scrub ------------------------------------------------------------------------

UUID = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")


def job(
    *,
    state: JobState = JobState.SCRUBBING,
    verdict: VerdictKind = VerdictKind.TERMINATED,
    held: Iterable[CopyState] = (CopyState.VERIFIED,),
    unreadable: bool = False,
) -> JobRecord:
    return JobRecord(
        job=JobId("8d3c"),
        instance=UUID,
        state=state,
        verdict=verdict,
        verdict_reason="",
        rule="everything",
        scrub_method="zero",
        created_at_s=0.0,
        updated_at_s=0.0,
        source=InstanceRecord(instance=UUID),
        files=(),
        copies=copies(held),
        unreadable=unreadable,
    )


def test_a_disk_is_overwritten_only_with_every_gate_open() -> None:
    """Every state, every verdict, every combination of up to two copies, read whole or not: 3,870 jobs."""
    opened = 0
    for state, verdict, held, unreadable in itertools.product(JobState, VerdictKind, combinations(2), (False, True)):
        refusal = scrub_refusal(job(state=state, verdict=verdict, held=held, unreadable=unreadable))
        proven = CopyState.VERIFIED in held and set(held) <= {CopyState.VERIFIED, CopyState.DISCARDED}
        may = state is JobState.SCRUBBING and verdict is VerdictKind.TERMINATED and proven and not unreadable
        assert (refusal is None) is may, (state, verdict, held, unreadable)
        assert refusal != ""
        opened += may
    assert opened == 1 + 3


@pytest.mark.parametrize("state", sorted(set(JobState) - {JobState.SCRUBBING}))
def test_a_scrub_that_was_not_journaled_is_refused_in_words(state: JobState) -> None:
    assert scrub_refusal(job(state=state)) == f"is {state}, not scrubbing"


@pytest.mark.parametrize("verdict", sorted(set(VerdictKind) - {VerdictKind.TERMINATED}))
def test_a_scrub_without_a_termination_is_refused_in_words(verdict: VerdictKind) -> None:
    assert scrub_refusal(job(verdict=verdict)) == f"its verdict is {verdict}"


@pytest.mark.parametrize("copy", sorted(set(CopyState) - {CopyState.VERIFIED}))
def test_a_scrub_without_a_proof_is_refused_in_words(copy: CopyState) -> None:
    assert scrub_refusal(job(held=[copy])) == "not every destination holds a proven copy"


def test_a_scrub_of_what_could_not_be_read_is_refused_in_words() -> None:
    assert scrub_refusal(job(unreadable=True)) == "parts of its disks could not be read"


def test_a_job_that_is_owed_nowhere_is_not_scrubbed() -> None:
    assert scrub_refusal(job(held=[])) is not None


# ---- pauses -------------------------------------------------------------------------------------------------

COUNTS = [*range(80), 1000, 10**6, 2**63, 10**30]
SPREADS = [0.0, 0.25, 0.5, 0.999, 1.0]
PAUSES = [(5.0, 900.0), (0.1, 0.1), (0.25, 86400.0), (60.0, 61.0), (3600.0, 86400.0)]


@pytest.mark.parametrize(("first_s", "longest_s"), PAUSES)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_pause_is_never_nothing_never_too_long_and_never_the_last(
    first_s: float, longest_s: float, spread: float
) -> None:
    for count in COUNTS:
        delay_s = retry_delay_s(count, first_s=first_s, longest_s=longest_s, spread=spread)
        assert math.isfinite(delay_s)
        assert first_s / 2 <= delay_s <= longest_s, count


@pytest.mark.parametrize(("first_s", "longest_s"), PAUSES)
def test_a_pause_doubles_with_each_failure_until_it_is_the_longest(first_s: float, longest_s: float) -> None:
    expected_s = first_s
    for count in range(1, 80):
        assert retry_delay_s(count, first_s=first_s, longest_s=longest_s, spread=1.0) == pytest.approx(expected_s)
        expected_s = min(longest_s, expected_s * 2)
    assert expected_s == longest_s


def test_before_the_first_failure_a_pause_is_the_first() -> None:
    assert retry_delay_s(0, first_s=5.0, longest_s=900.0, spread=1.0) == 5.0


def test_hosts_that_lost_the_same_store_come_back_between_half_and_whole_of_the_pause() -> None:
    for count in COUNTS:
        least_s, middle_s, most_s = (
            retry_delay_s(count, first_s=5.0, longest_s=900.0, spread=spread) for spread in (0.0, 0.5, 1.0)
        )
        assert least_s == most_s / 2
        assert middle_s == pytest.approx(most_s * 0.75)


def test_a_pause_without_a_longest_is_still_a_number() -> None:
    """2.0 ** 1024 raises OverflowError."""
    assert math.isfinite(retry_delay_s(10**9, first_s=5.0, longest_s=math.inf, spread=1.0))


# ---- pauses that the other side asked for ---------------------------------------------------------------------

ASKED_S = [0.0, 0.001, 1.0, 30.0, 899.0, 3599.0, 3600.0]
TOO_LONG_S = [3600.001, 7200.0, 86400.0, 1e300, math.inf]
LONGEST_ASKED_S = 3600.0


@pytest.mark.parametrize(("first_s", "longest_s"), PAUSES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("asked_s", ASKED_S)
def test_nobody_is_asked_again_earlier_than_he_said(
    first_s: float, longest_s: float, spread: float, asked_s: float
) -> None:
    """Nor earlier than by our own count: a service that says "0" is not called in a busy loop."""
    for count in COUNTS:
        own_s = retry_delay_s(count, first_s=first_s, longest_s=longest_s, spread=spread)
        delay_s = retry_delay_s(count, first_s=first_s, longest_s=longest_s, spread=spread, retry_after_s=asked_s)
        assert delay_s >= asked_s, count
        assert delay_s >= own_s, count
        assert delay_s <= max(own_s, asked_s * 1.5), count


@pytest.mark.parametrize(("first_s", "longest_s"), PAUSES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("asked_s", TOO_LONG_S)
def test_a_pause_that_is_asked_for_has_an_end(first_s: float, longest_s: float, spread: float, asked_s: float) -> None:
    """A Retry-After of a day is a mistake, or an attack: an hour is waited, and up to a half of it more."""
    for count in COUNTS:
        delay_s = retry_delay_s(count, first_s=first_s, longest_s=longest_s, spread=spread, retry_after_s=asked_s)
        assert LONGEST_ASKED_S <= delay_s <= max(longest_s, LONGEST_ASKED_S * 1.5), count


def test_hosts_that_were_told_the_same_time_do_not_come_back_in_step() -> None:
    for asked_s in ASKED_S[3:]:
        delays_s = [
            retry_delay_s(1, first_s=5.0, longest_s=900.0, spread=spread, retry_after_s=asked_s) for spread in SPREADS
        ]
        assert delays_s == pytest.approx([asked_s * (1 + 0.5 * spread) for spread in SPREADS])


def test_who_asked_for_nothing_is_waited_for_as_before() -> None:
    for count, spread in itertools.product(COUNTS, SPREADS):
        plain_s = retry_delay_s(count, first_s=5.0, longest_s=900.0, spread=spread)
        assert retry_delay_s(count, first_s=5.0, longest_s=900.0, spread=spread, retry_after_s=None) == plain_s
