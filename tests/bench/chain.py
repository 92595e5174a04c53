"""
A backup that stands on a sealed base, brought back, against `qemu-img convert` of the chain that it was made of.

Both sides find what they read on the disk and not in the page cache, and end when their result is on the disk. Where
ours opens and proves what was sealed, qemu-img copies cleartext that is at hand: the ratio is what the proof costs.
Speeds are of the data that a guest sees, whatever the disk's size; ours without the start of Python.

Promote is held against the chain converted to a file here and sent by `curl -T`.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.corpus import corpus
from tests.bench.glance import used
from tests.bench.harness import (
    HOME,
    Figure,
    GiB,
    MiB,
    Sample,
    cpus,
    interleaved,
    noise_of,
    ratios,
    require,
    run_child,
    run_command,
    run_shell,
    said,
    spread,
    walls,
)
from tests.lab.openstack.cloud import Cloud

from autobackup.container.header import HEADER_BYTES

Samples = Mapping[str, Sequence[Sample]]
_FLAT: Final = ("raw", "qcow2")
_PROMOTER: Final = ("vera", "vault")  # who makes images, and where
_WAY_IN_BYTES: Final = 8 * MiB  # of an object, beside reading it whole: its header, its seek table, its manifest
_RSS_DRIFT_MIB: Final = 8
_CONVERT: Final = 'qemu-img convert -f qcow2 -O {format} "$1" "$2"; sync "$2"'
_CONVERT_AND_SEND: Final = (
    'qemu-img convert -f qcow2 -O qcow2 "$1" "$2"; '
    'curl -sS --fail -X PUT -H Expect: -H "Content-Type: application/octet-stream" -H "X-Auth-Token: $3" -T "$2" "$4"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A disk and its base, of one virtual size; how much of it each has data for; what is tried beside the chain."""

    kind: str
    virtual_mib: int
    base_mib: int
    overlay_mib: int
    rounds: int = 1
    flat: tuple[str, ...] = _FLAT
    is_promoted: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {_size(self.virtual_mib * MiB)}"


