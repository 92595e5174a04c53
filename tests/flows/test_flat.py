"""A chain as one file: what QEMU shows of the one is what it shows of the other, whatever the layers are like."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from tests.unit.qcow2.material import KiB, MiB, needs_qemu_img, qemu_img, qemu_io, qemu_reads, write_at_random

from autobackup.errors import Damaged
from autobackup.flows.flat import BLOCK_BYTES, Part, flattened
from autobackup.flows.layers import FileSource, content, open_layer
from autobackup.flows.workers import Workers

pytestmark = needs_qemu_img
SIZE: Final = 6 * MiB


@dataclass(frozen=True)
class Qcow2:
    """An overlay, or the lowest one: what is written to it, at random (*seed*) or as *commands* say."""

    virtual_bytes: int = SIZE
    cluster_bytes: int = 64 * KiB
    options: str = ""
    seed: int | None = None
    commands: tuple[str, ...] = ()

    def make(self, path: Path, below: Path | None, below_format: str) -> None:
        options = f"cluster_size={self.cluster_bytes}" + (f",{self.options}" if self.options else "")
        backing: list[str | Path] = ["-b", below, "-F", below_format] if below else []
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(self.virtual_bytes))
        if self.seed is not None:
            write_at_random(
                path, virtual_bytes=self.virtual_bytes, cluster_bytes=self.cluster_bytes, seed=self.seed,
                fresh="extended_l2" not in options,
            )  # fmt: skip
        if self.commands:
            qemu_io(path, *self.commands)


@dataclass(frozen=True)
class Raw:
    """Data, with zeros in the middle."""

    virtual_bytes: int = SIZE

    def make(self, path: Path, below: Path | None, below_format: str) -> None:
        assert below is None
        data = bytearray(random.Random(self.virtual_bytes).randbytes(self.virtual_bytes))
        data[MiB : 2 * MiB + 5] = bytes(MiB + 5)
        path.write_bytes(data[: self.virtual_bytes])


@dataclass(frozen=True)
class Packed:
    """As vendors publish them: compressed, all of it."""

    options: str = ""
    below: Raw = field(default_factory=Raw)

    def make(self, path: Path, below: Path | None, below_format: str) -> None:
        raw = path.with_suffix(".unpacked")
        self.below.make(raw, None, "")
        options = ["-o", self.options] if self.options else []
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, raw, path)


Layer = Raw | Qcow2 | Packed


def format_of(layer: Layer) -> str:
    return "raw" if isinstance(layer, Raw) else "qcow2"


def make(folder: Path, layers: Sequence[Layer]) -> list[Path]:
    """The files of the chain, the lowest first."""
    paths: list[Path] = []
    for number, layer in enumerate(layers):
        path = folder / f"layer{number}"
        layer.make(path, paths[-1] if paths else None, format_of(layers[number - 1]) if paths else "")
        paths.append(path)
    return paths


async def parts_of(paths: Sequence[Path], layers: Sequence[Layer], workers: Workers, *, marked: bool) -> list[Part]:
    parts = []
    for path, layer in zip(reversed(paths), reversed(layers), strict=True):
        opened = await open_layer(FileSource(str(path), workers), format_of(layer), workers)
        not_zero = None
        if marked and path == paths[0]:
            disk = b"".join([bytes(one) if isinstance(one, int) else one async for one in content(opened)])
            blocks = range(0, len(disk), BLOCK_BYTES)
            not_zero = bytearray(any(disk[at : at + BLOCK_BYTES]) for at in blocks)
        parts.append(Part(layer=opened, not_zero=not_zero))
    return parts


async def flat_file(path: Path, parts: Sequence[Part]) -> int:
    flat = await flattened(parts)
    with path.open("wb") as file:
        async for piece in flat.pieces():
            assert 0 < len(piece) <= 2 * MiB
            file.write(piece)
    assert path.stat().st_size == flat.plan.file_bytes
    return flat.plan.file_bytes


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(cpu_tokens=2, threads=2)
    yield workers
    workers.close()


OVER_DATA: Final = ("write -P 7 0 3M", "write -z 128k 1M", "write -z -u 2M 256k", "discard 1500k 64k")
CHAINS: Final[dict[str, Sequence[Layer]]] = {
    "raw alone": [Raw()],
    "packed alone": [Packed()],
    "nothing alone": [Qcow2()],
    "on raw": [Raw(), Qcow2(seed=1)],
    "on raw, nothing written": [Raw(), Qcow2()],
    "on raw, all written": [Raw(), Qcow2(commands=("write -P 3 0 6M",))],
    "on a packed one": [Packed(), Qcow2(seed=2)],
    "on one packed by zstd": [Packed("compression_type=zstd,cluster_size=2M"), Qcow2(seed=3)],
    "packed clusters of 4 KiB": [Packed("cluster_size=4k"), Qcow2(seed=4, cluster_bytes=2 * MiB)],
    "version 2": [Qcow2(seed=5, options="compat=0.10"), Qcow2(seed=6)],
    "three": [Raw(), Qcow2(seed=7), Qcow2(seed=8)],
    "four": [Packed(), Qcow2(seed=9), Qcow2(seed=10), Qcow2(seed=11, cluster_bytes=512)],
    "small clusters in the middle": [Raw(), Qcow2(seed=12, cluster_bytes=4 * KiB), Qcow2(seed=13, cluster_bytes=MiB)],
    "large clusters in the middle": [Raw(), Qcow2(seed=14, cluster_bytes=2 * MiB), Qcow2(seed=15)],
    "subclusters": [Raw(), Qcow2(seed=16, options="extended_l2=on"), Qcow2(seed=17)],
    "small subclusters on top": [Raw(), Qcow2(seed=18, options="extended_l2=on", cluster_bytes=16 * KiB)],
    "zeros over data below": [Raw(), Qcow2(commands=("write -z 0 2M", "write -z -u 3M 1M"))],
    "zeros over data in one": [Raw(), Qcow2(commands=OVER_DATA)],
    "zeros over zeros over data": [
        Raw(), Qcow2(commands=OVER_DATA), Qcow2(commands=("write -z 0 1M", "write -P 9 192k 64k"))
    ],
    "grown": [Raw(3 * MiB), Qcow2(seed=19)],
    "grown from a size that is odd": [Raw(3 * MiB + 77), Qcow2(seed=20)],
    "grown from a part of a cluster": [Qcow2(3 * MiB + 512, seed=21), Qcow2(seed=22)],
    "shrunk": [Raw(), Qcow2(3 * MiB, seed=23)],
    "shrunk to a part of a cluster": [Raw(), Qcow2(3 * MiB + 1536, seed=24)],
    "shrunk to next to nothing": [Raw(), Qcow2(512)],
    "grown twice": [Raw(2 * MiB), Qcow2(3 * MiB, seed=25), Qcow2(seed=26)],
    "shrunk and grown": [Raw(), Qcow2(3 * MiB), Qcow2()],
    "shrunk to a part of a cluster and grown": [Raw(), Qcow2(3 * MiB + 512), Qcow2()],
    "shrunk to a part of a larger cluster and grown": [Raw(), Qcow2(3 * MiB + 512, cluster_bytes=2 * MiB), Qcow2()],
    "shrunk, grown, shrunk": [Packed(), Qcow2(2 * MiB + 1024), Qcow2(seed=27), Qcow2(5 * MiB + 2560, seed=28)],
    "an odd raw one, in full": [Raw(6 * MiB - 3), Qcow2(commands=("write -P 1 5M 1M",))],
    "less than a cluster": [Raw(1000), Qcow2(1024, commands=("write -P 1 512 512",))],
    "of no size": [Raw(0), Qcow2(MiB)],
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
async def test_qemu_shows_the_same_of_both(tmp_path: Path, workers: Workers, name: str) -> None:
    layers = CHAINS[name]
    paths = make(tmp_path, layers)
    seen = tmp_path / "seen.raw"
    qemu_img("convert", "-f", format_of(layers[-1]), "-O", "raw", paths[-1], seen)
    wanted = seen.read_bytes()

    sizes = []
    for marked in (False, True):
        target = tmp_path / f"flat-{marked}"
        sizes.append(await flat_file(target, await parts_of(paths, layers, workers, marked=marked)))
        assert qemu_img("check", "-f", "qcow2", target).startswith("No errors")
        assert hashlib.sha256(qemu_reads(target)).digest() == hashlib.sha256(wanted).digest(), marked
        assert "backing file" not in qemu_img("info", "-f", "qcow2", target)
    assert sizes[1] <= sizes[0], "what is known to be zeros is not sent"


async def test_known_zeros_are_not_in_the_file(tmp_path: Path, workers: Workers) -> None:
    """A raw base of a large image is mostly nothing."""
    path = tmp_path / "layer0"
    path.write_bytes(bytes(20 * MiB) + b"x" + bytes(20 * MiB - 1))
    layers: Sequence[Layer] = [Raw(), Qcow2(40 * MiB)]
    layers[1].make(tmp_path / "layer1", path, "raw")
    parts = await parts_of([path, tmp_path / "layer1"], layers, workers, marked=True)
    assert await flat_file(tmp_path / "flat", parts) <= 8 * BLOCK_BYTES
    assert qemu_reads(tmp_path / "flat") == path.read_bytes()


async def test_every_file_is_read_in_order(tmp_path: Path, workers: Workers) -> None:
    """Each layer's data lies in the file as in its own: a store or a cloud is read forwards."""
    layers = CHAINS["three"]
    paths = make(tmp_path, layers)
    parts = await parts_of(paths, layers, workers, marked=False)
    flat = await flattened(parts)
    for part in parts:
        offsets = [
            run.extent.host_offset + run.first * flat.plan.cluster_bytes - run.extent.guest_offset
            for run in flat.runs
            if run.layer is part.layer
        ]
        assert offsets == sorted(offsets)
        assert offsets


def truncated(data: bytearray) -> None:
    del data[len(data) // 2 :]


def l1_out_of_the_file(data: bytearray) -> None:
    data[40:48] = (1 << 40).to_bytes(8, "big")


def l1_entry_into_nowhere(data: bytearray) -> None:
    at = int.from_bytes(data[40:48], "big")
    data[at : at + 8] = ((1 << 63) | (1 << 40)).to_bytes(8, "big")


@pytest.mark.parametrize("damage", [truncated, l1_out_of_the_file, l1_entry_into_nowhere])
async def test_tables_that_lead_nowhere_are_damage(
    tmp_path: Path, workers: Workers, damage: Callable[[bytearray], None]
) -> None:
    layers: Sequence[Layer] = [Raw(), Qcow2(seed=1, commands=("write -P 1 5M 1M",))]
    paths = make(tmp_path, layers)
    data = bytearray(paths[-1].read_bytes())
    damage(data)
    paths[-1].write_bytes(data)
    with pytest.raises(Damaged):
        await flat_file(tmp_path / "flat", await parts_of(paths, layers, workers, marked=False))
