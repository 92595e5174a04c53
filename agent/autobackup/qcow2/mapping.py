"""
What each guest cluster of one qcow2 file is, and where its bytes are.

The caller reads `l1_span`, then the tables that `l2_offsets` names, then what their extents point at; memory is
bounded by the tables (32 MiB, and 2 MiB at a time). Only the active state is read, no snapshot. What shows through a
HOLE is for whoever knows the chain.

Content is hostile: an offset that the file does not have, or that QEMU would not follow, is `Damaged`. Bits that are
reserved are ignored, as QEMU does: what the guest saw is what counts.
"""

import enum
import heapq
import sys
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import zstandard

from autobackup.errors import Damaged
from autobackup.qcow2.header import SECTOR_BYTES, ZSTD, Layout, check_table
from autobackup.units import MiB

_OFFSET: Final = (1 << 56) - (1 << 9)  # of an L2 table in an L1 entry, of a cluster in an L2 entry
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1 << 0
_SUBCLUSTERS: Final = 32
_ZSTD_WINDOW_BYTES: Final = 8 * MiB  # RFC 8878 asks every reader for so much; QEMU's writer uses a cluster
_RUN_ENTRIES: Final = 1 << 16


class Kind(enum.Enum):
    HOLE = enum.auto()  # not here: the layer below shows
    ZERO = enum.auto()
    DATA = enum.auto()
    COMPRESSED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """
    A range of the guest's disk and, of DATA and COMPRESSED, what to read from the file for it.

    DATA is as long in the file, or shorter where the file ends: the rest reads as zeros. COMPRESSED is one cluster:
    where the guest's disk ends within it, only the first *length_bytes* of what `decompress` returns are the guest's.
    """

    guest_offset: int
    length_bytes: int
    kind: Kind
    host_offset: int = 0
    host_bytes: int = 0


# What an L2 entry, or a part of one, is: kind, guest's bytes, offset in the file, bytes there
_Piece: TypeAlias = tuple[Kind, int, int, int]


def l1_span(layout: Layout) -> tuple[int, int]:
    """Offset and length in the file of the part of the L1 table that maps the guest's disk."""
    return layout.l1_offset, layout.l1_entries * 8


def l2_offsets(layout: Layout, l1: bytes) -> "array[int]":
    """Where the L2 table of each L1 entry is, one cluster long; 0: there is none, all of its range is a HOLE."""
    if len(l1) != layout.l1_entries * 8:
        raise Damaged(f"qcow2 L1 table: {len(l1)} bytes of {layout.l1_entries * 8}")
    offsets = array("Q", (entry & _OFFSET for entry in _numbers(l1)))
    for offset in filter(None, offsets):
        check_table(layout, "L2 table", offset=offset, length_bytes=layout.cluster_bytes)
    # QEMU writes no such thing, and with it a small file could map a disk without end
    if shared := _first_shared(offsets):
        raise Damaged(f"qcow2 L2 table at {shared} belongs to two L1 entries")
    return offsets


def extents(layout: Layout, l1_index: int, l2: bytes | None) -> Iterator[Extent]:
    """
    What the range of one L1 entry is, without gaps, as far as the guest's disk goes; *l2* is None if it has no table.

    Neighbours of one kind are one extent, DATA if they are neighbours in the file, too; COMPRESSED never. Extents begin
    and end where clusters do, or subclusters, or the guest's disk.
    """
    if not 0 <= l1_index < layout.l1_entries:
        raise ValueError(f"L1 entry {l1_index} of {layout.l1_entries}")
    start = l1_index * layout.l2_guest_bytes
    end = min(start + layout.l2_guest_bytes, layout.virtual_bytes)
    if l2 is None:
        return iter((Extent(guest_offset=start, length_bytes=end - start, kind=Kind.HOLE),))
    if len(l2) != layout.cluster_bytes:
        raise Damaged(f"qcow2 L2 table: {len(l2)} bytes of {layout.cluster_bytes}")
    clusters = -(-(end - start) // layout.cluster_bytes)
    if layout.has_subclusters:
        return _merged(_subclusters(layout, l2[: clusters * 16]), start=start, end=end)
    return _merged(_clusters(layout, l2[: clusters * 8]), start=start, end=end)


def decompress(layout: Layout, data: bytes) -> bytes:
    """The one cluster that *data* begins with; the last sector read may hold the start of another."""
    wanted_bytes = layout.cluster_bytes
    try:
        if layout.compression_type == ZSTD:
            cluster = (
                zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
                .stream_reader(data)
                .read(wanted_bytes + 1)
            )
        else:
            cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, wanted_bytes + 1)
    except (zlib.error, zstandard.ZstdError) as exc:
        raise Damaged(f"qcow2 compressed cluster: {exc}") from None
    if len(cluster) != wanted_bytes:
        size = "more" if len(cluster) > wanted_bytes else str(len(cluster))
        raise Damaged(f"qcow2 compressed cluster: {size} bytes where {wanted_bytes} should be")
    return cluster


