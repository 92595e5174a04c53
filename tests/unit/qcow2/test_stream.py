"""A file written front to back is one that QEMU finds nothing wrong with, and that reads as the disk it was made of."""

import json
import random
import tracemalloc
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.unit.qcow2.material import GiB, KiB, MiB, needs_qemu_img, qemu_img, qemu_io, qemu_reads, read_guest

from autobackup.errors import Refused
from autobackup.qcow2.header import parse_header
from autobackup.qcow2.stream import PIECE_BYTES, Plan, plan, refcounting


def filled(cluster: int, *, cluster_bytes: int) -> bytes:
    return (cluster + 1).to_bytes(8, "big") * (cluster_bytes // 8)


def write(path: Path, made: Plan, order: Sequence[int]) -> None:
    """Without a step back, as it is uploaded."""
    with path.open("wb") as file:
        for piece in made.metadata():
            assert 0 < len(piece) <= PIECE_BYTES
            file.write(piece)
        assert file.tell() == made.metadata_bytes
        for cluster in order:
            file.write(filled(cluster, cluster_bytes=made.cluster_bytes))
        assert file.tell() == made.file_bytes


def disk_of(made: Plan, order: Sequence[int]) -> bytes:
    disk = bytearray(-(-made.virtual_bytes // made.cluster_bytes) * made.cluster_bytes)
    for cluster in order:
        start = cluster * made.cluster_bytes
        disk[start : start + made.cluster_bytes] = filled(cluster, cluster_bytes=made.cluster_bytes)
    return bytes(disk[: made.virtual_bytes])


def assert_qemu_finds_nothing(path: Path, *, data_clusters: int) -> None:
    found = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", path))
    assert found["check-errors"] == 0
    assert {"corruptions", "leaks"}.isdisjoint(found), found
    assert found["image-end-offset"] == path.stat().st_size
    assert found.get("allocated-clusters", 0) == data_clusters


@needs_qemu_img
@pytest.mark.parametrize(
    ("cluster_bits", "virtual_bytes", "count"),
    [
        (9, 3 * MiB + 512, 3000),  # more than one cluster of L1 table
        (9, 512, 1),
        (12, 5 * MiB + 512, 700),
        (16, 10 * MiB + 1536, 90),
        (16, 10 * MiB + 1536, 161),  # all of it
        (16, 10 * MiB, 0),
        (16, 0, 0),
        (21, 20 * MiB + 512, 5),
    ],
)
def test_qemu_reads_the_disk_and_finds_nothing_wrong(
    tmp_path: Path, cluster_bits: int, virtual_bytes: int, count: int
) -> None:
    order = random.Random(count).sample(range(-(-virtual_bytes // (1 << cluster_bits))), count)
    made = plan(virtual_bytes, order=order, cluster_bits=cluster_bits)
    path = tmp_path / "disk"
    write(path, made, order)
    assert_qemu_finds_nothing(path, data_clusters=count)
    assert qemu_reads(path) == read_guest(path.read_bytes()) == disk_of(made, order)

    info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
    assert "backing-filename" not in info
    assert (info["virtual-size"], info["cluster-size"]) == (virtual_bytes, 1 << cluster_bits)


@needs_qemu_img
def test_what_is_left_of_a_chain_can_be_written_to(tmp_path: Path) -> None:
    """It is a guest's disk: QEMU allocates in it, and frees."""
    path, order = tmp_path / "disk", [5, 3, 17]
    write(path, plan(8 * MiB, order=order), order)
    qemu_io(path, "write -P 9 0 1M", "discard 192k 64k", "write -P 8 7M 1M")
    assert qemu_img("check", "-f", "qcow2", path).startswith("No errors")


@needs_qemu_img
def test_little_data_on_a_large_disk_is_a_small_file(tmp_path: Path) -> None:
    path, order = tmp_path / "disk", [20 * GiB // (64 * KiB) - 1, 0, 100_000, 3]
    made = plan(20 * GiB, order=order)
    assert made.file_bytes == (4 + 3 + 4) * 64 * KiB  # header, refcounts and L1; L2 tables; data
    write(path, made, order)
    assert_qemu_finds_nothing(path, data_clusters=4)
    for cluster in order:
        data = filled(cluster, cluster_bytes=64 * KiB)
        assert len(set(data[:8])) > 1
        piece = tmp_path / f"piece-{cluster}"
        qemu_img(
            "dd",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "bs=65536",
            f"skip={cluster}",
            f"count={cluster + 1}",
            f"if={path}",
            f"of={piece}",
        )
        assert piece.read_bytes() == data


@needs_qemu_img
@pytest.mark.parametrize(
    ("count", "clusters", "blocks", "tables"),
    [(241, 256, 1, 1), (242, 258, 2, 1), (16_059, 16_384, 64, 1), (16_060, 16_387, 65, 2)],
)
def test_the_reference_counts_count_themselves(
    tmp_path: Path, count: int, clusters: int, blocks: int, tables: int
) -> None:
    """256 of them fill a block of 512 bytes, and 64 blocks the first cluster of the table."""
    made = plan(16 * MiB, order=range(count), cluster_bits=9)
    assert made.file_bytes == clusters * 512
    assert (made.refcount_block_clusters, made.refcount_table_clusters) == (blocks, tables)
    write(tmp_path / "disk", made, range(count))
    assert_qemu_finds_nothing(tmp_path / "disk", data_clusters=count)


def test_it_takes_some_bytes_of_memory_for_each_cluster() -> None:
    order = array("Q", range(30_000))
    tracemalloc.start()
    try:
        made = plan(8 * GiB, order=order)
        assert tracemalloc.get_traced_memory()[0] < 10 * len(order)
        assert sum(map(len, made.metadata())) == made.metadata_bytes
        assert tracemalloc.get_traced_memory()[1] < 10 * len(order) + 4 * PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_a_disk_that_qemu_would_not_open_is_refused() -> None:
    largest = 2**22 * 32 * KiB
    with pytest.raises(Refused, match="too large"):
        plan(largest + 512, order=(), cluster_bits=9)
    most = 2**28 - 2**20 - 2**14  # clusters of 512 bytes, beside the counts of all of them
    assert refcounting(most, cluster_bytes=512) == (2**14, 2**20)
    with pytest.raises(Refused, match="too many"):
        refcounting(most + 1, cluster_bytes=512)
    made = plan(largest, order=(), cluster_bits=9)
    assert parse_header(next(made.metadata())).l1_entries == 2**22


@pytest.mark.parametrize(
    ("virtual_bytes", "order", "cluster_bits"),
    [
        (1 * MiB, (16,), 16),
        (1 * MiB, (-1,), 16),
        (1 * MiB, (3, 4, 3), 16),
        (1 * MiB + 1, (), 16),
        (-512, (), 16),
        (1 * MiB, (), 8),
        (1 * MiB, (), 22),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_bug(virtual_bytes: int, order: Sequence[int], cluster_bits: int) -> None:
    with pytest.raises(ValueError, match=r"cluster|disk"):
        plan(virtual_bytes, order=order, cluster_bits=cluster_bits)
