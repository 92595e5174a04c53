"""Overwriting a disk once, durably, against `shred -n1`: on a fresh file of the same bytes each time."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.bench.corpus import corpus
from tests.bench.harness import (
    HOME,
    Figure,
    GiB,
    KiB,
    MiB,
    Sample,
    cpus,
    interleaved,
    noise_of,
    ratios,
    require,
    run_child,
    run_command,
    said,
    spread,
    walls,
)

_FASTER = 2.0
_CPU_SHARE = 0.2


def run(*, quick: bool) -> list[Figure]:
    source = corpus(64 * MiB if quick else 1024 * MiB)
    runs: dict[str, Callable[[], Sample]] = {
        name: partial(_scrub, source, name, partial(run_child, "scrubbing", name)) for name in ("zero", "random")
    }
    runs["shred -n1"] = partial(_scrub, source, "shred", partial(run_command, "shred", "-n1"))
    samples = interleaved(runs, rounds=1 if quick else 5, repeat_noisy=not quick)
    size_gib, shred = source.stat().st_size / GiB, samples["shred -n1"]
    figures = []
    for name in ("zero", "random"):
        ours = samples[name]
        wall, cpu = ratios(walls(shred), said(ours, "wall_s")), ratios(said(ours, "cpu_s"), cpus(shred))
        whole = f"wall {ratios(walls(shred), walls(ours))} x, CPU {ratios(cpus(ours), cpus(shred))}"
        figures.append(
            Figure(
                name=f"scrub: {name} in the running agent against shred -n1",
                ours=_words(said(ours, "wall_s"), said(ours, "cpu_s"), size_gib),
                other=_words(walls(shred), cpus(shred), size_gib),
                ratio=f"wall {wall} x, CPU {cpu}; with the start of a Python for it: {whole}",
                target=f">= {_FASTER:g} x at <= {_CPU_SHARE:g} of the CPU",
                met=wall.median >= _FASTER and cpu.median <= _CPU_SHARE,
                binds=f"in wall the disk's own writes, which both wait for; {noise_of(samples)}",
                data={
                    who: {"wall_s": walls(taken), "cpu_s": cpus(taken), "said": [dict(one.said) for one in taken]}
                    for who, taken in samples.items()
                },
            )
        )
    return figures


def _words(wall_s: Sequence[float], cpu_s: Sequence[float], size_gib: float) -> str:
    return f"{spread([size_gib / one for one in wall_s])} GiB/s, {spread([one / size_gib for one in cpu_s])} CPU-s/GiB"


def _scrub(source: Path, name: str, measure: Callable[[Path], Sample]) -> Sample:
    path = HOME / "scrubbed"
    with source.open("rb") as original, path.open("wb") as copy:
        shutil.copyfileobj(original, copy, 4 * MiB)
        os.fsync(copy.fileno())
    try:
        sample = measure(path)
        require(path.stat().st_size == source.stat().st_size, f"{name} changed the size")
        _require_overwritten(source, path, name)
        return sample
    finally:
        path.unlink()


def _require_overwritten(source: Path, path: Path, name: str) -> None:
    """Every 1 MiB, 4 KiB of it."""
    with source.open("rb") as before, path.open("rb") as after:
        for at in range(0, source.stat().st_size, MiB):
            before.seek(at)
            after.seek(at)
            old, new = before.read(4 * KiB), after.read(4 * KiB)
            is_gone = not any(new) if name == "zero" else new != old
            require(is_gone, f"{name} left the bytes at {at}")
