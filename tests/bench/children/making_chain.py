"""
Makes a raw base and an overlay on it, as a guest leaves them: `FOLDER CORPUS VIRTUAL_MIB BASE_MIB OVERLAY_MIB`.

Base and overlay have that much data of *CORPUS*, in runs of 1 MiB at places drawn by lot. The overlay's are written in
no order, and QEMU appends what is written: the guest's order is not the file's.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.bench.harness import MiB

_RUN_BYTES = 1 * MiB


def main(folder: Path, corpus: Path, virtual_mib: int, base_mib: int, overlay_mib: int) -> None:
    folder.mkdir()
    base, overlay = folder / "base", folder / "overlay.qcow2"
    draw, pool = random.Random(1), corpus.read_bytes()
    in_base = draw.sample(range(virtual_mib), base_mib)
    in_overlay = draw.sample(range(virtual_mib), overlay_mib)
    with base.open("wb") as file:
        file.truncate(virtual_mib * MiB)
        for at in in_base:
            file.seek(at * MiB)
            file.write(_run(draw, pool))
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)]
    subprocess.run(words, check=True)
    _write_overlay(overlay, in_overlay, [_run(draw, pool) for _ in range(min(64, len(pool) // _RUN_BYTES))])
    for path in (base, overlay):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seen = len({*in_base, *in_overlay}) * MiB
    print(json.dumps({"seen_bytes": seen, "file_bytes": [path.stat().st_blocks * 512 for path in (base, overlay)]}))


def _run(draw: random.Random, pool: bytes) -> memoryview:
    at = draw.randrange(len(pool) // _RUN_BYTES) * _RUN_BYTES
    return memoryview(pool)[at : at + _RUN_BYTES]


def _write_overlay(overlay: Path, places: list[int], runs: list[memoryview]) -> None:
    """By QEMU itself, in the order of *places* (in MiB)."""
    sources = []
    for n, run in enumerate(runs):
        sources.append(overlay.with_name(f"run-{n}"))
        sources[-1].write_bytes(run)
    orders = [f"write -q -s {sources[n % len(sources)]} {at}M 1M\n" for n, at in enumerate(places)]
    words = ["qemu-io", "-t", "unsafe", "-f", "qcow2", str(overlay)]
    said = subprocess.run(words, input="".join(orders), check=True, text=True, capture_output=True)
    if "failed" in said.stdout + said.stderr:
        sys.exit(f"qemu-io: {said.stdout[-500:]}{said.stderr[-500:]}")
    for source in sources:
        source.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
