"""
Sending an overlay to a real Glance against `curl -T` of the plain file to the same one.

A disk's bytes each second, from the agent's first read to the return of its put, with everything that lies between: the
roles asked for anew, the image made, the bytes compressed, sealed and hashed. curl begins with an image that is there
and a token at hand, and gives Glance a container format that it does not look into: as raw/bare, which is ours and
costs Glance a tenth more CPU, it takes no overlay with a backing file. Both ways of curl's are run (a length, chunks);
the better one is what ours is held against.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench.corpus import corpus, warm
from tests.bench.glance import GlanceUse, used
from tests.bench.harness import (
    Figure,
    GiB,
    MiB,
    Sample,
    interleaved,
    noise_of,
    ratios,
    require,
    run_child,
    run_shell,
    said,
    spread,
)
from tests.bench.sealed import thread_shares
from tests.lab.openstack.cloud import Cloud

Samples = Mapping[str, Sequence[Sample]]
_TARGETS: Final = {"zstd:-1": 0.95, "none": 0.85}
_OWNERS: Final = {"vault": "vera", "tenant-a": "alice"}  # a user of each project
_CURL: Final = (
    "curl -sS --fail -o /dev/null -w '{{\"wall_s\": %{{time_total}}}}\\n' -X PUT -H Expect: "
    '-H "Content-Type: application/octet-stream" -H "X-Auth-Token: {token}" -T {body} "{url}"'
)
_BODIES: Final = {"a length": '"$1"', "chunks": '- < "$1"'}


def run(*, quick: bool) -> list[Figure]:
    path = corpus(16 * MiB if quick else 1024 * MiB)
    at_once = ("zstd:-1",) if quick else tuple(_TARGETS)
    with Cloud() as cloud:
        samples = interleaved(_runs(cloud, path, at_once), rounds=1 if quick else 5, repeat_noisy=not quick)
    size_gib = path.stat().st_size / GiB
    ways = [f"curl, {way}" for way in _BODIES]
    curl = min(ways, key=lambda way: statistics.median(said(samples[way], "wall_s")))
    return [
        *(_against_curl(samples, compression, curl, size_gib) for compression in _TARGETS),
        *(_beside_glance(samples, f"ours {compression}", size_gib) for compression in _TARGETS),
        _beside_glance(samples, curl, size_gib),
        *(_two_at_once(samples, compression, size_gib) for compression in at_once),
    ]


# ---- what is run ----------------------------------------------------------------------------------------


def _runs(cloud: Cloud, path: Path, at_once: Sequence[str]) -> dict[str, Callable[[], Sample]]:
    runs: dict[str, Callable[[], Sample]] = {
        f"curl, {way}": partial(_by_curl, cloud, path, ("vault",), body=body) for way, body in _BODIES.items()
    }
    runs["curl, raw/bare"] = partial(_by_curl, cloud, path, ("vault",), container_format="bare")
    runs["two curls"] = partial(_by_curl, cloud, path, tuple(_OWNERS))
    for compression in _TARGETS:
        runs[f"ours {compression}"] = partial(_by_agent, cloud, path, compression, ("vault",))
    for compression in at_once:
        runs[f"ours {compression} x2"] = partial(_by_agent, cloud, path, compression, tuple(_OWNERS))
    return runs


def _by_agent(cloud: Cloud, path: Path, compression: str, projects: Sequence[str]) -> Sample:
    warm(path)
    with used(cloud.glance_workers()) as use:
        sample = run_child("uploading", path, compression, cloud.clouds_file, *projects)
    return _with(sample, use)


def _by_curl(
    cloud: Cloud,
    path: Path,
    projects: Sequence[str],
    *,
    body: str = _BODIES["a length"],
    container_format: str = "compressed",
) -> Sample:
    """To all of *projects* at once."""
    images = {project: _make_image(cloud, project, container_format) for project in projects}
    commands = [
        _CURL.format(token=cloud.token(_OWNERS[project], project), body=body, url=f"{url}/file")
        for project, url in images.items()
    ]
    warm(path)
    with used(cloud.glance_workers()) as use:
        script = "; ".join(f"{command} & p{n}=$!" for n, command in enumerate(commands))
        sample = run_shell(f"{script}; {'; '.join(f'wait $p{n}' for n in range(len(commands)))}", path)
    for project, url in images.items():
        image = cloud.call(_OWNERS[project], project, "GET", url).json()
        require((image["status"], image["size"]) == ("active", path.stat().st_size), f"curl made {image}")
        require(cloud.call(_OWNERS[project], project, "DELETE", url).status == 204, f"{url} stays")
    # of two the process that ran them knows when both were done
    return _with(sample, use, **({"wall_s": sample.wall_s} if len(projects) > 1 else {}))


def _make_image(cloud: Cloud, project: str, container_format: str) -> str:
    """The URL of a queued image."""
    words = {"name": "bench", "disk_format": "raw", "container_format": container_format, "visibility": "private"}
    answer = cloud.call(_OWNERS[project], project, "POST", f"{cloud.glance_url}/v2/images", json=words)
    require(answer.status == 201, f"no image: {answer}")
    return f"{cloud.glance_url}/v2/images/{answer.json()['id']}"


def _with(sample: Sample, use: GlanceUse, **more: float) -> Sample:
    """Glance's part is part of what was measured: what it computed is not noise."""
    return replace(
        sample,
        other_cores=max(0.0, sample.other_cores - use.cpu_s / sample.wall_s),
        said={**sample.said, "glance_cpu_s": use.cpu_s, "glance_peak_bytes": use.peak_bytes, **more},
    )


