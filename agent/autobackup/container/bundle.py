"""
The bundle: a POSIX pax tar archive of a narrow kind (docs/format.md, section 4).

Any tar reads it. This module reads nothing else: a head must be, byte for byte, what `member_head` makes of
its name, size and time, so that links, devices, long names, sparse members and owners need no rule of their
own. A member's name is the only thing in an archive that could lead a reader out of its folder, and the list
of names leaves no room for that.

Where the compressed frames are cut is the writer's duty: after each head, at every `FRAME_BYTES` of a
member's own offset, and after its last byte. What is in a member is not looked at here.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from autobackup.container import Buffer
from autobackup.errors import ContainerDamaged
from autobackup.units import GiB, MiB, TiB

MANIFEST: Final = "manifest.json"
DOMAIN_XML: Final = "domain.xml"
CONSOLE_LOG: Final = "console.log"
DIGESTS: Final = "digests.json"
DISKS: Final = "disks/"
BASES: Final = "bases/"
NVRAM: Final = "nvram/"
SWTPM: Final = "swtpm/"

BLOCK_BYTES: Final = 512
END: Final = bytes(2 * BLOCK_BYTES)
MAX_MEMBERS: Final = 4096
MAX_MEMBER_BYTES: Final = 128 * TiB  # what the seek table can list
MAX_RECORD_BYTES: Final = 16 * MiB  # of the members that a reader holds in memory

_RECORDS: Final = frozenset({MANIFEST, DOMAIN_XML, DIGESTS})
_NAME: Final = re.compile(
    r"manifest\.json|domain\.xml|console\.log|digests\.json"
    r"|(disks|bases|nvram|swtpm)/[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
)
_PAX_NAME: Final = "././@PaxHeader"
_PAX_FROM_BYTES: Final = 8 * GiB  # eleven octal digits end here
_PAX_RECORD: Final = re.compile(rb"[1-9][0-9] size=([1-9][0-9]{9,14})\n")
_MAX_MTIME_S: Final = 8**11 - 1

# name mode uid gid size mtime checksum type linkname magic, and 247 bytes that are always NUL: owner, group,
# device numbers, prefix.
_HEAD: Final = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 8s 247x")
_CHECKSUM: Final = slice(148, 156)
_TYPE_FILE: Final = b"0"
_TYPE_PAX: Final = b"x"
_TYPES: Final = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a FIFO",
    b"g": "a global pax header",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStart:
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberData:
    """Some of the member's bytes: a view of what was pushed, good until the next step of the iterator."""

    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberEnd:
    name: str


Event: TypeAlias = MemberStart | MemberData | MemberEnd


def check_name(name: str) -> None:
    """Raise ValueError if a bundle has no place for a member of this name."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not a name in a bundle")


def member_head(name: str, size_bytes: int, mtime_s: int) -> bytes:
    """What stands before the data: 512 bytes, or 1536 for a member of 8 GiB and more."""
    check_name(name)
    limit = MAX_RECORD_BYTES if name in _RECORDS else MAX_MEMBER_BYTES
    if not 0 <= size_bytes <= limit:
        raise ValueError(f"{name}: {size_bytes} bytes, must be 0 to {limit}")
    if not 0 <= mtime_s <= _MAX_MTIME_S:
        raise ValueError(f"{name}: mtime {mtime_s}, must be 0 to {_MAX_MTIME_S}")
    if size_bytes < _PAX_FROM_BYTES:
        return _block(name, mode=0o600, size_bytes=size_bytes, mtime_s=mtime_s, kind=_TYPE_FILE)
    record = _pax_record(size_bytes)
    pax_head = _block(_PAX_NAME, mode=0, size_bytes=len(record), mtime_s=0, kind=_TYPE_PAX)
    head = _block(name, mode=0o600, size_bytes=0, mtime_s=mtime_s, kind=_TYPE_FILE)
    return pax_head + record.ljust(BLOCK_BYTES, b"\0") + head


def member_padding(size_bytes: int) -> bytes:
    """What stands after the data."""
    return bytes(-size_bytes % BLOCK_BYTES)


def head_at(data: Buffer) -> tuple[str, int, int] | None:
    """Name, length of the head and size of the member whose head *data* begins with; None at the archive's end."""
    block = bytes(data)[: 3 * BLOCK_BYTES]
    if not any(block[:BLOCK_BYTES]):
        return None
    head = block[: _head_bytes(bytearray(block))]
    name, size_bytes = BundleReader()._parse_head(head)
    return name, len(head), size_bytes


