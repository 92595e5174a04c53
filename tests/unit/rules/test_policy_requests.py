"""An owner's request is added to what the rules say; alone it is enough, and it never takes anything away."""

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from tests.unit.rules.rulebooks import PROJECT, UNSEEN, WEB, places

from autobackup.model import DiskKind, InstanceId, InstanceRecord, Occasion, Request, RequestSource, ServerRecord
from autobackup.rules.policy import Plan, Rulebook, explain, may_be_wanted, plan, requested_destination, terms_of
from autobackup.terms import Destination, Match, RequestSection, Rule

READER = "0" * 31 + "1"
WISH = Request(project=PROJECT, reader=READER, retention_s=604800.0)
DECLINED = Request(enabled=False, source=RequestSource.SERVER)
TAKEN = RequestSection(destination="owners", scrub="unlink")
INSTANCE = InstanceRecord(
    instance=InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"), domain_xml="<domain/>", request=WISH
)
RULE = Rule(name="all", destinations=("vault",), scrub="random", disks=(DiskKind.ROOT,))
OTHER = Rule(name="other", match=Match(name="nobody"), destinations=("vault",))
TEMPLATE = Destination(
    name="owners", store="glance", cloud="c", project="vault", project_domain="d", key="barbican", readers=("f" * 32,),
    retention_s=86400.0,
)  # fmt: skip


def asked(
    instance: InstanceRecord,
    *rules: Rule,
    caps: RequestSection = TAKEN,
    mode: Literal["first-match", "additive"] = "first-match",
    occasion: Occasion = Occasion.TERMINATE,
    disk_bytes: int | None = None,
) -> Plan | None:
    return plan(
        instance, Rulebook(rules=rules, requests=caps, mode=mode), occasion=occasion, disk_bytes=disk_bytes
    )  # fmt: skip


def why_not(instance: InstanceRecord, *rules: Rule, caps: RequestSection = TAKEN, disk_bytes: int | None = None) -> str:
    book = Rulebook(rules=rules, requests=caps)
    return explain(instance, book, occasion=Occasion.TERMINATE, disk_bytes=disk_bytes).request_note


# ---- what it adds ---------------------------------------------------------------------------------------------------


def test_alone_it_is_enough() -> None:
    wanted = asked(INSTANCE, OTHER)
    assert wanted is not None
    (copy,) = wanted.copies
    assert (copy.destination, copy.request, copy.retention_s) == (f"owners.{PROJECT}", WISH, None)
    assert (wanted.scrub_method, wanted.certain, wanted.disks) == ("unlink", True, frozenset(DiskKind))


def test_it_is_added_to_what_a_rule_says() -> None:
    wanted, by_rule = asked(INSTANCE, RULE), asked(replace(INSTANCE, request=None), RULE)
    assert wanted is not None
    assert by_rule is not None
    assert wanted.copies[:-1] == by_rule.copies
    assert wanted.copies[-1].request == WISH
    assert replace(wanted, copies=by_rule.copies) == by_rule


def test_it_is_added_where_a_rule_excludes() -> None:
    """An exclusion is what the operator does not want; that owners may not ask is said by another word."""
    excluding = Rule(name="scratch", exclude=True)
    for mode in ("first-match", "additive"):
        assert places(asked(INSTANCE, excluding, RULE, mode=mode)) == (f"owners.{PROJECT}",)


@pytest.mark.parametrize("rules", [[], [OTHER]])
def test_without_a_destination_for_requests_it_counts_for_nothing(rules: list[Rule]) -> None:
    assert asked(INSTANCE, *rules, caps=RequestSection()) is None
    assert "request.destination" in why_not(INSTANCE, *rules, caps=RequestSection())


def test_it_is_for_a_termination_and_for_nothing_else() -> None:
    for occasion in Occasion:
        assert places(asked(INSTANCE, occasion=occasion)) == (
            (f"owners.{PROJECT}",) if occasion is Occasion.TERMINATE else ()
        )
        always = replace(RULE, on=tuple(Occasion))
        assert places(asked(INSTANCE, always, occasion=occasion))[0] == "vault"


@pytest.mark.parametrize("rules", [(), (RULE,)])
def test_one_that_is_refused_adds_no_copy_and_says_why(rules: tuple[Rule, ...]) -> None:
    refused = replace(INSTANCE, request=replace(WISH, refused="project 5f has not consented"))
    assert asked(refused, *rules) == asked(replace(INSTANCE, request=None), *rules)
    assert why_not(refused, *rules) == "project 5f has not consented"


# ---- what an operator may say of it ---------------------------------------------------------------------------------

FORBIDDING = replace(RULE, name="firm", requests="forbid")


