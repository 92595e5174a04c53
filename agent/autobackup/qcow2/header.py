"""
The header of a qcow2 file, read as hostile bytes: what it claims, and whether the content can be read by it.

`parse_header` says what stands there and judges no more than it must in order to read on: what a hypervisor ran is
backed up as it is. `layout` judges, and without a `Layout` nothing of the content is read. Whether the names in a
header may be followed is for whoever holds the file.

Source of the format: QEMU, docs/interop/qcow2.txt.
"""

import struct
from dataclasses import dataclass
from typing import Final

from autobackup.errors import Damaged, Refused

MAGIC: Final = b"QFI\xfb"
V2_FIELDS: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset
V3_FIELDS: Final = struct.Struct(">QQQII")
V3_HEADER_BYTES: Final = V2_FIELDS.size + V3_FIELDS.size  # at least; what follows is optional
REFCOUNT_ORDER: Final = 4  # version 2 has no other
SMALLEST_CLUSTER_BITS: Final = 9
LARGEST_CLUSTER_BITS: Final = 21
LARGEST_L1_ENTRIES: Final = 2**22  # what QEMU opens: 32 MiB of them
SECTOR_BYTES: Final = 512
ZLIB, ZSTD = 0, 1

_DIRTY: Final = 1 << 0
_CORRUPT: Final = 1 << 1
_DATA_FILE: Final = 1 << 2  # the data is in another file
_COMPRESSION: Final = 1 << 3
_EXTENDED_L2: Final = 1 << 4
_KNOWN: Final = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_SMALLEST_EXTENDED_BITS: Final = 14
_LARGEST_REFCOUNT_ORDER: Final = 6
_BACKING_FORMAT: Final = 0xE2792ACA
_LONGEST_NAME_BYTES: Final = 1023


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What the header claims; a number in it can be any that its field can hold."""

    version: int
    virtual_bytes: int
    backing_path: str | None
    backing_format: str | None
    cluster_bits: int
    crypt_method: int
    l1_offset: int
    l1_entries: int
    snapshot_count: int
    incompatible_features: int
    refcount_order: int  # a reference count has 2 ** this bits
    header_bytes: int
    compression_type: int

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible_features & _DATA_FILE)

    @property
    def is_marked_corrupt(self) -> bool:
        return bool(self.incompatible_features & _CORRUPT)

    @property
    def is_marked_dirty(self) -> bool:
        """Only the reference counts may be wrong: what is mapped where is not."""
        return bool(self.incompatible_features & _DIRTY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A header whose content can be read. Made by `layout` alone."""

    version: int
    virtual_bytes: int
    file_bytes: int
    cluster_bits: int
    l1_offset: int
    has_subclusters: bool
    compression_type: int

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_guest_bytes(self) -> int:
        """What one L2 table maps."""
        return 1 << (2 * self.cluster_bits - (4 if self.has_subclusters else 3))

    @property
    def l1_entries(self) -> int:
        """That the guest's disk needs; the file can have more, for what a running machine saved or a shrunken disk."""
        return -(-self.virtual_bytes // self.l2_guest_bytes)


def parse_header(head: bytes) -> Qcow2Header:
    """Read a header from the head of a disk. Raises `Damaged` where it makes no sense."""
    if len(head) < V2_FIELDS.size or head[:4] != MAGIC:
        raise Damaged("no qcow2 header")
    (
        _, version, name_offset, name_bytes, cluster_bits, virtual_bytes, crypt_method,
        l1_entries, l1_offset, _, _, snapshot_count, _,
    ) = V2_FIELDS.unpack_from(head)  # fmt: skip
    incompatible, refcount_order, header_bytes, compression_type = 0, REFCOUNT_ORDER, V2_FIELDS.size, 0
    if version == 3:
        if len(head) < V3_HEADER_BYTES:
            raise Damaged("qcow2 header is cut short")
        incompatible, _, _, refcount_order, header_bytes = V3_FIELDS.unpack_from(head, V2_FIELDS.size)
        if min(header_bytes, len(head)) > V3_HEADER_BYTES:
            compression_type = head[V3_HEADER_BYTES]
    elif version != 2:
        raise Damaged(f"qcow2 version {version} is not known")
    backing_path = None
    if name_offset:
        if name_bytes > _LONGEST_NAME_BYTES or name_offset + name_bytes > len(head):
            raise Damaged("qcow2 backing file name lies outside the header")
        backing_path = head[name_offset : name_offset + name_bytes].decode("utf-8", "surrogateescape")
    return Qcow2Header(
        version=version,
        virtual_bytes=virtual_bytes,
        backing_path=backing_path,
        backing_format=_extension(head, header_bytes),
        cluster_bits=cluster_bits,
        crypt_method=crypt_method,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        snapshot_count=snapshot_count,
        incompatible_features=incompatible,
        refcount_order=refcount_order,
        header_bytes=header_bytes,
        compression_type=compression_type,
    )


def layout(header: Qcow2Header, *, file_bytes: int) -> Layout:
    """Raises `Refused` for what we do not read and `Damaged` for what nobody can."""
    _check_features(header)
    _check_shape(header)
    found = Layout(
        version=header.version,
        virtual_bytes=header.virtual_bytes // SECTOR_BYTES * SECTOR_BYTES,  # a guest of QEMU has no part of one
        file_bytes=file_bytes,
        cluster_bits=header.cluster_bits,
        l1_offset=header.l1_offset,
        has_subclusters=bool(header.incompatible_features & _EXTENDED_L2),
        compression_type=header.compression_type,
    )
    if not found.l1_entries <= header.l1_entries <= LARGEST_L1_ENTRIES:
        raise Damaged(f"qcow2 L1 table of {header.l1_entries} entries for a disk of {header.virtual_bytes} bytes")
    if found.l1_entries:
        check_table(found, "L1 table", offset=found.l1_offset, length_bytes=found.l1_entries * 8)
    return found


def check_table(layout: Layout, name: str, *, offset: int, length_bytes: int) -> None:
    if offset % layout.cluster_bytes:
        raise Damaged(f"qcow2 {name} at {offset} is not at the start of a cluster")
    if not 0 < offset <= layout.file_bytes - length_bytes:
        raise Damaged(f"qcow2 {name} at {offset} is outside the file of {layout.file_bytes} bytes")


def _extension(head: bytes, at: int) -> str | None:
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return None
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode("ascii", "replace")
        at += 8 + (length + 7) // 8 * 8
    return None


def _check_features(header: Qcow2Header) -> None:
    features = header.incompatible_features
    if unknown := features & ~_KNOWN:
        raise Refused(f"qcow2 incompatible features {unknown:#x} are not known")
    if features & _DATA_FILE:
        raise Refused("qcow2 data is in another file")
    if header.crypt_method:
        raise Refused(f"qcow2 content is encrypted, method {header.crypt_method}")
    if bool(features & _COMPRESSION) is (header.compression_type == ZLIB):
        raise Damaged(f"qcow2 compression type {header.compression_type} is not what the features say")
    if header.compression_type not in (ZLIB, ZSTD):
        raise Refused(f"qcow2 compression type {header.compression_type} is not known")


def _check_shape(header: Qcow2Header) -> None:
    smallest_bits = SMALLEST_CLUSTER_BITS
    if header.incompatible_features & _EXTENDED_L2:
        smallest_bits = _SMALLEST_EXTENDED_BITS
    if not smallest_bits <= header.cluster_bits <= LARGEST_CLUSTER_BITS:
        raise Damaged(f"qcow2 clusters of 2 ** {header.cluster_bits} bytes")
    if header.refcount_order > _LARGEST_REFCOUNT_ORDER:
        raise Damaged(f"qcow2 reference counts of 2 ** {header.refcount_order} bits")
    if header.version != 2 and (
        header.header_bytes % 8 or not V3_HEADER_BYTES <= header.header_bytes <= 1 << header.cluster_bits
    ):
        raise Damaged(f"qcow2 header of {header.header_bytes} bytes")
