"""Whether the agent still answers while it seals: /healthz at 100 requests/s, and a ticker inside its loop."""

import time

from tests.bench.agents import Prober, Span, agent, empty_stores, finish, place_disk, rest, stalls_ms, terminate, within
from tests.bench.corpus import corpus
from tests.bench.harness import Figure, MiB, latencies
from tests.lab.hypervisor import Hypervisor

_PER_SECOND = 100
_WITHIN_MS = 10.0


def run(*, quick: bool, hypervisor: Hypervisor) -> list[Figure]:
    return [_health(hypervisor, jobs=jobs, quick=quick) for jobs in (1, 4)]


def _health(hypervisor: Hypervisor, *, jobs: int, quick: bool) -> Figure:
    """The same amount is sealed by one job or by several at once, between two rests."""
    source, copies, rest_s = (corpus(64 * MiB), 4, 1.5) if quick else (corpus(1024 * MiB), 8, 15)
    with agent(hypervisor, parallel_jobs=jobs) as process:
        instances = [place_disk(process, source, copies=copies // jobs) for _ in range(jobs)]
        time.sleep(1)
        with Prober("health_prober", process.socket, str(_PER_SECOND)) as prober:
            idle = [rest(rest_s)]
            for instance in instances:
                terminate(process, instance)
            busy = [finish(process, instance) for instance in instances]
            idle.append(rest(rest_s))
            seen = prober.stop()
        empty_stores(process)
        process.stop()
        idle_stall_ms, stall_ms = stalls_ms(process, idle), stalls_ms(process, busy)
    at_rest, sealing = latencies(within(seen, idle)), latencies(within(seen, busy))
    whole = Span(begun_s=min(one.begun_s for one in busy), ended_s=max(one.ended_s for one in busy))
    return Figure(
        name=f"loop: /healthz with {jobs} job{'s' * (jobs > 1)} sealing, p50 / p99 / max",
        ours=f"sealing: {sealing} (n={sealing.count})",
        other=f"idle: {at_rest} (n={at_rest.count})",
        ratio=f"p99 {sealing.p99 - at_rest.p99:+.2f} ms",
        target=f"p99 <= idle + {_WITHIN_MS:g} ms",
        met=sealing.p99 <= at_rest.p99 + _WITHIN_MS,
        binds=f"longest stall of the loop: {stall_ms:.1f} ms sealing, {idle_stall_ms:.1f} ms idle; "
        f"{copies * source.stat().st_size / MiB / whole.length_s:.0f} MiB/s sealed, proven and scrubbed",
        data={"idle_ms": within(seen, idle), "sealing_ms": within(seen, busy), "stall_ms": stall_ms},
    )
