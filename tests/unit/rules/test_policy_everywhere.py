"""
What holds of every list of rules, in every mode, on every occasion, whatever is known and asked: by enumeration.

A rule is reduced to what a plan may depend on: whether it applies (yes, no, a fact is missing), whether it excludes,
forbids requests or may be declined, and when. Lists of two are enumerated whole, lists of three without what only
requests depend on.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import pytest
from tests.unit.rules.rulebooks import PROJECT, UUID, places

from autobackup.model import InstanceRecord, Occasion, Request, ServerRecord
from autobackup.rules.policy import Explanation, Plan, Rulebook, explain, may_be_wanted, plan
from autobackup.terms import Match, RequestSection, Rule

MODES: Final[tuple[Literal["first-match", "additive"], ...]] = ("first-match", "additive")
MAYBE: Final = (Match(flavor="gold"), Match(domain="gold"), Match(image="gold"))  # a fact of its own for each place
REQUESTS: Final = (None, Request(enabled=False), Request(project=PROJECT))
TAKEN: Final = RequestSection(destination="owners")
ASKED: Final = f"owners.{PROJECT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A rule, but for its place in the list."""

    applies: bool | None
    exclude: bool
    forbid: bool = False
    may_decline: bool = False
    on: tuple[Occasion, ...] = (Occasion.TERMINATE,)

    def at(self, place: int) -> Rule:
        match = MAYBE[place] if self.applies is None else Match() if self.applies else Match(uuid="0*")
        return Rule(
            name=f"r{place}",
            match=match,
            on=self.on,
            exclude=self.exclude,
            destinations=() if self.exclude else (f"d{place}",),
            requests="forbid" if self.forbid else "allow",
            may_decline=self.may_decline,
        )


FACTS: Final = (True, False, None)
BOTH: Final = (False, True)
KINDS: Final = [
    *(Kind(applies=a, exclude=True, forbid=f) for a in FACTS for f in BOTH),
    *(Kind(applies=a, exclude=False, forbid=f, may_decline=d) for a in FACTS for f in BOTH for d in BOTH),
]  # fmt: skip
FEWER: Final = [
    *(Kind(applies=a, exclude=e) for a in FACTS for e in BOTH),
    *(Kind(applies=a, exclude=False, may_decline=True) for a in FACTS),
]
WHEN: Final = [
    Kind(applies=True, exclude=e, forbid=f, may_decline=d, on=on)
    for on in ((Occasion.TERMINATE,), (Occasion.REBUILD,), (Occasion.SHELVE_OFFLOAD,), tuple(Occasion))
    for e, f, d in itertools.product(BOTH, repeat=3)
    if not (e and d)
]


def lists() -> Iterator[tuple[Kind, ...]]:
    for count, kinds in ((0, KINDS), (1, KINDS), (2, KINDS), (3, FEWER), (2, WHEN)):
        yield from itertools.product(kinds, repeat=count)


def rules_of(some: tuple[Kind, ...]) -> tuple[Rule, ...]:
    return tuple(kind.at(place) for place, kind in enumerate(some))


LISTS: Final = [rules_of(some) for some in dict.fromkeys(lists())]
SHORT: Final = [rules_of(some) for count in range(3) for some in itertools.product(FEWER, repeat=count)]


def instance(request: Request | None, *facts: bool) -> InstanceRecord:
    """One of which nothing is known, or the facts that `MAYBE` asks for, one by one."""
    flavor, domain, image = ("gold" if fact else "lead" for fact in facts) if facts else ("", None, "")
    return InstanceRecord(
        instance=UUID, request=request, server=ServerRecord(flavor=flavor or "", domain=domain, image=image or "")
    )


ALL_FACTS: Final = list(itertools.product((True, False), repeat=3))


def explained(rules: tuple[Rule, ...], mode: Literal["first-match", "additive"], record: InstanceRecord) -> Explanation:
    return explain(record, Rulebook(rules=rules, mode=mode, requests=TAKEN), occasion=Occasion.TERMINATE)


