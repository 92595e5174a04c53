"""
The jobs of this host: the one place where a job's or a copy's state changes.

Every change is decided by `rules.lifecycle`, written to the spool, and only then true here; the effect comes after
that. If the journal cannot be written, `SpoolUnavailable` is raised and nothing has changed.

It does not know what a state demands: that is `flows.backup`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autobackup import logs
from autobackup.errors import Refused
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import CopyRecord, CopyState, DestinationName, JobId, JobRecord, JobState
from autobackup.rules.lifecycle import (
    CopyEvent,
    IllegalTransition,
    JobEvent,
    move_copy,
    move_job,
)

_log = logs.get("flows.jobs")


class Jobs:
    """What is in the spool, by id. *intend* sees every record right before it is journaled, *observe* right after."""

    def __init__(
        self,
        *,
        spool: Spool,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        intend: Callable[[JobRecord], None] = lambda _record: None,
        observe: Callable[[JobRecord], None] = lambda _record: None,
    ) -> None:
        self._spool = spool
        self._metrics = metrics
        self._clock = clock
        self._intend = intend
        self._observe = observe
        self._records: dict[JobId, JobRecord] = {}

    def load(self) -> None:
        """Walk over the spool. What was under way when the last process ended is picked up by `flows.backup`."""
        for record in self._spool.load_jobs():
            self._records[record.job] = record
        self._count()

    def all(self) -> list[JobRecord]:
        return sorted(self._records.values(), key=lambda record: record.created_at_s)

    def get(self, job: JobId) -> JobRecord:
        try:
            return self._records[job]
        except KeyError:
            raise Refused(f"no job {job} in the spool") from None

    async def create(self, record: JobRecord) -> None:
        self._intend(record)
        await self._spool.create_job(record)
        self._accept(record)

    async def move(self, job: JobId, event: JobEvent, **changes: Any) -> JobRecord:
        """Take one step of the job's table, together with *changes* to its record."""
        record = self.get(job)
        return await self._write(replace(record, state=move_job(record.state, event), **changes))

    async def update(self, job: JobId, **changes: Any) -> JobRecord:
        """Change what the record says without changing its state."""
        return await self._write(replace(self.get(job), **changes))

    async def move_copies(
        self,
        job: JobId,
        events: Mapping[DestinationName, CopyEvent],
        changes: Mapping[DestinationName, Mapping[str, Any]],
    ) -> JobRecord:
        """Take one step for each copy in *events*, with *changes* to any, in one write."""
        record = self.get(job)
        copies = []
        for copy in record.copies:
            if copy.destination in events:
                copy = replace(copy, state=move_copy(copy.state, events[copy.destination]))
            copies.append(replace(copy, **changes.get(copy.destination, {})))
        return await self._write(replace(record, copies=tuple(copies)))

    async def order_retry(self, job: JobId) -> JobRecord:
        """An operator says: try again now. Parked copies and the job go back to the queue."""
        record = self.get(job)
        copies = tuple(_hurried(copy) for copy in record.copies)
        fresh = {"copies": copies, "not_before_s": 0.0, "failure_count": 0}
        if record.state is JobState.PARKED:
            return await self.move(job, JobEvent.RETRY_ORDERED, last_error="", **fresh)
        if record.state in (JobState.SENDING, JobState.DONE):
            raise Refused(f"job {job} is {record.state}; there is nothing to retry")
        return await self.update(job, **fresh)

    async def order_discard(self, job: JobId) -> JobRecord:
        """An operator says: let this instance's last state go. On the record, and the only end without a proof."""
        try:
            return await self.move(job, JobEvent.DISCARD_ORDERED, not_before_s=0.0)
        except IllegalTransition:
            raise Refused(f"job {job} is {self.get(job).state}; only a queued or parked job can be discarded") from None

    async def order_discard_of(self, job: JobId, destination: DestinationName) -> JobRecord:
        """An operator says: this destination gets no copy. The others still must; one of them, at least."""
        record = self.get(job)
        copy = next((copy for copy in record.copies if copy.destination == destination), None)
        if copy is None:
            known = ", ".join(copy.destination for copy in record.copies)
            raise Refused(f"job {job} has no copy for {destination!r}; it has: {known}")
        if record.state not in (JobState.QUEUED, JobState.PARKED):
            raise Refused(f"job {job} is {record.state}; only while it is queued or parked can a copy be discarded")
        if not any(other.state is not CopyState.DISCARDED for other in record.copies if other is not copy):
            raise Refused(f"{destination!r} is the only destination that is left; discard the job, or retry it")
        try:
            gone = (copy.attempt.attempt,) if copy.attempt is not None else ()
            words = {"attempt": None, "obsolete": (*copy.obsolete, *gone), "last_error": "discarded by an operator"}
            record = await self.move_copies(job, {destination: CopyEvent.DISCARD_ORDERED}, {destination: words})
        except IllegalTransition:
            raise Refused(f"the copy for {destination!r} is {copy.state}; there is nothing to discard") from None
        _log.warning("copy.discarded", job=job, instance=record.instance, destination=destination,
                     consequence="that destination gets no copy")  # fmt: skip
        return await self.order_retry(job)

    async def forget(self, job: JobId) -> None:
        """The folder of a finished job goes, then the job."""
        await self._spool.remove_job(job)
        self._records.pop(job, None)
        self._count()

    async def _write(self, record: JobRecord) -> JobRecord:
        record = replace(record, updated_at_s=self._clock())
        self._intend(record)
        await self._spool.write_job(record)
        self._accept(record)
        return record

    def _accept(self, record: JobRecord) -> None:
        self._records[record.job] = record
        self._count()
        self._observe(record)

    def _count(self) -> None:
        states = [record.state for record in self._records.values()]
        for state in JobState:
            self._metrics.jobs.labels(state=state.value).set(states.count(state))
        ages = [r.created_at_s for r in self._records.values() if r.state not in (JobState.DONE, JobState.KEPT)]
        self._metrics.oldest_job_age.set(max(0.0, self._clock() - min(ages)) if ages else 0.0)


def _hurried(copy: CopyRecord) -> CopyRecord:
    if copy.state is CopyState.PARKED:
        copy = replace(copy, state=move_copy(copy.state, CopyEvent.RETRY_ORDERED))
    return replace(copy, not_before_s=0.0)
