"""
What may become of a job and of each of its copies: two tables, and nothing else decides a state.

A job is `verified` when every copy is settled (verified, or discarded by an operator on the record) and at
least one is verified. `scrubbing` is journaled before the first byte is overwritten: from there a job can only
go forward, because the disk can no longer be captured again.

Invariants 1 and 4: without `verified` there is no way to `scrubbing`, and every way out of the spool leads
through `verified` or an operator's `discard`.
"""

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from autobackup.model import CopyRecord, CopyState, JobRecord, JobState, VerdictKind


class JobEvent(enum.StrEnum):
    """What happened to a job."""

    STARTED = "started"
    INTERRUPTED = "interrupted"  # crash, stop, or copies still to be sent: try again
    ALL_VERIFIED = "all_verified"
    CHANGED = "changed"  # torn capture: read it again
    SCRUB_BEGUN = "scrub_begun"
    SCRUBBED = "scrubbed"
    NOT_TO_BE_SCRUBBED = "not_to_be_scrubbed"  # still named elsewhere, or not a terminated instance's
    NAME_GONE = "name_gone"
    RECEIPTED = "receipted"
    GAVE_UP = "gave_up"  # retrying cannot help
    RETRY_ORDERED = "retry_ordered"
    DISCARD_ORDERED = "discard_ordered"


class CopyEvent(enum.StrEnum):
    """What happened to one copy."""

    STARTED = "started"
    INTERRUPTED = "interrupted"
    SENT = "sent"
    PROVEN = "proven"
    NOT_PROVEN = "not_proven"
    OUTDATED = "outdated"  # the disk changed after this copy was read
    GAVE_UP = "gave_up"
    RETRY_ORDERED = "retry_ordered"
    DISCARD_ORDERED = "discard_ordered"


JOB_MOVES: Final[Mapping[tuple[JobState, JobEvent], JobState]] = MappingProxyType(
    {
        (JobState.QUEUED, JobEvent.STARTED): JobState.SENDING,
        (JobState.QUEUED, JobEvent.GAVE_UP): JobState.PARKED,
        (JobState.QUEUED, JobEvent.DISCARD_ORDERED): JobState.DISCARDED,
        (JobState.SENDING, JobEvent.INTERRUPTED): JobState.QUEUED,
        (JobState.SENDING, JobEvent.CHANGED): JobState.QUEUED,
        (JobState.SENDING, JobEvent.ALL_VERIFIED): JobState.VERIFIED,
        (JobState.SENDING, JobEvent.GAVE_UP): JobState.PARKED,
        (JobState.VERIFIED, JobEvent.CHANGED): JobState.QUEUED,
        (JobState.VERIFIED, JobEvent.GAVE_UP): JobState.PARKED,
        (JobState.VERIFIED, JobEvent.SCRUB_BEGUN): JobState.SCRUBBING,
        (JobState.VERIFIED, JobEvent.NOT_TO_BE_SCRUBBED): JobState.KEPT,
        (JobState.SCRUBBING, JobEvent.SCRUBBED): JobState.SCRUBBED,
        (JobState.SCRUBBING, JobEvent.NOT_TO_BE_SCRUBBED): JobState.KEPT,
        (JobState.SCRUBBED, JobEvent.RECEIPTED): JobState.DONE,
        (JobState.KEPT, JobEvent.NAME_GONE): JobState.DONE,
        (JobState.PARKED, JobEvent.RETRY_ORDERED): JobState.QUEUED,
        (JobState.PARKED, JobEvent.DISCARD_ORDERED): JobState.DISCARDED,
        (JobState.DISCARDED, JobEvent.RECEIPTED): JobState.DONE,
    }
)

