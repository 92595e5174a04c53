"""
The sending half of a job: one read of its disks for every destination that is due, then a proof of each copy.

An attempt is journaled before its store hears of it, with nothing in it that could open it; it is made with a key,
a salt and a nonce prefix drawn for it alone, and none of them outlives it here (invariant 6). A stream that was
cut off is never resumed: its attempt becomes obsolete, is deleted from the store once that answers, and the copy is
sent anew.
"""

import asyncio
import random
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from autobackup import logs
from autobackup.config import RetrySection
from autobackup.container import header as container_header
from autobackup.container.header import HEADER_BYTES
from autobackup.container.seal import NONCE_PREFIX_BYTES, SALT_BYTES, sealed_bytes
from autobackup.errors import (
    AutobackupError,
    Damaged,
    KeyLost,
    OverlayChanged,
    Refused,
    StoreRefused,
    StoreUnavailable,
    Transient,
)
from autobackup.flows.attempt import attempt_header, attempt_properties
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.gather import gather
from autobackup.flows.jobs import Jobs
from autobackup.flows.pacing import Pace
from autobackup.flows.tap import FanoutLimits, Outlet, Tap
from autobackup.flows.verify import prove_copy
from autobackup.flows.workers import Workers
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import (
    AttemptId,
    AttemptRecord,
    CopyRecord,
    CopyState,
    DestinationName,
    JobRecord,
)
from autobackup.rules.lifecycle import CopyEvent, retry_delay_s
from autobackup.stores import DataKey, OpenDestination

_log = logs.get("flows.send")
_NOT_PROVEN_PARKS: Final = 3  # a store that keeps returning other bytes than it was sent needs an operator
_Answer = TypeVar("_Answer")


