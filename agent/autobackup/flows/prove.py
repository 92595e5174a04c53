"""
The proving half of a copy: what its store holds, opened with a key fetched anew, and what it stands on still kept.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from autobackup import logs
from autobackup.errors import AutobackupError, Damaged, KeyLost, StoreRefused, Transient
from autobackup.flows.copies import Copies
from autobackup.flows.jobs import Jobs
from autobackup.flows.secure import Secure
from autobackup.flows.verify import prove_copy
from autobackup.flows.workers import Workers
from autobackup.metrics import Metrics
from autobackup.model import CopyRecord, CopyState, JobRecord
from autobackup.rules.lifecycle import CopyEvent
from autobackup.stores import OpenDestination

_log = logs.get("flows.prove")
_NOT_PROVEN_PARKS: Final = 3  # a store that keeps returning other bytes than it was sent needs an operator


class Prove:
    """Proves copies that were sent."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        copies: Copies,
        places: Callable[[CopyRecord], OpenDestination],
        secure: Secure,
        workers: Workers,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._copies = copies
        self._places = places
        self._secure = secure
        self._workers = workers
        self._metrics = metrics
        self._clock = clock

    async def prove(self, record: JobRecord) -> JobRecord:
        """Prove every copy that was sent, and delete what proven copies left behind in their stores."""
        proving = {
            asyncio.ensure_future(self._proof(record, copy)): copy
            for copy in record.copies
            if copy.state is CopyState.SENT and copy.not_before_s <= self._clock()
        }
        try:
            while proving:
                done, _ = await asyncio.wait(proving, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    record = await self._proven(record, proving.pop(task), task.result())
        finally:
            for task in proving:
                task.cancel()
        left = [
            copy.destination
            for copy in record.copies
            if copy.state is CopyState.VERIFIED and copy.obsolete and copy.not_before_s <= self._clock()
        ]
        return await self._copies.sweep(record, left)

    # ---- inside -----------------------------------------------------------------------------------------

    async def _proof(self, record: JobRecord, copy: CopyRecord) -> AutobackupError | None:
        """Prove one copy; what stands against it, or None."""
        name, sent = copy.destination, copy.attempt
        assert sent is not None
        outcome, error, started_s = "cancelled", "", time.monotonic()
        try:
            place = self._places(copy)
            await place.store.check()  # a role that was taken from us is no proof against the copy
            await prove_copy(
                store=place.store, keys=place.keys, job=record.job, sent=sent,
                readback=place.destination.verify == "readback", workers=self._workers,
            )  # fmt: skip
            await self._secure.require(place, copy)
            await place.keys.settle(sent.attempt)
            outcome = "proven"
        except AutobackupError as exc:
            outcome, error = type(exc).__name__, str(exc)
            return exc
        finally:
            self._metrics.stage_attempts.labels(stage="verify", outcome=outcome).inc()
            _log.info("verify.attempt", job=record.job, instance=record.instance, destination=name, outcome=outcome,
                      error=error, elapsed_s=round(time.monotonic() - started_s, 3))  # fmt: skip
        return None

    async def _proven(self, record: JobRecord, copy: CopyRecord, error: AutobackupError | None) -> JobRecord:
        """Journal what came of a proof."""
        name = copy.destination
        if error is None:
            self._metrics.last_success.labels(destination=name).set(self._clock())
            self._metrics.destination_reachable.labels(destination=name).set(1)
            return await self._jobs.move_copies(
                record.job,
                {name: CopyEvent.PROVEN},
                {name: {"verified_at_s": self._clock(), "failure_count": 0, "last_error": ""}},
            )
        if isinstance(error, Transient):
            return await self._copies.failed(record, name, error, event=None)  # what was sent stays sent
        worth_sending = (
            isinstance(error, Damaged | StoreRefused | KeyLost) and copy.failure_count + 1 < _NOT_PROVEN_PARKS
        )
        return await self._copies.failed(
            record, name, error, event=CopyEvent.NOT_PROVEN if worth_sending else CopyEvent.GAVE_UP
        )