# ---- what it says ---------------------------------------------------------------------------------------


def _against_curl(samples: Samples, compression: str, curl: str, size_gib: float) -> Figure:
    ours, target = samples[f"ours {compression}"], _TARGETS[compression]
    ratio = ratios(said(samples[curl], "wall_s"), said(ours, "wall_s"))
    alike = ratios(said(samples["curl, raw/bare"], "wall_s"), said(ours, "wall_s"))
    proven = ratios(said(samples[curl], "wall_s"), said(ours, "proven_s"))
    return Figure(
        name=f"upload: {compression}, a disk's bytes/s, against curl -T of the plain file",
        ours=f"{_rate(ours, size_gib)}; from the job to its proof {_rate(ours, size_gib, 'proven_s')}",
        other=f"{_rate(samples[curl], size_gib)} ({curl.partition(', ')[2]}); "
        f"as raw/bare {_rate(samples['curl, raw/bare'], size_gib)}",
        ratio=f"{ratio}; with curl as raw/bare too {alike}; to the proof {proven}",
        target=f">= {target:.2f}",
        met=ratio.median >= target,
        binds=f"{_glance_share(ours)}; {thread_shares(ours)}; {noise_of(samples)}",
        data={name: [_numbers(one) for one in taken] for name, taken in samples.items()},
    )  # fmt: skip


def _beside_glance(samples: Samples, name: str, size_gib: float) -> Figure:
    """CPU for each GiB of the disk, and the peak of memory, on both sides of one upload."""
    taken = samples[name]
    is_curl = name.startswith("curl")
    own_cpu = [one.cpu_s for one in taken] if is_curl else said(taken, "cpu_s")
    glance_cpu = said(taken, "glance_cpu_s")
    memory = "" if is_curl else f", peak {max(said(taken, 'peak_rss_bytes')) / MiB:.0f} MiB"
    return Figure(
        name=f"upload: CPU and memory beside Glance's, {name}",
        ours=f"{spread([one / size_gib for one in own_cpu])} s/GiB{memory}",
        other=f"Glance {spread([one / size_gib for one in glance_cpu])} s/GiB, "
        f"peak {max(said(taken, 'glance_peak_bytes')) / MiB:.0f} MiB",
        ratio=f"{ratios(own_cpu, glance_cpu)} of Glance's CPU",
    )


def _two_at_once(samples: Samples, compression: str, size_gib: float) -> Figure:
    ours, curls = samples[f"ours {compression} x2"], samples["two curls"]
    return Figure(
        name=f"upload: {compression}, one read to two projects, against two curls at once",
        ours=f"{_rate(ours, size_gib)} to each; {statistics.mean(said(ours, 'reads')):.2g} reads",
        other=f"{_rate(curls, size_gib)} to each",
        ratio=str(ratios(said(curls, "wall_s"), said(ours, "wall_s"))),
        binds=f"{_glance_share(ours)}; {thread_shares(ours)}",
    )


def _glance_share(ours: Sequence[Sample]) -> str:
    busy = statistics.median(said(ours, "glance_cpu_s")[n] / one.said["wall_s"] for n, one in enumerate(ours))
    return f"Glance's CPU/wall {busy:.2f}"


def _rate(samples: Sequence[Sample], size_gib: float, key: str = "wall_s") -> str:
    return f"{spread([size_gib / one for one in said(samples, key)])} GiB/s"


def _numbers(one: Sample) -> dict[str, object]:
    return {
        "cpu_s": one.cpu_s, "stolen_cores": one.stolen_cores, "other_cores": one.other_cores, "said": dict(one.said),
    }  # fmt: skip