class Send:
    """
    Sends and proves copies; changes their states and nothing else.

    *places* opens the destination of a copy, and raises `Refused` for one that is no longer in the configuration.
    """

    def __init__(
        self,
        *,
        jobs: Jobs,
        spool: Spool,
        places: Callable[[CopyRecord], OpenDestination],
        pace: Pace,
        limits: FanoutLimits,
        retry: RetrySection,
        workers: Workers,
        metrics: Metrics,
        host: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._spool = spool
        self._places = places
        self._pace = pace
        self._limits = limits
        self._retry = retry
        self._workers = workers
        self._metrics = metrics
        self._host = host
        self._clock = clock

    async def resume(self, record: JobRecord) -> JobRecord:
        """Copies that were being sent when the last process or step ended: cut off, to be sent anew."""
        cut = {c.destination: c for c in record.copies if c.state is CopyState.SENDING}
        if not cut:
            return record
        changes = {name: _obsolete(copy) for name, copy in cut.items()}
        return await self._jobs.move_copies(record.job, dict.fromkeys(cut, CopyEvent.INTERRUPTED), changes)

    async def outdate(self, record: JobRecord) -> JobRecord:
        """The disk changed after these copies were read: none of them is the last state."""
        record = await self.resume(record)
        old = {c.destination: c for c in record.copies if c.state in (CopyState.SENT, CopyState.VERIFIED)}
        if not old:
            return record
        changes = {name: _obsolete(copy) | {"verified_at_s": None} for name, copy in old.items()}
        return await self._jobs.move_copies(record.job, dict.fromkeys(old, CopyEvent.OUTDATED), changes)

    async def send(self, record: JobRecord, due: Sequence[DestinationName]) -> JobRecord:
        """
        Read the job's disks once and send them to every destination of *due* that can take them now.

        Raises what stands against reading (`DiskBusy`, `OverlayChanged`, `Refused`); what stands against one
        destination becomes that copy's own failure.
        """
        record = await self._sweep(record, due)
        ready = [c.destination for c in record.copies if c.destination in due and c.not_before_s <= self._clock()]
        if not ready:
            return record
        with ExitStack() as disks:
            fixed_length = self._limits.zstd_level is None
            gathered = await self._workers.blocking(
                partial(gather, record, self._spool, self._host, disks, fixed_length=fixed_length)
            )
            if any(not now.same_content(record.first_read.get(link, now)) for link, now in gathered.first_read.items()):
                raise OverlayChanged(f"job {record.job}: its disks changed between two reads")
            record = await self._jobs.update(
                record.job, first_read=gathered.first_read, not_captured=gathered.not_captured
            )
            announced_bytes = None
            if fixed_length:
                stored_bytes = await self._workers.blocking(gathered.contents.stored_bytes)
                announced_bytes = HEADER_BYTES + sealed_bytes(stored_bytes)
            record, outlets = await self._begin(record, ready, announced_bytes)
            if not outlets:
                return record
            started_s = time.monotonic()
            outcomes = await fan_out(gathered.contents, outlets, self._limits)
            self._metrics.read_bytes.inc(gathered.contents.read_bytes)
            self._metrics.stage_duration.labels(stage="send").observe(time.monotonic() - started_s)
            contents = gathered.contents
        if any(isinstance(outcome, Sent) for outcome in outcomes.values()):
            record = await self._jobs.update(
                record.job,
                unreadable=record.unreadable or bool(contents.unreadable),
                member_digests={name: digest.sha256 for name, digest in contents.digests.items()},
            )
        record = await self._settle(record, outcomes, elapsed_s=time.monotonic() - started_s)
        changed = next((o for o in outcomes.values() if isinstance(o, OverlayChanged)), None)
        if changed is not None:
            raise changed
        return record

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
        return await self._sweep(record, left)

    # ---- before the read --------------------------------------------------------------------------------

    async def _sweep(self, record: JobRecord, names: Sequence[DestinationName]) -> JobRecord:
        """Ask each store if it can take or give, and delete the copy's obsolete attempts there."""
        answers = await self._side_by_side({name: self._asked(_copy(record, name)) for name in names})
        for name, error in answers.items():
            if error is not None:
                self._say_not_begun(record, name, error)
                record = await self._copy_failed(record, name, error, event=None)
            elif _copy(record, name).obsolete:
                record = await self._jobs.move_copies(record.job, {}, {name: {"obsolete": ()}})
        return record

    async def _asked(self, copy: CopyRecord) -> None:
        place = self._places(copy)
        await place.store.check()
        for attempt in copy.obsolete:
            await place.keys.destroy(attempt)
            await place.store.delete(attempt)

    async def _side_by_side(
        self, questions: Mapping[DestinationName, Coroutine[Any, Any, _Answer]]
    ) -> dict[DestinationName, _Answer | AutobackupError]:
        """
        Ask several destinations at once. What an answer is not, or an `AutobackupError`, is raised.

        Once one has answered well, those that are silent for the time that would detach them wait for another try.
        """
        tasks = {name: asyncio.ensure_future(question) for name, question in questions.items()}
        answers: dict[DestinationName, _Answer | AutobackupError] = {}
        if not tasks:
            return answers
        try:
            done, late = await asyncio.wait(tasks.values(), timeout=self._limits.detach_after_s)
            if late and not any(task.exception() is None for task in done):
                await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(late, timeout=self._limits.detach_after_s)
            for name, task in tasks.items():
                try:
                    answers[name] = task.result()
                except asyncio.InvalidStateError:
                    limit_s = self._limits.detach_after_s
                    answers[name] = StoreUnavailable(f"no answer in {limit_s:g} s, and others were ready; tried later")
                except AutobackupError as exc:
                    answers[name] = exc
        finally:
            for task in tasks.values():
                task.cancel()
        return answers

    def _say_not_begun(self, record: JobRecord, name: DestinationName, error: AutobackupError) -> None:
        self._metrics.stage_attempts.labels(stage="check", outcome=type(error).__name__).inc()
        _log.warning("send.not_begun", job=record.job, instance=record.instance, destination=name, error=str(error))

    async def _begin(
        self, record: JobRecord, ready: Sequence[DestinationName], announced_bytes: int | None
    ) -> tuple[JobRecord, list[Outlet]]:
        """Journal the attempts, draw their keys, and only then make the outlets."""
        attempts = {
            name: AttemptRecord(
                attempt=AttemptId(str(uuid.uuid4())),
                started_at_s=self._clock(),
                digest_algorithm=self._places(_copy(record, name)).store.digest_algorithm,
            )
            for name in ready
        }
        record = await self._jobs.move_copies(
            record.job,
            dict.fromkeys(attempts, CopyEvent.STARTED),
            {name: {"attempt": attempt} for name, attempt in attempts.items()},
        )
        drawn = await self._side_by_side(
            {name: self._places(_copy(record, name)).keys.draw(one.attempt) for name, one in attempts.items()}
        )
        outlets = []
        for name, key in drawn.items():
            if isinstance(key, AutobackupError):
                self._say_not_begun(record, name, key)
                event = CopyEvent.INTERRUPTED if isinstance(key, Transient) else CopyEvent.GAVE_UP
                record = await self._copy_failed(record, name, key, event=event)
            else:
                outlets.append(self._outlet(record, name, attempts[name], key, announced_bytes))
        return record, outlets

    def _outlet(
        self,
        record: JobRecord,
        name: DestinationName,
        attempt: AttemptRecord,
        key: DataKey,
        announced_bytes: int | None,
    ) -> Outlet:
        place = self._places(_copy(record, name))
        header = attempt_header(record, place.destination, attempt, key.header_words)
        return Outlet(
            destination=name,
            header=container_header.encode(header),
            key=key.key,
            salt=secrets.token_bytes(SALT_BYTES),
            nonce_prefix=secrets.token_bytes(NONCE_PREFIX_BYTES),
            digest_algorithm=attempt.digest_algorithm,
            announced_bytes=announced_bytes,
            send=partial(
                self._put,
                place,
                attempt.attempt,
                attempt_properties(record, header, host=self._host, agent_id=self._spool.agent_id),
            ),
        )

    async def _put(self, place: OpenDestination, attempt: AttemptId, properties: Mapping[str, str], tap: Tap) -> None:
        body = self._pace.paced(tap, place.destination)
        await place.store.put(attempt, body, properties=properties)

    # ---- after it ---------------------------------------------------------------------------------------

    async def _settle(
        self, record: JobRecord, outcomes: Mapping[DestinationName, Sent | AutobackupError], *, elapsed_s: float
    ) -> JobRecord:
        for name, outcome in outcomes.items():
            words: dict[str, Any] = {"outcome": "sent", "error": ""}
            if isinstance(outcome, Sent):
                attempt = _copy(record, name).attempt
                assert attempt is not None
                attempt = replace(attempt, size_bytes=outcome.size_bytes, digest=outcome.digest)
                record = await self._jobs.move_copies(record.job, {name: CopyEvent.SENT}, {name: {"attempt": attempt}})
                self._metrics.sealed_bytes.labels(destination=name).inc(outcome.size_bytes)
                words["sent_bytes"] = outcome.size_bytes
            else:
                words = {"outcome": type(outcome).__name__, "error": str(outcome)}
                event = CopyEvent.GAVE_UP if isinstance(outcome, Refused) else CopyEvent.INTERRUPTED
                record = await self._copy_failed(record, name, outcome, event=event)
            self._metrics.stage_attempts.labels(stage="send", outcome=words["outcome"]).inc()
            say = _log.info if isinstance(outcome, Sent) else _log.warning
            say("send.attempt", job=record.job, instance=record.instance, destination=name,
                      elapsed_s=round(elapsed_s, 3), **words)  # fmt: skip
        return record

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
            return await self._copy_failed(record, name, error, event=None)  # what was sent stays sent
        worth_sending = (
            isinstance(error, Damaged | StoreRefused | KeyLost) and copy.failure_count + 1 < _NOT_PROVEN_PARKS
        )
        return await self._copy_failed(
            record, name, error, event=CopyEvent.NOT_PROVEN if worth_sending else CopyEvent.GAVE_UP
        )

    async def _copy_failed(
        self, record: JobRecord, name: DestinationName, error: AutobackupError, *, event: CopyEvent | None
    ) -> JobRecord:
        """Journal a failure of one copy: its own back-off, its own count, its obsolete attempt."""
        copy = _copy(record, name)
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
            changes |= _obsolete(copy)
        return await self._jobs.move_copies(record.job, {name: event} if event else {}, {name: changes})


def _copy(record: JobRecord, name: DestinationName) -> CopyRecord:
    return next(copy for copy in record.copies if copy.destination == name)


def _obsolete(copy: CopyRecord) -> dict[str, Any]:
    """An attempt that will not be used is deleted from its store sooner or later, and named until it is."""
    gone = (copy.attempt.attempt,) if copy.attempt is not None else ()
    return {"attempt": None, "obsolete": (*copy.obsolete, *gone)}