COPY_MOVES: Final[Mapping[tuple[CopyState, CopyEvent], CopyState]] = MappingProxyType(
    {
        (CopyState.QUEUED, CopyEvent.STARTED): CopyState.SENDING,
        (CopyState.QUEUED, CopyEvent.GAVE_UP): CopyState.PARKED,
        (CopyState.QUEUED, CopyEvent.DISCARD_ORDERED): CopyState.DISCARDED,
        (CopyState.SENDING, CopyEvent.SENT): CopyState.SENT,
        (CopyState.SENDING, CopyEvent.INTERRUPTED): CopyState.QUEUED,
        (CopyState.SENDING, CopyEvent.GAVE_UP): CopyState.PARKED,
        (CopyState.SENT, CopyEvent.PROVEN): CopyState.VERIFIED,
        (CopyState.SENT, CopyEvent.NOT_PROVEN): CopyState.QUEUED,
        (CopyState.SENT, CopyEvent.OUTDATED): CopyState.QUEUED,
        (CopyState.SENT, CopyEvent.GAVE_UP): CopyState.PARKED,
        (CopyState.SENT, CopyEvent.DISCARD_ORDERED): CopyState.DISCARDED,
        (CopyState.VERIFIED, CopyEvent.OUTDATED): CopyState.QUEUED,
        (CopyState.PARKED, CopyEvent.RETRY_ORDERED): CopyState.QUEUED,
        (CopyState.PARKED, CopyEvent.DISCARD_ORDERED): CopyState.DISCARDED,
    }
)

_LONGEST_ASKED_S: Final = 3600.0  # a Retry-After of a day is a mistake, or an attack
_State = TypeVar("_State", JobState, CopyState)
_Event = TypeVar("_Event", JobEvent, CopyEvent)


class IllegalTransition(RuntimeError):
    """A bug, always. Not an `AutobackupError`, so that nothing handles it."""


def move_job(state: JobState, event: JobEvent) -> JobState:
    """Return the state after *event*, or raise `IllegalTransition`."""
    return _move(JOB_MOVES, state, event)


def move_copy(state: CopyState, event: CopyEvent) -> CopyState:
    """Return the state after *event*, or raise `IllegalTransition`."""
    return _move(COPY_MOVES, state, event)


def all_settled(copies: Iterable[CopyRecord]) -> bool:
    """True when nothing more is owed to any destination and at least one holds a proven copy."""
    states = [copy.state for copy in copies]
    settled = {CopyState.VERIFIED, CopyState.DISCARDED}
    return CopyState.VERIFIED in states and settled.issuperset(states)


def only_parked_left(copies: Iterable[CopyRecord]) -> bool:
    """True when no copy can move without an operator and at least one is parked."""
    states = {copy.state for copy in copies}
    return CopyState.PARKED in states and states <= {CopyState.PARKED, CopyState.VERIFIED, CopyState.DISCARDED}


def scrub_refusal(job: JobRecord) -> str | None:
    """Why the disks of *job* must not be overwritten, or None. The gates that need no machine (invariant 2)."""
    if job.state is not JobState.SCRUBBING:
        return f"is {job.state}, not {JobState.SCRUBBING}"
    if job.verdict is not VerdictKind.TERMINATED:
        return f"its verdict is {job.verdict}"
    if not all_settled(job.copies):
        return "not every destination holds a proven copy"
    if job.unreadable:
        return "parts of its disks could not be read"
    return None


def retry_delay_s(
    failure_count: int, *, first_s: float, longest_s: float, spread: float, retry_after_s: float | None = None
) -> float:
    """
    Seconds until the next try: doubling from *first_s*, capped at *longest_s*, never giving up.

    *spread* is the caller's draw from 0..1: the delay falls between half and whole of the nominal one, so that
    1,000 hosts which lost the same store do not come back in step. *retry_after_s* is the least that the other side has
    asked for; up to a half of it is added, for the same reason.
    """
    asked_s = 0.0 if retry_after_s is None else min(retry_after_s, _LONGEST_ASKED_S) * (1.0 + 0.5 * spread)
    nominal_s = min(longest_s, first_s * 2.0 ** min(max(failure_count - 1, 0), 32))
    return max(asked_s, nominal_s * (0.5 + 0.5 * spread))


def _move(moves: Mapping[tuple[_State, _Event], _State], state: _State, event: _Event) -> _State:
    try:
        return moves[state, event]
    except KeyError:
        raise IllegalTransition(f"{event} in state {state}") from None
