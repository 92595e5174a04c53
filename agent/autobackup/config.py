"""
The operator's configuration: TOML, read once into frozen dataclasses, refused whole if a word of it is wrong.

`autobackup.toml` is read first, then the `*.toml` of the `conf.d` folder beside it in the order of their names:
tables merge key by key, scalars of a later file win, `[[destination]]` and `[[rule]]` add up. Every error names
the file, the key and what to write instead. Values carry their unit ("30d", "200GiB"), so the keys do not; the
fields here do (`retention_s`).

This module checks what can be known from the text. What the machine has to say (a folder that is not there, two
mounts) is said at start by the room that uses it.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from autobackup.errors import ConfigError
from autobackup.units import GiB, MiB, parse_bytes, parse_duration_s

DEFAULT_PATH: Final = Path("/etc/autobackup/autobackup.toml")


def _with_unit(parse: Any) -> BeforeValidator:
    def convert(value: object) -> object:
        if isinstance(value, str):
            return parse(value)
        raise ValueError(f'write it in quotes with its unit, as in "{"30s" if parse is parse_duration_s else "64MiB"}"')

    return BeforeValidator(convert)


Seconds = Annotated[float, _with_unit(parse_duration_s)]
ByteCount = Annotated[int, _with_unit(parse_bytes)]


def _key(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s")


_SECTION: Final = ConfigDict(extra="forbid", alias_generator=_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtSection:
    """Where libvirt listens and how long an answer may take."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    uri: str = "qemu:///system"
    call_timeout_s: Seconds = 30.0  # a destroy of any domain blocks every other call: 0.2 to 10 s measured
    keepalive_interval_s: Seconds = 5.0  # a hung daemon is noticed after 4 intervals
    reconnect_longest_s: Seconds = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSection:
    """How claims are made and when a candidate counts as terminated."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    quiet_period_s: Seconds = 60.0  # a rebuild looks like a delete until its new folder appears
    leaked_after_s: Seconds = 3600.0  # a `_del` folder that outlives this was left behind by Nova
    scan_interval_s: Seconds = 60.0
    undecided_longest_s: Seconds = 300.0  # longest pause between two looks at an undecided candidate
    undefined_is_released: bool = False  # plain libvirt: `virsh undefine` leaves the disk; take it as released
    filesystems: tuple[str, ...] = ("ext4", "xfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingSection:
    """The data path: how hard it may work."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    compression: str = "zstd:-1"  # zstd:LEVEL with LEVEL from -50 to 9, or none
    compress_threads: int = 2
    parallel_jobs: int = 2
    cpu_tokens: int = 0  # heavy C calls at once in the whole process; 0 = one per CPU
    detach_after_s: Seconds = 3.0  # a destination that blocks the shared read longer gets its own later

    def __post_init__(self) -> None:
        _ = self.zstd_level
        if not 1 <= self.compress_threads <= 64:
            raise ValueError("compress_threads must be 1 to 64")
        if not 1 <= self.parallel_jobs <= 64:
            raise ValueError("parallel_jobs must be 1 to 64")
        if self.cpu_tokens < 0:
            raise ValueError("cpu_tokens must be 0 or more")

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
            raise ValueError(f'compression {self.compression!r}: write "none" or "zstd:LEVEL" with LEVEL from -50 to 9')
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySection:
    """Pauses between tries of a job. They have no end: a transient error is never given up on."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    first_s: Seconds = 5.0
    longest_s: Seconds = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSection:
    """The local HTTP socket."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    socket: Path = Path("/run/autobackup/agent.sock")
    group: str = ""  # may read and order retries; empty = root only


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a backup goes and on what terms."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    name: str
    store: Literal["directory"]
    path: Path
    key: Literal["keyfile"]
    keyfile: Path
    older_keyfiles: tuple[Path, ...] = ()  # still open what they sealed; nothing new is sealed with them
    retention_s: Seconds | None = None  # None: kept until somebody deletes it
    verify: Literal["fast", "readback"] = "fast"
    must_be_mount: bool = False  # refuse the folder under a mount point that is not mounted
    reserve_bytes: ByteCount = 1 * GiB  # space that a store must keep free; less is "full"

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError(f"name {self.name!r} must be made of letters, digits, '-', '_' and '.'")


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
        if not self.destinations:
            raise ValueError(f"rule {self.name!r} names no destination")
        if len(set(self.destinations)) < len(self.destinations):
            raise ValueError(f"rule {self.name!r} names a destination twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    instances_path: Path = Path("/var/lib/nova/instances")
    verdict: Literal["libvirt"] = "libvirt"
    verdict_despite_nova: bool = False  # `libvirt` where nova.conf or Nova's domain metadata is found
    nova_conf: Path = Path("/etc/nova/nova.conf")
    libvirt: LibvirtSection = field(default_factory=LibvirtSection)
    capture: CaptureSection = field(default_factory=CaptureSection)
    sealing: SealingSection = field(default_factory=SealingSection)
    retry: RetrySection = field(default_factory=RetrySection)
    api: ApiSection = field(default_factory=ApiSection)
    destination: tuple[Destination, ...] = ()
    rule: tuple[Rule, ...] = ()
    reserve_bytes: ByteCount = 4 * MiB  # kept in the spool, given up when its filesystem is full

    def __post_init__(self) -> None:
        names = [d.name for d in self.destination]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two destinations are named {name!r}")
        for rule in self.rule:
            for wanted in rule.destinations:
                if wanted not in names:
                    near = difflib.get_close_matches(wanted, names, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"rule {rule.name!r} names the destination {wanted!r}, which is not defined{hint}")
        if not self.instances_path.is_absolute():
            raise ValueError(f"instances_path {str(self.instances_path)!r} must be absolute")

    @property
    def spool_path(self) -> Path:
        """Inside `instances_path`, always: a hard link cannot cross a mount."""
        return self.instances_path / ".autobackup"


def load(path: Path) -> Config:
    """Read *path* and its `conf.d`. Raises `ConfigError` with every mistake found, one a line."""
    merged: dict[str, Any] = {}
    origin: dict[tuple[str | int, ...], Path] = {}
    for file in [path, *sorted((path.parent / "conf.d").glob("*.toml"))]:
        _merge(merged, _parse(file), file=file, origin=origin, at=())
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as exc:
        lines = [_explain(error, origin, path) for error in exc.errors()]
        raise ConfigError("\n".join(lines)) from None


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: not found; name the file with --config") from None
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file}: not valid TOML: {exc}") from None


