"""
An event loop in which waiting costs nothing: its clock jumps to whatever comes next.

For what is about time and asks nobody on the outside: rates, pauses and deadlines are then exact, and a loaded machine
makes no difference.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Timers fire in order, as soon as nothing else is left to do."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 1000.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            # a little at least: who waits for less than a float can tell would wait for ever
            self._now_s = max(self._now_s + 1e-6, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """`asyncio.run` without the waiting."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()
