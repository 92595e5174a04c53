"""
The real agent, as a process, on an instances folder below build/bench, and disks for it to seal.

Its libvirt is the lab's private one, by the test driver: connected, and without domains of these uuids. A disk of
`JOBS` that loses its last name becomes a job; one of `PROBES` is let go. Times are Unix times throughout, so that the
agent's log, the probers and the benches speak of the same instants.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from tests.bench.harness import HOME, require
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.hypervisor import Hypervisor
from tests.lab.workspace import workspace

JOBS: Final = "c0ffee00"
PROBES: Final = "facade00"
_TICKS: Final = "AUTOBACKUP_BENCH_TICKS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From one instant to another."""

    begun_s: float
    ended_s: float

    def __contains__(self, at_s: float) -> bool:
        return self.begun_s <= at_s <= self.ended_s

    @property
    def length_s(self) -> float:
        return self.ended_s - self.begun_s


@contextmanager
def agent(
    hypervisor: Hypervisor, *, compression: str = "zstd:-1", parallel_jobs: int = 2, rule: str = f"{JOBS}-*"
) -> Iterator[AgentProcess]:
    """An agent in a home of its own, gone afterwards. It keeps a ticker in its loop; see `stalls_ms`."""
    home = HOME / f"agent-{uuid.uuid4().hex[:8]}"
    instances = home / "instances"
    instances.mkdir(parents=True)
    os.environ[_TICKS] = str(home / "ticks.json")
    with workspace() as place:
        process = AgentProcess(
            home,
            instances,
            uri=hypervisor.test_uri,
            rule=f'name = "bench"\nmatch = {{ uuid = "{rule}" }}',
            extra=f'[sealing]\ncompression = "{compression}"\nparallel_jobs = {parallel_jobs}\n',
            run_folder=place.folder("run"),
            command=[sys.executable, "-m", "tests.bench.children.ticking_agent"],
        )
        try:
            with process:
                yield process
        finally:
            process.stop()
            shutil.rmtree(home)


def place_disk(process: AgentProcess, source: Path, *, copies: int = 1) -> str:
    """An instance whose root disk is *source*, so many times over, durable and not in the page cache; its uuid."""
    instance = f"{JOBS}-{str(uuid.uuid4())[9:]}"
    folder = process.instances_path / instance
    folder.mkdir()
    with (folder / "disk").open("wb") as disk:
        subprocess.run(["cat", *[str(source)] * copies], stdout=disk, check=True)
        os.fsync(disk.fileno())
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wait_until(lambda: (folder / "disk").stat().st_nlink == 2, words="the disk is claimed")
    return instance


def terminate(process: AgentProcess, instance: str) -> None:
    """As Nova does: rename, then remove."""
    folder = process.instances_path / instance
    folder.rename(folder.with_name(f"{instance}_del"))
    shutil.rmtree(folder.with_name(f"{instance}_del"))


def finish(process: AgentProcess, instance: str, *, within_s: float = 900.0) -> Span:
    """Wait until the job of *instance* is sealed, proven and scrubbed; from when it was queued until then."""
    receipt = process.receipt_of(instance, within_s=within_s)
    require(receipt["scrub"]["scrubbed"], f"the job of {instance} ended as {receipt['outcome']}: {receipt}")
    wait_until(lambda: process.events("job.done", instance=instance), words="the job is done")
    return span(process, instance, "job.queued", "job.done")


def span(process: AgentProcess, instance: str, begin: str, end: str) -> Span:
    """Between two lines of the agent's log."""
    return Span(begun_s=_at_s(process, begin, instance), ended_s=_at_s(process, end, instance))


def empty_stores(process: AgentProcess) -> None:
    for folder in process.stores.values():
        for path in folder.iterdir():
            path.unlink()


def stalls_ms(process: AgentProcess, spans: Sequence[Span]) -> float:
    """The longest time for which the agent's loop did not turn, in any of *spans*. Once the agent has stopped."""
    ticks: list[tuple[float, float]] = json.loads((process.home / "ticks.json").read_text())
    return max((stall_ms for at_s, stall_ms in ticks if any(at_s in one for one in spans)), default=0.0)


class Prober:
    """One of the probing children: runs until told to stop, then says what it saw, as [Unix time, ms] pairs."""

    def __init__(self, name: str, *arguments: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.bench.children.{name}", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        require(self._process.stdout and self._process.stdout.readline() == b"ready\n", f"{name} did not start")

    def __enter__(self) -> "Prober":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def stop(self) -> list[tuple[float, float]]:
        output, _ = self._process.communicate(timeout=60)
        require(self._process.returncode == 0, f"a prober ended with {self._process.returncode}")
        return [(at_s, ms) for at_s, ms in json.loads(output)]


def within(seen: Sequence[tuple[float, float]], spans: Sequence[Span]) -> list[float]:
    """The milliseconds of what was seen in any of *spans*."""
    return [ms for at_s, ms in seen if any(at_s in one for one in spans)]


def rest(seconds: float) -> Span:
    """Let the agent idle."""
    begun_s = time.time()
    time.sleep(seconds)
    return Span(begun_s=begun_s, ended_s=time.time())


def _at_s(process: AgentProcess, event: str, instance: str) -> float:
    line: Mapping[str, Any] = process.events(event, instance=instance)[0]
    return datetime.fromisoformat(line["timestamp"]).timestamp()
