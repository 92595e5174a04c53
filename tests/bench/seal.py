"""
Sealing against what it cannot do without, against stock tools, and its AEAD layer against Tink's own Python binding.

Same file, warm page cache, every process at the same nice value. Streams end in /dev/null and in a store that keeps
nothing; restic and borg, which have repositories, stand against the `directory` store: all of them fsync.
"""

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.corpus import corpus, warm
from tests.bench.harness import (
    HOME,
    Figure,
    GiB,
    MiB,
    Sample,
    Spread,
    cpus,
    interleaved,
    noise_of,
    ratios,
    run_child,
    run_command,
    run_shell,
    said,
    spread,
    walls,
)
from tests.bench.sealed import thread_shares

Samples = Mapping[str, Sequence[Sample]]
_SECRETS: Final = HOME / "secrets"
_HASHED: Final = (
    'fifo=$(mktemp -u); mkfifo $fifo; trap "rm -f $fifo" EXIT; {digest} < $fifo > /dev/null & '
    "{seal} | tee $fifo > /dev/null; wait"
)
_OPENSSL: Final = 'openssl enc -aes-256-ctr -K $(printf "%064d" 1) -iv $(printf "%032d" 1) -in "$1"'
_AGE: Final = 'age -R "$2"/recipient'
_GPG: Final = (
    'gpg --homedir "$2" --batch --quiet --pinentry-mode loopback --passphrase-file "$2"/passphrase --symmetric '
    "--cipher-algo AES256 --compress-algo none"
)
_TOOLS: Final = {
    "openssl-ctr | tee openssl dgst -sha512": _HASHED.format(digest="openssl dgst -sha512", seal=_OPENSSL),
    "age | tee sha512sum": _HASHED.format(digest="sha512sum", seal=f'{_AGE} "$1"'),
    "age | tee openssl dgst -sha512": _HASHED.format(digest="openssl dgst -sha512", seal=f'{_AGE} "$1"'),
    "zstd -1 | age": f'zstd -q -1 -c "$1" | {_AGE} > /dev/null',
    "zstd -1 -T2 | age": f'zstd -q -1 -T2 -c "$1" | {_AGE} > /dev/null',
    "zstd -1 | gpg --symmetric": f'zstd -q -1 -c "$1" | {_GPG} > /dev/null',
}
_RESTIC: Final = {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(HOME / "restic-cache")}
_BORG: Final = {"BORG_PASSPHRASE": "bench", "BORG_BASE_DIR": str(HOME / "borg-base")}


def run(*, quick: bool) -> list[Figure]:
    path = corpus(64 * MiB if quick else 1024 * MiB)
    _make_secrets()
    streams = interleaved(_streams(path), rounds=1 if quick else 5, repeat_noisy=not quick)
    stored = interleaved(_repositories(path), rounds=1 if quick else 3, repeat_noisy=not quick)
    mib = "64" if quick else "256"
    aead = {
        f"{who} {what}": partial(run_child, "aead", who, what, mib)
        for what in ("seal", "open")
        for who in ("ours", "tink")
    }
    layers = interleaved(aead, rounds=1 if quick else 5, repeat_noisy=not quick)
    size_gib = path.stat().st_size / GiB
    return [
        *_against_floor(streams, size_gib),
        *_against_tools(streams, size_gib),
        *_against_repositories(stored, size_gib),
        *_aead(layers),
    ]


# ---- what is run ----------------------------------------------------------------------------------------


def _streams(path: Path) -> dict[str, Callable[[], Sample]]:
    runs: dict[str, Callable[[], Sample]] = {}
    for compression in ("none", "zstd:-1"):
        runs[f"floor {compression}"] = partial(_warmed, path, run_child, "floor", path, compression)
        for destinations in ("1", "2"):
            name = f"ours {compression} x{destinations}"
            runs[name] = partial(_warmed, path, run_child, "sealing", path, compression, destinations, "null")
    for name, script in _TOOLS.items():
        runs[name] = partial(_warmed, path, run_shell, script, path, _SECRETS)
    return runs


