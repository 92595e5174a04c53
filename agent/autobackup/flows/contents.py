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
from autobackup.container.frames import FRAME_BYTES, stored_frame_bytes, zero_frame
from autobackup.container.manifest import Digest, Digests, Health, Manifest, Unreadable
from autobackup.container.seek_table import encoded_table_bytes
from autobackup.errors import Refused
from autobackup.host.disks import HeldDisk
from autobackup.model import DiskIdentity
from autobackup.units import KiB

_ZEROS: Final = bytes(FRAME_BYTES)
_ROOM_FOR_LOST_BYTES: Final = 64 * KiB  # of an announced digests.json: some 500 ranges that cannot be read


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
    """
    The plaintext of one sealed bundle; iterate `pieces` once.

    *fixed_length*: `stored_bytes` is known before the first byte is read, because room is kept for what is not.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        members: Sequence[Member],
        health: Sequence[Health],
        mtime_s: int,
        fixed_length: bool = False,
    ) -> None:
        self._members = (Member(name="manifest.json", data=manifest.encode()), *members)
        self._health = tuple(health)
        self._mtime_s = mtime_s
        self._digests: dict[str, Digest] = {}
        self._unreadable: list[Unreadable] = []
        self._data_frames = {member.name: _data_frames(member) for member in self._members}
        self._digests_bytes = self._longest_digests_bytes() if fixed_length else 0
        self.read_bytes = 0

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Ranges that were sent as zeros because the medium failed. Complete after `pieces` has ended."""
        return tuple(self._unreadable)

    @property
    def digests(self) -> dict[str, Digest]:
        """Member name -> digest of its logical bytes. Complete after `pieces` has ended."""
        return dict(self._digests)

    def stored_bytes(self) -> int:
        """The length of the compressed stream when every piece is a stored frame. Only with *fixed_length*."""
        total_bytes = frames = 0
        for length, is_zeros in self._lengths():
            total_bytes += len(zero_frame(length)) if is_zeros else stored_frame_bytes(length)
            frames += 1
        return total_bytes + encoded_table_bytes(frames)

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
        digests = self._encoded_digests()
        between += bundle.member_head("digests.json", len(digests), self._mtime_s)
        yield from _literal(between)
        yield from _literal(digests)
        yield from _literal(bundle.member_padding(len(digests)) + bundle.END)

    def _lengths(self) -> Iterator[tuple[int, bool]]:
        """(length, zeros) of every piece, as `pieces` will cut them."""
        between_bytes = 0
        for member in self._members:
            between_bytes += len(bundle.member_head(member.name, member.size_bytes, self._mtime_s))
            yield from _cut(between_bytes)
            if member.disk is None:
                yield from _cut(member.size_bytes)
            else:
                has_data = self._data_frames[member.name]
                for at in range(0, member.size_bytes, FRAME_BYTES):
                    yield min(FRAME_BYTES, member.size_bytes - at), not has_data[at // FRAME_BYTES]
            between_bytes = len(bundle.member_padding(member.size_bytes))
        between_bytes += len(bundle.member_head("digests.json", self._digests_bytes, self._mtime_s))
        yield from _cut(between_bytes)
        yield from _cut(self._digests_bytes)
        yield from _cut(len(bundle.member_padding(self._digests_bytes) + bundle.END))

    def _longest_digests_bytes(self) -> int:
        blank = {m.name: Digest(size_bytes=m.size_bytes, sha256="0" * 64) for m in self._members}
        return len(Digests(members=blank, unreadable=(), health=self._health).encode()) + _ROOM_FOR_LOST_BYTES

    def _encoded_digests(self) -> bytes:
        digests = Digests(members=self._digests, unreadable=tuple(self._unreadable), health=self._health)
        try:
            return digests.encode(pad_to_bytes=self._digests_bytes)
        except ValueError as exc:
            raise Refused(
                f'{exc}: too many ranges cannot be read; with compression = "zstd:-1" they have room'
            ) from exc

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
        has_data = self._data_frames[member.name]
        for at in range(0, member.size_bytes, FRAME_BYTES):
            length = min(FRAME_BYTES, member.size_bytes - at)
            if not has_data[at // FRAME_BYTES]:
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


def _data_frames(member: Member) -> bytearray:
    """
    One byte for each frame of a disk: 0 where it is all hole.

    Asked once: SEEK_DATA changes its mind about preallocated blocks when their pages leave the cache, and a length that
    was announced must hold.
    """
    return bytearray() if member.disk is None else member.disk.data_marks(FRAME_BYTES)


def _literal(data: bytes) -> Iterator[Piece]:
    for at in range(0, len(data), FRAME_BYTES):
        part = data[at : at + FRAME_BYTES]
        yield Piece(length=len(part), data=part)


def _cut(length: int) -> Iterator[tuple[int, bool]]:
    for at in range(0, length, FRAME_BYTES):
        yield min(FRAME_BYTES, length - at), False
