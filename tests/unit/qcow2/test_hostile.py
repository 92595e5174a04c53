"""Whatever stands in a qcow2 file, it is read within bounds or refused by name."""

import dataclasses
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qcow2.material import GiB, KiB, MiB, entries, extents_of, read_guest

from autobackup.errors import AutobackupError, Damaged, Refused
from autobackup.qcow2.header import Layout, Qcow2Header, layout, parse_header
from autobackup.qcow2.mapping import Extent, Kind, decompress, extents, l1_span, l2_offsets
from autobackup.qcow2.stream import plan

CLUSTER = 64 * KiB
FILE = 100 * CLUSTER
USED = 1 << 63

GOOD = Qcow2Header(
    version=3,
    virtual_bytes=1 * GiB,
    backing_path=None,
    backing_format=None,
    cluster_bits=16,
    crypt_method=0,
    l1_offset=3 * CLUSTER,
    l1_entries=2,
    snapshot_count=0,
    incompatible_features=0,
    refcount_order=4,
    header_bytes=112,
    compression_type=0,
)


def good(**fields: Any) -> Layout:
    return layout(dataclasses.replace(GOOD, **fields), file_bytes=FILE)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        *(({"cluster_bits": bits}, Damaged, "clusters of 2") for bits in (0, 8, 22, 63, 64, 2**32 - 1)),
        *(({"incompatible_features": 1 << bit}, Refused, "not known") for bit in range(5, 64)),
        ({"incompatible_features": 1 << 2}, Refused, "another file"),
        ({"incompatible_features": 1 << 3}, Damaged, "compression type 0"),
        ({"compression_type": 1}, Damaged, "compression type 1"),
        ({"incompatible_features": 1 << 3, "compression_type": 2}, Refused, "type 2 is not known"),
        ({"incompatible_features": 1 << 4, "cluster_bits": 13}, Damaged, "clusters of 2"),
        *(({"crypt_method": method}, Refused, "encrypted") for method in (1, 2, 3, 2**32 - 1)),
        *(({"refcount_order": order}, Damaged, "reference counts") for order in (7, 2**32 - 1)),
        *(({"header_bytes": count}, Damaged, "header of") for count in (0, 72, 96, 105, CLUSTER + 8, 2**32 - 1)),
        *(({"l1_entries": count}, Damaged, "L1 table of") for count in (0, 1, 2**22 + 1, 2**32 - 1)),
        *(({"l1_offset": at}, Damaged, "start of a cluster") for at in (1, 512, CLUSTER - 1, 2**64 - 1)),
        *(({"l1_offset": at}, Damaged, "outside") for at in (0, FILE, 1 << 63, 2**64 - CLUSTER)),
        *(({"virtual_bytes": count}, Damaged, "L1 table of") for count in (1 * GiB + 512, 2**63, 2**64 - 1)),
        ({"virtual_bytes": 2**64 - 1, "l1_entries": 2**32 - 1}, Damaged, "L1 table of"),
    ],
    ids=str,
)
def test_a_header_with_a_field_out_of_range_is_refused_by_name(
    fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        good(**fields)


def test_what_only_warns_does_not_hinder_reading() -> None:
    """Dirty: reference counts may be wrong. Corrupt: QEMU still reads. A longer L1 table: a machine's state."""
    for fields in ({"incompatible_features": 3}, {"l1_entries": 2**22}, {"cluster_bits": 21, "l1_offset": 2 * MiB}):
        good(**fields)
    assert good(virtual_bytes=0, l1_entries=0, l1_offset=0).l1_entries == 0
    marked = dataclasses.replace(GOOD, incompatible_features=3)
    assert (marked.is_marked_dirty, marked.is_marked_corrupt, marked.has_data_file) == (True, True, False)


def test_a_short_header_has_no_compression_type() -> None:
    """QEMU before 5.1 wrote 104 bytes; what follows is an extension."""
    head = next(plan(1 * MiB, order=()).metadata())[:104] + struct.pack(">II4s", 0xE2792ACA, 3, b"raw")
    header = parse_header(head.ljust(4 * KiB, b"\0"))
    assert (header.header_bytes, header.compression_type, header.backing_format) == (104, 0, "raw")
    assert layout(header, file_bytes=1 * MiB).compression_type == 0


def test_the_l1_table_ends_within_the_file() -> None:
    header = dataclasses.replace(GOOD, l1_offset=CLUSTER)
    assert l1_span(layout(header, file_bytes=CLUSTER + 16)) == (CLUSTER, 16)
    with pytest.raises(Damaged, match="outside"):
        layout(header, file_bytes=CLUSTER + 15)


@pytest.mark.parametrize(
    ("l1", "words"),
    [
        ((CLUSTER + 512, 0), "start of a cluster"),
        ((USED | 512, 0), "start of a cluster"),
        ((0, FILE), "outside"),
        ((0, FILE - CLUSTER + CLUSTER), "outside"),
        ((0, (1 << 56) - CLUSTER), "outside"),
        ((5 * CLUSTER, USED | 5 * CLUSTER), "two L1 entries"),
    ],
)
def test_an_l1_entry_that_names_no_table_of_its_own_is_damage(l1: tuple[int, ...], words: str) -> None:
    with pytest.raises(Damaged, match=words):
        l2_offsets(good(), entries(*l1))


def test_bits_that_mean_nothing_are_not_part_of_an_offset() -> None:
    reserved = 0x7F << 56 | 0x1FF
    assert list(l2_offsets(good(), entries(USED | reserved | 5 * CLUSTER, reserved))) == [5 * CLUSTER, 0]
    assert list(l2_offsets(good(), entries(FILE - CLUSTER, 0))) == [FILE - CLUSTER, 0]


def test_a_table_shared_from_far_away_is_found() -> None:
    """The most entries that are sorted at a time lie between the two."""
    count = 3 << 16
    found = Layout(
        version=3,
        virtual_bytes=count * 32 * KiB,
        file_bytes=1 << 40,
        cluster_bits=9,
        l1_offset=512,
        has_subclusters=False,
        compression_type=0,
    )
    table = list(range(512, 512 * (count + 1), 512))
    assert len(l2_offsets(found, entries(*table))) == count
    table[-1] = table[0]
    with pytest.raises(Damaged, match="at 512 belongs to two"):
        l2_offsets(found, entries(*table))


@pytest.mark.parametrize("length", [0, 15, 17, 24])
def test_a_table_of_another_length_is_damage(length: int) -> None:
    with pytest.raises(Damaged, match="L1 table"):
        l2_offsets(good(), bytes(length))
    with pytest.raises(Damaged, match="L2 table"):
        extents(good(), 0, bytes(length))


def first(found: Layout, *entry: int) -> list[tuple[Kind, int, int, int]]:
    """What comes of an L2 table with *entry* first and nothing else."""
    table = entries(*entry).ljust(CLUSTER, b"\0")
    shown = [(e.kind, e.length_bytes, e.host_offset, e.host_bytes) for e in extents(found, 0, table)]
    last = found.l2_guest_bytes - sum(length for _, length, _, _ in shown[:-1])
    assert shown.pop() == (Kind.HOLE, last, 0, 0)
    return shown


def packed_entry(offset: int, sectors: int) -> int:
    return 1 << 62 | (sectors - 1) << 54 | offset


DATA_TO_THE_END = [(Kind.DATA, CLUSTER, FILE - CLUSTER, CLUSTER)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (USED | 0x3F << 56 | 0x1FE, []),
        (USED | FILE - CLUSTER, DATA_TO_THE_END),
        (FILE - CLUSTER, DATA_TO_THE_END),
        (USED | 0x3F << 56 | 0x1FE | FILE - CLUSTER, DATA_TO_THE_END),
        (1, [(Kind.ZERO, CLUSTER, 0, 0)]),
        (USED | CLUSTER | 1, [(Kind.ZERO, CLUSTER, 0, 0)]),
        (CLUSTER + 512 | 1, "start of a cluster"),
        (USED | FILE, "outside"),
        (USED | (1 << 56) - CLUSTER, "outside"),
        (USED | CLUSTER + 512, "start of a cluster"),
        (packed_entry(CLUSTER + 7, 1), [(Kind.COMPRESSED, CLUSTER, CLUSTER + 7, 505)]),
        (packed_entry(CLUSTER + 7, 128), [(Kind.COMPRESSED, CLUSTER, CLUSTER + 7, 128 * 512 - 7)]),
        (packed_entry(FILE - 100, 128), [(Kind.COMPRESSED, CLUSTER, FILE - 100, 100)]),
        (packed_entry(FILE - 1, 1), [(Kind.COMPRESSED, CLUSTER, FILE - 1, 1)]),
        (packed_entry(FILE, 1), "outside"),
        (packed_entry((1 << 54) - 1, 1), "outside"),
        (packed_entry(0, 1), "outside"),
    ],
    ids=str,
)
def test_each_kind_of_l2_entry_is_read_or_is_damage(entry: int, expected: list[Any] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(Damaged, match=expected):
            first(good(), entry)
    else:
        assert first(good(), entry) == expected


def test_version_2_has_no_zero_clusters() -> None:
    with pytest.raises(Damaged, match="version 2"):
        first(good(version=2, header_bytes=72), 1)


@pytest.mark.parametrize(
    ("entry", "bitmap", "expected"),
    [
        (CLUSTER, 0, []),
        (0, 1 << 63, [(Kind.HOLE, 31 * 2048, 0, 0), (Kind.ZERO, 2048, 0, 0)]),
        (CLUSTER, 6, [(Kind.HOLE, 2048, 0, 0), (Kind.DATA, 4096, CLUSTER + 2048, 4096)]),
        (CLUSTER | 1, 1 << 33 | 1, [(Kind.DATA, 2048, CLUSTER, 2048), (Kind.ZERO, 2048, 0, 0)]),
        (packed_entry(CLUSTER + 7, 1), 2**64 - 1, [(Kind.COMPRESSED, CLUSTER, CLUSTER + 7, 505)]),
        (CLUSTER, 1 << 32 | 1, "contradict"),
        (0, 1, "contradict"),
        (FILE, 1, "outside"),
        (CLUSTER + 512, 0, "start of a cluster"),
    ],
    ids=str,
)
def test_each_subcluster_is_read_or_is_damage(entry: int, bitmap: int, expected: list[Any] | str) -> None:
    found = good(incompatible_features=1 << 4, l1_entries=4)
    if isinstance(expected, str):
        with pytest.raises(Damaged, match=expected):
            first(found, entry, bitmap)
    else:
        assert first(found, entry, bitmap) == expected


def test_entries_beyond_the_end_of_the_disk_are_not_looked_at() -> None:
    found = good(virtual_bytes=CLUSTER + 512)
    table = entries(packed_entry(CLUSTER, 1), 2 * CLUSTER, USED | 1 << 50).ljust(CLUSTER, b"\xff")
    assert list(extents(found, 0, table)) == [
        Extent(guest_offset=0, length_bytes=CLUSTER, kind=Kind.COMPRESSED, host_offset=CLUSTER, host_bytes=512),
        Extent(guest_offset=CLUSTER, length_bytes=512, kind=Kind.DATA, host_offset=2 * CLUSTER, host_bytes=512),
    ]
    with pytest.raises(ValueError, match="L1 entry"):
        extents(found, 1, None)

    for virtual_bytes in (2048, CLUSTER):
        found = good(virtual_bytes=virtual_bytes, incompatible_features=1 << 4)
        table = entries(CLUSTER, 2**32 - 1).ljust(CLUSTER, b"\x0f")
        (extent,) = extents(found, 0, table)
        assert (extent.kind, extent.length_bytes, extent.host_bytes) == (Kind.DATA, virtual_bytes, virtual_bytes)


def deflated(data: bytes) -> bytes:
    pack = zlib.compressobj(wbits=-12)
    return pack.compress(data) + pack.flush()


@pytest.mark.parametrize("method", [0, 1])
@pytest.mark.parametrize("change_bytes", [-1, 0, 1, 64 * MiB])
def test_a_compressed_cluster_is_one_cluster_or_damage(method: int, change_bytes: int) -> None:
    """However much it would unpack to, not more than a cluster of it is."""
    found = good(incompatible_features=method << 3, compression_type=method)
    data = (deflated, zstandard.compress)[method](b"x" * (CLUSTER + change_bytes))
    tracemalloc.start()
    try:
        if change_bytes:
            with pytest.raises(Damaged, match="bytes where 65536 should be"):
                decompress(found, data)
        else:
            assert decompress(found, data + b"the start of another") == b"x" * CLUSTER
            for wrong in (*(data[:cut] for cut in range(0, len(data) - 8, 7)), b"\xff" * 512, data[1:]):
                with pytest.raises(Damaged, match="compressed cluster"):
                    decompress(found, wrong)
        assert tracemalloc.get_traced_memory()[1] < 1 * MiB
    finally:
        tracemalloc.stop()


def test_a_frame_that_wants_much_memory_is_refused() -> None:
    found = good(incompatible_features=1 << 3, compression_type=1)
    wide = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True, write_content_size=False)
    pack = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    with pytest.raises(Damaged, match="too much memory"):
        decompress(found, pack.compress(bytes(CLUSTER)) + pack.flush())


