"""
Who is backed up, where to and on what terms, as the operator writes it: destinations, rules, what owners may ask for.

What a rule means for an instance is `rules.policy`'s to say, what a request may have is `rules.wishes`'.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from autobackup.fields import (
    SECTION,
    AbsolutePath,
    ByteCount,
    Name,
    ProjectId,
    Rate,
    Retention,
    UserId,
    WrongAt,
    key_of,
)
from autobackup.model import DiskKind, Occasion, RequestSource
from autobackup.units import GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a backup goes and on what terms. Which keys go together is in `_NEEDS` and `_GOES_WITH`."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    name: Name
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
    parents: Literal["auto", "protect", "copy"] = "auto"  # how what a backup stands on is kept

    def __post_init__(self) -> None:
        if self.parents == "protect" and self.store != "glance":
            raise WrongAt('is "protect", which has a meaning only with store = "glance"; remove it', at=("parents",))
        for (key, word), needed in _NEEDS.items():
            if getattr(self, key) == word and not getattr(self, needed):
                raise WrongAt(f'is missing; {key} = "{word}" needs it', at=(needed,))
        for name, pairs in _GOES_WITH.items():
            is_set = getattr(self, name) != _default(Destination, name)
            if is_set and not any(getattr(self, key) == word for key, word in pairs):
                words = " or ".join(f'{key} = "{word}"' for key, word in pairs)
                raise WrongAt(f"has a meaning only with {words}; remove it", at=(key_of(name),))


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
    """What owners' requests may have. Without a destination every one is refused."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    destination: str = ""  # the terms of what is asked for; its project is the one that is asked for
    scrub: str = "zero"
    sources: tuple[RequestSource, ...] = tuple(RequestSource)  # who is listened to
    projects: tuple[ProjectId, ...] = ()  # the only ones that may be named; empty: any that has consented
    retention_longest_s: Retention | None = None  # a longer one, or none, becomes this
    disk_at_most_bytes: ByteCount | None = None  # what the root disk may occupy on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """
    Conditions of a rule; all must hold. Left out = anything.

    Texts are shell globs, case-sensitive; where a thing has an id and a name, either may fit.
    """

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    name: str = "*"  # Nova's name of the server, or libvirt's of the domain
    uuid: str = "*"
    project: str = "*"  # the owner's, by id or name
    user: str = "*"  # who made it, by id or name
    domain: str = "*"  # Keystone's domain of the owner's project, by id
    flavor: str = "*"
    extra_specs: Mapping[str, str] = field(default_factory=dict)
    image: str = "*"  # the id of the image it was made from
    image_properties: Mapping[str, str] = field(default_factory=dict)
    aggregate: str = "*"  # one of this host's `aggregates`
    disk_at_least_bytes: ByteCount | None = None  # what the root disk occupies on the host
    disk_at_most_bytes: ByteCount | None = None

    def __post_init__(self) -> None:
        least, most = self.disk_at_least_bytes, self.disk_at_most_bytes
        if least is not None and most is not None and least > most:
            raise WrongAt("must not be less than disk_at_least, or nothing ever fits", at=("disk_at_most",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which instances are backed up, or are not, and on what terms."""

    __pydantic_config__: ClassVar[ConfigDict] = SECTION
    name: str
    match: Match = field(default_factory=Match)
    on: tuple[Occasion, ...] = (Occasion.TERMINATE,)
    exclude: bool = False  # what matches is not backed up
    destinations: tuple[str, ...] = ()
    retention_s: Retention | None = None  # None: each destination's own
    disks: tuple[DiskKind, ...] = tuple(DiskKind)
    scrub: str = "zero"  # an entry point of the group `autobackup.scrub`
    requests: Literal["allow", "forbid"] = "allow"  # whether owners of what matches may ask for a backup
    may_decline: bool = False  # whether owners may say no to this rule

    def __post_init__(self) -> None:
        if not self.name:
            raise WrongAt("must not be empty", at=("name",))
        if not self.on:
            raise WrongAt(f"rule {self.name!r} names no occasion, so it never applies", at=("on",))
        if self.exclude:
            for name in ("destinations", "retention_s", "may_decline"):
                if getattr(self, name):
                    words = f"has no meaning in rule {self.name!r} with exclude = true; remove it"
                    raise WrongAt(words, at=(key_of(name),))
            return
        if not self.destinations:
            words = f"rule {self.name!r} names no destination; add one, or write exclude = true"
            raise WrongAt(words, at=("destinations",))
        for n, name in enumerate(self.destinations):
            if name in self.destinations[:n]:
                raise WrongAt(f"rule {self.name!r} names {name!r} twice; remove one", at=("destinations", n))
        if DiskKind.ROOT not in self.disks:
            raise WrongAt(f'rule {self.name!r} must have "root": the others mean little without it', at=("disks",))