def _numbers(table: bytes) -> "array[int]":
    numbers = array("Q", table)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _first_shared(offsets: "array[int]") -> int | None:
    # sorted in runs and merged: a set of the most there can be takes 400 MiB, this takes 32
    starts = range(0, len(offsets), _RUN_ENTRIES)
    runs = [array("Q", sorted(filter(None, offsets[at : at + _RUN_ENTRIES]))) for at in starts]
    return next((one for one, other in pairwise(heapq.merge(*runs)) if one == other), None)


def _clusters(layout: Layout, l2: bytes) -> Iterator[_Piece]:
    cluster_bytes = layout.cluster_bytes
    hole: _Piece = (Kind.HOLE, cluster_bytes, 0, 0)
    for entry in _numbers(l2):
        offset = entry & _OFFSET
        if entry & _COMPRESSED:
            yield _compressed(layout, entry)
        elif entry & _ZERO:
            if layout.version == 2:
                raise Damaged(f"qcow2 L2 entry {entry:#x}: version 2 has no such clusters")
            if offset % cluster_bytes:
                raise Damaged(f"qcow2 cluster at {offset} is not at the start of a cluster")
            yield Kind.ZERO, cluster_bytes, 0, 0
        elif offset:
            yield _data(layout, offset, start=0, end=cluster_bytes)
        else:
            yield hole


def _subclusters(layout: Layout, l2: bytes) -> Iterator[_Piece]:
    """As `_clusters`, where each entry has a second half: what each 32nd of the cluster is."""
    part_bytes = layout.cluster_bytes // _SUBCLUSTERS
    numbers = iter(_numbers(l2))
    for entry, bitmap in zip(numbers, numbers, strict=True):
        if entry & _COMPRESSED:
            yield _compressed(layout, entry)
            continue
        offset, allocated, zero = entry & _OFFSET, bitmap & 0xFFFFFFFF, bitmap >> 32
        if allocated & zero or (allocated and not offset):
            raise Damaged(f"qcow2 L2 entry {entry:#x}: subclusters {bitmap:#x} contradict it")
        if offset % layout.cluster_bytes:
            raise Damaged(f"qcow2 cluster at {offset} is not at the start of a cluster")
        for part in range(_SUBCLUSTERS):
            if allocated >> part & 1:
                yield _data(layout, offset, start=part * part_bytes, end=(part + 1) * part_bytes)
            else:
                yield Kind.ZERO if zero >> part & 1 else Kind.HOLE, part_bytes, 0, 0


def _compressed(layout: Layout, entry: int) -> _Piece:
    """The descriptor's low bits are an offset of bytes, the high ones count sectors after the one it is in."""
    offset_bits = 62 - (layout.cluster_bits - 8)
    offset = entry & ((1 << offset_bits) - 1)
    sectors = 1 + (entry >> offset_bits & ((1 << (layout.cluster_bits - 8)) - 1))
    # the last sector may be cut at the end of the file, where the compressed bytes are not
    host_bytes = min(sectors * SECTOR_BYTES - offset % SECTOR_BYTES, layout.file_bytes - offset)
    if not offset or host_bytes <= 0:
        raise Damaged(f"qcow2 compressed cluster at {offset} is outside the file of {layout.file_bytes} bytes")
    return Kind.COMPRESSED, layout.cluster_bytes, offset, host_bytes


def _data(layout: Layout, offset: int, *, start: int, end: int) -> _Piece:
    """From *start* to *end* of the cluster at *offset*."""
    if offset % layout.cluster_bytes:
        raise Damaged(f"qcow2 cluster at {offset} is not at the start of a cluster")
    if offset >= layout.file_bytes:
        raise Damaged(f"qcow2 cluster at {offset} is outside the file of {layout.file_bytes} bytes")
    host_bytes = min(end, layout.file_bytes - offset) - start
    if host_bytes <= 0:
        return Kind.ZERO, end - start, 0, 0
    return Kind.DATA, end - start, offset + start, host_bytes


def _merged(pieces: Iterator[_Piece], *, start: int, end: int) -> Iterator[Extent]:
    at, (run_kind, run_bytes, run_offset, run_host_bytes) = start, next(pieces)
    for kind, piece_bytes, host_offset, host_bytes in pieces:
        if at + run_bytes >= end:
            break
        if kind is run_kind and host_offset == run_offset + run_host_bytes and kind is not Kind.COMPRESSED:
            run_bytes += piece_bytes
            run_host_bytes += host_bytes
            continue
        yield Extent(
            guest_offset=at, length_bytes=run_bytes, kind=run_kind, host_offset=run_offset, host_bytes=run_host_bytes
        )
        at += run_bytes
        run_kind, run_bytes, run_offset, run_host_bytes = kind, piece_bytes, host_offset, host_bytes
    # the guest's disk can end within a cluster
    run_bytes = min(run_bytes, end - at)
    yield Extent(
        guest_offset=at,
        length_bytes=run_bytes,
        kind=run_kind,
        host_offset=run_offset,
        host_bytes=min(run_host_bytes, run_bytes) if run_kind is Kind.DATA else run_host_bytes,
    )
