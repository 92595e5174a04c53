"""
Frames: the compressed stream, independent zstd frames of at most 1 MiB of plaintext each.

Independent frames are compressed on any number of threads and opened one by one; against one long stream they
cost 0.5 % of size. A frame of stored blocks has a length that is known beforehand, which is how a bundle that
is not compressed keeps the same format (docs/format.md, section 3).

What is read is hostile until proven otherwise, even though it was authenticated: every frame's claims are
checked before a byte of it is decompressed, so that no frame needs more than 1 MiB of memory. That all frames
are there is proved by the seek table, which must agree with what was seen.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import zstandard

from autobackup.container import Buffer
from autobackup.container.seek_table import (
    FRAME_BYTES,
    MAX_STORED_FRAME_BYTES,
    SKIPPABLE_MAGIC,
    SeekTable,
)
from autobackup.errors import ContainerDamaged
from autobackup.units import KiB

__all__ = [
    "FRAME_BYTES",
    "MAX_STORED_FRAME_BYTES",
    "FrameCompressor",
    "FrameDecompressor",
    "FrameReader",
    "SeekTable",
    "stored_frame",
    "stored_frame_bytes",
    "zero_frame",
]

_FRAME_MAGIC: Final = 0xFD2FB528
_BLOCK_BYTES: Final = 128 * KiB  # RFC 8878: the largest block
_BLOCK_HEADER_BYTES: Final = 3
_RAW, _RLE, _RESERVED = 0, 1, 3
# Single segment, content size in 4 bytes, no checksum, no dictionary.
_PLAIN_FRAME: Final = struct.Struct("<IBI")
_PLAIN_DESCRIPTOR: Final = 0xA0


class FrameCompressor:
    """Makes frames at one level. One per thread: the context inside is not to be shared."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(
            level=level, write_content_size=True, write_checksum=False, write_dict_id=False
        )

    def compress(self, data: Buffer) -> bytes:
        _check_plain_length(len(data))
        return self._zstd.compress(data)


def stored_frame(data: Buffer) -> bytes:
    """A frame that holds *data* as it is; its length is `stored_frame_bytes(len(data))`."""
    view = memoryview(data).cast("B")
    parts: list[Buffer] = [_plain_frame_start(len(view))]
    for at in range(0, len(view), _BLOCK_BYTES):
        block = view[at : at + _BLOCK_BYTES]
        parts.append(_block_header(_RAW, len(block), last=at + len(block) == len(view)))
        parts.append(block)
    return b"".join(parts)


