"""
What goes into a bundle: the members of one job in order, as pieces of plaintext, digested on the way.

A piece is one zstd frame's worth: it never spans the start of a member's data, and a disk's MiB number k is one
piece, so the frames of a disk can be found by counting. Holes are pieces without bytes. Everything but the digests
is fixed before the first byte is read: a disk's size is its size at open.

Runs in one thread (`pieces`), reads each byte once, and holds one buffer at a time. That the disks did not change
is checked after the last read and before the digests leave: a torn capture never becomes a whole bundle
(invariant 2).
"""

import hashlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from autobackup.container import bundle
from autobackup.container.frames import FRAME_BYTES
from autobackup.container.manifest import Digest, Digests, Health, Manifest, Unreadable
from autobackup.host.disks import HeldDisk
from autobackup.model import DiskIdentity

_ZEROS: Final = bytes(FRAME_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a bundle: either *data* at hand or an open *disk* whose identity at the first read is *first*."""

    name: str
    data: bytes = b""
    disk: HeldDisk | None = None
    first: DiskIdentity | None = None

    @property
    def size_bytes(self) -> int:
        return self.disk.identity.size_bytes if self.disk is not None else len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Plaintext of one frame. `data` is None for zeros. `buffer` goes back to the pool once `data` was used."""

    length: int
    data: bytes | memoryview | None
    buffer: bytearray | None = None


class Contents:
    """The plaintext of one sealed bundle; iterate `pieces` once."""

    def __init__(
        self, *, manifest: Manifest, members: Sequence[Member], health: Sequence[Health], mtime_s: int
    ) -> None:
        self._members = (Member(name="manifest.json", data=manifest.encode()), *members)
        self._health = tuple(health)
        self._mtime_s = mtime_s
        self._digests: dict[str, Digest] = {}
        self._unreadable: list[Unreadable] = []
        self.read_bytes = 0

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Ranges that were sent as zeros because the medium failed. Complete after `pieces` has ended."""
        return tuple(self._unreadable)

    @property
    def digests(self) -> dict[str, Digest]:
        """Member name -> digest of its logical bytes. Complete after `pieces` has ended."""
        return dict(self._digests)

    def pieces(self, buffers: "queue.SimpleQueue[bytearray]") -> Iterator[Piece]:
        """
        Every piece, in order. Takes a buffer of `FRAME_BYTES` for each piece that was read; waits if there is none.

        Raises `OverlayChanged` if a disk is no longer what it was at the first read.
        """
        between = b""
        for member in self._members:
            between += bundle.member_head(member.name, member.size_bytes, self._mtime_s)
            yield from _literal(between)
            yield from self._member(member, buffers)
            between = bundle.member_padding(member.size_bytes)
        for member in self._members:
            if member.disk is not None and member.first is not None:
                member.disk.require_unchanged(member.first)
        digests = Digests(members=self._digests, unreadable=tuple(self._unreadable), health=self._health).encode()
        between += bundle.member_head("digests.json", len(digests), self._mtime_s)
        yield from _literal(between)
        yield from _literal(digests)
        yield from _literal(bundle.member_padding(len(digests)) + bundle.END)

    def _member(self, member: Member, buffers: "queue.SimpleQueue[bytearray]") -> Iterator[Piece]:
        digest = hashlib.sha256()
        if member.disk is None:
            digest.update(member.data)
            yield from _literal(member.data)
        else:
            yield from self._disk(member, member.disk, digest, buffers)
        self._digests[member.name] = Digest(size_bytes=member.size_bytes, sha256=digest.hexdigest())

    def _disk(
        self, member: Member, disk: HeldDisk, digest: "hashlib._Hash", buffers: "queue.SimpleQueue[bytearray]"
    ) -> Iterator[Piece]:
        ranges = disk.data_ranges()
        start, end = 0, 0  # the next range of data that ends after `at`
        for at in range(0, member.size_bytes, FRAME_BYTES):
            length = min(FRAME_BYTES, member.size_bytes - at)
            while end <= at:
                start, size_bytes = next(ranges, (member.size_bytes, FRAME_BYTES))
                end = start + size_bytes
            if start >= at + length:
                digest.update(memoryview(_ZEROS)[:length])
                yield Piece(length=length, data=None)
                continue
            buffer = buffers.get()
            data = memoryview(buffer)[:length]
            for offset, lost_bytes in disk.read_into(data, at):
                self._lost(member.name, offset, lost_bytes)
            digest.update(data)
            self.read_bytes += length
            yield Piece(length=length, data=data, buffer=buffer)

    def _lost(self, name: str, offset: int, lost_bytes: int) -> None:
        """Blocks side by side are one range: a dead region of GiBs must not make digests.json too large to seal."""
        last = self._unreadable[-1] if self._unreadable else None
        if last is not None and last.member == name and last.offset_bytes + last.length_bytes == offset:
            self._unreadable[-1] = replace(last, length_bytes=last.length_bytes + lost_bytes)
        else:
            self._unreadable.append(Unreadable(member=name, offset_bytes=offset, length_bytes=lost_bytes))


def _literal(data: bytes) -> Iterator[Piece]:
    for at in range(0, len(data), FRAME_BYTES):
        part = data[at : at + FRAME_BYTES]
        yield Piece(length=len(part), data=part)
