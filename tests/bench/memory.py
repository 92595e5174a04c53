"""How much memory the agent needs: VmHWM of a fresh process after one job, small and large, by the kernel's count."""

import subprocess
import sys

from tests.bench.agents import agent, empty_stores, finish, place_disk, terminate
from tests.bench.corpus import corpus
from tests.bench.harness import Figure, MiB, require
from tests.bench.peak import peak_rss_bytes
from tests.lab.hypervisor import Hypervisor

_LIMIT_MIB = 96
_DRIFT_MIB = 4
_NOT_NEEDED = ("rich", "click", "tink", "pytest")  # the command line's, and ours
_LOOK = "import sys, autobackup.service.app; print(' '.join(set(sys.argv[1:]) & set(sys.modules)))"


def run(*, quick: bool, hypervisor: Hypervisor) -> list[Figure]:
    looked = subprocess.run([sys.executable, "-c", _LOOK, *_NOT_NEEDED], capture_output=True, text=True, check=True)
    require(not looked.stdout.strip(), f"the agent imports what it does not need: {looked.stdout}")
    return [_peak(hypervisor, compression, quick=quick) for compression in ("zstd:-1", "none")]


def _peak(hypervisor: Hypervisor, compression: str, *, quick: bool) -> Figure:
    source, sizes = (corpus(64 * MiB), (1, 3)) if quick else (corpus(1024 * MiB), (1, 8))
    idle_mib, small_mib = _after_one_job(
        hypervisor, compression, source_mib=source.stat().st_size // MiB, copies=sizes[0]
    )
    _, large_mib = _after_one_job(hypervisor, compression, source_mib=source.stat().st_size // MiB, copies=sizes[1])
    total_mib = [source.stat().st_size // MiB * copies for copies in sizes]
    return Figure(
        name=f"memory: peak RSS of the agent, {compression}",
        ours=f"{total_mib[1]} MiB job: {large_mib:.1f} MiB",
        other=f"{total_mib[0]} MiB job: {small_mib:.1f} MiB; idle {idle_mib:.1f} MiB",
        ratio=f"{large_mib - small_mib:+.1f} MiB",
        target=f"<= {_LIMIT_MIB} MiB, drift <= {_DRIFT_MIB} MiB",
        met=max(small_mib, large_mib) <= _LIMIT_MIB and large_mib - small_mib <= _DRIFT_MIB,
        binds=f"{idle_mib:.0f} MiB are the interpreter, its imports and libvirt; the rest is buffers in flight",
        data={"idle_mib": idle_mib, "small_mib": small_mib, "large_mib": large_mib},
    )


def _after_one_job(hypervisor: Hypervisor, compression: str, *, source_mib: int, copies: int) -> tuple[float, float]:
    with agent(hypervisor, compression=compression) as process:
        assert process.process is not None
        idle_bytes = peak_rss_bytes(process.process.pid)
        instance = place_disk(process, corpus(source_mib * MiB), copies=copies)
        terminate(process, instance)
        finish(process, instance)
        peak_bytes = peak_rss_bytes(process.process.pid)
        empty_stores(process)
    return idle_bytes / MiB, peak_bytes / MiB