def stored_frame_bytes(length: int) -> int:
    _check_plain_length(length)
    return _PLAIN_FRAME.size + _BLOCK_HEADER_BYTES * -(-length // _BLOCK_BYTES) + length


@lru_cache(maxsize=8)  # FRAME_BYTES, and the odd lengths at the ends of a few disks
def zero_frame(length: int) -> bytes:
    """A frame of zeros."""
    # The first block is raw: the zstd tool up to 1.4.3 refuses a frame that begins with an RLE block
    # (facebook/zstd issue 1881).
    parts = [_plain_frame_start(length), _block_header(_RAW, 1, last=length == 1), b"\0"]
    for at in range(1, length, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, length - at)
        parts += [_block_header(_RLE, count, last=at + count == length), b"\0"]
    return b"".join(parts)


class FrameDecompressor:
    """Opens single frames, for readers that found them through the seek table. One per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def decompress(self, frame: Buffer, *, at: int = 0) -> bytes:
        """The plaintext of exactly one frame; *at* is its offset in the stream, for the error's text."""
        shape = _FrameShape(at)
        if shape.end(memoryview(frame).cast("B")) != len(frame):
            raise ContainerDamaged(f"frame at offset {at}: {len(frame)} bytes are not one whole frame")
        return self.decompress_checked(frame, at=at, plain_bytes=shape.plain_bytes)

    def decompress_checked(self, frame: Buffer, *, at: int, plain_bytes: int) -> bytes:
        """As `decompress`, for a frame whose shape has been checked."""
        try:
            plain = self._zstd.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise ContainerDamaged(f"frame at offset {at}: {exc}") from None
        if len(plain) != plain_bytes:
            raise ContainerDamaged(f"frame at offset {at}: {len(plain)} bytes, claims {plain_bytes}")
        return plain


class FrameReader:
    """
    The compressed stream from front to back, in pieces of any size.

    Holds one frame at most, and 8 bytes per frame seen. Only `finish` proves that no frame is missing.
    """

    def __init__(self) -> None:
        self._decompressor = FrameDecompressor()
        self._table = SeekTable()
        self._pending = bytearray()
        self._offset = 0  # of the first pending byte in the stream
        self._shape = _FrameShape(0)
        self._expected_table: memoryview | None = None
        self._pushing = False
        self._finished = False

    def push(self, data: Buffer) -> Iterator[bytes]:
        """
        The plaintext of each frame that *data* completes.

        The iterator must be exhausted before the next call. After an error every further call fails.
        """
        self._check_ready()
        self._pushing = True
        return self._push(memoryview(data).cast("B"))

    def finish(self) -> None:
        """Return if the stream ended with its seek table, and not otherwise."""
        self._check_ready()
        self._finished = True
        if self._expected_table is None:
            where = f"in the frame at offset {self._offset}" if self._pending else f"at offset {self._offset}"
            raise ContainerDamaged(f"compressed stream: ends {where}, without a seek table")
        if len(self._expected_table):
            raise ContainerDamaged(f"compressed stream: ends in the seek table, at offset {self._offset}")

    def _check_ready(self) -> None:
        if self._finished:
            raise RuntimeError("the stream is finished")
        if self._pushing:
            raise RuntimeError("the frames of the last push were not all taken, or the stream is damaged")

    def _push(self, data: memoryview) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            # Never more than a frame at a time is pending, however much is pushed.
            piece = data[at : at + FRAME_BYTES]
            at += len(piece)
            if self._expected_table is None:
                self._pending += piece
                yield from self._frames()
            else:
                self._take_table(piece)
        self._pushing = False

    def _frames(self) -> Iterator[bytes]:
        while self._expected_table is None:
            if self._pending[:4] == SKIPPABLE_MAGIC:
                self._expected_table = memoryview(self._table.encode())
                with memoryview(self._pending) as rest:
                    self._take_table(rest)
                self._pending.clear()
                return
            with memoryview(self._pending) as pending:
                end = self._shape.end(pending)
                if end is None:
                    return
                with pending[:end] as frame:
                    plain = self._decompressor.decompress_checked(
                        frame, at=self._offset, plain_bytes=self._shape.plain_bytes
                    )
            del self._pending[:end]
            self._add_to_table(end, len(plain))
            self._offset += end
            self._shape = _FrameShape(self._offset)
            yield plain

    def _add_to_table(self, frame_bytes: int, plain_bytes: int) -> None:
        try:
            self._table.add(frame_bytes=frame_bytes, plain_bytes=plain_bytes)
        except ValueError as exc:
            raise ContainerDamaged(f"frame at offset {self._offset}: {exc}") from None

    def _take_table(self, piece: memoryview) -> None:
        expected = self._expected_table
        assert expected is not None
        if len(piece) > len(expected):
            end = self._offset + len(expected)
            raise ContainerDamaged(f"compressed stream: offset {end}: bytes after the seek table")
        if piece != expected[: len(piece)]:
            raise ContainerDamaged(
                f"compressed stream: the seek table does not agree with the frames, offset {self._offset} ff."
            )
        self._expected_table = expected[len(piece) :]
        self._offset += len(piece)


class _FrameShape:
    """Where a frame ends and how much it holds, from its headers alone. Remembers how far it has looked."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._block = 0  # offset of the next block header; 0: the frame's own header comes first
        self.plain_bytes = 0

    def end(self, data: memoryview) -> int | None:
        """The length of the frame that *data* begins with, or None if *data* does not show it yet."""
        if self._block == 0 and not self._read_header(data):
            return None
        while len(data) >= self._block + _BLOCK_HEADER_BYTES:
            at = self._block
            header = data[at] | data[at + 1] << 8 | data[at + 2] << 16
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            if kind == _RESERVED or size > _BLOCK_BYTES:
                raise self._damaged(f"block at {self._block} of type {kind} with {size} bytes")
            end = self._block + _BLOCK_HEADER_BYTES + (1 if kind == _RLE else size)
            if end > MAX_STORED_FRAME_BYTES:
                raise self._damaged(f"longer than {MAX_STORED_FRAME_BYTES} bytes")
            if last:
                return end if end <= len(data) else None
            self._block = end
        return None

    def _read_header(self, data: memoryview) -> bool:
        if len(data) >= 4 and int.from_bytes(data[:4], "little") != _FRAME_MAGIC:
            raise self._damaged(f"begins with {bytes(data[:4]).hex(' ')}, which is not a zstd frame")
        if len(data) < 5:
            return False
        descriptor = data[4]
        single_segment = bool(descriptor & 0x20)
        size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
        if descriptor & 0x1F or not size_bytes:
            raise self._damaged(f"descriptor {descriptor:#04x}: checksum, dictionary, or no content size")
        size_at = 5 if single_segment else 6
        if len(data) < size_at + size_bytes:
            return False
        stated = int.from_bytes(data[size_at : size_at + size_bytes], "little")
        self.plain_bytes = stated + 256 if size_bytes == 2 else stated
        if not 1 <= self.plain_bytes <= FRAME_BYTES:
            raise self._damaged(f"claims {self.plain_bytes} bytes, must be 1 to {FRAME_BYTES}")
        if not single_segment and _window_bytes(data[5]) > FRAME_BYTES:
            raise self._damaged(f"window of {_window_bytes(data[5])} bytes, must be at most {FRAME_BYTES}")
        self._block = size_at + size_bytes
        return True

    def _damaged(self, what: str) -> ContainerDamaged:
        return ContainerDamaged(f"frame at offset {self._at}: {what}")


def _check_plain_length(length: int) -> None:
    if not 1 <= length <= FRAME_BYTES:
        raise ValueError(f"a frame holds 1 to {FRAME_BYTES} bytes, not {length}")


def _plain_frame_start(length: int) -> bytes:
    _check_plain_length(length)
    return _PLAIN_FRAME.pack(_FRAME_MAGIC, _PLAIN_DESCRIPTOR, length)


def _block_header(kind: int, size: int, *, last: bool) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(_BLOCK_HEADER_BYTES, "little")


def _window_bytes(descriptor: int) -> int:
    # RFC 8878, 3.1.1.1.2
    base = 1 << (10 + (descriptor >> 3))
    return base + base // 8 * (descriptor & 7)