class BundleReader:
    """
    The archive from front to back, in pieces of any size.

    Holds one head at most. Only `finish` proves that the archive is whole.
    """

    def __init__(self) -> None:
        self._offset = 0  # of the next byte to look at
        self._head = bytearray()
        self._names: set[str] = set()
        self._name = ""  # of the latest member
        self._data_left = 0
        self._in_member = False
        self._padding_left = 0
        self._end_left = len(END)
        self._ending = False
        self._pushing = False
        self._finished = False

    def push(self, data: Buffer) -> Iterator[Event]:
        """
        What *data* brings. The iterator must be exhausted before the next call.

        After an error every further call fails.
        """
        self._check_ready()
        self._pushing = True
        return self._push(memoryview(data).cast("B").toreadonly())

    def finish(self) -> None:
        """Return if the archive ended with its end, and not otherwise."""
        self._check_ready()
        self._finished = True
        if not self._ending or self._end_left:
            where = f"in {self._name}" if self._in_member or self._padding_left else "between members"
            raise self._damaged(f"ends {where}, without its two blocks of NULs")

    def _check_ready(self) -> None:
        if self._finished:
            raise RuntimeError("the bundle is finished")
        if self._pushing:
            raise RuntimeError("the events of the last push were not all taken, or the bundle is damaged")

    def _push(self, data: memoryview) -> Iterator[Event]:
        while len(data):
            if self._ending:
                data = self._take_end(data)
            elif self._in_member:
                piece = data[: self._data_left]
                self._data_left -= len(piece)
                self._offset += len(piece)
                data = data[len(piece) :]
                yield MemberData(data=piece)
            elif self._padding_left:
                data = self._take_padding(data)
            else:
                data = self._take_head(data)
                if self._in_member:
                    yield MemberStart(name=self._name, size_bytes=self._data_left)
            if self._in_member and self._data_left == 0:
                self._in_member = False
                yield MemberEnd(name=self._name)
        self._pushing = False

    def _take_padding(self, data: memoryview) -> memoryview:
        piece = data[: self._padding_left]
        if any(piece):
            raise self._damaged(f"the padding of {self._name} is not NUL")
        self._padding_left -= len(piece)
        self._offset += len(piece)
        return data[len(piece) :]

    def _take_end(self, data: memoryview) -> memoryview:
        piece = data[: self._end_left]
        if not len(piece):
            raise self._damaged("bytes after the end")
        if any(piece):
            raise self._damaged("one block of NULs, then something else")
        self._end_left -= len(piece)
        self._offset += len(piece)
        return data[len(piece) :]

    def _take_head(self, data: memoryview) -> memoryview:
        wanted = BLOCK_BYTES if len(self._head) < BLOCK_BYTES else _head_bytes(self._head)
        piece = data[: wanted - len(self._head)]
        self._head += piece
        data = data[len(piece) :]
        if len(self._head) < BLOCK_BYTES:
            return data
        if not any(self._head):
            self._begin_end()
        elif len(self._head) == _head_bytes(self._head):
            self._begin_member()
        return data

    def _begin_end(self) -> None:
        if self._name != DIGESTS:
            raise self._damaged(f"the last member is {self._name or 'missing'}, must be {DIGESTS}")
        self._ending = True
        self._end_left -= BLOCK_BYTES
        self._offset += BLOCK_BYTES
        self._head.clear()

    def _begin_member(self) -> None:
        name, size_bytes = self._parse_head(bytes(self._head))
        if self._name == DIGESTS:
            raise self._damaged(f"{name} after {DIGESTS}, which must be the last")
        if not self._names and name != MANIFEST:
            raise self._damaged(f"{name} is the first member, must be {MANIFEST}")
        if name in self._names:
            raise self._damaged(f"{name} occurs twice")
        if len(self._names) == MAX_MEMBERS:
            raise self._damaged(f"more than {MAX_MEMBERS} members")
        self._names.add(name)
        self._name = name
        self._data_left = size_bytes
        self._padding_left = -size_bytes % BLOCK_BYTES
        self._in_member = True
        self._offset += len(self._head)
        self._head.clear()

    def _parse_head(self, head: bytes) -> tuple[str, int]:
        """Name and size, if *head* is what `member_head` makes of them."""
        last_block = head[-BLOCK_BYTES:]
        for block in (head[:BLOCK_BYTES], last_block):
            if block[_CHECKSUM] != _checksum(block):
                raise self._damaged("the checksum of a head is wrong")
        raw_name, _, _, _, raw_size, raw_mtime, _, kind, *_ = _HEAD.unpack(last_block)
        name = raw_name.rstrip(b"\0").decode("ascii", "backslashreplace")
        if kind != _TYPE_FILE:
            what = _TYPES.get(kind, f"of type {kind!r}")
            raise self._damaged(f"{name!r} is {what}; a bundle holds regular files only")
        size_bytes, mtime_s = _octal(raw_size), _octal(raw_mtime)
        if len(head) > BLOCK_BYTES:
            record = _PAX_RECORD.match(head, BLOCK_BYTES)
            size_bytes = int(record[1]) if record else None
        if size_bytes is None or mtime_s is None:
            raise self._damaged(f"{name!r}: size or time is not a number in the form of a bundle")
        try:
            expected = member_head(name, size_bytes, mtime_s)
        except ValueError as exc:
            raise self._damaged(str(exc)) from None
        if head != expected:
            at = next(i for i, (a, b) in enumerate(zip(head, expected, strict=False)) if a != b)
            raise self._damaged(f"{name}: its head differs from the form of a bundle from byte {at}")
        return name, size_bytes

    def _damaged(self, what: str) -> ContainerDamaged:
        return ContainerDamaged(f"bundle: offset {self._offset}: {what}")


def _head_bytes(head: bytearray) -> int:
    """The length of the head of which *head* is the first block or more."""
    return 3 * BLOCK_BYTES if head[156:157] == _TYPE_PAX else BLOCK_BYTES


def _block(name: str, *, mode: int, size_bytes: int, mtime_s: int, kind: bytes) -> bytes:
    block = bytearray(
        _HEAD.pack(
            name.encode("ascii"),
            b"%07o\0" % mode,
            b"%07o\0" % 0,
            b"%07o\0" % 0,
            b"%011o\0" % size_bytes,
            b"%011o\0" % mtime_s,
            b"",
            kind,
            b"",
            b"ustar\x0000",
        )
    )
    block[_CHECKSUM] = _checksum(block)
    return bytes(block)


def _checksum(block: bytes | bytearray) -> bytes:
    with_spaces = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    return b"%06o\0 " % with_spaces


def _pax_record(size_bytes: int) -> bytes:
    rest = b" size=%d\n" % size_bytes
    return b"%d" % (len(rest) + 2) + rest  # 19 to 24 bytes: its length has two digits


def _octal(field: bytes) -> int | None:
    digits = field[:-1]
    if field[-1:] != b"\0" or digits.strip(b"01234567"):
        return None
    return int(digits, 8)
