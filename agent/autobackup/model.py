"""
The nouns of the agent: ids, disks, instances, jobs. Data only; what may become of it is `rules`' to say.

Everything here is frozen, and everything that is journaled (`JobRecord`, `InstanceRecord`) is read back
through `decode`, strictly: a record that does not fit raises `RecordDamaged` and is never guessed at.
"""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, NewType, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from autobackup.errors import RecordDamaged

InstanceId = NewType("InstanceId", str)  # Nova's and libvirt's UUID
JobId = NewType("JobId", str)  # random; never derived from an instance
AttemptId = NewType("AttemptId", str)  # random UUID; the name of the object in the store
DestinationName = NewType("DestinationName", str)

ROOT_DISK = "disk"

_JOURNALED: Final = ConfigDict(extra="forbid", strict=True)


class VerdictKind(enum.StrEnum):
    """What became of a candidate."""

    TERMINATED = "terminated"
    ALIVE = "alive"
    MOVED = "moved"
    REPLACED = "replaced"
    UNDECIDED = "undecided"


class Occasion(enum.StrEnum):
    """What happened to an instance that a rule may want its disk for: its `on`."""

    TERMINATE = "terminate"
    REBUILD = "rebuild"  # whoever broke in may rebuild to destroy the evidence
    SHELVE_OFFLOAD = "shelve-offload"


class DiskKind(enum.StrEnum):
    """What a rule may choose of an instance's disks. Firmware state and the console's log come with any of them."""

    ROOT = "root"
    EPHEMERAL = "ephemeral"
    SWAP = "swap"
    CONFIG_DRIVE = "config-drive"


class RequestSource(enum.StrEnum):
    """How an owner asked. The first of them that has a word decides."""

    SOCKET = "socket"
    SERVER = "server"  # `openstack server set --property autobackup=true`
    IMAGE = "image"
    FLAVOR = "flavor"


class JobState(enum.StrEnum):
    """Where a job stands; the legal moves are `rules.lifecycle.JOB_MOVES`."""

    QUEUED = "queued"
    SENDING = "sending"
    VERIFIED = "verified"
    SCRUBBING = "scrubbing"  # journaled before the first byte is overwritten
    SCRUBBED = "scrubbed"
    KEPT = "kept"  # verified, not scrubbed: still named elsewhere
    DONE = "done"
    PARKED = "parked"
    DISCARDED = "discarded"


class CopyState(enum.StrEnum):
    """Where the copy for one destination stands; the legal moves are `rules.lifecycle.COPY_MOVES`."""

    QUEUED = "queued"
    SENDING = "sending"
    SENT = "sent"
    VERIFIED = "verified"
    PARKED = "parked"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskIdentity:
    """
    Which inode, and which content. An inode number comes again; with its generation it does not.

    The device's number is only good until the next boot: it is compared with the spool's own, never with a journal's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    device: int
    inode: int
    generation: int | None  # FS_IOC_GETVERSION; None where the filesystem has none (tmpfs, overlayfs)
    size_bytes: int
    mtime_ns: int

    def same_inode(self, other: "DiskIdentity") -> bool:
        return (self.inode, self.generation) == (other.inode, other.generation)

    def same_content(self, other: "DiskIdentity") -> bool:
        """The same inode, and nobody has written to it in between."""
        return self.same_inode(other) and (self.size_bytes, self.mtime_ns) == (other.size_bytes, other.mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLink:
    """One backing file, by libvirt's word or, said so in `DiskSource.chain_source`, by the overlay's header."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    path: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """
    What the bytes of a backing file are, read once for its inode; digests are hex, over its bytes, holes as zeros.

    Found to hold just these bytes: *same_as*, images, and *copies*, sealed bases; as `<id>:<size>:<version>`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    identity: DiskIdentity
    sha256: str
    sha512: str
    is_damaged: bool = False  # parts of it could not be read, and count as zeros
    same_as: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSource:
    """What the hypervisor says of one disk of an instance."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    path: str
    format: str  # `<driver type=>`: never from the content
    chain: tuple[ChainLink, ...] = ()
    chain_source: str = "none"  # libvirt | header | none


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """
    The owner's wish for one instance: to whom its last state goes, who may open it, for how long it is kept.

    Not *enabled*: the owner wants no backup, which only a rule that may be declined heeds. *refused*: why it is not
    granted; it stays, for its owner to read, and is asked for again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    project: str = ""  # id; owns image and key
    reader: str = ""  # id of a user who may have the key
    retention_s: float | None = None  # None: as long as the destination's terms say
    enabled: bool = True
    source: RequestSource = RequestSource.SOCKET
    refused: str = ""
    asked: bool = True  # its project has been asked; until then nothing is done with it, nor without it


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """What OpenStack says of a server, in its domain's metadata or by its API. None: nobody has told yet."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    name: str = ""  # by the API: the domain's goes stale when the server is renamed
    project_name: str = ""
    user: str = ""  # id
    user_name: str = ""
    domain: str | None = None  # Keystone's, of the project; id
    flavor: str = ""
    extra_specs: Mapping[str, str] | None = None
    image: str = ""  # id of the one that the server was made from
    image_properties: Mapping[str, str] | None = None
    image_heard: bool = False  # Glance was asked, too: a domain carries only what Nova knows
    properties: Mapping[str, str] | None = None  # the owner's; gone from the API as soon as the server is


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """What is known of an instance, cached while it lives: after a destroy nobody can tell any more."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    instance: InstanceId
    libvirt_name: str = ""
    display_name: str = ""  # Nova's name of the server, where the domain carries it
    owner_project: str = ""
    server: ServerRecord = ServerRecord()
    disks: tuple[DiskSource, ...] = ()
    nvram_path: str | None = None
    tpm: bool = False
    domain_xml: str = ""
    root_inode: int = 0  # the root disk that the domain was last seen with; 0: none yet
    resized_inodes: tuple[int, ...] = ()  # root disks last seen under `<uuid>_resize/`
    reverted_inodes: tuple[int, ...] = ()  # root disks that went when an older one came back from there
    companion_inodes: tuple[int, ...] = ()  # the other files that were last seen beside `root_inode`
    outlived_inodes: tuple[int, ...] = ()  # those that were seen beside an earlier root disk
    migrated_away: bool = False  # the last stop was a migration to another host
    request: Request | None = None
    updated_at_s: float = 0.0

    @property
    def name(self) -> str:
        """What an operator would call it."""
        return self.server.name or self.display_name or self.libvirt_name


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A link that a job owns, by its name in the job's folder, and what it is."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    link: str  # `<uuid>.<disk>.<inode>`, in `jobs/<id>/`
    disk: str  # `disk`, `disk.eph0`, `console.log`, `nvram` …
    source_path: str
    format: str
    chain: tuple[ChainLink, ...] = ()
    chain_source: str = "none"
    identity: DiskIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One try to put one job into one destination. Journaled before the store hears of it. No key is in it."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    attempt: AttemptId
    started_at_s: float
    size_bytes: int | None = None  # known when all was sent
    digest: str | None = None  # hex, `digest_algorithm` of the store
    digest_algorithm: str = ""


