"""
`autobackup-agent` with a task in its loop that asks to be woken every 5 ms and notes by how much it was late.

Writes [Unix time, ms] of what was late by 1 ms and more to the file that AUTOBACKUP_BENCH_TICKS names, at the end.
"""

import asyncio
import json
import os
import time
from pathlib import Path

from autobackup.service import app

_EVERY_S = 0.005
_LATE_FROM_MS = 1.0


class TickingAgent(app.Agent):
    async def run(self) -> None:
        late: list[tuple[float, float]] = []
        ticker = asyncio.create_task(_tick(late))
        try:
            await super().run()
        finally:
            ticker.cancel()
            Path(os.environ["AUTOBACKUP_BENCH_TICKS"]).write_text(json.dumps(late))


async def _tick(late: list[tuple[float, float]]) -> None:
    while True:
        wanted_s = time.perf_counter() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        late_ms = (time.perf_counter() - wanted_s) * 1000
        if late_ms >= _LATE_FROM_MS:
            late.append((time.time(), late_ms))


if __name__ == "__main__":
    app.Agent = TickingAgent  # type: ignore[misc]
    app.main()
