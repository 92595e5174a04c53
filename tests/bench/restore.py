"""Restoring a sealed bundle against only reading it back: the same bytes, the same proofs, and a disk written."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.corpus import corpus
from tests.bench.harness import (
    HOME,
    Figure,
    GiB,
    MiB,
    Sample,
    interleaved,
    noise_of,
    ratios,
    require,
    run_child,
    said,
    spread,
)
from tests.bench.sealed import sha256_of

_LIMIT = 1.3
_RSS_DRIFT_MIB = 8


def run(*, quick: bool) -> list[Figure]:
    small, large = (corpus(32 * MiB), corpus(64 * MiB)) if quick else (corpus(256 * MiB), corpus(1024 * MiB))
    return [_restore(small, large, compression, quick=quick) for compression in ("zstd:-1", "none")]


def _restore(small: Path, large: Path, compression: str, *, quick: bool) -> Figure:
    store = HOME / "store"
    try:
        attempts = {
            path: str(run_child("sealing", path, compression, "1", store).said["attempt"]) for path in (small, large)
        }
        runs: dict[str, Callable[[], Sample]] = {
            "verify": partial(run_child, "restoring", store / "0", attempts[large], "verify"),
            "restore": partial(_into_folder, large, store / "0", attempts[large]),
            "small": partial(_into_folder, small, store / "0", attempts[small]),
        }
        samples = interleaved(runs, rounds=1 if quick else 5, repeat_noisy=not quick)
    finally:
        shutil.rmtree(store)
    restored, verified = samples["restore"], samples["verify"]
    for sample in (*restored, *verified):
        read_once = sample.said["read_bytes"] == sample.said["sealed_bytes"]
        require(read_once, f"read {sample.said['read_bytes']} of {sample.said['sealed_bytes']} bytes")
    ratio = ratios(said(restored, "wall_s"), said(verified, "wall_s"))
    rss_mib = [max(said(samples[name], "peak_rss_bytes")) / MiB for name in ("restore", "small")]
    size_gib = large.stat().st_size / GiB
    return Figure(
        name=f"restore: {compression}, wall, against verification only",
        ours=f"{spread([size_gib / s for s in said(restored, 'wall_s')])} GiB/s; "
        f"peak RSS {rss_mib[0]:.0f} MiB ({rss_mib[1]:.0f} for {small.stat().st_size // MiB} MiB)",
        other=f"{spread([size_gib / s for s in said(verified, 'wall_s')])} GiB/s",
        ratio=f"{ratio}; each sealed byte read once",
        target=f"<= {_LIMIT:g}, RSS flat",
        met=ratio.median <= _LIMIT and rss_mib[0] - rss_mib[1] <= _RSS_DRIFT_MIB,
        binds=f"CPU {spread(said(restored, 'cpu_s'))} s restoring, {spread(said(verified, 'cpu_s'))} s verifying; "
        f"{noise_of(samples)}",
        data={name: [dict(one.said) for one in taken] for name, taken in samples.items()},
    )


def _into_folder(source: Path, store: Path, attempt: str) -> Sample:
    target = HOME / "restored"
    try:
        sample = run_child("restoring", store, attempt, target)
        require(sha256_of(target / "disks/disk") == sha256_of(source), "what was restored is not what was sealed")
        return sample
    finally:
        shutil.rmtree(target, ignore_errors=True)
