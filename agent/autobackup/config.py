"""
The operator's configuration, in frozen dataclasses: every key, its default, and what it may be.

Values carry their unit ("30d", "200GiB"), so the keys do not; the fields here do (`retention_s`).

This module checks what can be known from the text; `configfile` reads the files. What the machine has to say (a
folder that is not there, two mounts) is said at start by the room that uses it.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict

from autobackup.units import GiB, MiB, parse_bytes, parse_duration_s

DEFAULT_PATH: Final = Path("/etc/autobackup/autobackup.toml")

_DESTINATION_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what the header of a bundle can hold
_LONGEST_TEMPLATE: Final = 31  # a project's id has 32 letters, a destination's name 64
_SOCKET_PATH_BYTES: Final = 107  # sun_path of unix(7), less its NUL
_PROJECT_ID: Final = re.compile(r"[0-9a-f]{32}")
_USER_ID: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # Keystone's own users; those of LDAP and federation


def _with_unit(parse: Any) -> BeforeValidator:
    def convert(value: object) -> object:
        if isinstance(value, str):
            return parse(value)
        raise ValueError(f'write it in quotes with its unit, as in "{"30s" if parse is parse_duration_s else "64MiB"}"')

    return BeforeValidator(convert)


def _between(least: str, most: str, *, parse: Callable[[str], float] = parse_duration_s) -> AfterValidator:
    """What makes sense in a file. Code that builds a section by itself is not held to it."""

    def check(value: float) -> float:
        if not parse(least) <= value <= parse(most):
            raise ValueError(f"must be {least} to {most}")
        return value

    return AfterValidator(check)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} must be an absolute path: what it is relative to differs from start to start")
    return path


def _socket_path(path: Path) -> Path:
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ValueError(f"a socket's path has at most {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    return path


def _destination_name(name: str) -> str:
    if _DESTINATION_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} must be 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit"
        )
    return name


def _project_id(project: str) -> str:
    if _PROJECT_ID.fullmatch(project) is None:
        raise ValueError(
            f"{project!r} is not the id of a project, and Glance would take it unseen; "
            f"ask for the id with: openstack project show -f value -c id {project}"
        )
    return project


def _user_id(user: str) -> str:
    if _USER_ID.fullmatch(user) is None:
        raise ValueError(
            f"{user!r} is not the id of a user, and Barbican would take it unseen; "
            f"ask for the id with: openstack user show -f value -c id {user}"
        )
    return user


Seconds = Annotated[float, _with_unit(parse_duration_s)]
ByteCount = Annotated[int, _with_unit(parse_bytes)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Pause = Annotated[Seconds, _between("100ms", "1d")]  # 0 would be a busy loop
Deadline = Annotated[Seconds, _between("1s", "10m")]  # libvirt's keepalive counts whole seconds
Interval = Annotated[Seconds, _between("1s", "1d")]
LongInterval = Annotated[Seconds, _between("1s", "30d")]
Retention = Annotated[Seconds, _between("1s", "36525d")]
Rate = Annotated[ByteCount, _between("64KiB", "1TiB", parse=parse_bytes)]  # bytes each second
ProjectId = Annotated[str, AfterValidator(_project_id)]
UserId = Annotated[str, AfterValidator(_user_id)]
SpoolReserve = Annotated[ByteCount, _between("1MiB", "1GiB", parse=parse_bytes)]


class _WrongAt(ValueError):
    """What only a look at several keys can tell; *at* is the key to mend, below the table that is looked at."""

    def __init__(self, words: str, *, at: tuple[str | int, ...]) -> None:
        super().__init__(words)
        self.at = at


def key_of(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s")


def nearest(word: str, known: Sequence[str], *, none: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}" if known else none


_SECTION: Final = ConfigDict(extra="forbid", alias_generator=key_of)


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtSection:
    """Where libvirt listens and how long an answer may take."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    uri: str = "qemu:///system"
    call_timeout_s: Deadline = 30.0  # a destroy of any domain blocks every other call: 0.2 to 10 s measured
    keepalive_interval_s: Deadline = 5.0  # a hung daemon is noticed after 4 intervals
    reconnect_longest_s: Deadline = 10.0
    swtpm_path: AbsolutePath = Path("/var/lib/libvirt/swtpm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSection:
    """How claims are made and when a candidate counts as terminated."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    quiet_period_s: Interval = 60.0  # a rebuild looks like a delete until its new folder appears
    leaked_after_s: LongInterval = 3600.0  # a `_del` folder that outlives this was left behind by Nova
    scan_interval_s: Interval = 60.0
    undecided_longest_s: Interval = 300.0  # longest pause between two looks at an undecided candidate
    undefined_is_released: bool = False  # plain libvirt: `virsh undefine` leaves the disk; take it as released
    filesystems: tuple[str, ...] = ("ext4", "xfs")

    def __post_init__(self) -> None:
        if not self.filesystems:
            raise _WrongAt("name at least one, or no spool can be opened", at=("filesystems",))
        if self.leaked_after_s < self.quiet_period_s:
            raise _WrongAt("must not be shorter than quiet_period", at=("leaked_after",))


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingSection:
    """The data path: how hard it may work."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    compression: str = "zstd:-1"  # zstd:LEVEL with LEVEL from -50 to 9, or none
    compress_threads: int = 2
    parallel_jobs: int = 2
    cpu_tokens: int = 0  # heavy C calls at once in the whole process; 0 = one per CPU
    detach_after_s: Pause = 3.0  # a destination that blocks the shared read longer gets its own later
    rate_bytes: Rate | None = None  # what all jobs of this host may send together, each second

    def __post_init__(self) -> None:
        _ = self.zstd_level
        for name in ("compress_threads", "parallel_jobs"):
            if not 1 <= getattr(self, name) <= 64:
                raise _WrongAt("must be 1 to 64", at=(name,))
        if self.cpu_tokens < 0:
            raise _WrongAt("must be 0 or more", at=("cpu_tokens",))

    @property
    def zstd_level(self) -> int | None:
        """The level, or None for stored frames."""
        if self.compression == "none":
            return None
        kind, _, level = self.compression.partition(":")
        try:
            number = int(level)
        except ValueError:
            number = 99
        if kind != "zstd" or not -50 <= number <= 9:
            words = f'{self.compression!r} is unknown; write "none" or "zstd:LEVEL" with LEVEL from -50 to 9'
            raise _WrongAt(words, at=("compression",))
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySection:
    """Pauses between tries of a job. They have no end: a transient error is never given up on."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    first_s: Pause = 5.0
    longest_s: Pause = 900.0

    def __post_init__(self) -> None:
        if self.longest_s < self.first_s:
            raise _WrongAt("must not be shorter than first", at=("longest",))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSection:
    """The local HTTP socket."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    socket: Annotated[AbsolutePath, AfterValidator(_socket_path)] = Path("/run/autobackup/agent.sock")
    group: str = ""  # may read and order retries; empty = root only


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenstackSection:
    """How OpenStack's services are talked to. Who we are there, and all passwords, are in clouds.yaml."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    clouds_yaml: AbsolutePath | None = None  # None: where openstacksdk looks, /etc/openstack/clouds.yaml among them
    call_timeout_s: Deadline = 30.0
    stall_timeout_s: Interval = 120.0  # an upload of which no byte is taken for so long is given up
    reply_timeout_s: Interval = 600.0  # Glance's answer after the last byte: it may still be writing to its backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a backup goes and on what terms. Which keys go together is in `_NEEDS` and `_GOES_WITH`."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    name: Annotated[str, AfterValidator(_destination_name)]
    store: Literal["directory", "glance"]
    path: AbsolutePath | None = None
    must_be_mount: bool = False  # refuse the folder under a mount point that is not mounted
    reserve_bytes: ByteCount = 1 * GiB  # space that a folder must keep free; less is "full"
    cloud: str = ""  # an entry of clouds.yaml
    project: str = ""  # name or id; empty: the one that the entry names
    project_domain: str = ""  # name or id; empty: the entry's
    members: tuple[ProjectId, ...] = ()  # ids of projects that the image is shared with
    key: Literal["keyfile", "barbican", "recipient", "none"]
    keyfile: AbsolutePath | None = None
    older_keyfiles: tuple[AbsolutePath, ...] = ()  # still open what they sealed; nothing new is sealed with them
    recipients: tuple[AbsolutePath, ...] = ()  # files with public keys
    readers: tuple[UserId, ...] = ()  # users who may have the key, besides who wrote it
    project_access: bool = False  # whether every member of the project may have the key
    retention_s: Retention | None = None  # None: kept until somebody deletes it
    verify: Literal["fast", "readback"] = "fast"
    rate_bytes: Rate | None = None  # what may be sent there each second, by this host

    def __post_init__(self) -> None:
        for (key, word), needed in _NEEDS.items():
            if getattr(self, key) == word and not getattr(self, needed):
                raise _WrongAt(f'is missing; {key} = "{word}" needs it', at=(needed,))
        for name, pairs in _GOES_WITH.items():
            is_set = getattr(self, name) != _default(Destination, name)
            if is_set and not any(getattr(self, key) == word for key, word in pairs):
                words = " or ".join(f'{key} = "{word}"' for key, word in pairs)
                raise _WrongAt(f"has a meaning only with {words}; remove it", at=(key_of(name),))


_NEEDS: Final[Mapping[tuple[str, str], str]] = {
    ("store", "directory"): "path",
    ("store", "glance"): "cloud",
    ("key", "keyfile"): "keyfile",
    ("key", "barbican"): "cloud",
    ("key", "recipient"): "recipients",
}
_OF_A_CLOUD: Final = (("store", "glance"), ("key", "barbican"))
_GOES_WITH: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "path": (("store", "directory"),),
    "must_be_mount": (("store", "directory"),),
    "reserve_bytes": (("store", "directory"),),
    "cloud": _OF_A_CLOUD,
    "project": _OF_A_CLOUD,
    "project_domain": _OF_A_CLOUD,
    "members": (("store", "glance"),),
    "keyfile": (("key", "keyfile"),),
    "recipients": (("key", "recipient"),),
    "readers": (("key", "barbican"),),
    "project_access": (("key", "barbican"),),
}


def _default(section: type, name: str) -> object:
    return next(field.default for field in fields(section) if field.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSection:
    """What an owner's request for one instance may have. Without a destination it is refused."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    destination: str = ""  # the terms of what is asked for; its project is the one that is asked for
    scrub: str = "zero"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Conditions of a rule, as shell globs; all must hold. Left out = anything."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    name: str = "*"  # Nova's name of the server, or libvirt's of the domain
    uuid: str = "*"
    project: str = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which instances are backed up, where to, and how their disks are scrubbed afterwards."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    name: str
    match: Match = field(default_factory=Match)
    destinations: tuple[str, ...]
    scrub: str = "zero"  # an entry point of the group `autobackup.scrub`

    def __post_init__(self) -> None:
        if not self.name:
            raise _WrongAt("must not be empty", at=("name",))
        if not self.destinations:
            raise _WrongAt(f"rule {self.name!r} names no destination; add one", at=("destinations",))
        for n, name in enumerate(self.destinations):
            if name in self.destinations[:n]:
                raise _WrongAt(f"rule {self.name!r} names {name!r} twice; remove one", at=("destinations", n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    instances_path: AbsolutePath = Path("/var/lib/nova/instances")
    verdict: Literal["libvirt"] = "libvirt"
    verdict_despite_nova: bool = False  # `libvirt` where nova.conf or Nova's domain metadata is found
    nova_conf: AbsolutePath = Path("/etc/nova/nova.conf")
    libvirt: LibvirtSection = field(default_factory=LibvirtSection)
    capture: CaptureSection = field(default_factory=CaptureSection)
    sealing: SealingSection = field(default_factory=SealingSection)
    retry: RetrySection = field(default_factory=RetrySection)
    openstack: OpenstackSection = field(default_factory=OpenstackSection)
    api: ApiSection = field(default_factory=ApiSection)
    request: RequestSection = field(default_factory=RequestSection)
    destination: tuple[Destination, ...] = ()
    rule: tuple[Rule, ...] = ()
    reserve_bytes: SpoolReserve = 4 * MiB  # kept in the spool, given up when its filesystem is full

    def __post_init__(self) -> None:
        names = [d.name for d in self.destination]
        for kind, given in (("destination", names), ("rule", [r.name for r in self.rule])):
            for n, name in enumerate(given):
                if name in given[:n]:
                    raise _WrongAt(f"two are named {name!r}; rename one", at=(kind, n, "name"))
        self._check_request()
        for n, rule in enumerate(self.rule):
            for m, wanted in enumerate(rule.destinations):
                if wanted not in names:
                    raise _WrongAt(
                        f"rule {rule.name!r} names the destination {wanted!r}, which is not defined; "
                        + nearest(wanted, names, none="there is no [[destination]]"),
                        at=("rule", n, "destinations", m),
                    )

    def _check_request(self) -> None:
        wanted = self.request.destination
        template = next((one for one in self.destination if one.name == wanted), None)
        if not wanted:
            return
        if template is None:
            words = nearest(wanted, [one.name for one in self.destination], none="there is no [[destination]]")
            raise _WrongAt(f"{wanted!r} is not defined; {words}", at=("request", "destination"))
        if template.store != "glance":
            words = 'must be a destination with store = "glance": a request names a project'
            raise _WrongAt(words, at=("request", "destination"))
        if len(wanted) > _LONGEST_TEMPLATE:
            words = f"must have a name of at most {_LONGEST_TEMPLATE} letters: the project's id is added to it"
            raise _WrongAt(words, at=("request", "destination"))

    @property
    def only_asked_for(self) -> str:
        """The destination that only requests name: which project it is for is not known before one comes."""
        named = {name for rule in self.rule for name in rule.destinations}
        return "" if self.request.destination in named else self.request.destination

    @property
    def spool_path(self) -> Path:
        """Inside `instances_path`, always: a hard link cannot cross a mount."""
        return self.instances_path / ".autobackup"
