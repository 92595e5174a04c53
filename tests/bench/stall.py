"""What a destination that is slow, or that stops taking, does to the other one of the same read."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable

from tests.bench.corpus import corpus, warm
from tests.bench.harness import Figure, MiB, Spread, require, spread
from tests.bench.sealed import NullStore, seal

from autobackup.errors import StoreUnavailable
from autobackup.flows.fanout import Sent

_FOR_EVER_S = 3600.0
_SLACK_S = 0.5


def run(*, quick: bool) -> list[Figure]:
    path, detach_s, rounds = (corpus(64 * MiB), 0.5, 1) if quick else (corpus(512 * MiB), 3.0, 3)
    half = path.stat().st_size // 5  # of the stored bytes, more or less

    def once(wait_s: float) -> Callable[[int], float]:
        stalled = False

        def before(at: int) -> float:
            nonlocal stalled
            if at < half or stalled:
                return 0.0
            stalled = True
            return wait_s

        return before

    neighbours: dict[str, Callable[[], Callable[[int], float]]] = {
        "as quick as we": lambda: lambda _at: 0.0,
        f"pausing once for {detach_s / 2:g} s": lambda: once(detach_s / 2),
        "that stops taking": lambda: once(_FOR_EVER_S),
        "at 50 MiB/s": lambda: lambda _at: MiB / (50 * MiB),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in neighbours}
    for _ in range(rounds):
        for name, make in neighbours.items():
            warm(path)
            ours, neighbour = NullStore(), NullStore(make())
            started_s = time.perf_counter()
            outcomes = asyncio.run(
                seal(path, [ours, neighbour], zstd_level=-1, detach_after_s=detach_s, cpus=os.cpu_count() or 1)
            ).outcomes
            settled_s = time.perf_counter() - started_s
            require(isinstance(outcomes[0], Sent), f"the other destination {name} spoiled ours: {outcomes[0]}")
            is_detached = isinstance(outcomes[1], StoreUnavailable)
            require(is_detached == (name == "that stops taking"), f"a destination {name}: {outcomes[1]}")
            taken[name].append((ours.ended_s - started_s, settled_s))
    alone = [sent_s for sent_s, _ in taken["as quick as we"]]
    return [_figure(name, taken[name], alone, detach_s) for name in list(neighbours)[1:]]


def _figure(name: str, taken: list[tuple[float, float]], alone: list[float], detach_s: float) -> Figure:
    sent, settled = spread([sent_s for sent_s, _ in taken]), spread([settled_s for _, settled_s in taken])
    later: Spread = spread([sent_s - alone_s for (sent_s, _), alone_s in zip(taken, alone, strict=True)])
    allowed_s = detach_s if "stops" in name else detach_s / 2 if "pausing" in name else None
    return Figure(
        name=f"stall: beside a destination {name}",
        ours=f"sent in {sent} s, settled in {settled} s",
        other=f"beside a quick one: {statistics.median(alone):.2f} s",
        ratio=f"{later.median:+.2f} s",
        target=f"<= +{allowed_s + _SLACK_S:g} s" if allowed_s is not None else "",
        met=settled.median - statistics.median(alone) <= allowed_s + _SLACK_S if allowed_s is not None else None,
        binds="one read feeds all: who never blocks it for long sets the pace of all; by design"
        if allowed_s is None
        else f"detached after {detach_s:g} s",
        data={"sent_and_settled_s": taken},
    )