def _repositories(path: Path) -> dict[str, Callable[[], Sample]]:
    return {
        "ours none": partial(_into_store, path, "none"),
        "ours zstd:-1": partial(_into_store, path, "zstd:-1"),
        "restic": partial(_into_restic, path),
        "borg": partial(_into_borg, path),
    }


def _warmed(path: Path, measure: Callable[..., Sample], *arguments: str | Path) -> Sample:
    warm(path)
    return measure(*arguments)


def _into_store(path: Path, compression: str) -> Sample:
    folder = HOME / "store"
    try:
        return _warmed(path, run_child, "sealing", path, compression, "1", folder)
    finally:
        shutil.rmtree(folder)


def _into_restic(path: Path) -> Sample:
    folder = HOME / "restic"
    command = ("restic", "--repo", folder, "--quiet")
    try:
        run_command(*command, "init", env=_RESTIC)
        warm(path)
        return run_command(*command, "backup", path, env=_RESTIC)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(HOME / "restic-cache", ignore_errors=True)


def _into_borg(path: Path) -> Sample:
    folder = HOME / "borg"
    try:
        run_command("borg", "init", "--encryption", "repokey", folder, env=_BORG)
        warm(path)
        return run_command("borg", "create", f"{folder}::bench", path, env=_BORG)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(HOME / "borg-base", ignore_errors=True)


def _make_secrets() -> None:
    _SECRETS.mkdir(mode=0o700, parents=True, exist_ok=True)
    (_SECRETS / "passphrase").write_text("bench\n")
    run_shell(
        'rm -f "$1"/identity; age-keygen -o "$1"/identity; age-keygen -y "$1"/identity > "$1"/recipient', _SECRETS
    )


# ---- what it says ---------------------------------------------------------------------------------------


def _against_floor(streams: Samples, size_gib: float) -> list[Figure]:
    noise = noise_of(streams)
    figures = []
    for compression, words, limit in (("none", "raw", 1.30), ("zstd:-1", "zstd:-1", 1.15)):
        ours, floor = streams[f"ours {compression} x1"], streams[f"floor {compression}"]
        own_cpu, with_member = said(ours, "cpu_s"), _floor_cpu(floor)
        without = _floor_cpu(floor, but="sha256")
        sha512_s = [sample.said["cpu_s"]["sha512"] for sample in floor]
        ratio = ratios(own_cpu, with_member)
        if compression == "none":
            wall = ratios(sha512_s, said(ours, "wall_s"))
            figures.append(
                Figure(
                    name="seal: raw, wall, against one core's SHA-512 of the same bytes",
                    ours=f"{_rate(size_gib, said(ours, 'wall_s'))} GiB/s",
                    other=f"{_rate(size_gib, sha512_s)} GiB/s",
                    ratio=str(wall),
                    target=">= 0.90",
                    met=wall.median >= 0.90,
                    binds=f"{thread_shares(ours)}; {noise}",
                    data=_data(streams),
                )
            )
        figures.append(
            Figure(
                name=f"seal: {words}, CPU-s/GiB, against the floor",
                ours=_per_gib(own_cpu, size_gib),
                other=f"{_per_gib(with_member, size_gib)}; without the member's SHA-256 {_per_gib(without, size_gib)}",
                ratio=f"{ratio}; without it {ratios(own_cpu, without)}",
                target=f"<= {limit:.2f}",
                met=ratio.median <= limit,
                binds=f"floor: {_floor_words(floor, size_gib)}; ours: {thread_shares(ours)}",
            )
        )
        double = streams[f"ours {compression} x2"]
        figures.append(
            Figure(
                name=f"seal: {words}, two destinations against one, wall",
                ours=_seconds(said(double, "wall_s")),
                other=_seconds(said(ours, "wall_s")),
                ratio=str(ratios(said(double, "wall_s"), said(ours, "wall_s"))),
                binds=f"CPU: {ratios(said(double, 'cpu_s'), own_cpu)} of one destination's; {thread_shares(double)}",
            )
        )
    return figures


