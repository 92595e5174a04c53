"""
The copies of a job between two sendings: their failures journaled, what they left behind deleted.
"""

import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from autobackup import logs
from autobackup.config import RetrySection
from autobackup.errors import AutobackupError, StoreRefused, Transient
from autobackup.flows.jobs import Jobs
from autobackup.flows.seal_base import take_back
from autobackup.flows.side_by_side import side_by_side
from autobackup.metrics import Metrics
from autobackup.model import AttemptId, CopyRecord, CopyState, DestinationName, JobRecord
from autobackup.rules.lifecycle import CopyEvent, retry_delay_s
from autobackup.stores import OpenDestination

_log = logs.get("flows.copies")
_Answer = TypeVar("_Answer")


class Copies:
    """
    What goes wrong with copies, and what is left of them.

    *places* opens the destination of a copy, and raises `Refused` for one that is no longer in the configuration.
    *late_after_s*: how long one destination may be silent while others are ready.
    """

    def __init__(
        self,
        *,
        jobs: Jobs,
        places: Callable[[CopyRecord], OpenDestination],
        retry: RetrySection,
        late_after_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._places = places
        self._retry = retry
        self._late_after_s = late_after_s
        self._metrics = metrics
        self._clock = clock

    async def at_once(
        self, questions: Mapping[DestinationName, Coroutine[Any, Any, _Answer]]
    ) -> dict[DestinationName, _Answer | AutobackupError]:
        """Several destinations asked side by side."""
        return await side_by_side(questions, late_after_s=self._late_after_s)

    async def sweep(self, record: JobRecord, names: Sequence[DestinationName]) -> JobRecord:
        """Ask each store if it can take or give, and delete the copy's obsolete attempts there."""
        answers = await self.at_once({name: self._asked(copy_of(record, name)) for name in names})
        for name, error in answers.items():
            if error is not None:
                self.not_begun(record, name, error)
                record = await self.failed(record, name, error, event=None)
            elif copy_of(record, name).obsolete or copy_of(record, name).base_attempt:
                record = await self._jobs.move_copies(record.job, {}, {name: {"obsolete": (), "base_attempt": None}})
        return record

    async def _asked(self, copy: CopyRecord) -> None:
        place = self._places(copy)
        await place.store.check()
        for attempt in copy.obsolete:
            await place.keys.destroy(attempt)
            await place.store.delete(attempt)
        if copy.base_attempt is not None and await self._is_cut(place, copy):
            await take_back(place, copy.base_attempt)

    async def _is_cut(self, place: OpenDestination, copy: CopyRecord) -> bool:
        """Whether the base that was being sent for it did not arrive: one that did may have others on it by now."""
        try:
            await place.store.stat(copy.base_attempt or AttemptId(""))
        except StoreRefused:
            return True
        return False

    def not_begun(self, record: JobRecord, name: DestinationName, error: AutobackupError) -> None:
        """Say what kept a copy from being sent."""
        self._metrics.stage_attempts.labels(stage="check", outcome=type(error).__name__).inc()
        _log.warning("send.not_begun", job=record.job, instance=record.instance, destination=name, error=str(error))

    async def failed(
        self, record: JobRecord, name: DestinationName, error: AutobackupError, *, event: CopyEvent | None
    ) -> JobRecord:
        """Journal a failure of one copy: its own back-off, its own count, its obsolete attempt."""
        copy = copy_of(record, name)
        self._metrics.destination_reachable.labels(destination=name).set(0)
        count = copy.failure_count + 1
        delay_s = retry_delay_s(
            count,
            first_s=self._retry.first_s,
            longest_s=self._retry.longest_s,
            spread=random.random(),  # noqa: S311
            retry_after_s=getattr(error, "retry_after_s", None),
        )
        changes: dict[str, Any] = {
            "failure_count": count,
            "not_before_s": self._clock() + delay_s,
            "last_error": f"{name}: {error}",
        }
        if event is None and not isinstance(error, Transient) and copy.state is CopyState.QUEUED:
            event = CopyEvent.GAVE_UP
        if event is not None:
            changes |= obsolete(copy)
        return await self._jobs.move_copies(record.job, {name: event} if event else {}, {name: changes})


def copy_of(record: JobRecord, name: DestinationName) -> CopyRecord:
    """The copy for the destination *name*."""
    return next(copy for copy in record.copies if copy.destination == name)


def obsolete(copy: CopyRecord) -> dict[str, Any]:
    """An attempt that will not be used is deleted from its store sooner or later, and named until it is."""
    gone = (copy.attempt.attempt,) if copy.attempt is not None else ()
    return {"attempt": None, "anchors": (), "obsolete": (*copy.obsolete, *gone)}