class Protection(enum.StrEnum):
    """What keeps a parent from being lost to a backup, strongest first by what a tenant can undo."""

    POLICY = "policy"  # Glance refuses the image's deletion while it is marked, and only agents may mark
    PROTECTED = "protected"  # protected=true: deletion is refused until a member of its project unprotects it
    COPY = "copy"  # the base is a sealed object of its own in the destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """What one backing file is to one copy: an image in its cloud, or a sealed base in its destination."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    path: str  # the backing file's
    parent: str  # id of the image, or attempt of the sealed base
    protection: Protection


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRecord:
    """The copy that one destination is owed."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    destination: DestinationName
    state: CopyState = CopyState.QUEUED
    attempt: AttemptRecord | None = None
    obsolete: tuple[AttemptId, ...] = ()  # ours in the store, superseded or cut off: to be deleted there
    failure_count: int = 0
    not_before_s: float = 0.0  # Unix time of the next try
    last_error: str = ""
    verified_at_s: float | None = None
    request: Request | None = None  # the terms, where they are not the destination's own: an owner's
    retention_s: float | None = None  # or the rule's
    anchors: tuple[Anchor, ...] = ()  # what `attempt` stands on
    base_attempt: AttemptId | None = None  # a base of ours that is on its way there


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One terminated instance on its way to all its destinations."""

    __pydantic_config__: ClassVar[ConfigDict] = _JOURNALED
    job: JobId
    instance: InstanceId
    state: JobState
    verdict: VerdictKind
    verdict_reason: str
    occasion: Occasion = Occasion.TERMINATE
    rule: str
    scrub_method: str
    created_at_s: float
    updated_at_s: float
    source: InstanceRecord  # as it was known at the verdict
    files: tuple[HeldFile, ...]
    copies: tuple[CopyRecord, ...]
    not_captured: Mapping[str, str] = field(default_factory=dict)
    first_read: Mapping[str, DiskIdentity] = field(default_factory=dict)  # link -> identity at the first read
    member_digests: Mapping[str, str] = field(default_factory=dict)  # of the last whole read, for the receipt
    unreadable: bool = False
    failure_count: int = 0
    not_before_s: float = 0.0
    last_error: str = ""
    still_named: tuple[str, ...] = ()  # paths that kept files of this job from being scrubbed

    @property
    def bases(self) -> tuple[ChainLink, ...]:
        """Every backing file that a file of this job stands on, once."""
        return tuple(dict.fromkeys(link for held in self.files for link in held.chain))


_Record = TypeVar("_Record")
_ADAPTERS: dict[type, TypeAdapter[object]] = {}


def encode(record: object) -> bytes:
    """One record as indented JSON: an operator reads the spool with `less`."""
    text = json.dumps(_adapter(type(record)).dump_python(record, mode="json"), indent=1, ensure_ascii=False)
    # half of a surrogate pair (a file name that is not UTF-8) could be written, but would not be read back
    return text.encode("utf-8", "replace") + b"\n"


def decode(kind: type[_Record], data: bytes, *, where: str) -> _Record:
    """Read back what `encode` wrote. Raises `RecordDamaged` naming *where*."""
    try:
        return _adapter(kind).validate_json(data)  # type: ignore[return-value]
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecordDamaged(f"{where}: {key or 'document'}: {first['msg']}") from exc


def _adapter(kind: type) -> TypeAdapter[object]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
