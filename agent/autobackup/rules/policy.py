"""
Who is backed up, where to and on what terms: an instance, the operator's rules and its owner's wish in, a plan out.

`first-match`: the first rule that applies decides alone. `additive`: every rule that applies adds its destinations, its
disks and the longest of the retentions; one that excludes ends it. A rule applies when all its conditions hold and
its `on` names what happened. What the owner asked for is added to what the rules say, unless one that applies forbids
it. No rule and no request, no backup: an agent with an empty configuration captures nothing.

Where a fact is missing (the instance lived and died unseen), a rule that asks for it neither applies nor does not: the
plan says so, and an operator decides; silence would lose a wanted disk.

This module does not know whether an instance is dead (`rules.termination`) nor how it got its facts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from autobackup.model import DestinationName, DiskKind, InstanceRecord, Occasion, Request, RequestSource
from autobackup.rules.matching import Condition, Surroundings, conditions
from autobackup.terms import Destination, RequestSection, Rule

_UNSEEN: Final = "its owner may have asked for a backup: its properties were not seen while it lived"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rulebook:
    """All that the operator has said of who is backed up."""

    rules: Sequence[Rule] = ()
    mode: Literal["first-match", "additive"] = "first-match"
    requests: RequestSection = field(default_factory=RequestSection)
    aggregates: Sequence[str] = ()
    hears_owners: bool = False  # Nova is asked, and so owners' properties can be known

    def surroundings(self, disk_bytes: int | None) -> Surroundings:
        return Surroundings(aggregates=self.aggregates, disk_bytes=disk_bytes, hears_images=self.hears_owners)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCopy:
    """One copy, and its terms where they are not the destination's own: a rule's retention, an owner's request."""

    destination: DestinationName
    retention_s: float | None = None
    request: Request | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    What is wanted of one instance. Not *certain*: a fact is missing, and *missing* says which.

    Not *settled*: the project that its owner names has not been asked yet.
    """

    rule: str
    copies: tuple[PlannedCopy, ...]
    scrub_method: str
    disks: frozenset[DiskKind] = frozenset(DiskKind)
    certain: bool = True
    missing: str = ""

    @property
    def settled(self) -> bool:
        return all(copy.request is None or copy.request.asked for copy in self.copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleAnswer:
    """
    How one rule answers for one instance on one occasion.

    *holds*: whether all its conditions do; None where a fact is missing and none fails.
    """

    rule: Rule
    conditions: tuple[Condition, ...]
    holds: bool | None
    names_occasion: bool
    is_asked: bool  # False: an earlier one has decided

    @property
    def applies(self) -> bool | None:
        return self.holds if self.names_occasion else False


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The plan, and how it came about. *request_note*: why the owner's wish is not in it."""

    answers: tuple[RuleAnswer, ...]
    request: Request | None
    request_note: str
    plan: Plan | None


def may_be_wanted(instance: InstanceRecord, book: Rulebook, *, disk_bytes: int | None) -> bool:
    """Whether there is a plan for *instance* on any occasion: if not, it need not wait for a verdict."""
    return any(plan(instance, book, occasion=one, disk_bytes=disk_bytes) is not None for one in Occasion)


def plan(instance: InstanceRecord, book: Rulebook, *, occasion: Occasion, disk_bytes: int | None = None) -> Plan | None:
    """
    What is wanted of *instance* on *occasion*; None: nothing.

    *disk_bytes*: what its root disk occupies on the host; None: not known.
    """
    return explain(instance, book, occasion=occasion, disk_bytes=disk_bytes).plan


def explain(
    instance: InstanceRecord, book: Rulebook, *, occasion: Occasion, disk_bytes: int | None = None
) -> Explanation:
    """As `plan`, with the reasons."""
    answers: list[RuleAnswer] = []
    deciding: list[RuleAnswer] = []
    for rule in book.rules:
        held = conditions(instance, rule.match, book.surroundings(disk_bytes))
        answer = RuleAnswer(
            rule=rule,
            conditions=held,
            holds=_all(one.holds for one in held),
            names_occasion=occasion in rule.on,
            is_asked=book.mode == "additive" or all(_may_leave_it_open(one, instance) for one in deciding),
        )
        answers.append(answer)
        if answer.is_asked and answer.applies is not False:
            deciding.append(answer)
    by_rules = _by_rules(instance, deciding, book)
    request = instance.request
    forbidding = _forbidding(deciding, book)
    note = _why_not(request, deciding, forbidding, book.requests, occasion=occasion, disk_bytes=disk_bytes)
    whole = by_rules
    if request is not None and request.enabled and not note:
        may_be_forbidden = any(one.rule.requests == "forbid" for one in deciding)
        unsure = _unsure(deciding) if may_be_forbidden else ""
        whole = _with_request(by_rules, request, book.requests, unsure=unsure)
    elif by_rules is None and _may_be_asked_for(instance, book, occasion) and not forbidding:
        whole = Plan(rule="request", copies=(), scrub_method=book.requests.scrub, certain=False, missing=_UNSEEN)
    return Explanation(answers=tuple(answers), request=request, request_note=note, plan=whole)