def small_image() -> bytes:
    made = plan(64 * 512 * 3, order=[2, 0, 64, 65, 150], cluster_bits=9)
    return b"".join(made.metadata()) + b"".join(bytes([number]) * 512 for number in range(1, 6))


IMAGE = small_image()
TABLES = [*range(struct.calcsize(">4sIQIIQIIQQIIQ") + 32), *(3 * 512 + at for at in range(24))]
TABLES += [at for start in (4, 5, 6) for at in range(start * 512, start * 512 + 24)]


def test_the_small_image_is_what_it_should_be() -> None:
    """Or else the next test mutates something that nobody reads."""
    data = read_guest(IMAGE)
    assert [data[number * 512] for number in (0, 1, 2, 3, 64, 65, 150)] == [2, 0, 1, 0, 3, 4, 5]
    (l1,) = struct.unpack_from(">Q", IMAGE, 40)
    assert l1 == 3 * 512
    assert struct.unpack_from(">3Q", IMAGE, l1) == tuple(USED | at * 512 for at in (4, 5, 6))


@settings(max_examples=25, deadline=None)
@given(value=st.integers(0, 255), repeat=st.integers(1, 8))
def test_no_byte_of_a_table_makes_more_of_it_than_an_error(value: int, repeat: int) -> None:
    for at in TABLES:
        mutant = bytearray(IMAGE)
        mutant[at : at + repeat] = bytes([value]) * repeat
        try:
            seen = list(extents_of(bytes(mutant)))
        except AutobackupError:
            continue
        assert sum(extent.length_bytes for extent in seen) == parse_header(bytes(mutant)).virtual_bytes // 512 * 512
        assert all(extent.host_offset + extent.host_bytes <= len(mutant) for extent in seen)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 15).map(lambda at: at * 512), min_size=64, max_size=64))
def test_any_l2_table_is_read_within_the_file_or_is_damage(table: list[int]) -> None:
    found = layout(parse_header(IMAGE), file_bytes=len(IMAGE))
    try:
        seen = list(extents(found, 1, entries(*table)))
    except Damaged:
        return
    at = found.l2_guest_bytes
    for extent in seen:
        assert extent.guest_offset == at
        assert extent.host_offset + extent.host_bytes <= len(IMAGE)
        at += extent.length_bytes
    assert at == 2 * found.l2_guest_bytes
