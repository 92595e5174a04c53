"""
A sealed bundle entered in the middle (docs/format.md, section 6): its members by name and range.

Each segment is authenticated before a byte of it is used, and the last one as the last; so what is read is what was
sealed. That all of it is there and agrees with its digests is only proven by reading it whole (`flows.verify`).
"""

from collections import OrderedDict
from functools import partial
from typing import Final

from autobackup.container.bundle import MANIFEST, head_at
from autobackup.container.frames import FrameDecompressor
from autobackup.container.header import HEADER_BYTES
from autobackup.container.manifest import Manifest
from autobackup.container.seal import SEGMENT_BYTES, STREAM_HEADER_BYTES
from autobackup.container.seek_table import FOOTER_BYTES, FrameSpan, SeekTable, table_bytes
from autobackup.container.unseal import Opener, locate, plain_bytes, segment_count, segment_span
from autobackup.errors import ContainerDamaged
from autobackup.flows.verify import SealedObject
from autobackup.flows.workers import Workers

_LARGEST_HEAD_BYTES: Final = 1536
_SEGMENTS_AT_HAND: Final = 12
_MOST_AT_ONCE: Final = 8
_FRAMES_AT_HAND: Final = 4


class _Segments:
    """The stream's segments, opened; the latest stay at hand, and more are fetched at once where they go on."""

    def __init__(self, sealed: SealedObject, opener: Opener, workers: Workers) -> None:
        self._sealed = sealed
        self._opener = opener
        self._workers = workers
        self._sealed_bytes = sealed.size_bytes - HEADER_BYTES
        self._count = segment_count(self._sealed_bytes)
        self._open: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self._next, self._step = -1, 1  # where a sequence goes on, and how many it fetched last

    async def read(self, start: int, end: int) -> bytes:
        """The plaintext of the stream from *start* to *end*, each segment authenticated."""
        if start < 0:
            raise ContainerDamaged(f"{self._sealed.attempt}: too short for its seek table")
        (first, skip), (last, _) = locate(start), locate(max(start, end - 1))
        pieces = [await self._segment(n) for n in range(first, last + 1)]
        return (
            b"".join(pieces)[skip : skip + end - start]
            if len(pieces) > 1
            else bytes(pieces[0][skip : skip + end - start])
        )

    async def _segment(self, index: int) -> bytes | bytearray:
        if index not in self._open:
            self._step = min(self._step * 2, _MOST_AT_ONCE) if index == self._next else 1
            await self._fetch(index, min(self._step, self._count - index))
        self._open.move_to_end(index)
        return self._open[index]

    async def _fetch(self, index: int, count: int) -> None:
        offset, _ = segment_span(index, self._sealed_bytes)
        last_offset, last_length = segment_span(index + count - 1, self._sealed_bytes)
        raw = await self._sealed.store.read(
            self._sealed.attempt, offset=HEADER_BYTES + offset, length=last_offset + last_length - offset
        )

        def open_all() -> None:
            view = memoryview(raw)
            for n in range(count):
                segment = view[n * SEGMENT_BYTES : (n + 1) * SEGMENT_BYTES]
                self._open[index + n] = self._opener.open_segment(index + n, segment, last=index + n == self._count - 1)

        await self._workers.heavy(open_all)
        self._next = index + count
        while len(self._open) > _SEGMENTS_AT_HAND:
            self._open.popitem(last=False)


class SealedFile:
    """Made by `open_file`."""

    def __init__(self, sealed: SealedObject, workers: Workers, segments: _Segments, table: SeekTable) -> None:
        self.sealed = sealed
        self._workers = workers
        self._segments = segments
        self._table = table
        self._decompressor = FrameDecompressor()
        self._frames: OrderedDict[int, bytes] = OrderedDict()  # by offset in the archive
        self._members: dict[str, tuple[int, int]] = {}

    async def manifest(self) -> Manifest:
        """What the bundle says was captured."""
        offset, size_bytes = await self.member(MANIFEST)
        return Manifest.decode(await self.read(offset, size_bytes))

    async def member(self, name: str) -> tuple[int, int]:
        """Where *name* begins in the archive, and how long it is. `ContainerDamaged` if there is none."""
        at = 0
        if self._members:
            last, size_bytes = list(self._members.values())[-1]
            at = last + size_bytes + -size_bytes % 512
        while name not in self._members and at < self._table.plain_bytes:
            head = head_at(await self.read(at, _LARGEST_HEAD_BYTES))
            if head is None:
                break
            found, head_bytes, size_bytes = head
            self._members[found] = (at + head_bytes, size_bytes)
            at += head_bytes + size_bytes + -size_bytes % 512
        if name not in self._members:
            raise ContainerDamaged(f"{self.sealed.attempt}: no member {name}")
        return self._members[name]

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the archive; fewer only at its end."""
        pieces, at = [], offset
        end = min(offset + length, self._table.plain_bytes)
        while at < end:
            span = self._table.at(at)
            frame = await self._frame(span)
            pieces.append(frame[at - span.plain_offset : end - span.plain_offset])
            at = span.plain_offset + span.plain_bytes
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _frame(self, span: FrameSpan) -> bytes:
        frame = self._frames.get(span.plain_offset)
        if frame is None:
            stored = await self._segments.read(span.stored_offset, span.stored_offset + span.stored_bytes)
            frame = await self._workers.heavy(partial(self._decompressor.decompress, stored, at=span.stored_offset))
            if len(frame) != span.plain_bytes:
                raise ContainerDamaged(f"frame at {span.stored_offset}: not what the seek table says")
            self._frames[span.plain_offset] = frame
            while len(self._frames) > _FRAMES_AT_HAND:
                self._frames.popitem(last=False)
        self._frames.move_to_end(span.plain_offset)
        return frame


class MemberSource:
    """One member of a sealed bundle as a `flows.layers.Source`."""

    def __init__(self, file: SealedFile, offset: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._file = file
        self._offset = offset

    async def read(self, offset: int, length: int) -> bytes:
        at_hand = max(0, min(length, self.size_bytes - offset))
        return (
            (await self._file.read(self._offset + offset, at_hand)).ljust(length, b"\0") if at_hand else bytes(length)
        )


async def open_file(sealed: SealedObject, workers: Workers) -> SealedFile:
    """Open the end of *sealed*, and read its seek table."""
    head = await sealed.store.read(sealed.attempt, offset=HEADER_BYTES, length=STREAM_HEADER_BYTES)
    opener = Opener(key=sealed.key, associated_data=sealed.header_bytes, stream_header=head)
    segments = _Segments(sealed, opener, workers)
    stream_bytes = plain_bytes(sealed.size_bytes - HEADER_BYTES)
    footer = await segments.read(stream_bytes - FOOTER_BYTES, stream_bytes)
    tail_bytes = min(table_bytes(footer), stream_bytes)
    tail = await segments.read(stream_bytes - tail_bytes, stream_bytes)
    table = await workers.heavy(partial(SeekTable.decode, tail, stream_bytes=stream_bytes))
    return SealedFile(sealed, workers, segments, table)
