"""Several destinations asked at once, none of which keeps the others waiting."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from autobackup.errors import AutobackupError, StoreUnavailable
from autobackup.model import DestinationName

_Answer = TypeVar("_Answer")


async def side_by_side(
    questions: Mapping[DestinationName, Coroutine[Any, Any, _Answer]], *, late_after_s: float
) -> dict[DestinationName, _Answer | AutobackupError]:
    """
    Ask several destinations at once. What an answer is not, or an `AutobackupError`, is raised.

    Once one has answered well, those that are silent for *late_after_s* wait for another try.
    """
    tasks = {name: asyncio.ensure_future(question) for name, question in questions.items()}
    answers: dict[DestinationName, _Answer | AutobackupError] = {}
    if not tasks:
        return answers
    try:
        done, late = await asyncio.wait(tasks.values(), timeout=late_after_s)
        if late and not any(task.exception() is None for task in done):
            await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(late, timeout=late_after_s)
        for name, task in tasks.items():
            try:
                answers[name] = task.result()
            except asyncio.InvalidStateError:
                words = f"no answer in {late_after_s:g} s, and others were ready; tried later"
                answers[name] = StoreUnavailable(words)
            except AutobackupError as exc:
                answers[name] = exc
    finally:
        for task in tasks.values():
            task.cancel()
    return answers