def test_a_rule_that_applies_may_forbid_it() -> None:
    assert places(asked(INSTANCE, FORBIDDING)) == ("vault",)
    assert "'firm'" in why_not(INSTANCE, FORBIDDING)
    excluding = Rule(name="scratch", exclude=True, requests="forbid")
    assert asked(INSTANCE, excluding) is None
    assert "'scratch'" in why_not(INSTANCE, excluding)


def test_a_rule_that_does_not_apply_forbids_nothing() -> None:
    for rule in (replace(FORBIDDING, match=Match(uuid="0*")), replace(FORBIDDING, on=(Occasion.REBUILD,))):
        assert f"owners.{PROJECT}" in places(asked(INSTANCE, rule))
        assert not why_not(INSTANCE, rule)


def test_a_rule_behind_the_one_that_decides_forbids_nothing() -> None:
    first = replace(RULE, name="first")
    assert places(asked(INSTANCE, first, FORBIDDING)) == ("vault", f"owners.{PROJECT}")
    assert places(asked(INSTANCE, first, FORBIDDING, mode="additive")) == ("vault",)


def test_where_it_may_be_forbidden_an_operator_decides() -> None:
    maybe = Rule(name="maybe", match=Match(flavor="secret"), exclude=True, requests="forbid")
    wanted = asked(replace(UNSEEN, request=WISH), maybe)
    assert wanted is not None
    assert not wanted.certain
    assert "'maybe'" in wanted.missing


def test_a_rule_that_may_exclude_but_forbids_nothing_leaves_a_request_certain() -> None:
    maybe = Rule(name="maybe", match=Match(flavor="secret"), exclude=True)
    wanted = asked(replace(UNSEEN, request=WISH), maybe)
    assert wanted is not None
    assert (places(wanted), wanted.certain) == ((f"owners.{PROJECT}",), True)


def test_a_plan_with_a_project_that_was_not_asked_yet_is_not_settled() -> None:
    """Whatever else is in it."""
    unasked = replace(INSTANCE, request=replace(WISH, asked=False))
    for rules in ((), (RULE,), (RULE, Rule(name="more", destinations=("tape",)))):
        for instance, settled in ((unasked, False), (INSTANCE, True), (replace(INSTANCE, request=None), True)):
            wanted = asked(instance, *rules, mode="additive")
            assert wanted is None or wanted.settled is settled


@pytest.mark.parametrize(("disk_bytes", "granted"), [(0, True), (9, True), (10, True), (11, False), (None, True)])
def test_a_disk_may_be_too_large_to_be_asked_for(disk_bytes: int | None, granted: bool) -> None:
    """One whose size nobody knows is not let go for it."""
    caps = replace(TAKEN, disk_at_most_bytes=10)
    assert (asked(INSTANCE, caps=caps, disk_bytes=disk_bytes) is not None) is granted
    assert bool(why_not(INSTANCE, caps=caps, disk_bytes=disk_bytes)) is not granted
    assert places(asked(INSTANCE, RULE, caps=caps, disk_bytes=disk_bytes))[0] == "vault"


# ---- an owner who says no -------------------------------------------------------------------------------------------


def test_an_owner_may_say_no_to_a_rule_that_lets_them() -> None:
    polite, firm = replace(RULE, name="polite", may_decline=True), replace(RULE, name="firm", destinations=("tape",))
    no = replace(INSTANCE, request=DECLINED)
    for mode in ("first-match", "additive"):
        assert asked(no, polite, mode=mode) is None
        assert places(asked(no, firm, mode=mode)) == ("tape",)
        assert asked(replace(no, request=None), polite, mode=mode) is not None
    assert asked(no, polite, firm) is None  # the first that applies decides alone, and it may be declined
    wanted = asked(no, polite, firm, mode="additive")
    assert wanted is not None
    assert (wanted.rule, places(wanted)) == ("firm", ("tape",))


def test_an_owner_whose_no_is_not_heeded_is_told_of_the_rule() -> None:
    no = replace(INSTANCE, request=DECLINED)
    assert "'all'" in why_not(no, RULE)
    assert why_not(no, replace(RULE, may_decline=True)) == ""
    assert why_not(no) == ""


def test_a_rule_is_firm_unless_it_says_otherwise() -> None:
    assert (RULE.may_decline, RULE.requests) == (False, "allow")


# ---- owners of whom nothing was heard -------------------------------------------------------------------------------

UNHEARD = ServerRecord()
HEARD = ServerRecord(properties={}, extra_specs={}, image_properties={}, image_heard=True)


