"""
Whether the conditions of a rule hold for an instance, one by one, with what was wanted and what was found.

Texts are shell globs, case-sensitive. A fact that nobody has told is not a fact that is not so: `None`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from autobackup.model import InstanceRecord
from autobackup.terms import Match
from autobackup.units import format_bytes

_ANYTHING: Final = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition: *found* in words; *holds* is None where nobody has told the fact."""

    key: str
    wanted: str
    found: str
    holds: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """
    What a condition may ask for that is not the instance's own.

    *disk_bytes*: what its root disk occupies here, or None. *hears_images*: Glance will be asked, if it was not yet.
    """

    aggregates: Sequence[str] = ()
    disk_bytes: int | None = None
    hears_images: bool = False


def conditions(instance: InstanceRecord, match: Match, around: Surroundings) -> tuple[Condition, ...]:
    """Every condition that *match* sets. What is left out is none."""
    return tuple(_conditions(instance, match, around))


def _conditions(instance: InstanceRecord, match: Match, around: Surroundings) -> Iterator[Condition]:
    server = instance.server
    seen = bool(instance.domain_xml)  # what a domain that was seen does not have is not missing
    texts = (
        ("uuid", match.uuid, (instance.instance,), True),
        ("name", match.name, (server.name or instance.display_name, instance.libvirt_name), seen),
        ("project", match.project, (instance.owner_project, server.project_name), seen),
        ("user", match.user, (server.user, server.user_name), seen),
        ("domain", match.domain, (server.domain or "",), server.domain is not None),
        ("flavor", match.flavor, (server.flavor,), seen or bool(server.flavor)),
        ("image", match.image, (server.image,), seen or bool(server.image)),
        ("aggregate", match.aggregate, around.aggregates, True),
    )
    for key, pattern, values, is_known in texts:
        if pattern != _ANYTHING:
            yield _text(key, pattern, values, is_known=is_known)
    # a domain carries all extra specs of its flavor, but of its image's properties only those that Nova knows
    is_whole = server.image_heard or not around.hears_images
    yield from _table("extra_specs", match.extra_specs, server.extra_specs, is_whole=True)
    yield from _table("image_properties", match.image_properties, server.image_properties, is_whole=is_whole)
    yield from _size("disk_at_least", match.disk_at_least_bytes, around.disk_bytes, is_floor=True)
    yield from _size("disk_at_most", match.disk_at_most_bytes, around.disk_bytes, is_floor=False)


def _text(key: str, pattern: str, values: Sequence[str], *, is_known: bool) -> Condition:
    found = [value for value in values if value]
    holds: bool | None = any(fnmatchcase(value, pattern) for value in found)
    if not holds and not is_known:
        holds = None  # it may have another name, which nobody has told
    return Condition(key=key, wanted=pattern, found=_words(found, is_known=is_known), holds=holds)


def _table(
    key: str, wanted: Mapping[str, str], found: Mapping[str, str] | None, *, is_whole: bool
) -> Iterator[Condition]:
    for name, pattern in wanted.items():
        value = None if found is None else found.get(name)
        is_known = value is not None or (found is not None and is_whole)
        holds = (value is not None and fnmatchcase(value, pattern)) if is_known else None
        words = _words([] if value is None else [value], is_known=is_known)
        yield Condition(key=f"{key}.{name}", wanted=pattern, found=words, holds=holds)


def _size(key: str, limit_bytes: int | None, found_bytes: int | None, *, is_floor: bool) -> Iterator[Condition]:
    if limit_bytes is None:
        return
    holds = None if found_bytes is None else found_bytes >= limit_bytes if is_floor else found_bytes <= limit_bytes
    found = "not known" if found_bytes is None else format_bytes(found_bytes)
    yield Condition(key=key, wanted=format_bytes(limit_bytes), found=found, holds=holds)


def _words(values: Sequence[str], *, is_known: bool) -> str:
    return " / ".join(values) if values else "none" if is_known else "not known"
