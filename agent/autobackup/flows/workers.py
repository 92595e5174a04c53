"""
Threads for work that would hold up the event loop: nice, and one CPU token each.

The stall of a busy host is CPU scheduling, not the GIL: worker threads at nice +10 and a process-wide bound on
heavy calls keep the loop's p99 within 10 ms of an idle one.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from autobackup.host.priority import be_nice

_Result = TypeVar("_Result")


class Workers:
    """The process's pool for blocking and heavy work, and its CPU tokens."""

    def __init__(self, *, cpu_tokens: int = 0, threads: int = 16) -> None:
        self.cpu_tokens = threading.BoundedSemaphore(cpu_tokens or os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, "work", initializer=be_nice)

    async def blocking(self, work: Callable[[], _Result]) -> _Result:
        """
        Run what mostly waits for the disk.

        Cancelled, it ends when the work has ended: a thread cannot be stopped, and its caller would close a file
        under it, or remove a folder that it still fills.
        """
        running = self._pool.submit(work)
        done = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            while not running.cancel() and not done.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({done})
            raise

    async def interruptible(self, work: Callable[[Callable[[], bool]], _Result]) -> _Result:
        """As `blocking`, for what takes long: *work* is told when nobody waits for it any more, and then ends soon."""
        is_given_up = threading.Event()
        running = asyncio.ensure_future(self.blocking(lambda: work(is_given_up.is_set)))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            is_given_up.set()
            await asyncio.wait({running})
            if not running.cancelled():
                running.exception()  # it ended because it was told to
            raise

    async def heavy(self, work: Callable[[], _Result]) -> _Result:
        """Run what mostly computes, when a CPU token is free."""

        def with_token() -> _Result:
            with self.cpu_tokens:
                return work()

        return await self.blocking(with_token)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