def requested_name(requests: RequestSection, request: Request) -> DestinationName:
    """What the copy that a request asks for goes by: the destination of its terms, and the project."""
    return DestinationName(f"{requests.destination}.{request.project}")


def terms_of(destination: Destination, copy_retention_s: float | None) -> Destination:
    """*destination* with the retention of a rule."""
    return destination if copy_retention_s is None else replace(destination, retention_s=copy_retention_s)


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


# ---- the rules ------------------------------------------------------------------------------------------------


def _by_rules(instance: InstanceRecord, deciding: Sequence[RuleAnswer], book: Rulebook) -> Plan | None:
    """What the rules that apply, or may, amount to."""
    if any(one.rule.exclude and one.applies for one in deciding):
        return None
    declines = instance.request is not None and not instance.request.enabled
    heeded = [one for one in deciding if not (declines and one.rule.may_decline)]
    rules = [one.rule for one in heeded if not one.rule.exclude]
    if not rules:
        return None
    missing = _unsure(heeded if book.mode == "additive" else deciding)
    return Plan(
        rule=", ".join(rule.name for rule in rules),
        copies=tuple(_copies(rules)),
        scrub_method=rules[0].scrub,
        disks=frozenset(kind for rule in rules for kind in rule.disks),
        certain=not missing,
        missing=missing,
    )


def _may_leave_it_open(answer: RuleAnswer, instance: InstanceRecord) -> bool:
    """First match: whether a later rule may have to be asked, since this one wants nothing if it applies."""
    declines = instance.request is not None and not instance.request.enabled
    return answer.applies is None and (answer.rule.exclude or (declines and answer.rule.may_decline))


def _unsure(answers: Iterable[RuleAnswer]) -> str:
    """Which facts are missing."""
    unsure = [one for one in answers if one.applies is None]
    return "; ".join(f"rule {one.rule.name!r} asks for {_lacking(one)}" for one in unsure)


def _copies(rules: Iterable[Rule]) -> Iterable[PlannedCopy]:
    """One for each destination. Where two rules name it: the longer retention, or its own if one of them says so."""
    kept: dict[str, float | None] = {}
    for rule in rules:
        for name in rule.destinations:
            known = kept.get(name, rule.retention_s)
            kept[name] = None if known is None or rule.retention_s is None else max(known, rule.retention_s)
    for name, retention_s in kept.items():
        yield PlannedCopy(destination=DestinationName(name), retention_s=retention_s)


def _lacking(answer: RuleAnswer) -> str:
    return ", ".join(one.key for one in answer.conditions if one.holds is None) + ", which nobody has told"


def _all(answers: Iterable[bool | None]) -> bool | None:
    """False as soon as one fails; None where none fails but one is not known."""
    given = list(answers)
    return False if False in given else None if None in given else True


# ---- the owner's wish ---------------------------------------------------------------------------------------------


def _why_not(
    request: Request | None,
    deciding: Sequence[RuleAnswer],
    forbidding: str,
    caps: RequestSection,
    *,
    occasion: Occasion,
    disk_bytes: int | None,
) -> str:
    """Why the owner's wish is not added, or ""."""
    if request is None:
        return ""
    if not request.enabled:
        firm = [one.rule.name for one in deciding if not one.rule.exclude and not one.rule.may_decline]
        return f"declined, which rule {firm[0]!r} does not let its owner" if firm else ""
    if request.refused:
        return request.refused
    if not caps.destination:
        return "this host takes no requests: its operator has set no request.destination"
    if forbidding:
        return f"rule {forbidding!r} forbids requests"
    if caps.disk_at_most_bytes is not None and disk_bytes is not None and disk_bytes > caps.disk_at_most_bytes:
        return "its root disk is larger than request.disk_at_most"
    if occasion is not Occasion.TERMINATE:
        return f"a request is for a termination, not for a {occasion}"
    return ""


def _forbidding(deciding: Sequence[RuleAnswer], book: Rulebook) -> str:
    """The rule that forbids requests for certain, or "": of first matches, one before which none is unsure."""
    certain = deciding if book.mode == "additive" else deciding[:1]
    return next((one.rule.name for one in certain if one.applies and one.rule.requests == "forbid"), "")


def _with_request(by_rules: Plan | None, request: Request, caps: RequestSection, *, unsure: str) -> Plan:
    copy = PlannedCopy(destination=requested_name(caps, request), request=request)
    if by_rules is None:
        return Plan(rule="request", copies=(copy,), scrub_method=caps.scrub, certain=not unsure, missing=unsure)
    return replace(by_rules, copies=(*by_rules.copies, copy))


def _may_be_asked_for(instance: InstanceRecord, book: Rulebook, occasion: Occasion) -> bool:
    """Whether its owner may have asked for a backup while nobody looked."""
    server = instance.server
    unheard = {
        RequestSource.SERVER: server.properties is None,
        RequestSource.IMAGE: not server.image_heard,
        RequestSource.FLAVOR: server.extra_specs is None,
    }
    return (
        book.hears_owners
        and bool(book.requests.destination)
        and any(unheard.get(source, False) for source in book.requests.sources)
        and instance.request is None
        and occasion is Occasion.TERMINATE
    )