def planned(
    rules: tuple[Rule, ...],
    mode: Literal["first-match", "additive"],
    record: InstanceRecord,
    occasion: Occasion = Occasion.TERMINATE,
) -> Plan | None:
    return plan(record, Rulebook(rules=rules, mode=mode, requests=TAKEN), occasion=occasion)


def test_the_space_is_the_one_that_is_meant() -> None:
    assert len(LISTS) > 1200
    assert {rule.exclude for rules in LISTS for rule in rules} == {True, False}


# ---- with every fact known: the specification, a second time ---------------------------------------------------------


def expected(rules: tuple[Rule, ...], mode: str, record: InstanceRecord, occasion: Occasion) -> set[str] | None:
    """What the text of the issue says, for one of which all is known. None: not backed up."""
    facts = {"flavor": record.server.flavor, "domain": record.server.domain, "image": record.server.image}
    applying = [
        rule for rule in rules
        if rule.match.uuid == "*" and occasion in rule.on
        and all(getattr(rule.match, key) in ("*", value) for key, value in facts.items())
    ]  # fmt: skip
    if mode == "first-match":
        applying = applying[:1]
    request, copies = record.request, set()
    if not any(rule.exclude for rule in applying):
        declines = request is not None and not request.enabled
        wanting = [rule for rule in applying if not (declines and rule.may_decline)]
        copies = {name for rule in wanting for name in rule.destinations}
    is_forbidden = any(rule.requests == "forbid" for rule in applying)
    if request is not None and request.enabled and not is_forbidden and occasion is Occasion.TERMINATE:
        copies.add(ASKED)
    return copies or None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("occasion", list(Occasion))
@pytest.mark.parametrize("request_", REQUESTS, ids=["unasked", "declined", "asked"])
def test_what_is_known_decides(mode: Literal["first-match", "additive"], occasion: Occasion, request_: Request) -> None:
    for rules in LISTS:
        for facts in ALL_FACTS if len(rules) < 3 else [(True, False, True), (False, True, True), (False, False, False)]:
            record = instance(request_, *facts)
            wanted = planned(rules, mode, record, occasion)
            assert (None if wanted is None else set(places(wanted))) == expected(rules, mode, record, occasion), rules
            assert wanted is None or wanted.certain, rules


