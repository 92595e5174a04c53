"""
A guest that boots within a second under TCG, and what it leaves on its disk.

`guest.S` is one boot sector. From a seed in its base image it derives a marker that is
nowhere in that image, writes marker and pseudo-random data over the disk through the
BIOS, reports on COM1 and then lives, sleeps or dies by its mode. This module builds base
images for it and computes, byte for byte, what must be on the disk afterwards.

The geometry is written twice, here and in guest.S; `tests/e2e/test_lab.py` compares.
"""

import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20

VIRTUAL_BYTES: Final = 64 * MiB
SEED_BYTES: Final = 32
SECTOR_BYTES: Final = 512
BLOCK_BYTES: Final = 32 * KiB  # what the guest writes in one BIOS call
MARKER_EVERY_BYTES: Final = 4 * KiB  # so that no page of its data can hide
HEARTBEAT_OFFSET: Final = 8 * SECTOR_BYTES

TEXT_UP: Final = b"GUEST-UP"
TEXT_WROTE: Final = b"GUEST-WROTE"
TEXT_FAILED: Final = b"GUEST-FAILED"

_MAGIC: Final = b"LABLABLA"
_TABLE_OFFSET: Final = 64
_SOURCE: Final = Path(__file__).with_name("guest.S")


class Mode(StrEnum):
    """What the guest does once it has written its data."""

    HEARTBEAT = "H"  # rewrites a counter at 18 Hz; goes off at the power button
    DEAF = "D"  # the same, but ignores the power button
    IDLE = "I"  # writes nothing more; goes off at the power button
    STOP = "S"  # cli, hlt: the domain stays active
    POWER_OFF = "P"  # goes off by itself


def new_seed() -> bytes:
    seed = os.urandom(SEED_BYTES)
    return seed if any(seed[:4]) else new_seed()


def marker(seed: bytes) -> bytes:
    """32 bytes that only the guest of *seed* ever writes."""
    _check_seed(seed)
    return bytes(byte ^ 0x5A for byte in seed)


def regions(*, virtual_bytes: int = VIRTUAL_BYTES) -> list[tuple[int, int]]:
    """The (offset, bytes) that the guest writes: two runs, scattered clusters, the disk's end."""
    if virtual_bytes < VIRTUAL_BYTES or virtual_bytes % MiB:
        raise ValueError(f"virtual_bytes must be whole MiB and at least {VIRTUAL_BYTES}, got {virtual_bytes}")
    runs = [(4 * MiB, 3 * MiB), (20 * MiB + 32 * KiB, 1 * MiB)]
    clusters = [(28 * MiB + index * (2 * MiB + 192 * KiB), 64 * KiB) for index in range(15)]
    return [*runs, *clusters, (virtual_bytes - 64 * KiB, 64 * KiB)]


@functools.lru_cache(maxsize=8)
def expected_regions(seed: bytes, *, virtual_bytes: int = VIRTUAL_BYTES) -> tuple[tuple[int, bytes], ...]:
    """What the guest of *seed* has written, as (offset, bytes) pairs, heartbeat aside."""
    _check_seed(seed)
    mark = marker(seed)
    words = _Xorshift(int.from_bytes(seed[:4], "little"))
    pattern = struct.pack(f"<{BLOCK_BYTES // 4}I", *(words.draw() for _ in range(BLOCK_BYTES // 4)))
    pattern_number = int.from_bytes(pattern, "little")
    written = []
    for offset, length in regions(virtual_bytes=virtual_bytes):
        data = bytearray()
        for _ in range(length // BLOCK_BYTES):
            mask = words.draw().to_bytes(4, "little") * (BLOCK_BYTES // 4)
            number = pattern_number ^ int.from_bytes(mask, "little")
            data += number.to_bytes(BLOCK_BYTES, "little")
        for at in range(0, length, MARKER_EVERY_BYTES):
            data[at : at + SEED_BYTES] = mark
        written.append((offset, bytes(data)))
    return tuple(written)


def heartbeat(sector: bytes, seed: bytes) -> int:
    """The counter in the heartbeat sector: 0 before the first beat, never going down."""
    if sector[:SEED_BYTES] not in (marker(seed), bytes(SEED_BYTES)):
        raise ValueError("not the heartbeat sector of this seed")
    return int.from_bytes(sector[SEED_BYTES : SEED_BYTES + 4], "little")


def base_regions() -> tuple[tuple[int, bytes], ...]:
    """What the base image holds and the guest never overwrites: seen through the chain."""
    return ((1 * MiB, hashlib.shake_256(b"content of the base image").digest(256 * KiB)),)


def build_base(path: Path, *, virtual_bytes: int = VIRTUAL_BYTES, seed: bytes, mode: Mode = Mode.HEARTBEAT) -> None:
    """Make a sparse raw base image that boots the guest of *seed*."""
    _check_seed(seed)
    table = b"".join(
        struct.pack("<II", offset // SECTOR_BYTES, length // BLOCK_BYTES)
        for offset, length in regions(virtual_bytes=virtual_bytes)
    )
    seed_sector = (_MAGIC + seed + mode.encode()).ljust(_TABLE_OFFSET, b"\0") + table
    if len(seed_sector) > SECTOR_BYTES - 8:
        raise ValueError("the region table does not fit into the seed sector")
    with path.open("xb") as base:
        base.write(boot_sector() + seed_sector)
        for offset, data in base_regions():
            base.seek(offset)
            base.write(data)
        base.truncate(virtual_bytes)


def make_overlay(path: Path, base: Path, *, base_format: str = "raw") -> None:
    """A qcow2 overlay as Nova makes it: absolute backing path, 64 KiB clusters."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base.resolve()), "-F", base_format, str(path)],
        check=True,
    )


@functools.cache
def boot_sector() -> bytes:
    with tempfile.TemporaryDirectory(prefix="lab-guest-") as folder:
        compiled, sector = Path(folder, "guest.o"), Path(folder, "guest.bin")
        subprocess.run(["as", "--32", "-o", str(compiled), str(_SOURCE)], check=True)
        link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
        subprocess.run([*link, "-o", str(sector), str(compiled)], check=True)
        code = sector.read_bytes()
    if len(code) != SECTOR_BYTES or code[510:] != b"\x55\xaa":
        raise RuntimeError(f"guest.S made {len(code)} bytes, not one boot sector")
    return code


class _Xorshift:
    """Marsaglia's xorshift32, as the guest computes it."""

    def __init__(self, state: int) -> None:
        self._state = state

    def draw(self) -> int:
        state = self._state
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        self._state = state
        return state


def _check_seed(seed: bytes) -> None:
    if len(seed) != SEED_BYTES or not any(seed[:4]):
        raise ValueError(f"a seed is {SEED_BYTES} bytes, the first four not all zero")
