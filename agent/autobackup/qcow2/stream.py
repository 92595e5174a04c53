"""
A new qcow2 file, written front to back: all of its tables are known before the first byte of data.

    header | refcount table | refcount blocks | L1 table | L2 tables | data clusters, in the caller's order

The caller sends `Plan.metadata()` and then each data cluster whole, padded where the guest's disk ends within it. What
the order does not name reads as zeros. The file has no backing file, no snapshot and no cluster without a use.
"""

import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from autobackup.errors import Refused
from autobackup.qcow2.header import (
    LARGEST_CLUSTER_BITS,
    LARGEST_L1_ENTRIES,
    MAGIC,
    REFCOUNT_ORDER,
    SECTOR_BYTES,
    SMALLEST_CLUSTER_BITS,
    V2_FIELDS,
    V3_FIELDS,
    V3_HEADER_BYTES,
)
from autobackup.units import MiB

PIECE_BYTES: Final = 1 * MiB

_USED_ONCE: Final = 1 << 63  # an L2 table or a cluster whose reference count is exactly one
_ONE: Final = b"\0\1"  # a reference count
_LARGEST_REFCOUNT_TABLE_BYTES: Final = 8 * MiB  # what QEMU opens
_SLOT_BITS: Final = LARGEST_CLUSTER_BITS - 3
_SLOT: Final = (1 << _SLOT_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything goes. Made by `plan`."""

    virtual_bytes: int
    cluster_bits: int
    data_cluster_count: int
    refcount_table_clusters: int
    refcount_block_clusters: int
    l1_entries: int
    l1_clusters: int
    # by L1 entry: for each data cluster its place in the order and, in the low bits, its slot in the L2 table
    l2_tables: "Mapping[int, array[int]]"

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def metadata_bytes(self) -> int:
        return self._l2_offset + len(self.l2_tables) * self.cluster_bytes

    @property
    def file_bytes(self) -> int:
        return self.metadata_bytes + self.data_cluster_count * self.cluster_bytes

    def metadata(self) -> Iterator[bytes]:
        """All that stands before the data, in pieces of `PIECE_BYTES` at most."""
        waiting = bytearray()
        for part in self._parts():
            waiting += part
            while len(waiting) >= PIECE_BYTES:
                yield bytes(waiting[:PIECE_BYTES])
                del waiting[:PIECE_BYTES]
        if waiting:
            yield bytes(waiting)

    @property
    def _refcount_blocks_offset(self) -> int:
        return (1 + self.refcount_table_clusters) * self.cluster_bytes

    @property
    def _l1_offset(self) -> int:
        return self._refcount_blocks_offset + self.refcount_block_clusters * self.cluster_bytes

    @property
    def _l2_offset(self) -> int:
        return self._l1_offset + self.l1_clusters * self.cluster_bytes

    def _parts(self) -> Iterator[bytes]:
        blocks = range(self._refcount_blocks_offset, self._l1_offset, self.cluster_bytes)
        sections: tuple[tuple[Iterable[bytes], int], ...] = (
            ([self._header()], 1),
            (_encoded(blocks), self.refcount_table_clusters),
            (_ones(self.file_bytes >> self.cluster_bits), self.refcount_block_clusters),
            (_encoded(self._l1()), self.l1_clusters),
        )
        for parts, clusters in sections:
            yield from _padded(parts, length_bytes=clusters << self.cluster_bits)
        for index in sorted(self.l2_tables):
            yield self._l2(index)

    def _header(self) -> bytes:
        fixed = V2_FIELDS.pack(
            MAGIC, 3, 0, 0, self.cluster_bits, self.virtual_bytes, 0,
            self.l1_entries, self._l1_offset, self.cluster_bytes, self.refcount_table_clusters, 0, 0,
        )  # fmt: skip
        return fixed + V3_FIELDS.pack(0, 0, 0, REFCOUNT_ORDER, V3_HEADER_BYTES)

    def _l1(self) -> Iterator[int]:
        offset = self._l2_offset
        for index in range(self.l1_entries):
            if index in self.l2_tables:
                yield _USED_ONCE | offset
                offset += self.cluster_bytes
            else:
                yield 0

    def _l2(self, index: int) -> bytes:
        table, start = array("Q", bytes(self.cluster_bytes)), self.metadata_bytes
        for packed in self.l2_tables[index]:
            table[packed & _SLOT] = _USED_ONCE | start + (packed >> _SLOT_BITS << self.cluster_bits)
        return _big_endian(table)


def plan(virtual_bytes: int, *, order: Iterable[int], cluster_bits: int = 16) -> Plan:
    """
    A file for a disk of *virtual_bytes* whose data clusters, by their numbers on the guest's disk, come in *order*.

    Takes 8 bytes of memory for each. Raises `Refused` for a disk that QEMU would not open.
    """
    if not SMALLEST_CLUSTER_BITS <= cluster_bits <= LARGEST_CLUSTER_BITS:
        raise ValueError(f"clusters of 2 ** {cluster_bits} bytes")
    if virtual_bytes < 0 or virtual_bytes % SECTOR_BYTES:
        raise ValueError(f"a disk of {virtual_bytes} bytes")
    slot_bits = cluster_bits - 3
    l1_entries = _ratio_up(virtual_bytes, 1 << cluster_bits + slot_bits)
    if l1_entries > LARGEST_L1_ENTRIES:
        raise Refused(f"a disk of {virtual_bytes} bytes is too large for clusters of {1 << cluster_bits}")
    l2_tables = _grouped(order, cluster_count=_ratio_up(virtual_bytes, 1 << cluster_bits), slot_bits=slot_bits)
    l1_clusters = _ratio_up(l1_entries * 8, 1 << cluster_bits)
    data_cluster_count = sum(map(len, l2_tables.values()))
    tables, blocks = refcounting(1 + l1_clusters + len(l2_tables) + data_cluster_count, cluster_bytes=1 << cluster_bits)
    return Plan(
        virtual_bytes=virtual_bytes,
        cluster_bits=cluster_bits,
        data_cluster_count=data_cluster_count,
        refcount_table_clusters=tables,
        refcount_block_clusters=blocks,
        l1_entries=l1_entries,
        l1_clusters=l1_clusters,
        l2_tables=l2_tables,
    )


def refcounting(other_clusters: int, *, cluster_bytes: int) -> tuple[int, int]:
    """Clusters of the refcount table and of its blocks, which count themselves, too."""
    table, blocks = 0, 0
    while True:
        needed_blocks = _ratio_up((other_clusters + table + blocks) * len(_ONE), cluster_bytes)
        needed_table = _ratio_up(needed_blocks * 8, cluster_bytes)
        if (needed_table, needed_blocks) == (table, blocks):
            break
        table, blocks = needed_table, needed_blocks
    if table * cluster_bytes > _LARGEST_REFCOUNT_TABLE_BYTES:
        raise Refused(f"{other_clusters} clusters of {cluster_bytes} bytes are too many for one file")
    return table, blocks


def _grouped(order: Iterable[int], *, cluster_count: int, slot_bits: int) -> "Mapping[int, array[int]]":
    tables: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
    slot = (1 << slot_bits) - 1
    for place, cluster in enumerate(order):
        if not 0 <= cluster < cluster_count:
            raise ValueError(f"cluster {cluster} of {cluster_count}")
        tables[cluster >> slot_bits].append(place << _SLOT_BITS | cluster & slot)
    for index, table in tables.items():
        if len({packed & _SLOT for packed in table}) < len(table):
            raise ValueError(f"a cluster of L2 table {index} comes twice")
    return dict(tables)


def _ratio_up(value: int, by: int) -> int:
    return -(-value // by)


def _padded(parts: Iterable[bytes], *, length_bytes: int) -> Iterator[bytes]:
    for part in parts:
        yield part
        length_bytes -= len(part)
    yield bytes(length_bytes)


def _encoded(numbers: Iterable[int]) -> Iterator[bytes]:
    numbers = iter(numbers)
    while batch := array("Q", islice(numbers, PIECE_BYTES // 8)):
        yield _big_endian(batch)


def _ones(count: int) -> Iterator[bytes]:
    while count > 0:
        step = min(count, PIECE_BYTES // len(_ONE))
        yield _ONE * step
        count -= step


def _big_endian(numbers: "array[int]") -> bytes:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()
