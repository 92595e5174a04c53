"""What the tests of this room share: images that the real QEMU makes and reads, and a reader of our own."""

import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from autobackup.qcow2.header import layout, parse_header
from autobackup.qcow2.mapping import Extent, Kind, decompress, extents, l1_span, l2_offsets

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img and qemu-io")
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def extents_of(image: bytes) -> Iterator[Extent]:
    found = layout(parse_header(image[:4096]), file_bytes=len(image))
    offset, length = l1_span(found)
    for index, table in enumerate(l2_offsets(found, image[offset : offset + length])):
        yield from extents(found, index, image[table : table + found.cluster_bytes] if table else None)


def read_guest(image: bytes, *, below: bytes = b"") -> bytes:
    """The guest's disk, where *below* is what the backing file reads as."""
    found = layout(parse_header(image[:4096]), file_bytes=len(image))
    disk, at = bytearray(below[: found.virtual_bytes].ljust(found.virtual_bytes, b"\0")), 0
    for extent in extents_of(image):
        assert extent.guest_offset == at
        assert extent.length_bytes > 0
        at += extent.length_bytes
        assert at % (512 if found.has_subclusters else found.cluster_bytes) == 0 or at == found.virtual_bytes
        stored = image[extent.host_offset : extent.host_offset + extent.host_bytes]
        assert len(stored) == extent.host_bytes
        if extent.kind is Kind.ZERO:
            disk[extent.guest_offset : at] = bytes(extent.length_bytes)
        elif extent.kind is not Kind.HOLE:
            data = stored if extent.kind is Kind.DATA else decompress(found, stored)[: extent.length_bytes]
            disk[extent.guest_offset : at] = data.ljust(extent.length_bytes, b"\0")
    assert at == len(disk) == found.virtual_bytes
    return bytes(disk)


def qemu_img(*arguments: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def qemu_reads(path: Path) -> bytes:
    """The guest's disk, the whole chain below it included."""
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def write_at_random(path: Path, *, virtual_bytes: int, cluster_bytes: int, seed: int, fresh: bool = True) -> None:
    """Compressed clusters where nothing is yet, as QEMU demands; data, discards, zeros with and without a cluster."""
    draw = random.Random(seed)
    last = (virtual_bytes - 1) // cluster_bytes
    packed = [last, *draw.sample(range(last - 1), min(6, last // 2))] if fresh else []
    end = virtual_bytes * 3 // 4  # beyond it stays what it is
    commands = [
        ("write -c", at * cluster_bytes, min(cluster_bytes, virtual_bytes - at * cluster_bytes)) for at in packed
    ]
    for _ in range(30 if cluster_bytes < MiB else 10):
        offset = draw.randrange(end // 512) * 512
        length = min(draw.choice([512, 4096, cluster_bytes, 3 * cluster_bytes, 130 * KiB]), end // 512 * 512 - offset)
        commands.append((draw.choice(["write", "write", "write -z", "write -z -u", "discard"]), offset, length))
    qemu_io(
        path,
        *(
            f"{what} -P {1 + (number + 40 * seed) % 255} {offset} {length}"
            if what in ("write", "write -c")
            else f"{what} {offset} {length}"
            for number, (what, offset, length) in enumerate(commands)
        ),
    )


def qemu_io(path: Path, *commands: str) -> None:
    options = [option for command in commands for option in ("-c", command)]
    command = ["qemu-io", "-f", "qcow2", "-t", "unsafe", "-d", "unmap", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "fail" not in done.stdout.lower()


def entries(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)