def _merge(
    into: dict[str, Any],
    new: Mapping[str, Any],
    *,
    file: Path,
    origin: dict[tuple[str | int, ...], Path],
    at: tuple[str | int, ...],
) -> None:
    for key, value in new.items():
        here = (*at, key)
        origin.setdefault(here, file)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, file=file, origin=origin, at=here)
        elif isinstance(value, list) and isinstance(into.get(key), list) and all(isinstance(v, dict) for v in value):
            origin.update({(*here, len(into[key]) + n): file for n in range(len(value))})
            into[key] = [*into[key], *value]
        else:
            origin[here] = file
            if isinstance(value, list):
                origin.update({(*here, n): file for n in range(len(value))})
            into[key] = dict(value) if isinstance(value, dict) else value
            if isinstance(value, dict):
                origin.update({(*here, sub): file for sub in value})


def _explain(error: ErrorDetails, origin: Mapping[tuple[str | int, ...], Path], main: Path) -> str:
    loc = tuple(error["loc"])
    file = next((origin[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origin), main)
    key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = sorted(_keys_at(loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "known here: " + ", ".join(known)
        return f"{file}: unknown key '{key}'; {hint}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{file}: '{key}' is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    return f"{file}: {f'{key}: ' if key else ''}{message}"


def _keys_at(loc: tuple[str | int, ...]) -> Iterator[str]:
    """The keys that the table at *loc* may have."""
    kind: Any = Config
    for part in loc:
        if isinstance(part, int):
            kind = get_args(kind)[0]
        else:
            kind = next((hint for name, hint in get_type_hints(kind).items() if _key(name) == part), None)
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
    if is_dataclass(kind):
        yield from (_key(f.name) for f in fields(kind))