def _against_tools(streams: Samples, size_gib: float) -> list[Figure]:
    raw, packed = "ours none x1", "ours zstd:-1 x1"
    pairs: list[tuple[str, str, float | None]] = [
        (raw, "openssl-ctr | tee openssl dgst -sha512", None),
        (raw, "age | tee sha512sum", 1.8),
        (raw, "age | tee openssl dgst -sha512", None),
        (packed, "zstd -1 | age", 1.25),
        (packed, "zstd -1 -T2 | age", None),
        (packed, "zstd -1 | gpg --symmetric", None),
    ]
    return [_against(streams, ours, other, target, size_gib) for ours, other, target in pairs]


def _against_repositories(stored: Samples, size_gib: float) -> list[Figure]:
    pairs = [(ours, other) for other in ("restic", "borg") for ours in ("ours zstd:-1", "ours none")]
    return [
        _against(stored, ours, other, 3.0 if "zstd" in ours else None, size_gib, prefix="to disk, ")
        for ours, other in pairs
    ]


def _against(
    samples: Samples, ours: str, other: str, target: float | None, size_gib: float, *, prefix: str = ""
) -> Figure:
    """Whole processes: the interpreter's start is ours to pay."""
    wall = ratios(walls(samples[other]), walls(samples[ours]))
    cpu = ratios(cpus(samples[other]), cpus(samples[ours]))
    return Figure(
        name=f"seal: {prefix}{ours.removeprefix('ours ')} against {other}",
        ours=f"{_rate(size_gib, walls(samples[ours]))} GiB/s, {_per_gib(cpus(samples[ours]), size_gib)}",
        other=f"{_rate(size_gib, walls(samples[other]))} GiB/s, {_per_gib(cpus(samples[other]), size_gib)}",
        ratio=f"wall {wall} x, CPU {cpu} x",
        target=f">= {target:.3g} x" if target else "",
        met=wall.median >= target if target else None,
        binds=f"{thread_shares(samples[ours])}; {noise_of(samples)}",
        data=_data({name: samples[name] for name in (ours, other)}),
    )


def _aead(layers: Samples) -> list[Figure]:
    figures = []
    for what in ("seal", "open"):
        ratio = ratios(said(layers[f"tink {what}"], "cpu_s"), said(layers[f"ours {what}"], "cpu_s"))
        figures.append(
            Figure(
                name=f"seal: AEAD layer, {what}, CPU, against Tink's Python streaming",
                ours=_seconds(said(layers[f"ours {what}"], "cpu_s")),
                other=_seconds(said(layers[f"tink {what}"], "cpu_s")),
                ratio=f"{ratio} x",
                target=">= 4 x",
                met=ratio.median >= 4,
                binds=noise_of(layers),
                data=_data(layers),
            )
        )
    return figures


def _floor_cpu(floor: Sequence[Sample], *, but: str = "") -> list[float]:
    return [sum(spent for name, spent in sample.said["cpu_s"].items() if name != but) for sample in floor]


def _floor_words(floor: Sequence[Sample], size_gib: float) -> str:
    names = floor[0].said["cpu_s"]
    median = {name: statistics.median(sample.said["cpu_s"][name] for sample in floor) / size_gib for name in names}
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in median.items())


def _rate(size_gib: float, seconds: Sequence[float]) -> Spread:
    return spread([size_gib / one for one in seconds])


def _per_gib(seconds: Sequence[float], size_gib: float) -> str:
    return f"{statistics.median(seconds) / size_gib:.2f} s/GiB"


def _seconds(seconds: Sequence[float]) -> str:
    return f"{spread(seconds)} s"


def _data(samples: Samples) -> dict[str, list[dict[str, object]]]:
    return {
        name: [
            {
                "wall_s": one.wall_s, "cpu_s": one.cpu_s, "stolen_cores": one.stolen_cores,
                "other_cores": one.other_cores, "said": dict(one.said),
            }
            for one in taken
        ]
        for name, taken in samples.items()
    }  # fmt: skip
