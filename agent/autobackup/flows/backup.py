"""
One job on its way: queued -> sending -> verified -> scrubbing -> scrubbed -> done, one step at a time.

Each step is journaled before its effect (`flows.jobs`), so that a kill at any instant is a start from the last
one. What a failure means is read off its branch of `errors`: transient ones back off and never give up, refusals
and damage park the job for an operator. Once `scrubbing` is journaled there is no way back, only forward.

`flows.send` does the sending; this module decides nothing that `rules.lifecycle` has not written down.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from autobackup import logs
from autobackup.config import RetrySection
from autobackup.errors import (
    AutobackupError,
    OverlayChanged,
    Refused,
    SpoolUnavailable,
    Transient,
)
from autobackup.flows.jobs import Jobs
from autobackup.flows.receipt import receipt, why_not_scrubbed
from autobackup.flows.send import Send
from autobackup.flows.workers import Workers
from autobackup.host.claims import named_path
from autobackup.host.disks import HeldDisk
from autobackup.host.scrub import ScrubMethod, method_named, scrub_file
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import CopyState, HeldFile, JobId, JobRecord, JobState, VerdictKind
from autobackup.rules.lifecycle import JobEvent, all_settled, only_parked_left, retry_delay_s

_log = logs.get("flows.backup")
_KEPT_LOOK_S: Final = 60.0  # how often a job that was kept looks whether the other name is gone


class Backup:
    """Takes jobs forward. One task per job at a time; `advance` may be called again at any time."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        spool: Spool,
        send: Send,
        scrub_methods: Mapping[str, ScrubMethod],
        retry: RetrySection,
        workers: Workers,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        on_finished: Callable[[], Awaitable[None]],
    ) -> None:
        self._jobs = jobs
        self._spool = spool
        self._send = send
        self._scrub_methods = scrub_methods
        self._retry = retry
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._on_finished = on_finished

    async def advance(self, job: JobId) -> None:
        """Take *job* as far as it goes now. Returns when it waits, is parked, or is gone."""
        while True:
            record = self._jobs.get(job)
            if record.state is JobState.PARKED or record.not_before_s > self._clock():
                return
            try:
                if not await self._step(record):
                    return
            except AutobackupError as exc:
                await self._failed(job, exc)

    async def _step(self, record: JobRecord) -> bool:
        """One step. False when there is nothing more to do now."""
        match record.state:
            case JobState.QUEUED:
                await self._workers.blocking(partial(self._spool.take_over, record))
                await self._jobs.move(record.job, JobEvent.STARTED)
            case JobState.SENDING:
                return await self._send_and_prove(record)
            case JobState.VERIFIED:
                await self._open_gates(record)
            case JobState.SCRUBBING:
                await self._scrub(record)
            case JobState.SCRUBBED | JobState.DISCARDED:
                await self._finish(record)
            case JobState.KEPT:
                await self._look_at_kept(record)
            case JobState.DONE:
                await self._jobs.forget(record.job)
                await self._on_finished()
                return False
            case JobState.PARKED:
                return False
        return True

    # ---- sending ----------------------------------------------------------------------------------------

    async def _send_and_prove(self, record: JobRecord) -> bool:
        """False where copies are left for later: another job may have this one's place until then."""
        if not record.copies:
            raise Refused("no destination is known for it; discard it, or back its disks up by hand first")
        record = await self._send.resume(record)
        due = [
            copy for copy in record.copies
            if copy.state is CopyState.QUEUED and copy.not_before_s <= self._clock()
        ]  # fmt: skip
        if due:
            record = await self._send.send(record, [copy.destination for copy in due])
        record = await self._send.prove(record)
        waiting = [
            copy for copy in record.copies
            if copy.state in (CopyState.QUEUED, CopyState.SENT) or (copy.state is CopyState.VERIFIED and copy.obsolete)
        ]  # fmt: skip
        if all_settled(record.copies) and not waiting:
            await self._jobs.move(record.job, JobEvent.ALL_VERIFIED, failure_count=0, last_error="")
            return True
        if only_parked_left(record.copies):
            reasons = "; ".join(copy.last_error for copy in record.copies if copy.state is CopyState.PARKED)
            await self._jobs.move(record.job, JobEvent.GAVE_UP, last_error=reasons)
            _log.error("job.parked", job=record.job, instance=record.instance, error=reasons)
        else:
            await self._jobs.move(
                record.job,
                JobEvent.INTERRUPTED,
                not_before_s=min(copy.not_before_s for copy in waiting),
                last_error="; ".join(copy.last_error for copy in waiting),
            )
        return False

    # ---- the gates in front of the scrub ----------------------------------------------------------------

    async def _open_gates(self, record: JobRecord) -> None:
        """Look at every file once more, under the lease, before a byte of any is overwritten."""
        if record.unreadable:
            raise Refused("parts of the disks could not be read and were sent as zeros; the originals are kept")
        method_named(record.scrub_method, self._scrub_methods)
        if await self._send.outdate_orphans(record):
            await self._jobs.move(record.job, JobEvent.CHANGED, last_error="a parent was lost; sent anew")
            return
        named = await self._workers.blocking(partial(self._check_files, record))
        if len(named) == len(record.files) or record.verdict is not VerdictKind.TERMINATED:
            await self._keep(record)
        else:
            await self._jobs.move(record.job, JobEvent.SCRUB_BEGUN)

    def _check_files(self, record: JobRecord) -> list[str]:
        """The links that Nova still names; raises when a file is not, byte for byte, what was captured."""
        named = []
        for held in record.files:
            with HeldDisk(os.path.join(self._spool.job_folder(record.job), held.link)) as disk:
                disk.require_idle()
                disk.require_unchanged(record.first_read[held.link])
                if disk.link_count() > 1:
                    named.append(held.link)
        return named

    # ---- scrubbing --------------------------------------------------------------------------------------

    async def _scrub(self, record: JobRecord) -> None:
        method = method_named(record.scrub_method, self._scrub_methods)
        for held in record.files:
            named = await self._workers.blocking(partial(self._scrub_one, record, held, method))
            if named is not None and named not in record.still_named:
                record = await self._jobs.update(record.job, still_named=(*record.still_named, named))
                await self._workers.blocking(partial(self._unlink_ours, record, held))
        if record.still_named:
            await self._keep(record)
            return
        self._metrics.scrubs.labels(outcome=record.scrub_method).inc()
        await self._jobs.move(record.job, JobEvent.SCRUBBED, failure_count=0, last_error="")
        _log.info("job.scrubbed", job=record.job, instance=record.instance, method=record.scrub_method)

    def _scrub_one(self, record: JobRecord, held: HeldFile, method: ScrubMethod) -> str | None:
        """Scrub one file, or return the name that keeps it from being scrubbed."""
        path = os.path.join(self._spool.job_folder(record.job), held.link)
        if os.path.lexists(path) and os.lstat(path).st_nlink > 1:
            return self._name_of(record, held)
        scrub_file(record, held, folder=self._spool.job_folder(record.job), method=method)
        return None

    def _unlink_ours(self, record: JobRecord, held: HeldFile) -> None:
        path = os.path.join(self._spool.job_folder(record.job), held.link)
        if os.path.lexists(path):
            os.unlink(path)

    def _other_name(self, record: JobRecord, held: HeldFile) -> str | None:
        """The name that somebody else still has for the inode of *held*, where one is to be expected."""
        found = named_path(self._spool.instances_path, record.instance, held.disk, held.identity.inode)
        if found is None and os.path.lexists(held.source_path):  # firmware state lies elsewhere
            found = held.source_path if os.lstat(held.source_path).st_ino == held.identity.inode else None
        return found

    def _name_of(self, record: JobRecord, held: HeldFile) -> str:
        return self._other_name(record, held) or f"an unknown name of inode {held.identity.inode}"

    # ---- ends -------------------------------------------------------------------------------------------

    async def _keep(self, record: JobRecord) -> None:
        """Verified, not scrubbed: our names go, Nova's stay."""
        left = await self._workers.blocking(partial(self._names_left, record))
        names = tuple(dict.fromkeys((*record.still_named, *left)))
        why = why_not_scrubbed(replace(record, still_named=names))
        record = await self._jobs.move(
            record.job, JobEvent.NOT_TO_BE_SCRUBBED, still_named=names, failure_count=0,
            last_error=f"verified, not scrubbed: {why}",
        )  # fmt: skip
        self._metrics.scrubs.labels(outcome="kept").inc()
        if names:
            _log.warning("job.kept", job=record.job, instance=record.instance, names=list(names),
                         consequence="sealed and proven, but the host still has it; remove the names")  # fmt: skip
        else:
            _log.info("job.kept", job=record.job, instance=record.instance, reason=why)

    def _names_left(self, record: JobRecord) -> list[str]:
        """What others call the files that are still here."""
        left = []
        for held in record.files:
            path = os.path.join(self._spool.job_folder(record.job), held.link)
            if os.path.lexists(path) and os.lstat(path).st_nlink > 1:
                left.append(self._name_of(record, held))
        return left

    async def _look_at_kept(self, record: JobRecord) -> None:
        for held in record.files:
            await self._workers.blocking(partial(self._unlink_ours, record, held))
        if not self._spool.has_receipt(record.job):
            await self._spool.write_receipt(record.job, receipt(record))
        gone = all(self._other_name(record, held) is None for held in record.files)
        if gone:
            await self._jobs.move(record.job, JobEvent.NAME_GONE)
        else:
            await self._jobs.update(record.job, not_before_s=self._clock() + _KEPT_LOOK_S)

    async def _finish(self, record: JobRecord) -> None:
        if record.state is JobState.DISCARDED:
            await self._workers.blocking(partial(self._spool.take_over, record))
            for held in record.files:
                await self._workers.blocking(partial(self._unlink_ours, record, held))
            _log.warning(
                "job.discarded", job=record.job, instance=record.instance, consequence="its last state is gone"
            )
        await self._spool.write_receipt(record.job, receipt(replace(record, updated_at_s=self._clock())))
        await self._jobs.move(record.job, JobEvent.RECEIPTED)
        _log.info(
            "job.done", job=record.job, instance=record.instance, age_s=round(self._clock() - record.created_at_s, 1)
        )

    # ---- failures ---------------------------------------------------------------------------------------

    async def _failed(self, job: JobId, error: AutobackupError) -> None:
        """Back off, capture again, or park: by the branch of the error and by the state it met."""
        record = self._jobs.get(job)
        count = record.failure_count + 1
        delay_s = retry_delay_s(
            count,
            first_s=self._retry.first_s,
            longest_s=self._retry.longest_s,
            spread=random.random(),  # noqa: S311
        )
        later = {"failure_count": count, "not_before_s": self._clock() + delay_s, "last_error": str(error)}
        _log.warning("job.failed", job=job, instance=record.instance, state=record.state, kind=type(error).__name__,
                     error=str(error), failures=count)  # fmt: skip
        try:
            if isinstance(error, OverlayChanged) and record.state in (JobState.SENDING, JobState.VERIFIED):
                await self._send.outdate(record)
                await self._jobs.move(job, JobEvent.CHANGED, first_read={}, **later)
            elif isinstance(error, Transient) or record.state not in (JobState.SENDING, JobState.VERIFIED):
                await self._later(record, later)
            else:
                await self._jobs.move(job, JobEvent.GAVE_UP, failure_count=count, last_error=str(error))
                _log.error("job.parked", job=job, instance=record.instance, error=str(error))
        except SpoolUnavailable as exc:
            # not even the back-off can be journaled; wait here, so that a full disk is not also a busy loop
            _log.error("journal.unwritable", job=job, error=str(exc), consequence="tried again; nothing is lost")
            await asyncio.sleep(delay_s)

    async def _later(self, record: JobRecord, later: Mapping[str, object]) -> None:
        if record.state is JobState.SENDING:
            record = await self._send.resume(record)
            await self._jobs.move(record.job, JobEvent.INTERRUPTED, **later)
        else:
            await self._jobs.update(record.job, **later)
