"""
Who is backed up, where to and on what terms: an instance and the operator's rules in, a plan out.

The first rule that matches decides, and the owner's request is added to what it says. No rule and no request, no
backup: an agent with an empty configuration captures nothing.
Where a fact is missing (the instance lived and died unseen), a rule that asks for it neither matches nor fails:
the plan says so, and an operator decides; silence would lose a wanted disk.

This module does not know whether an instance is dead (`rules.termination`) nor how it got its facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from autobackup.config import Destination, RequestSection, Rule
from autobackup.model import DestinationName, InstanceRecord, Request

_ANYTHING = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    What is wanted of one instance. Not *certain*: the rule could not be told to match.

    *requested* is the owner's wish, and *requested_name* the destination's that it makes.
    """

    rule: str
    destinations: tuple[DestinationName, ...]
    scrub_method: str
    certain: bool
    requested: Request | None = None
    requested_name: DestinationName | None = None


def plan(
    instance: InstanceRecord,
    rules: Sequence[Rule],
    requests: RequestSection = RequestSection(),  # noqa: B008
) -> Plan | None:
    """What the first rule that matches, or may match, *instance* says, and its owner; None: not wanted."""
    by_rule = _by_rule(instance, rules)
    if instance.request is None or not requests.destination:
        return by_rule
    name = requested_name(requests, instance.request)
    if by_rule is None:
        by_rule = Plan(rule="request", destinations=(), scrub_method=requests.scrub, certain=True)
    return replace(by_rule, requested=instance.request, requested_name=name)


def requested_name(requests: RequestSection, request: Request) -> DestinationName:
    """What the copy that a request asks for goes by: the destination of its terms, and the project."""
    return DestinationName(f"{requests.destination}.{request.project}")


def requested_destination(template: Destination, request: Request) -> Destination:
    """*template* for the project, the reader and the time that *request* names."""
    readers = tuple(dict.fromkeys((*template.readers, request.reader))) if request.reader else template.readers
    return replace(
        template,
        project=request.project,
        project_domain="",
        readers=readers if template.key == "barbican" else (),
        retention_s=template.retention_s if request.retention_s is None else request.retention_s,
    )


def _by_rule(instance: InstanceRecord, rules: Sequence[Rule]) -> Plan | None:
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
