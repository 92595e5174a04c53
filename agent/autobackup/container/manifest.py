"""
The two records in a bundle: `manifest.json`, what was captured, and `digests.json`, what was sent.

A manifest with `parents` (backing files that lie elsewhere) is of format 2, one without of format 1.

Both are plain data with one encoding each (docs/format.md, section 5). Decoding is strict: an unknown or
missing member, a wrong type, another spelling of the same content are refused. `check_bundle` compares header
and records with what was read; a bundle that passes the lower layers but not this had a faulty writer.

Nothing here decides: the verdict and the results of health checks are text that others wrote.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Final, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from autobackup.container import bundle
from autobackup.container.header import Header
from autobackup.errors import ContainerDamaged

_STRICT: Final = ConfigDict(extra="forbid", strict=True)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_ID: Final = re.compile(r"[A-Za-z0-9:._-]{0,255}")
_WITH_PARENTS: Final = "autobackup-bundle/2"
_MAX_INTEGER: Final = 2**63 - 1

_Record = TypeVar("_Record", "Manifest", "Digests")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEntry:
    """A disk or a backing file."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    member: str
    format: Literal["qcow2", "raw", "unknown"]
    size_bytes: int
    source_path: str
    inode: int
    mtime_ns: int
    backing: str | None
    backing_path: str | None
    chain_source: Literal["libvirt", "header", "none"]

    def __post_init__(self) -> None:
        bundle.check_name(self.member)
        _check_integers(self.size_bytes, self.inode)
        _check_integers(self.mtime_ns, minimum=-_MAX_INTEGER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentEntry:
    """
    A backing file that is not in the bundle, and how to know the right one.

    *path* is how disks and other parents name it (`backing_path`). *sha256* is over its bytes on the host, holes as
    zeros; None: it could not be read any more. *image* is the id of the Glance image that it was made from,
    *image_hash* what Glance said of that image's data (`sha512:…`); empty where they were not known.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    path: str
    format: Literal["qcow2", "raw", "unknown"]
    size_bytes: int
    sha256: str | None
    backing_path: str | None
    image: str
    image_hash: str

    def __post_init__(self) -> None:
        _check_integers(self.size_bytes)
        if self.sha256 is not None:
            _check_sha256(self.sha256)
        elif self.size_bytes:
            raise ValueError(f"size_bytes is {self.size_bytes}, without a digest of them")
        for name in ("image", "image_hash"):
            if _ID.fullmatch(getattr(self, name)) is None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must match {_ID.pattern}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Any other member; *source_path* is empty if it came from no file."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    member: str
    size_bytes: int
    source_path: str

    def __post_init__(self) -> None:
        bundle.check_name(self.member)
        _check_integers(self.size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotCaptured:
    """What belongs to the instance and is not in the bundle."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was captured. Known in full before the first byte of a disk is sent."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    format: Literal["autobackup-bundle/1", "autobackup-bundle/2"] = "autobackup-bundle/1"
    job: str
    instance: str
    instance_name: str
    host: str
    captured_at_s: int
    verdict: str
    verdict_reason: str
    disks: tuple[DiskEntry, ...]
    bases: tuple[DiskEntry, ...]
    files: tuple[FileEntry, ...]
    not_captured: tuple[NotCaptured, ...]
    facts: Mapping[str, str]
    parents: tuple[ParentEntry, ...] = ()

    def __post_init__(self) -> None:
        _check_integers(self.captured_at_s)
        if bool(self.parents) != (self.format == _WITH_PARENTS):
            raise ValueError(f"format is {self.format}, with {len(self.parents)} parents")
        if len({parent.path for parent in self.parents}) < len(self.parents):
            raise ValueError("a parent is listed twice")
        _check_folder(self.disks, bundle.DISKS)
        _check_folder(self.bases, bundle.BASES)
        for entry in self.files:
            if entry.member.startswith((bundle.DISKS, bundle.BASES)) or entry.member in _OWN_RECORDS:
                raise ValueError(f"{entry.member} does not belong under files")
        occurrences = Counter(member for member, _ in self._members())
        twice = sorted(member for member, count in occurrences.items() if count > 1)
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        bases = {base.member for base in self.bases}
        for disk in (*self.disks, *self.bases):
            if disk.backing is not None and disk.backing not in bases:
                raise ValueError(f"{disk.member}: its backing {disk.backing} is not among the bases")
        _check_ends({base.member: base.backing for base in self.bases})
        _check_ends({parent.path: parent.backing_path for parent in self.parents})
        object.__setattr__(self, "facts", dict(self.facts))

    @property
    def members(self) -> Mapping[str, int]:
        """Name and size of every member that must be in the bundle beside the two records."""
        return dict(self._members())

    def _members(self) -> Iterator[tuple[str, int]]:
        for disk in (*self.disks, *self.bases):
            yield disk.member, disk.size_bytes
        for file in self.files:
            yield file.member, file.size_bytes

    def encode(self) -> bytes:
        return _encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        return _decode(Manifest, bundle.MANIFEST, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Of a member's data as it is in the archive, holes and unreadable ranges as zeros."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check_integers(self.size_bytes)
        _check_sha256(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A range that the host could not read."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    member: str
    offset_bytes: int
    length_bytes: int

    def __post_init__(self) -> None:
        bundle.check_name(self.member)
        _check_integers(self.offset_bytes)
        _check_integers(self.length_bytes, minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a check of a disk said."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    member: str
    tool: str
    result: str
    detail: str

    def __post_init__(self) -> None:
        bundle.check_name(self.member)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What was sent. Written last, when it is known."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    algorithm: Literal["sha256"] = "sha256"
    members: Mapping[str, Digest]
    unreadable: tuple[Unreadable, ...]
    health: tuple[Health, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", dict(self.members))
        for name in self.members:
            bundle.check_name(name)
        if bundle.DIGESTS in self.members:
            raise ValueError(f"{bundle.DIGESTS} cannot hold its own digest")
        for gap in self.unreadable:
            digest = self.members.get(gap.member)
            if digest is None or gap.offset_bytes + gap.length_bytes > digest.size_bytes:
                raise ValueError(f"unreadable range outside of {gap.member}")

    def encode(self, *, pad_to_bytes: int = 0) -> bytes:
        """The record; with *pad_to_bytes* of exactly that length, for a bundle whose length was announced."""
        text = _encode(self)
        if pad_to_bytes and len(text) > pad_to_bytes:
            raise ValueError(f"{bundle.DIGESTS} has {len(text)} bytes, {pad_to_bytes} were reserved")
        return text[:-1].ljust(pad_to_bytes - 1) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Digests":
        return _decode(Digests, bundle.DIGESTS, data[:-1].rstrip(b" ") + data[-1:])


def check_bundle(*, header: Header, manifest: Manifest, digests: Digests, read: Mapping[str, Digest]) -> None:
    """
    Refuse a bundle whose header, records and content disagree.

    *read* is what a reader saw: every member but `digests.json`, `manifest.json` included.
    """
    for name in ("job", "instance"):
        if getattr(manifest, name) != getattr(header, name):
            raise ContainerDamaged(f"{bundle.MANIFEST}: {name} is not the header's")
    read_bytes = {name: digest.size_bytes for name, digest in read.items() if name != bundle.MANIFEST}
    _refuse_differences(bundle.MANIFEST, manifest.members, read_bytes)
    _refuse_differences(bundle.DIGESTS, digests.members, read)


_OWN_RECORDS: Final = frozenset({bundle.MANIFEST, bundle.DIGESTS})


def _check_integers(*values: int, minimum: int = 0) -> None:
    for value in values:
        if not minimum <= value <= _MAX_INTEGER:
            raise ValueError(f"{value} is not from {minimum} to {_MAX_INTEGER}")


def _check_sha256(text: str) -> None:
    if _SHA256.fullmatch(text) is None:
        raise ValueError(f"sha256 is {text!r}, must be 64 lower-case hex digits")


def _check_ends(below: Mapping[str, str | None]) -> None:
    """Refuse a chain that goes round."""
    for start in below:
        at, steps = below[start], 0
        while at is not None and at in below:
            at, steps = below[at], steps + 1
            if steps > len(below):
                raise ValueError(f"{start} is backed by itself in the end")


def _check_folder(entries: Iterable[DiskEntry], folder: str) -> None:
    for entry in entries:
        if not entry.member.startswith(folder):
            raise ValueError(f"{entry.member} must be under {folder}")


def _refuse_differences(record: str, listed: Mapping[str, object], read: Mapping[str, object]) -> None:
    for name in sorted({*listed, *read}):
        if listed.get(name) != read.get(name):
            raise ContainerDamaged(f"{record}: {name} is listed as {listed.get(name)}, was {read.get(name)}")


def _encode(record: "Manifest | Digests") -> bytes:
    """Raises ValueError for what `decode` would refuse: it must show before the record is sealed."""
    value = asdict(record)
    if not value.get("parents", True):
        del value["parents"]  # format 1 knows none
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True).encode("ascii") + b"\n"
    if len(text) > bundle.MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(text)} bytes, at most {bundle.MAX_RECORD_BYTES} are allowed")
    TypeAdapter(type(record)).validate_json(text)
    return text


def _decode(cls: type[_Record], member: str, data: bytes) -> _Record:
    if len(data) > bundle.MAX_RECORD_BYTES:
        raise ContainerDamaged(f"{member}: {len(data)} bytes, at most {bundle.MAX_RECORD_BYTES}")
    try:
        record = TypeAdapter(cls).validate_json(data)
        text = _encode(record)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise ContainerDamaged(f"{member}: {where}: {first['msg']}") from None
    except ValueError as exc:
        raise ContainerDamaged(f"{member}: {exc}") from None
    if text != data:
        raise ContainerDamaged(f"{member}: not in its canonical form")
    return record