def _unheard(source: RequestSource) -> ServerRecord:
    """All heard, but for where *source* speaks."""
    match source:
        case RequestSource.SERVER:
            return replace(HEARD, properties=None)
        case RequestSource.IMAGE:
            return replace(HEARD, image_heard=False)
        case RequestSource.FLAVOR:
            return replace(HEARD, extra_specs=None)
        case RequestSource.SOCKET:
            return HEARD


def test_an_owner_who_was_not_heard_may_have_asked_and_an_operator_decides() -> None:
    """Nothing is sent anywhere, and nothing is let go: the job that comes of it has no copy."""
    book = Rulebook(requests=TAKEN, hears_owners=True)
    wanted = plan(UNSEEN, book, occasion=Occasion.TERMINATE)
    assert wanted is not None
    assert (wanted.copies, wanted.certain, wanted.scrub_method) == ((), False, "unlink")
    assert wanted.missing


def test_each_way_to_ask_is_missed_by_itself_and_only_where_it_is_listened_to() -> None:
    for source, listened in itertools.product(RequestSource, repeat=2):
        book = Rulebook(requests=replace(TAKEN, sources=(listened,)), hears_owners=True)
        instance = replace(UNSEEN, server=_unheard(source))
        is_missed = source is listened and source is not RequestSource.SOCKET
        assert may_be_wanted(instance, book, disk_bytes=None) is is_missed, (source, listened)


@pytest.mark.parametrize(
    ("instance", "book"),
    [
        (UNSEEN, Rulebook(requests=TAKEN)),
        (UNSEEN, Rulebook(hears_owners=True)),
        (UNSEEN, Rulebook(requests=replace(TAKEN, sources=(RequestSource.SOCKET,)), hears_owners=True)),
        (replace(UNSEEN, server=HEARD), Rulebook(requests=TAKEN, hears_owners=True)),
        (replace(UNSEEN, request=DECLINED), Rulebook(requests=TAKEN, hears_owners=True)),
        (replace(UNSEEN, request=replace(WISH, refused="no")), Rulebook(requests=TAKEN, hears_owners=True)),
        (UNSEEN, Rulebook(rules=[Rule(name="x", exclude=True, requests="forbid")], requests=TAKEN, hears_owners=True)),
    ],
    ids=["nova is not asked", "no requests", "socket alone", "heard", "declined", "refused", "forbidden"],
)
def test_nobody_waits_for_an_owner_who_could_not_be_granted_it(instance: InstanceRecord, book: Rulebook) -> None:
    assert not may_be_wanted(instance, book, disk_bytes=None)


@pytest.mark.parametrize("occasion", [Occasion.REBUILD, Occasion.SHELVE_OFFLOAD])
def test_an_owner_who_was_not_heard_cannot_have_asked_for_more_than_a_termination(occasion: Occasion) -> None:
    assert plan(UNSEEN, Rulebook(requests=TAKEN, hears_owners=True), occasion=occasion) is None


def test_a_request_that_was_heard_needs_no_other_fact() -> None:
    book = Rulebook(requests=TAKEN, hears_owners=True)
    wanted = plan(replace(UNSEEN, request=WISH), book, occasion=Occasion.TERMINATE)
    assert wanted is not None
    assert (places(wanted), wanted.certain) == ((f"owners.{PROJECT}",), True)


# ---- its terms ------------------------------------------------------------------------------------------------------


def test_it_changes_the_project_the_readers_and_the_time_and_no_other_term() -> None:
    asked_for = requested_destination(TEMPLATE, WISH)
    assert asked_for == dataclasses.replace(
        TEMPLATE, project=PROJECT, project_domain="", readers=("f" * 32, READER), retention_s=604800.0
    )


def test_what_it_does_not_name_is_as_the_operator_has_it() -> None:
    asked_for = requested_destination(TEMPLATE, Request(project=PROJECT))
    assert (asked_for.readers, asked_for.retention_s) == (TEMPLATE.readers, TEMPLATE.retention_s)


def test_a_reader_is_named_once() -> None:
    asked_for = requested_destination(TEMPLATE, Request(project=PROJECT, reader="f" * 32))
    assert asked_for.readers == ("f" * 32,)


def test_without_barbican_nobody_can_be_named() -> None:
    template = dataclasses.replace(TEMPLATE, key="recipient", readers=(), recipients=(Path("/k.pub"),))
    assert requested_destination(template, WISH).readers == ()


def test_a_rule_changes_the_time_of_its_copy_and_no_other_term() -> None:
    assert terms_of(TEMPLATE, None) == TEMPLATE
    assert terms_of(TEMPLATE, 60.0) == replace(TEMPLATE, retention_s=60.0)
    assert places(asked(WEB, RULE)) == ("vault",)
