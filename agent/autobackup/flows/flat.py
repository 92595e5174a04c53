"""
A chain as one qcow2 file, written front to back without a copy of it anywhere: what a guest saw, cluster by cluster.

From the top layer down, each cluster is taken from the first layer that has it. In the file the clusters of one layer
come in the order in which they lie in that layer's own file, so that all that is read is read in order.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from autobackup.flows.layers import PIECE_BYTES, Layer
from autobackup.qcow2.mapping import Extent, Kind
from autobackup.qcow2.stream import Plan, plan
from autobackup.units import KiB

BLOCK_BYTES: Final = 64 * KiB
_SECTOR_BYTES: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """
    One layer. *not_zero*, where it is known: a byte for each `BLOCK_BYTES`, 0 where the layer has only zeros.
    """

    layer: Layer
    not_zero: bytearray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Clusters side by side in the guest's disk and in one extent of one layer."""

    layer: Layer
    extent: Extent
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """The file: made by `flattened`."""

    plan: Plan
    runs: Sequence[_Run]

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """All of it, in pieces of about 1 MiB."""
        for piece in self.plan.metadata():
            yield piece
        cluster_bytes = self.plan.cluster_bytes
        step = max(1, PIECE_BYTES // cluster_bytes)
        for run in self.runs:
            for at in range(run.first, run.first + run.count, step):
                count = min(step, run.first + run.count - at)
                start = at * cluster_bytes - run.extent.guest_offset
                length = min(count * cluster_bytes, run.extent.length_bytes - start)
                data = await run.layer.data(run.extent, start, length)
                yield data.ljust(count * cluster_bytes, b"\0")


def _cluster_bytes(layers: Sequence[Layer]) -> int:
    """
    The size of a cluster of the result: no layer's own is cut by it, nor the end of one between others.

    (Behind that end a guest sees zeros, in front of it perhaps the layer below.)
    """
    ends = [layer.virtual_bytes & -layer.virtual_bytes for layer in layers[1:-1] if layer.virtual_bytes]
    return max(_SECTOR_BYTES, min([BLOCK_BYTES, *(layer.cluster_bytes for layer in layers), *ends]))


async def flattened(parts: Sequence[Part]) -> Flat:
    """Plan the file for the chain *parts*, the top first."""
    cluster_bytes = _cluster_bytes([part.layer for part in parts])
    virtual_bytes = -(-parts[0].layer.virtual_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
    settled = bytearray(-(-virtual_bytes // cluster_bytes))  # 1: a layer has had its say
    runs: list[_Run] = []
    for part in parts:
        mine = []
        async for extent in part.layer.extents():
            first = extent.guest_offset // cluster_bytes
            end = min(-(-(extent.guest_offset + extent.length_bytes) // cluster_bytes), len(settled))
            if extent.kind is Kind.HOLE or first >= end:
                continue
            if extent.kind is not Kind.ZERO:
                free = _free(settled, part.not_zero, BLOCK_BYTES // cluster_bytes, first, end)
                mine += [_Run(layer=part.layer, extent=extent, first=at, count=count) for at, count in free]
            settled[first:end] = b"\1" * (end - first)
        beyond = min(-(-part.layer.virtual_bytes // cluster_bytes), len(settled))
        settled[beyond:] = b"\1" * (len(settled) - beyond)  # behind a shorter layer a guest sees zeros
        mine.sort(key=lambda run: (run.extent.host_offset, run.first))
        runs += mine
    order = (cluster for run in runs for cluster in range(run.first, run.first + run.count))
    return Flat(plan=plan(virtual_bytes, order=order, cluster_bits=cluster_bytes.bit_length() - 1), runs=runs)


def _free(
    settled: bytearray, not_zero: bytearray | None, clusters: int, first: int, end: int
) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of clusters that no layer above has, and that are not zeros here."""
    at = first
    while (at := settled.find(0, at, end)) >= 0:
        stop = settled.find(1, at, end)
        stop = end if stop < 0 else stop
        if not_zero is None:
            yield at, stop - at
        else:
            yield from _marked(not_zero, clusters, at, stop)
        at = stop


def _marked(not_zero: bytearray, clusters: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Within *first* to *end*; a mark is for so many *clusters*."""
    block, last = first // clusters, -(-end // clusters)
    while (block := not_zero.find(1, block, last)) >= 0:
        stop = not_zero.find(0, block, last)
        stop = last if stop < 0 else stop
        start = max(first, block * clusters)
        yield start, min(end, stop * clusters) - start
        block = stop
