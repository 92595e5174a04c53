"""
Which job runs when: so many at once, each in a task of its own, woken by new jobs, orders and the clock.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from autobackup.errors import Refused
from autobackup.flows.backup import Backup
from autobackup.flows.jobs import Jobs
from autobackup.model import JobId, JobRecord, JobState

_LONGEST_SLEEP_S: Final = 30.0


class Runner:
    """Runs `Backup.advance` for every job that is due. Cancel `run` to stop; a stopped job is a crashed one."""

    def __init__(
        self, *, jobs: Jobs, backup: Backup, parallel_jobs: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._jobs = jobs
        self._backup = backup
        self._parallel_jobs = parallel_jobs
        self._clock = clock
        self._running: set[JobId] = set()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """A job may be due that was not before."""
        self._wake.set()

    async def order(self, job: JobId, act: Callable[[JobId], Awaitable[JobRecord]]) -> JobRecord:
        """Let an operator's order act on a job that nobody works on; otherwise `Refused`."""
        if job in self._running:
            raise Refused(f"job {job} is being worked on; try again in a moment")
        self._running.add(job)
        try:
            return await act(job)
        finally:
            self._running.discard(job)
            self._wake.set()

    async def run(self) -> None:
        """For ever. What is not an `AutobackupError` ends it, and with it the process."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                for record in self._due():
                    self._running.add(record.job)
                    group.create_task(self._advance(record.job), name=f"job {record.job}")
                try:
                    async with asyncio.timeout(self._sleep_s()):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    def _due(self) -> list[JobRecord]:
        ready = [r for r in self._idle() if r.not_before_s <= self._clock()]
        ready.sort(key=lambda r: bool(r.last_error))  # what has failed waits behind what has not been tried
        return ready[: max(0, self._parallel_jobs - len(self._running))]

    def _idle(self) -> list[JobRecord]:
        return [r for r in self._jobs.all() if r.state is not JobState.PARKED and r.job not in self._running]

    def _sleep_s(self) -> float:
        if len(self._running) >= self._parallel_jobs:
            return _LONGEST_SLEEP_S  # whoever ends wakes us
        next_s = min((r.not_before_s for r in self._idle()), default=float("inf"))
        return min(_LONGEST_SLEEP_S, max(0.0, next_s - self._clock()))

    async def _advance(self, job: JobId) -> None:
        try:
            await self._backup.advance(job)
        finally:
            self._running.discard(job)
            self._wake.set()
