"""
Disks that are read where they lie, by ranges: an image in Glance, a member of a sealed bundle. Nothing is written here.

A `Source` is a file's bytes by offset; a `Layer` is what a guest sees of one file of a chain. Reading in order is what
is fast: a source fetches more with each step of a sequence, and little for a leap.
"""

import os
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Final, Protocol

from autobackup.cloud.glance import Glance
from autobackup.errors import Damaged, Refused
from autobackup.flows.workers import Workers
from autobackup.qcow2.header import Layout, layout, parse_header
from autobackup.qcow2.mapping import Extent, Kind, decompress, extents, l1_span, l2_offsets
from autobackup.units import KiB, MiB

HEAD_BYTES: Final = 4096
PIECE_BYTES: Final = 1 * MiB
_LEAP_BYTES: Final = 256 * KiB
_LONGEST_STEP_BYTES: Final = 8 * MiB
_WINDOWS: Final = 4  # data, and tables between it
_LARGEST_CLUSTER_BYTES: Final = 2 * MiB
_SUBCLUSTERS: Final = 32


class Source(Protocol):
    """A file's bytes."""

    @property
    def size_bytes(self) -> int: ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes; what lies beyond the end is zeros."""


class Windowed(ABC):
    """A source that reads ahead; `_fetch` gets what is needed, exactly."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._windows: OrderedDict[int, bytes] = OrderedDict()  # offset -> bytes
        self._steps: dict[int, int] = {}  # where a sequence goes on -> how much it fetched last

    async def read(self, offset: int, length: int) -> bytes:
        pieces, end = [], min(offset + length, self.size_bytes)
        at = offset
        while at < end:
            start, window = await self._window(at)
            piece = window[at - start : end - start]
            pieces.append(piece)
            at += len(piece)
        found = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return found.ljust(length, b"\0")

    async def _window(self, offset: int) -> tuple[int, bytes]:
        for start, window in reversed(self._windows.items()):
            if start <= offset < start + len(window):
                self._windows.move_to_end(start)
                return start, window
        step_bytes = min(self._steps.pop(offset, _LEAP_BYTES // 2) * 2, _LONGEST_STEP_BYTES)
        window = await self._fetch(offset, min(step_bytes, self.size_bytes - offset))
        if not window:
            raise Damaged(f"ends at {offset}, {self.size_bytes} bytes were promised")
        self._windows[offset] = window
        self._steps[offset + len(window)] = step_bytes
        while len(self._windows) > _WINDOWS:
            gone, old = self._windows.popitem(last=False)
            self._steps.pop(gone + len(old), None)
        return offset, window

    @abstractmethod
    async def _fetch(self, offset: int, length: int) -> bytes: ...


class ImageSource(Windowed):
    """The data of an image."""

    def __init__(self, glance: Glance, image_id: str, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._glance = glance
        self._image_id = image_id

    async def _fetch(self, offset: int, length: int) -> bytes:
        return await self._glance.read(self._image_id, offset=offset, length=length)


class FileSource(Windowed):
    """A file of this machine."""

    def __init__(self, path: str, workers: Workers) -> None:
        found = os.stat(path)
        super().__init__(found.st_size)
        self._path = path
        self._known = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        self._workers = workers

    async def _fetch(self, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with open(self._path, "rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != self._known:
                    raise Damaged(f"{self._path}: changed while it was read")
                return os.pread(file.fileno(), length, offset)

        return await self._workers.blocking(read)


class Layer(Protocol):
    """What one file of a chain adds to a guest's disk. *cluster_bytes*: extents begin and end at multiples of it."""

    virtual_bytes: int
    cluster_bytes: int

    def extents(self) -> AsyncIterator[Extent]:
        """Of the whole disk, in the guest's order, without gaps."""

    async def data(self, extent: Extent, offset: int, length: int) -> bytes:
        """*length* bytes of a DATA or COMPRESSED extent, from *offset* within it."""

    @property
    def source(self) -> Source:
        """The file itself."""


class RawLayer:
    """A raw file: all of it is data."""

    cluster_bytes = _LARGEST_CLUSTER_BYTES

    def __init__(self, source: Source) -> None:
        self.source = source
        self.virtual_bytes = source.size_bytes

    async def extents(self) -> AsyncIterator[Extent]:
        if self.virtual_bytes:
            length = self.virtual_bytes
            yield Extent(guest_offset=0, length_bytes=length, kind=Kind.DATA, host_offset=0, host_bytes=length)

    async def data(self, extent: Extent, offset: int, length: int) -> bytes:
        return await self.source.read(extent.host_offset + offset, length)


class Qcow2Layer:
    """A qcow2 file, its backing file left out. Opened by `open_layer`."""

    def __init__(self, source: Source, head: bytes, workers: Workers) -> None:
        self.source = source
        self._workers = workers
        self._layout = layout(parse_header(head), file_bytes=source.size_bytes)
        self.virtual_bytes = self._layout.virtual_bytes
        self.cluster_bytes = self._layout.cluster_bytes // (_SUBCLUSTERS if self._layout.has_subclusters else 1)
        self._tables: array[int] | None = None
        self._cluster: tuple[int, bytes] = (-1, b"")  # the latest that was decompressed

    async def extents(self) -> AsyncIterator[Extent]:
        if self._tables is None:
            l1 = await self.source.read(*l1_span(self._layout))
            self._tables = await self._workers.heavy(partial(l2_offsets, self._layout, l1))
        for index, offset in enumerate(self._tables):
            l2 = await self.source.read(offset, self._layout.cluster_bytes) if offset else None
            for extent in await self._workers.heavy(partial(_listed, self._layout, index, l2)):
                yield extent

    async def data(self, extent: Extent, offset: int, length: int) -> bytes:
        if extent.kind is Kind.DATA:
            return await self.source.read(extent.host_offset + offset, length)
        if self._cluster[0] != extent.host_offset:
            packed = await self.source.read(extent.host_offset, extent.host_bytes)
            plain = await self._workers.heavy(partial(decompress, self._layout, packed))
            self._cluster = (extent.host_offset, plain)
        return self._cluster[1][offset : offset + length]


async def open_layer(source: Source, format_name: str, workers: Workers) -> Layer:
    """The layer that *source* is, in a format that somebody trustworthy named."""
    if format_name == "raw":
        return RawLayer(source)
    if format_name != "qcow2":
        raise Refused(f"a disk in the format {format_name!r} cannot be read in place")
    return Qcow2Layer(source, await source.read(0, min(HEAD_BYTES, source.size_bytes)), workers)


async def file_content(source: Source) -> AsyncGenerator[bytes | int, None]:
    """The file's own bytes, in order, at most 1 MiB each."""
    for at in range(0, source.size_bytes, PIECE_BYTES):
        yield await source.read(at, min(PIECE_BYTES, source.size_bytes - at))


async def content(layer: Layer) -> AsyncGenerator[bytes | int, None]:
    """The disk that *layer* alone is, in order: bytes, or how many zeros; at most 1 MiB each."""
    async for extent in layer.extents():
        for at in range(0, extent.length_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, extent.length_bytes - at)
            if extent.kind in (Kind.DATA, Kind.COMPRESSED):
                yield await layer.data(extent, at, length)
            else:
                yield length


def _listed(shape: Layout, index: int, l2: bytes | None) -> list[Extent]:
    return list(extents(shape, index, l2))
