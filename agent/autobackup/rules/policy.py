"""
Who is backed up, where to and on what terms: an instance and the operator's rules in, a plan out.

The first rule that matches decides. No rule, no backup: an agent with an empty configuration captures nothing.
Where a fact is missing (the instance lived and died unseen), a rule that asks for it neither matches nor fails:
the plan says so, and an operator decides; silence would lose a wanted disk.

This module does not know whether an instance is dead (`rules.termination`) nor how it got its facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from autobackup.config import Rule
from autobackup.model import DestinationName, InstanceRecord

_ANYTHING = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a rule wants done with one instance. Not *certain*: the rule could not be told to match."""

    rule: str
    destinations: tuple[DestinationName, ...]
    scrub_method: str
    certain: bool


def plan(instance: InstanceRecord, rules: Sequence[Rule]) -> Plan | None:
    """The plan of the first rule that matches, or may match, *instance*; None: not wanted."""
    for rule in rules:
        matched = matches(instance, rule)
        if matched is not False:
            return Plan(
                rule=rule.name,
                destinations=tuple(DestinationName(name) for name in rule.destinations),
                scrub_method=rule.scrub,
                certain=matched is True,
            )
    return None


def matches(instance: InstanceRecord, rule: Rule) -> bool | None:
    """Whether every condition of *rule* holds; None: no condition fails, but one lacks its fact."""
    seen = bool(instance.domain_xml)
    answers = (
        _fits((instance.instance,), rule.match.uuid, seen=True),
        _fits((instance.display_name, instance.libvirt_name), rule.match.name, seen=seen),
        _fits((instance.owner_project,), rule.match.project, seen=seen),
    )
    if False in answers:
        return False
    return None if None in answers else True


def _fits(values: Sequence[str], pattern: str, *, seen: bool) -> bool | None:
    """Shell globs, case-sensitive. What a domain whose XML was *seen* does not have is no missing fact."""
    if pattern == _ANYTHING or any(fnmatchcase(value, pattern) for value in values if value):
        return True
    return False if seen or any(values) else None
