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
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from autobackup.errors import ConfigError
from autobackup.units import GiB, MiB, parse_bytes, parse_duration_s

DEFAULT_PATH: Final = Path("/etc/autobackup/autobackup.toml")

_DESTINATION_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what the header of a bundle can hold
_REMEDIES: Final = {
    "dataclass_type": "must be a table: write [{key}] above its keys",
    "tuple_type": "must be a list",
}
_SOCKET_PATH_BYTES: Final = 107  # sun_path of unix(7), less its NUL


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


Seconds = Annotated[float, _with_unit(parse_duration_s)]
ByteCount = Annotated[int, _with_unit(parse_bytes)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Pause = Annotated[Seconds, _between("100ms", "1d")]  # 0 would be a busy loop
Deadline = Annotated[Seconds, _between("1s", "10m")]  # libvirt's keepalive counts whole seconds
Interval = Annotated[Seconds, _between("1s", "1d")]
LongInterval = Annotated[Seconds, _between("1s", "30d")]
Retention = Annotated[Seconds, _between("1s", "36525d")]
SpoolReserve = Annotated[ByteCount, _between("1MiB", "1GiB", parse=parse_bytes)]


class _WrongAt(ValueError):
    """What only a look at several keys can tell; *at* is the key to mend, below the table that is looked at."""

    def __init__(self, words: str, *, at: tuple[str | int, ...]) -> None:
        super().__init__(words)
        self.at = at


def _key(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s")


_SECTION: Final = ConfigDict(extra="forbid", alias_generator=_key)


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
class Destination:
    """Where a backup goes and on what terms."""

    __pydantic_config__: ClassVar[ConfigDict] = _SECTION
    name: Annotated[str, AfterValidator(_destination_name)]
    store: Literal["directory"]
    path: AbsolutePath
    key: Literal["keyfile"]
    keyfile: AbsolutePath
    older_keyfiles: tuple[AbsolutePath, ...] = ()  # still open what they sealed; nothing new is sealed with them
    retention_s: Retention | None = None  # None: kept until somebody deletes it
    verify: Literal["fast", "readback"] = "fast"
    must_be_mount: bool = False  # refuse the folder under a mount point that is not mounted
    reserve_bytes: ByteCount = 1 * GiB  # space that a store must keep free; less is "full"


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
    api: ApiSection = field(default_factory=ApiSection)
    destination: tuple[Destination, ...] = ()
    rule: tuple[Rule, ...] = ()
    reserve_bytes: SpoolReserve = 4 * MiB  # kept in the spool, given up when its filesystem is full

    def __post_init__(self) -> None:
        names = [d.name for d in self.destination]
        for kind, given in (("destination", names), ("rule", [r.name for r in self.rule])):
            for n, name in enumerate(given):
                if name in given[:n]:
                    raise _WrongAt(f"two are named {name!r}; rename one", at=(kind, n, "name"))
        for n, rule in enumerate(self.rule):
            for m, wanted in enumerate(rule.destinations):
                if wanted not in names:
                    raise _WrongAt(
                        f"rule {rule.name!r} names the destination {wanted!r}, which is not defined; "
                        + _nearest(wanted, names, none="there is no [[destination]]"),
                        at=("rule", n, "destinations", m),
                    )

    @property
    def spool_path(self) -> Path:
        """Inside `instances_path`, always: a hard link cannot cross a mount."""
        return self.instances_path / ".autobackup"


def load(path: Path) -> Config:
    """Read *path* and its `conf.d`. Raises `ConfigError` with every mistake found, one a line."""
    merged: dict[str, Any] = {}
    origin: dict[tuple[str | int, ...], Path] = {}
    for file in [path, *_drop_ins(path.parent / "conf.d")]:
        _merge(merged, _parse(file), file=file, origin=origin, at=())
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as exc:
        lines = [_explain(error, origin, path) for error in exc.errors()]
        raise ConfigError("\n".join(lines)) from None


def _drop_ins(folder: Path) -> list[Path]:
    """Listed, not globbed: a glob calls a folder that cannot be read empty."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix == ".toml" and not file.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise ConfigError(f"{folder}: {exc.strerror}") from None


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        remedy = "the link leads nowhere; remove it" if file.is_symlink() else "name the file with --config"
        raise ConfigError(f"{file}: not found; {remedy}") from None
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
        if key in into and _kind(value) != _kind(into[key]):
            words = f"is {_kind(value)}, but {_kind(into[key])} in {origin[here]}; write it the same way in both"
            raise ConfigError(f"{file}: '{'.'.join(str(part) for part in here)}' {words}")
        origin.setdefault(here, file)
        if isinstance(value, dict) and key in into:
            _merge(into[key], value, file=file, origin=origin, at=here)
        elif isinstance(value, list) and key in into and all(isinstance(v, dict) for v in [*into[key], *value]):
            origin.update({(*here, len(into[key]) + n): file for n in range(len(value))})
            into[key] = [*into[key], *value]
        else:
            origin[here] = file
            if isinstance(value, list):
                origin.update({(*here, n): file for n in range(len(value))})
            into[key] = dict(value) if isinstance(value, dict) else value
            if isinstance(value, dict):
                origin.update({(*here, sub): file for sub in value})


def _kind(value: object) -> str:
    return "a [table]" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a value"


def _explain(error: ErrorDetails, origin: Mapping[tuple[str | int, ...], Path], main: Path) -> str:
    loc = (*error["loc"], *getattr(error.get("ctx", {}).get("error"), "at", ()))
    file = next((origin[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origin), main)
    key = _words(loc, file, origin)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{file}: unknown key '{key}'; {_nearest(str(loc[-1]), sorted(_keys_at(loc[:-1])))}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{file}: '{key}' is missing; add it"
    remedy = _REMEDIES.get(error["type"])
    message = remedy.format(key=key) if remedy else error["msg"].removeprefix("Value error, ")
    return f"{file}: {key}: {message}"


def _words(loc: tuple[str | int, ...], file: Path, origin: Mapping[tuple[str | int, ...], Path]) -> str:
    """The key as its file has it: entries of `[[rule]]` are counted from 1 in each file."""
    words = ""
    for at, part in enumerate(loc):
        if isinstance(part, int):
            nth = sum(origin.get((*loc[:at], n)) == file for n in range(part + 1)) or part + 1
            words += f"[{nth}]"
        else:
            words += f".{part}"
    return words.removeprefix(".")


def _nearest(word: str, known: Sequence[str], *, none: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}" if known else none


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