_SHAPES: Final = (
    Shape(kind="sparse", virtual_mib=1024, base_mib=192, overlay_mib=96, rounds=3, is_promoted=True),
    Shape(kind="sparse", virtual_mib=20480, base_mib=704, overlay_mib=352, is_promoted=True),
    Shape(kind="dense", virtual_mib=1024, base_mib=768, overlay_mib=512, rounds=3, is_promoted=True),
    Shape(kind="dense", virtual_mib=4096, base_mib=3072, overlay_mib=2048),
    Shape(kind="dense", virtual_mib=8192, base_mib=6144, overlay_mib=4096, flat=()),
)
_QUICK_SHAPES: Final = (
    Shape(kind="sparse", virtual_mib=32, base_mib=8, overlay_mib=4, flat=()),
    Shape(kind="sparse", virtual_mib=256, base_mib=8, overlay_mib=4, flat=_FLAT[:1], is_promoted=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """*top*: the overlay. *sealed_bytes*: of the backup and of its base, by id."""

    shape: Shape
    top: Path
    store: Path
    backup: str
    sealed_bytes: Mapping[str, int]
    seen_bytes: int

    def forget(self) -> None:
        """What either side reads is to come from the disk."""
        for path in (self.top, self.top.with_name("base"), *self.store.iterdir()):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(*, quick: bool) -> list[Figure]:
    shapes, pool = (_QUICK_SHAPES, corpus(8 * MiB)) if quick else (_SHAPES, corpus(256 * MiB))
    figures: list[Figure] = []
    taken: dict[Shape, Samples] = {}
    with Cloud() as cloud:
        for shape in shapes:
            with _sealed(shape, pool) as chain:
                samples = interleaved(_runs(chain, cloud), rounds=shape.rounds, repeat_noisy=shape.rounds > 1)
            taken[shape] = samples
            figures += _against_convert(chain, samples)
            if shape.is_promoted:
                figures.append(_against_curl(chain, samples))
    kinds = dict.fromkeys(shape.kind for shape in shapes)
    return figures + [one for kind in kinds for one in _memory({s: taken[s] for s in shapes if s.kind == kind})]


# ---- what is run ----------------------------------------------------------------------------------------


@contextmanager
def _sealed(shape: Shape, pool: Path) -> Iterator[Chain]:
    folder, store = HOME / "chain", HOME / "chain-store"
    sizes = (str(mib) for mib in (shape.virtual_mib, shape.base_mib, shape.overlay_mib))
    try:
        made = run_child("making_chain", folder, pool, *sizes)
        sealing = run_child("sealing_chain", folder, store).said
        yield Chain(
            shape=shape, top=folder / "overlay.qcow2", store=store, backup=sealing["backup"],
            sealed_bytes=sealing["sealed_bytes"], seen_bytes=made.said["seen_bytes"],
        )  # fmt: skip
    finally:
        for path in (folder, store):
            shutil.rmtree(path, ignore_errors=True)


def _runs(chain: Chain, cloud: Cloud) -> dict[str, Callable[[], Sample]]:
    compared: set[str] = set()
    runs: dict[str, Callable[[], Sample]] = {"restore": partial(_restored, chain, "chain", compared)}
    for name in chain.shape.flat:
        runs[f"restore {name}"] = partial(_restored, chain, name, compared)
    for name in dict.fromkeys(("qcow2", *chain.shape.flat)):
        runs[f"convert {name}"] = partial(_converted, chain, _CONVERT.format(format=name))
    if chain.shape.is_promoted:
        runs["promote"] = partial(_promoted, chain, cloud)
        runs["convert and curl"] = partial(_sent, chain, cloud)
    return runs


def _restored(chain: Chain, how: str, compared: set[str]) -> Sample:
    target = HOME / "restored"
    chain.forget()
    try:
        sample = run_child("restoring_chain", chain.store, chain.backup, target, how)
        _require_each_byte_once(chain, sample)
        if how not in compared:
            compared.add(how)
            format_name = "qcow2" if how == "chain" else how
            run_command("qemu-img", "compare", "-f", "qcow2", "-F", format_name, chain.top, sample.said["disk"])
        return sample
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _require_each_byte_once(chain: Chain, sample: Sample) -> None:
    """That each object was read whole, from front to back, and beside that only what shows the way into it."""
    for attempt, size_bytes in chain.sealed_bytes.items():
        streamed, ranges = (sample.said[key].get(attempt, 0) for key in ("streamed_bytes", "ranges_bytes"))
        require(
            streamed == size_bytes - HEADER_BYTES and ranges <= _WAY_IN_BYTES,
            f"read {streamed} and, by ranges, {ranges} of {size_bytes} bytes",
        )


def _times_read(chain: Chain, samples: Sequence[Sample]) -> str:
    """How often the sealed bytes were asked for."""
    whole = sum(chain.sealed_bytes.values())
    times = [sum(sum(one.said[key].values()) for key in ("streamed_bytes", "ranges_bytes")) / whole for one in samples]
    return f"read {spread(times).median:.2f} times"


def _converted(chain: Chain, script: str, *arguments: str) -> Sample:
    target = HOME / "converted"
    chain.forget()
    try:
        return run_shell(script, chain.top, target, *arguments)
    finally:
        target.unlink(missing_ok=True)


def _promoted(chain: Chain, cloud: Cloud) -> Sample:
    chain.forget()
    with used(cloud.glance_workers()) as use:
        sample = run_child("promoting", chain.store, chain.backup, cloud.clouds_file, *_PROMOTER)
    return _without(sample, use.cpu_s)


def _sent(chain: Chain, cloud: Cloud) -> Sample:
    user, project = _PROMOTER
    images = f"{cloud.glance_url}/v2/images"
    words = {"name": "bench", "disk_format": "qcow2", "container_format": "bare", "visibility": "private"}
    image = f"{images}/{cloud.call(user, project, 'POST', images, json=words).json()['id']}"
    with used(cloud.glance_workers()) as use:
        sample = _converted(chain, _CONVERT_AND_SEND, cloud.token(user, project), f"{image}/file")
    status = cloud.call(user, project, "GET", image).json()["status"]
    require(status == "active", f"curl made an image that is {status}")
    require(cloud.call(user, project, "DELETE", image).status == 204, f"{image} stays")
    return _without(sample, use.cpu_s)


def _without(sample: Sample, glance_cpu_s: float) -> Sample:
    """What Glance computed for it is not noise."""
    return replace(sample, other_cores=max(0.0, sample.other_cores - glance_cpu_s / sample.wall_s))


# ---- what it says ---------------------------------------------------------------------------------------


def _against_convert(chain: Chain, samples: Samples) -> list[Figure]:
    rivals = {"restore": "convert qcow2"} | {f"restore {name}": f"convert {name}" for name in _FLAT}
    words = {"restore": "restore", "restore raw": "--flatten, raw", "restore qcow2": "--flatten, qcow2"}
    return [
        _figure(f"{words[name]}, against qemu-img convert", chain, samples, name, rival)
        for name, rival in rivals.items()
        if name in samples
    ]


def _against_curl(chain: Chain, samples: Samples) -> Figure:
    return _figure("promote, against convert and curl -T", chain, samples, "promote", "convert and curl")


def _figure(words: str, chain: Chain, samples: Samples, name: str, rival: str) -> Figure:
    ours, other, seen_gib = samples[name], samples[rival], chain.seen_bytes / GiB
    wall, cpu = ratios(said(ours, "wall_s"), walls(other)), ratios(said(ours, "cpu_s"), cpus(other))
    return Figure(
        name=f"chain: {chain.shape}, {_size(chain.seen_bytes)} of data: {words}",
        ours=f"{_rate(said(ours, 'wall_s'), seen_gib)}; CPU {spread(said(ours, 'cpu_s'))} s",
        other=f"{_rate(walls(other), seen_gib)}; CPU {spread(cpus(other))} s",
        ratio=f"{wall} of its time, {cpu} of its CPU; what is sealed {_times_read(chain, ours)}",
        binds=noise_of({name: ours, rival: other}),
        data={key: [_numbers(one) for one in samples[key]] for key in (name, rival)},
    )


def _memory(samples: Mapping[Shape, Samples]) -> list[Figure]:
    """The first of these shapes is the smallest, the last the largest."""
    figures = []
    for name in ("restore", "restore raw", "promote"):
        peaks = {
            shape: max(said(taken[name], "peak_rss_bytes")) / MiB for shape, taken in samples.items() if name in taken
        }
        if len(peaks) < 2:
            continue
        (small, least), *_, (large, most) = peaks.items()
        figures.append(
            Figure(
                name=f"chain: peak memory, {name}, {large} against {small}",
                ours=f"{most:.1f} MiB",
                other=f"{least:.1f} MiB",
                ratio=f"{most - least:+.1f} MiB",
                target=f"drift <= {_RSS_DRIFT_MIB} MiB",
                met=most - least <= _RSS_DRIFT_MIB,
                binds="; ".join(f"{shape}: {peak:.1f} MiB" for shape, peak in peaks.items()),
            )
        )
    return figures


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GiB:.3g} GiB" if size_bytes >= GiB else f"{size_bytes // MiB} MiB"


def _rate(seconds: Sequence[float], size_gib: float) -> str:
    return f"{spread([size_gib / one for one in seconds])} GiB/s"


def _numbers(one: Sample) -> dict[str, object]:
    return {
        "wall_s": one.wall_s, "cpu_s": one.cpu_s, "stolen_cores": one.stolen_cores, "other_cores": one.other_cores,
        "said": dict(one.said),
    }  # fmt: skip
