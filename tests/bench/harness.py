"""
How everything here is measured: whole processes by wait4, in turn, with what else the machine did written beside.

A sample knows how many cores were stolen by the hypervisor or busy with something else while it was taken. A round is
quiet when that was little in each of its samples; rounds are repeated until enough are quiet, or twice as many were
run as asked for. It decides nothing about targets: a bench says what it promised, in a `Figure`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path("build/bench").resolve()
_HOME: Final = "AUTOBACKUP_BENCH_HOME"
HOME: Final = Path(
    os.environ.setdefault(_HOME, str(RESULTS / f"run-{os.getpid()}"))
)  # one for each run, and its children
KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
QUIET_CORES: Final = 0.35  # stolen, or busy with something else, in a quiet sample
_NICE: Final = 10
_FEWEST_ROUNDS: Final = 3
_PATIENCE_S: Final = 300.0  # with noise, for the rounds of one comparison
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process, from its start to its end. *said* is the JSON object on the last line of its output."""

    wall_s: float
    cpu_s: float
    stolen_cores: float
    other_cores: float
    said: Mapping[str, Any]

    @property
    def is_quiet(self) -> bool:
        return self.stolen_cores + self.other_cores <= QUIET_CORES


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of the table. `met` is None where nothing was promised."""

    name: str
    ours: str
    other: str
    ratio: str
    target: str = ""
    met: bool | None = None
    binds: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class WrongResult(AssertionError):
    """What was measured did not do its work: the only failure of a bench beside a crash."""


def require(condition: object, words: str) -> None:
    if not condition:
        raise WrongResult(words)


# ---- processes ------------------------------------------------------------------------------------------


def run_command(*command: str | Path, env: Mapping[str, str] | None = None) -> Sample:
    """
    Run *command* to its end, which must be a good one. CPU is that of the process and of all it waited for.

    At nice 10, as our own worker threads are: what else runs on the machine must not favour either side.
    """
    with noted() as noise:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})}, preexec_fn=lambda: os.setpriority(os.PRIO_PROCESS, 0, _NICE),
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            process.wait()
            raise
        noise.end(own_cpu_s=usage.ru_utime + usage.ru_stime)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read().decode(errors="replace")
    require(process.returncode == 0, f"{command[:4]} ended with {process.returncode}: {errors[-2000:]}")
    last = output.strip().rpartition(b"\n")[2]
    return Sample(
        wall_s=noise.wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        stolen_cores=noise.stolen_cores,
        other_cores=noise.other_cores,
        said=json.loads(last) if last.startswith(b"{") else {},
    )


def run_child(name: str, *arguments: str | Path) -> Sample:
    """One of `tests.bench.children`."""
    return run_command(sys.executable, "-m", f"tests.bench.children.{name}", *arguments)


def run_shell(script: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Sample:
    """A pipeline; *arguments* are $1, $2 ... Background commands count if the script waits for them."""
    return run_command("bash", "-c", f"set -euo pipefail; {script}", "bench", *arguments, env=env)


# ---- rounds ---------------------------------------------------------------------------------------------


def interleaved(
    runs: Mapping[str, Callable[[], Sample]], *, rounds: int, repeat_noisy: bool = True
) -> dict[str, list[Sample]]:
    """
    Run all of *runs* in turn, round after round, every other round backwards (a drift must favour nobody).

    Returns the samples of the quiet rounds if there are enough of those, of all rounds otherwise.
    """
    taken: list[dict[str, Sample]] = []
    names = list(runs)
    until_s = time.monotonic() + _PATIENCE_S

    def is_enough() -> bool:
        if len(taken) < rounds or not repeat_noisy:
            return len(taken) >= rounds or (len(taken) >= _FEWEST_ROUNDS and time.monotonic() > until_s)
        return len(taken) >= 2 * rounds or len(_quiet(taken)) >= rounds or time.monotonic() > until_s

    while not is_enough():
        order = names if len(taken) % 2 == 0 else names[::-1]
        samples = {name: runs[name]() for name in order}
        taken.append({name: samples[name] for name in names})
    quiet = _quiet(taken)
    kept = quiet if len(quiet) >= min(rounds, _FEWEST_ROUNDS) else taken
    return {name: [round_[name] for round_ in kept] for name in names}


def _quiet(rounds: Sequence[Mapping[str, Sample]]) -> list[Mapping[str, Sample]]:
    return [one for one in rounds if all(sample.is_quiet for sample in one.values())]


@dataclass(slots=True)
class Noise:
    """What the machine did beside the measured work, in cores."""

    wall_s: float = 0.0
    stolen_cores: float = 0.0
    other_cores: float = 0.0
    _started_s: float = field(default_factory=time.perf_counter)
    _before: tuple[float, float] = field(default_factory=lambda: _busy_and_stolen_s())

    def end(self, *, own_cpu_s: float) -> None:
        self.wall_s = time.perf_counter() - self._started_s
        busy_s, stolen_s = (now - then for now, then in zip(_busy_and_stolen_s(), self._before, strict=True))
        self.stolen_cores = stolen_s / self.wall_s
        self.other_cores = max(0.0, busy_s - own_cpu_s) / self.wall_s


@contextmanager
def noted() -> Iterator[Noise]:
    yield Noise()


def _busy_and_stolen_s() -> tuple[float, float]:
    fields = Path("/proc/stat").read_text("ascii").partition("\n")[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, stolen = (int(word) / _TICKS_PER_S for word in fields[:8])
    return user + nice + system + irq + softirq, stolen


def noise_of(samples: Mapping[str, Sequence[Sample]]) -> str:
    """For the table: how quiet it was."""
    every = [sample for taken in samples.values() for sample in taken]
    rounds = len(next(iter(samples.values())))
    stolen = statistics.median(sample.stolen_cores for sample in every)
    other = statistics.median(sample.other_cores for sample in every)
    quiet = sum(sample.is_quiet for sample in every)
    return (
        f"{rounds} rounds; median {stolen:.2f} cores stolen, {other:.2f} busy elsewhere; "
        f"{quiet} of {len(every)} samples quiet"
    )


# ---- numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median, with the least and the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(self.least)}..{_short(self.most)}]"


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), least=min(values), most=max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Round by round."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def walls(samples: Sequence[Sample]) -> list[float]:
    return [sample.wall_s for sample in samples]


def cpus(samples: Sequence[Sample]) -> list[float]:
    return [sample.cpu_s for sample in samples]


def said(samples: Sequence[Sample], key: str) -> list[float]:
    return [float(sample.said[key]) for sample in samples]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Milliseconds."""

    count: int
    p50: float
    p99: float
    most: float

    def __str__(self) -> str:
        return f"{self.p50:.2f} / {self.p99:.2f} / {self.most:.1f} ms"


def latencies(values_ms: Sequence[float]) -> Latencies:
    require(values_ms, "nothing was measured")
    ordered = sorted(values_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Latencies(count=len(ordered), p50=at(0.5), p99=at(0.99), most=ordered[-1])
