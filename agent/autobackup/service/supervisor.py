"""
Runs the parts of the agent until a signal or a failure. Crash-only: what a part raises ends the process, and the
next start walks over the spool; a stop is no more than a crash that was asked for.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias

Part: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


async def run(parts: Mapping[str, Part], *, stop: asyncio.Event) -> None:
    """Run *parts* in their order; on *stop*, SIGTERM or SIGINT end them in reverse. Raises what a part raises."""
    loop = asyncio.get_running_loop()
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, stop.set)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part(), name=name) for name, part in parts.items()]
            await stop.wait()
            for task in reversed(tasks):
                task.cancel()
                await asyncio.wait({task})
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
