"""What we read of a qcow2 file is what QEMU reads of it, however QEMU wrote it."""

import collections
import random
from pathlib import Path

import pytest
from tests.unit.qcow2.material import (
    KiB,
    MiB,
    extents_of,
    needs_qemu_img,
    qemu_img,
    qemu_io,
    qemu_reads,
    read_guest,
    write_at_random,
)

from autobackup.qcow2.header import parse_header
from autobackup.qcow2.mapping import Kind

pytestmark = needs_qemu_img

SIZES = {"512": 2 * MiB + 512, "4k": 4 * MiB + 512, "16k": 4 * MiB, "64k": 9 * MiB + 1536, "2M": 17 * MiB + 512}
UNITS = {"512": 512, "4k": 4 * KiB, "16k": 16 * KiB, "64k": 64 * KiB, "2M": 2 * MiB}
SHAPES = [
    *(("1.1", cluster, "") for cluster in ("512", "4k", "64k", "2M")),
    *(("0.10", cluster, "") for cluster in ("512", "64k")),
    *(("1.1", cluster, ",extended_l2=on") for cluster in ("16k", "64k", "2M")),
    ("1.1", "64k", ",refcount_bits=1,lazy_refcounts=on"),
    ("1.1", "64k", ",extended_l2=on,compression_type=zstd"),
]


def made(path: Path, cluster: str, options: str, *more: str, seed: int) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}{options}", *more, path, str(SIZES[cluster]))
    write_at_random(path, virtual_bytes=SIZES[cluster], cluster_bytes=UNITS[cluster], seed=seed)
    return path


def content(length: int, *, seed: int) -> bytes:
    """Some of it can be compressed, some is zeros, some can not be compressed."""
    draw, parts, left = random.Random(seed), [], length
    while left > 0:
        size = min(left, draw.randrange(1, 200 * KiB))
        parts.append(draw.choice([bytes(size), bytes([draw.randrange(256)]) * size, draw.randbytes(size)]))
        left -= size
    return b"".join(parts)


@pytest.mark.parametrize(("compat", "cluster", "options"), SHAPES)
def test_a_layer_and_its_base_read_as_qemu_reads_them(tmp_path: Path, compat: str, cluster: str, options: str) -> None:
    base = made(tmp_path / "base", cluster, f",compat={compat}{options}", seed=1)
    below = read_guest(base.read_bytes())
    assert below == qemu_reads(base)

    over = made(tmp_path / "over", cluster, f",compat={compat}{options}", "-b", str(base), "-F", "qcow2", seed=2)
    image = over.read_bytes()
    assert read_guest(image, below=below) == qemu_reads(over)
    seen = {extent.kind for extent in extents_of(image)}
    assert seen >= {Kind.HOLE, Kind.DATA, Kind.COMPRESSED}
    assert (Kind.ZERO in seen) or compat == "0.10"


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_a_compressed_image_reads_as_it_was(tmp_path: Path, method: str, cluster: str) -> None:
    raw = tmp_path / "disk"
    raw.write_bytes(content(SIZES[cluster] // 512 * 512, seed=3))
    packed = tmp_path / "packed"
    options = f"cluster_size={cluster},compression_type={method}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, packed)
    image = packed.read_bytes()
    assert read_guest(image) == raw.read_bytes()
    kinds = collections.Counter(extent.kind for extent in extents_of(image))
    assert kinds[Kind.COMPRESSED] > 1


def test_a_disk_that_was_grown_shrunken_or_set_back_reads_as_it_now_is(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk", "4k", "", seed=4)
    qemu_img("snapshot", "-c", "before", disk)
    write_at_random(disk, virtual_bytes=SIZES["4k"], cluster_bytes=4 * KiB, seed=5, fresh=False)
    assert parse_header(disk.read_bytes()[:4096]).snapshot_count == 1
    after = read_guest(disk.read_bytes())
    assert after == qemu_reads(disk)

    qemu_img("snapshot", "-a", "before", disk)
    before = read_guest(disk.read_bytes())
    assert before == qemu_reads(disk)
    assert before != after

    qemu_img("snapshot", "-d", "before", disk)
    for size in ("+40M", "11M", "3M"):
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", disk, size)
        assert read_guest(disk.read_bytes()) == qemu_reads(disk)


def test_a_layer_above_a_smaller_base_reads_zeros_beyond_it(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * (MiB + 512))
    over = made(tmp_path / "over", "64k", "", "-b", str(tmp_path / "base"), "-F", "raw", seed=6)
    assert read_guest(over.read_bytes(), below=b"b" * (MiB + 512)) == qemu_reads(over)


def test_a_disk_of_no_whole_number_of_sectors_is_as_long_as_qemu_has_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    qemu_io(disk, "write -P 7 0 1M")
    image = bytearray(disk.read_bytes())
    image[24:32] = (MiB - 100).to_bytes(8, "big")
    disk.write_bytes(image)
    assert read_guest(bytes(image)) == qemu_reads(disk) == b"\x07" * (MiB - 512)


@pytest.mark.parametrize("options", ["", ",extended_l2=on"])
def test_a_cluster_that_the_file_ends_in_reads_zeros_there(tmp_path: Path, options: str) -> None:
    disk = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size=64k{options}", disk, "1M")
    qemu_io(disk, "write -P 7 0 128k")
    whole = disk.read_bytes()
    for cut_bytes in (1024, 33 * KiB, 60 * KiB):
        image = whole[:-cut_bytes]
        disk.write_bytes(image)
        assert read_guest(image) == qemu_reads(disk)
        missing = [e.length_bytes - e.host_bytes for e in extents_of(image) if e.kind is not Kind.HOLE]
        assert sum(missing) == cut_bytes


def test_neighbours_are_one_extent(tmp_path: Path) -> None:
    """A disk that was written in one go is read in one go."""
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(b"x" * 4 * MiB)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, disk)
    (extent,) = extents_of(disk.read_bytes())
    assert (extent.kind, extent.length_bytes, extent.host_bytes) == (Kind.DATA, 4 * MiB, 4 * MiB)

    qemu_img("create", "-q", "-f", "qcow2", disk, "3G")
    assert [(e.kind, e.length_bytes >> 20) for e in extents_of(disk.read_bytes())] == [(Kind.HOLE, 512)] * 6
