"""
The seek table at the end of a compressed stream: how long each frame is, stored and plain.

It is the zstd seekable format without checksums (docs/format.md, section 3), so other tools seek in it, too.
It lets a reader fetch the one frame that holds an offset, and it proves to a sequential reader that no frame
is missing.

A disk of 2 TiB has two million frames: the lengths stand in one array of 32-bit numbers, 16 MiB of it, in
the order in which they are stored.
"""

import struct
import sys
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Self

from autobackup.container import Buffer
from autobackup.errors import ContainerDamaged
from autobackup.units import KiB, MiB

FRAME_BYTES: Final = 1 * MiB  # of plaintext, at most
MAX_STORED_FRAME_BYTES: Final = FRAME_BYTES + 4 * KiB  # ZSTD_compressBound of 1 MiB
MAX_FRAMES: Final = 2**27  # the seekable format's own limit: 128 TiB
SKIPPABLE_MAGIC: Final = (0x184D2A5E).to_bytes(4, "little")
FOOTER_BYTES: Final = 9

_HEAD: Final = struct.Struct("<4sI")
_FOOTER: Final = struct.Struct("<IBI")
_FOOTER_MAGIC: Final = 0x8F92EAB1
_ENTRY_BYTES: Final = 8
_SMALLEST_STORED_FRAME_BYTES: Final = 10  # magic, descriptor, content size, a block of one byte


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSpan:
    """Where a frame is in the compressed stream, and what it holds of the plain one."""

    stored_offset: int
    stored_bytes: int
    plain_offset: int
    plain_bytes: int


class SeekTable:
    """Grows frame by frame while writing, or is decoded whole for random access."""

    def __init__(self) -> None:
        self._lengths = array("I")  # stored, plain, stored, plain, ...
        self._starts: tuple[array[int], array[int]] | None = None

    def __len__(self) -> int:
        return len(self._lengths) // 2

    @property
    def encoded_bytes(self) -> int:
        return encoded_table_bytes(len(self))

    def add(self, *, frame_bytes: int, plain_bytes: int) -> None:
        if not _SMALLEST_STORED_FRAME_BYTES <= frame_bytes <= MAX_STORED_FRAME_BYTES:
            raise ValueError(f"a frame of {frame_bytes} bytes")
        if not 1 <= plain_bytes <= FRAME_BYTES:
            raise ValueError(f"a frame that holds {plain_bytes} bytes")
        if len(self) >= MAX_FRAMES:
            raise ValueError(f"more than {MAX_FRAMES} frames")
        self._lengths.append(frame_bytes)
        self._lengths.append(plain_bytes)
        self._starts = None

    def encode(self) -> bytes:
        head = _HEAD.pack(SKIPPABLE_MAGIC, self.encoded_bytes - _HEAD.size)
        footer = _FOOTER.pack(len(self), 0, _FOOTER_MAGIC)
        return b"".join((head, _little_endian(self._lengths), footer))

    @classmethod
    def decode(cls, tail: Buffer, *, stream_bytes: int) -> Self:
        """
        The table at the end of *tail*, which is the end of a compressed stream of *stream_bytes*.

        How long a tail is needed, `table_bytes` says from the last `FOOTER_BYTES` of it.
        """
        view = memoryview(tail).cast("B")
        length = table_bytes(view)
        if length > len(view):
            raise ContainerDamaged(f"seek table: {length} bytes, but only {len(view)} at hand")
        view = view[len(view) - length :]
        if _HEAD.unpack_from(view) != (SKIPPABLE_MAGIC, length - _HEAD.size):
            raise ContainerDamaged("seek table: does not begin where its footer says")
        table = cls()
        table._lengths.frombytes(view[_HEAD.size : length - FOOTER_BYTES])
        if sys.byteorder == "big":
            table._lengths.byteswap()
        table._check(stream_bytes)
        return table

    def at(self, plain_offset: int) -> FrameSpan:
        """The frame that holds a byte of plaintext."""
        stored, plain = self._offsets()
        if not 0 <= plain_offset < plain[-1]:
            raise ValueError(f"plain_offset {plain_offset} of {plain[-1]}")
        index = bisect_right(plain, plain_offset) - 1
        return FrameSpan(
            stored_offset=stored[index],
            stored_bytes=self._lengths[2 * index],
            plain_offset=plain[index],
            plain_bytes=self._lengths[2 * index + 1],
        )

    @property
    def plain_bytes(self) -> int:
        return self._offsets()[1][-1]

    def _offsets(self) -> "tuple[array[int], array[int]]":
        if self._starts is None:
            self._starts = (
                array("Q", accumulate(self._lengths[::2], initial=0)),
                array("Q", accumulate(self._lengths[1::2], initial=0)),
            )
        return self._starts

    def _check(self, stream_bytes: int) -> None:
        stored, plain = self._lengths[::2], self._lengths[1::2]
        if len(self) and (
            min(stored) < _SMALLEST_STORED_FRAME_BYTES
            or max(stored) > MAX_STORED_FRAME_BYTES
            or min(plain) < 1
            or max(plain) > FRAME_BYTES
        ):
            raise ContainerDamaged(f"seek table: lists a frame that is empty or holds more than {FRAME_BYTES}")
        total = sum(stored) + self.encoded_bytes
        if total != stream_bytes:
            raise ContainerDamaged(f"seek table: its frames and itself have {total} bytes, not {stream_bytes}")


def encoded_table_bytes(frames: int) -> int:
    return _HEAD.size + _ENTRY_BYTES * frames + FOOTER_BYTES


def table_bytes(tail: Buffer) -> int:
    """The length of the seek table whose last bytes *tail* is, from its footer."""
    if len(tail) < FOOTER_BYTES:
        raise ContainerDamaged(f"seek table: {len(tail)} bytes are too few for its footer")
    frames, descriptor, magic = _FOOTER.unpack(bytes(tail[-FOOTER_BYTES:]))
    if magic != _FOOTER_MAGIC:
        raise ContainerDamaged("seek table: none at the end of the stream")
    if descriptor != 0 or frames > MAX_FRAMES:
        raise ContainerDamaged(f"seek table: descriptor {descriptor:#04x}, {frames} frames")
    return encoded_table_bytes(frames)


def _little_endian(lengths: "array[int]") -> bytes:
    if sys.byteorder == "little":
        return lengths.tobytes()
    swapped = array("I", lengths)
    swapped.byteswap()
    return swapped.tobytes()