# ---- what is not known never loses a disk, and is never guessed at ---------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("request_", REQUESTS, ids=["unasked", "declined", "asked"])
def test_what_any_answer_would_want_is_wanted_while_there_is_none(
    mode: Literal["first-match", "additive"], request_: Request | None
) -> None:
    for rules in LISTS:
        if planned(rules, mode, instance(request_)) is None:
            for facts in ALL_FACTS:
                assert planned(rules, mode, instance(request_, *facts)) is None, (rules, facts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("request_", REQUESTS, ids=["unasked", "declined", "asked"])
def test_a_plan_that_is_certain_is_the_plan_whatever_the_answer(
    mode: Literal["first-match", "additive"], request_: Request | None
) -> None:
    """One that is not says what is missing: a job by it is parked, for an operator to see."""
    for rules in LISTS:
        wanted = planned(rules, mode, instance(request_))
        if wanted is None:
            continue
        assert wanted.certain is (not wanted.missing), rules
        if wanted.certain:
            for facts in ALL_FACTS:
                assert set(places(planned(rules, mode, instance(request_, *facts)))) == set(places(wanted)), rules


# ---- any occasion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("request_", REQUESTS, ids=["unasked", "declined", "asked"])
def test_what_is_wanted_on_some_occasion_is_wanted_before_it_is_known_which(
    mode: Literal["first-match", "additive"], request_: Request | None
) -> None:
    """The machine is asked whether a candidate is wanted before anybody knows what became of it."""
    for rules in LISTS:
        for record in (instance(request_), instance(request_, True, True, True)):
            wanted = [planned(rules, mode, record, occasion) for occasion in Occasion]
            book = Rulebook(rules=rules, mode=mode, requests=TAKEN)
            may_be = may_be_wanted(record, book, disk_bytes=None)
            assert may_be is any(one is not None for one in wanted), rules


# ---- what may take something away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("facts", [(), (True, True, True), (False, True, False)], ids=["unknown", "gold", "mixed"])
def test_a_request_takes_no_copy_and_no_disk_away(
    mode: Literal["first-match", "additive"], facts: tuple[bool, ...]
) -> None:
    for rules in LISTS:
        without = planned(rules, mode, instance(None, *facts))
        for project in (PROJECT, "0" * 32):
            for refused in ("", "project 5f has not consented"):
                request = Request(project=project, refused=refused)
                wanted = planned(rules, mode, instance(request, *facts))
                assert set(places(without)) <= set(places(wanted)), rules
                if without is not None:
                    assert wanted is not None
                    assert without.disks <= wanted.disks
                    assert wanted.scrub_method == without.scrub_method
                    assert wanted.rule == without.rule
                    if not wanted.certain:
                        assert not without.certain


@pytest.mark.parametrize("occasion", [Occasion.TERMINATE, Occasion.REBUILD])
@pytest.mark.parametrize("facts", [(), (False, True, False)], ids=["unknown", "known"])
def test_one_more_rule_that_wants_takes_no_copy_away_where_rules_add_up(
    facts: tuple[bool, ...], occasion: Occasion
) -> None:
    """Unless it forbids what owners ask for, and then that alone."""
    for rules in SHORT:
        for request in REQUESTS:
            record = instance(request, *facts)
            before = planned(rules, "additive", record, occasion)
            for kind in (*KINDS, *WHEN):
                more = kind.at(2)
                if more.exclude:
                    continue
                for where in range(len(rules) + 1):
                    now = planned((*rules[:where], more, *rules[where:]), "additive", record, occasion)
                    lost = set(places(before)) - set(places(now))
                    assert lost <= ({ASKED} if more.requests == "forbid" else set()), (rules, more)
                    if before is not None and before.rule != "request":
                        assert now is not None
                        assert before.disks <= now.disks


def test_one_more_rule_at_the_end_changes_nothing_where_an_earlier_one_has_decided() -> None:
    for rules in SHORT:
        for request in REQUESTS:
            record = instance(request, True, True, True)
            if any(answer.applies for answer in explained(rules, "first-match", record).answers):
                before = planned(rules, "first-match", record)
                for kind in KINDS:
                    assert planned((*rules, kind.at(2)), "first-match", record) == before


# ---- the reasons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("facts", [(), (True, True, True), (False, False, True)], ids=["unknown", "gold", "mixed"])
def test_a_wish_that_is_not_heeded_has_a_reason_and_no_other_has(
    mode: Literal["first-match", "additive"], facts: tuple[bool, ...]
) -> None:
    for rules in LISTS:
        for refused in ("", "project 5f has not consented"):
            record = instance(Request(project=PROJECT, refused=refused), *facts)
            told = explained(rules, mode, record)
            assert (ASKED in places(told.plan)) is (not told.request_note), rules
        declined, unasked = instance(REQUESTS[1], *facts), instance(None, *facts)
        told = explained(rules, mode, declined)
        if not told.request_note:
            assert told.plan is None or not told.plan.certain, rules
        assert not explained(rules, mode, unasked).request_note


@pytest.mark.parametrize("mode", MODES)
def test_an_explanation_tells_of_every_rule_in_its_order(mode: Literal["first-match", "additive"]) -> None:
    for rules in LISTS:
        for record in (instance(None), instance(None, True, False, True)):
            told = explained(rules, mode, record)
            assert tuple(answer.rule for answer in told.answers) == rules
            if mode == "additive":
                assert all(answer.is_asked for answer in told.answers)
            decided = next((n for n, one in enumerate(told.answers) if one.applies), len(rules))
            if mode == "first-match":
                assert not any(answer.is_asked for answer in told.answers[decided + 1 :]), rules
            if told.plan is not None and told.plan.copies:
                asked = [one.rule.name for one in told.answers if one.is_asked and one.applies is not False]
                assert set(told.plan.rule.split(", ")) <= set(asked)


def test_a_request_refused_is_worth_what_none_is() -> None:
    for rules in LISTS:
        for mode in MODES:
            for facts in ((), (True, True, True)):
                refused = instance(replace(Request(project=PROJECT), refused="no"), *facts)
                assert planned(rules, mode, refused) == planned(rules, mode, instance(None, *facts)), rules
