"""
The operator's configuration, in frozen dataclasses: every key, its default, and what it may be.

Values carry their unit ("30d", "200GiB"), so the keys do not; the fields here do (`retention_s`).

This module checks what can be known from the text; `configfile` reads the files. What the machine has to say (a
folder that is not there, two mounts) is said at start by the room that uses it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from autobackup.fields import (
    SECTION,
    AbsolutePath,
    Deadline,
    Interval,
    LongInterval,
    Pause,
    Rate,
    SocketPath,
    SpoolReserve,
    WrongAt,
    nearest,
)
from autobackup.terms import Destination, RequestSection, Rule
from autobackup.units import MiB

DEFAULT_PATH: Final = Path("/etc/autobackup/autobackup.toml")
_LONGEST_TEMPLATE: Final = 31  # a project's id has 32 letters, a destination's name 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtSection:
    """Where libvirt listens and how long an answer may take."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    uri: str = "qemu:///system"
    call_timeout_s: Deadline = 30.0  # a destroy of any domain blocks every other call: 0.2 to 10 s measured
    keepalive_interval_s: Deadline = 5.0  # a hung daemon is noticed after 4 intervals
    reconnect_longest_s: Deadline = 10.0
    swtpm_path: AbsolutePath = Path("/var/lib/libvirt/swtpm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSection:
    """How claims are made and when a candidate counts as terminated."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    quiet_period_s: Interval = 60.0  # a rebuild looks like a delete until its new folder appears
    leaked_after_s: LongInterval = 3600.0  # a `_del` folder that outlives this was left behind by Nova
    scan_interval_s: Interval = 60.0
    undecided_longest_s: Interval = 300.0  # longest pause between two looks at an undecided candidate
    undefined_is_released: bool = False  # plain libvirt: `virsh undefine` leaves the disk; take it as released
    filesystems: tuple[str, ...] = ("ext4", "xfs")

    def __post_init__(self) -> None:
        if not self.filesystems:
            raise WrongAt("name at least one, or no spool can be opened", at=("filesystems",))
        if self.leaked_after_s < self.quiet_period_s:
            raise WrongAt("must not be shorter than quiet_period", at=("leaked_after",))


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingSection:
    """The data path: how hard it may work."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
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
                raise WrongAt("must be 1 to 64", at=(name,))
        if self.cpu_tokens < 0:
            raise WrongAt("must be 0 or more", at=("cpu_tokens",))

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
            raise WrongAt(words, at=("compression",))
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySection:
    """Pauses between tries of a job. They have no end: a transient error is never given up on."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    first_s: Pause = 5.0
    longest_s: Pause = 900.0

    def __post_init__(self) -> None:
        if self.longest_s < self.first_s:
            raise WrongAt("must not be shorter than first", at=("longest",))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSection:
    """The local HTTP socket."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    socket: SocketPath = Path("/run/autobackup/agent.sock")
    group: str = ""  # may read and order retries; empty = root only


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenstackSection:
    """How OpenStack's services are talked to. Who we are there, and all passwords, are in clouds.yaml."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    clouds_yaml: AbsolutePath | None = None  # None: where openstacksdk looks, /etc/openstack/clouds.yaml among them
    call_timeout_s: Deadline = 30.0
    stall_timeout_s: Interval = 120.0  # an upload of which no byte is taken for so long is given up
    reply_timeout_s: Interval = 600.0  # Glance's answer after the last byte: it may still be writing to its backend


@dataclass(frozen=True, slots=True, kw_only=True)
class NovaSection:
    """Whose record says what became of a server, with `verdict = "nova"`."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    cloud: str = ""  # an entry of clouds.yaml
    project: str = ""  # where we have the role that may list servers; empty: the one that the entry names
    project_domain: str = ""
    host: str = ""  # Nova's name of this host; empty: `host` of nova_conf, or this machine's name
    refresh_interval_s: Interval = 300.0  # how often this host's servers are listed: owners' properties change


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    instances_path: AbsolutePath = Path("/var/lib/nova/instances")
    verdict: Literal["libvirt", "nova"] = "libvirt"  # whose word is taken for a termination
    verdict_despite_nova: bool = False  # `libvirt` where nova.conf or Nova's domain metadata is found
    nova_conf: AbsolutePath = Path("/etc/nova/nova.conf")
    nova: NovaSection = field(default_factory=NovaSection)
    libvirt: LibvirtSection = field(default_factory=LibvirtSection)
    capture: CaptureSection = field(default_factory=CaptureSection)
    sealing: SealingSection = field(default_factory=SealingSection)
    retry: RetrySection = field(default_factory=RetrySection)
    openstack: OpenstackSection = field(default_factory=OpenstackSection)
    api: ApiSection = field(default_factory=ApiSection)
    request: RequestSection = field(default_factory=RequestSection)
    destination: tuple[Destination, ...] = ()
    rule_mode: Literal["first-match", "additive"] = "first-match"
    aggregates: tuple[str, ...] = ()  # the host aggregates that this host is in, for rules to match
    rule: tuple[Rule, ...] = ()
    reserve_bytes: SpoolReserve = 4 * MiB  # kept in the spool, given up when its filesystem is full

    def __post_init__(self) -> None:
        names = [d.name for d in self.destination]
        for kind, given in (("destination", names), ("rule", [r.name for r in self.rule])):
            for n, name in enumerate(given):
                if name in given[:n]:
                    raise WrongAt(f"two are named {name!r}; rename one", at=(kind, n, "name"))
        self._check_request()
        if self.verdict == "nova" and not self.nova.cloud:
            raise WrongAt('is missing; verdict = "nova" needs it: an entry of clouds.yaml', at=("nova", "cloud"))
        for n, rule in enumerate(self.rule):
            for m, wanted in enumerate(rule.destinations):
                if wanted not in names:
                    raise WrongAt(
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
            raise WrongAt(f"{wanted!r} is not defined; {words}", at=("request", "destination"))
        if template.store != "glance":
            words = 'must be a destination with store = "glance": a request names a project'
            raise WrongAt(words, at=("request", "destination"))
        if len(wanted) > _LONGEST_TEMPLATE:
            words = f"must have a name of at most {_LONGEST_TEMPLATE} letters: the project's id is added to it"
            raise WrongAt(words, at=("request", "destination"))

    @property
    def only_asked_for(self) -> str:
        """The destination that only requests name: which project it is for is not known before one comes."""
        named = {name for rule in self.rule for name in rule.destinations}
        return "" if self.request.destination in named else self.request.destination

    @property
    def spool_path(self) -> Path:
        """Inside `instances_path`, always: a hard link cannot cross a mount."""
        return self.instances_path / ".autobackup"
