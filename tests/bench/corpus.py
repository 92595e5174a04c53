"""
The file that is sealed: like an overlay after some months, in 64 KiB clusters in no order.

72 % clusters of files below /usr (binaries, libraries, text), 10 % logs, 10 % incompressible (photos, archives), 8 %
zeros that are written, not holes. zstd -1 makes about 0.4 of it.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.bench.harness import HOME, KiB, MiB

_CLUSTER_BYTES: Final = 64 * KiB
_RUN_CLUSTERS: Final = 16  # what a guest writes in one go stays together
_WORDS: Final = (
    "GET",
    "POST",
    "/api/v1/items",
    "/login",
    "200",
    "404",
    "worker",
    "accepted",
    "closed",
    "timeout",
    "retry",
)


def corpus(size_bytes: int) -> Path:
    """The file of this size; made at first use, the same one for the rest of the run."""
    path = HOME / f"corpus-{size_bytes // MiB}"
    if not path.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".new").open("wb") as file:
            for run in _runs(size_bytes // _CLUSTER_BYTES):
                file.write(run)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".new").rename(path)
    return path


def warm(path: Path) -> None:
    """Into the page cache: the sealer drops pages behind its read, the next one must find the same as it did."""
    with path.open("rb", buffering=0) as file:
        while file.read(4 * MiB):
            pass


def _runs(clusters: int) -> Iterator[bytes]:
    draw = random.Random(1)
    files = _file_runs(draw)
    while clusters > 0:
        count = min(_RUN_CLUSTERS, clusters)
        kind = draw.random()
        if kind < 0.72:
            yield next(files)[: count * _CLUSTER_BYTES].ljust(count * _CLUSTER_BYTES, b"\0")
        elif kind < 0.82:
            yield _log_lines(draw, count * _CLUSTER_BYTES)
        elif kind < 0.92:
            yield draw.randbytes(count * _CLUSTER_BYTES)
        else:
            yield bytes(count * _CLUSTER_BYTES)
        clusters -= count


def _file_runs(draw: random.Random) -> Iterator[bytes]:
    """Runs of clusters from the files below /usr, each file at the start of a cluster, round and round."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk("/usr") for name in names)
    draw.shuffle(paths)
    pending = bytearray()
    while True:
        for path in paths:
            try:
                with open(path, "rb") as file:
                    data = file.read(8 * MiB)
            except OSError:
                continue
            pending += data
            pending += bytes(-len(pending) % (4 * KiB))  # the guest's blocks
            while len(pending) >= _RUN_CLUSTERS * _CLUSTER_BYTES:
                yield bytes(pending[: _RUN_CLUSTERS * _CLUSTER_BYTES])
                del pending[: _RUN_CLUSTERS * _CLUSTER_BYTES]


def _log_lines(draw: random.Random, length: int) -> bytes:
    lines: list[str] = []
    made = 0
    while made < length:
        line = (
            f"2026-03-{draw.randrange(1, 29):02d}T{draw.randrange(24):02d}:{draw.randrange(60):02d}:"
            f"{draw.random() * 60:09.6f}Z host-{draw.randrange(40)} service[{draw.randrange(90000)}]: "
            f"{' '.join(draw.choices(_WORDS, k=6))} {draw.getrandbits(48):012x}\n"
        )
        lines.append(line)
        made += len(line)
    return "".join(lines).encode()[:length]
