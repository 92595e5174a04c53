"""Who is backed up: the first rule that matches, or may match, and nobody without one."""

import itertools
from dataclasses import replace

import pytest
from tests.unit.rules.rulebooks import PLAIN, UNSEEN, WEB, by, places, rule

from autobackup.config import Config
from autobackup.model import DestinationName, DiskKind, InstanceRecord, Occasion
from autobackup.rules.policy import Plan, PlannedCopy, Rulebook, may_be_wanted, plan
from autobackup.service.witness import rulebook
from autobackup.terms import Match, Rule

EVERYTHING = rule("everything")
VAULT = (PlannedCopy(destination=DestinationName("vault")),)
SCRATCH = Rule(name="scratch", match=Match(name="Web-*"), exclude=True)


# ---- which rule decides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("occasion", list(Occasion))
@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_without_a_rule_nothing_is_wanted(instance: InstanceRecord, occasion: Occasion) -> None:
    assert by(instance, occasion=occasion) is None
    assert plan(instance, rulebook(Config()), occasion=occasion) is None, "the default configuration captures something"


def test_without_a_matching_rule_nothing_is_wanted() -> None:
    assert by(WEB, rule(match=Match(name="db-*")), rule(match=Match(project="0*"))) is None


@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_a_rule_without_conditions_wants_everything_for_certain(instance: InstanceRecord) -> None:
    """No fact is asked for, so none can be missing."""
    assert by(instance, EVERYTHING) == Plan(rule="everything", copies=VAULT, scrub_method="zero", certain=True)


def test_the_terms_are_those_of_the_rule() -> None:
    terms = Rule(
        name="web", match=Match(name="Web-*"), destinations=("b", "a"), scrub="unlink", retention_s=60.0,
        disks=(DiskKind.ROOT, DiskKind.SWAP),
    )  # fmt: skip
    assert by(WEB, terms) == Plan(
        rule="web",
        copies=tuple(PlannedCopy(destination=DestinationName(name), retention_s=60.0) for name in ("b", "a")),
        scrub_method="unlink",
        disks=frozenset({DiskKind.ROOT, DiskKind.SWAP}),
        certain=True,
    )


def test_the_first_rule_that_matches_decides() -> None:
    no, web, also = rule("no", match=Match(name="db-*")), rule("web", match=Match(name="Web-*")), rule("also")
    for order in itertools.permutations([no, web, also]):
        first = next(one.name for one in order if one is not no)
        wanted = by(WEB, *order)
        assert wanted is not None
        assert wanted.rule == first


def test_a_rule_that_may_match_stands_before_one_that_does() -> None:
    """It could have sent the disk elsewhere, or to fewer: an operator decides."""
    asks, all_of_it = rule("asks", match=Match(name="Web-*")), rule("all", destinations=("tape",))
    wanted = by(UNSEEN, asks, all_of_it)
    assert wanted is not None
    assert (wanted.rule, wanted.certain) == ("asks", False)
    wanted = by(UNSEEN, all_of_it, asks)
    assert wanted is not None
    assert (wanted.rule, wanted.certain) == ("all", True)


def test_all_that_apply_add_up_in_the_additive_mode() -> None:
    one, no, two = rule("one"), rule("no", match=Match(name="db-*")), rule("two", destinations=("tape", "vault"))
    wanted = by(WEB, one, no, two, mode="additive")
    assert wanted is not None
    assert (wanted.rule, places(wanted), wanted.certain) == ("one, two", ("vault", "tape"), True)


def test_the_first_that_wants_it_says_what_becomes_of_the_disk() -> None:
    rules = rule("a", scrub="random"), rule("b", scrub="unlink")
    wanted = by(WEB, *rules, mode="additive")
    assert wanted is not None
    assert wanted.scrub_method == "random"


# ---- exclusion ----------------------------------------------------------------------------------------------


def test_an_exclusion_holds_before_what_it_stands_before() -> None:
    assert by(WEB, SCRATCH, EVERYTHING) is None
    assert places(by(WEB, EVERYTHING, SCRATCH)) == ("vault",)
    assert places(by(PLAIN, SCRATCH, EVERYTHING)) == ("vault",)


def test_an_exclusion_ends_it_wherever_it_stands_in_the_additive_mode() -> None:
    for order in itertools.permutations([SCRATCH, EVERYTHING, rule("more")]):
        assert by(WEB, *order, mode="additive") is None
        assert by(PLAIN, *order, mode="additive") is not None


@pytest.mark.parametrize("mode", ["first-match", "additive"])
def test_an_exclusion_that_may_hold_is_an_operators_to_decide(mode: str) -> None:
    """It neither lets the disk go nor sends it away."""
    wanted = by(UNSEEN, SCRATCH, EVERYTHING, mode=mode)  # type: ignore[arg-type]
    assert wanted is not None
    assert (wanted.rule, places(wanted), wanted.certain) == ("everything", ("vault",), False)
    assert "'scratch'" in wanted.missing
    assert "name" in wanted.missing


@pytest.mark.parametrize("mode", ["first-match", "additive"])
def test_an_exclusion_that_may_hold_of_what_nobody_wants_asks_nobody(mode: str) -> None:
    assert by(UNSEEN, SCRATCH, rule(match=Match(uuid="0*")), mode=mode) is None  # type: ignore[arg-type]


# ---- the occasion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["first-match", "additive"])
def test_a_rule_applies_to_the_occasions_that_it_names_and_to_no_other(mode: str) -> None:
    """Every set of occasions."""
    for count in (1, 2, 3):
        for on in itertools.combinations(Occasion, count):
            some = Rule(name="some", on=on, destinations=("vault",))
            for occasion in Occasion:
                wanted = by(WEB, some, occasion=occasion, mode=mode)  # type: ignore[arg-type]
                assert (wanted is not None) is (occasion in on), (on, occasion)


def test_a_rule_is_for_terminations_unless_it_says_more() -> None:
    """A rebuild is an owner's everyday business; its old disk is nobody's unless a rule says so."""
    assert EVERYTHING.on == (Occasion.TERMINATE,)


def test_a_rule_for_another_occasion_does_not_stand_in_the_way() -> None:
    for first in (
        Rule(name="x", on=(Occasion.REBUILD,), exclude=True),
        Rule(name="x", on=(Occasion.REBUILD,), destinations=("tape",)),
    ):
        assert places(by(WEB, first, EVERYTHING)) == ("vault",)
        assert places(by(WEB, first, EVERYTHING, occasion=Occasion.SHELVE_OFFLOAD)) == ()


# ---- missing facts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", [Match(name="Web-*"), Match(project="5f*"), Match(name="Web-*", project="5f*")])
def test_what_is_not_known_is_wanted_and_an_operators_to_decide(match: Match) -> None:
    wanted = by(UNSEEN, rule("r", match=match))
    assert wanted is not None
    assert not wanted.certain
    assert places(wanted) == ("vault",)


def test_the_operator_is_told_which_facts_are_missing_and_which_rule_asks() -> None:
    match = Match(flavor="gold*", image_properties={"os_distro": "debian"}, disk_at_least_bytes=1)
    wanted = by(UNSEEN, rule("gold", match=match))
    assert wanted is not None
    for word in ("'gold'", "flavor", "image_properties.os_distro", "disk_at_least"):
        assert word in wanted.missing


def test_one_condition_that_fails_is_enough_whatever_is_unknown() -> None:
    assert by(UNSEEN, rule(match=Match(name="Web-*", uuid="7b*"))) is None


def test_a_domain_without_a_project_is_in_none() -> None:
    """Its XML was seen: that nobody owns it is a fact, and no reason to capture it and ask an operator."""
    assert by(PLAIN, rule(match=Match(project="5f*"))) is None


def test_the_size_of_the_disk_is_a_fact_like_any_other() -> None:
    small = rule("small", match=Match(disk_at_most_bytes=10))
    assert places(by(WEB, small, disk_bytes=10)) == ("vault",)
    assert by(WEB, small, disk_bytes=11) is None
    wanted = by(WEB, small, disk_bytes=None)
    assert wanted is not None
    assert not wanted.certain


def test_a_disk_of_a_size_that_no_rule_wants_need_not_wait() -> None:
    book = Rulebook(rules=[rule("small", match=Match(disk_at_most_bytes=10))])
    assert [may_be_wanted(WEB, book, disk_bytes=size) for size in (10, 11, None)] == [True, False, True]


def test_what_an_image_has_is_not_known_before_glance_was_asked_where_it_will_be() -> None:
    """Nova's metadata leaves `class` out: an instance that was never heard of may have it."""
    rules = [rule(match=Match(image_properties={"class": "gold"}))]
    seen, asked = WEB, replace(WEB, server=replace(WEB.server, image_heard=True))
    for instance, hears_owners, certain in ((seen, False, None), (seen, True, False), (asked, True, None)):
        book = Rulebook(rules=rules, hears_owners=hears_owners)
        wanted = plan(instance, book, occasion=Occasion.TERMINATE)
        assert (None if wanted is None else wanted.certain) is certain


# ---- the terms where rules meet -----------------------------------------------------------------------------

DAY = 86400.0


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (DAY, 2 * DAY, 2 * DAY),
        (2 * DAY, DAY, 2 * DAY),
        (DAY, DAY, DAY),
        (DAY, None, None),
        (None, DAY, None),
        (None, None, None),
    ],
)
def test_where_two_rules_name_a_destination_the_longer_retention_holds(
    first: float | None, second: float | None, kept: float | None
) -> None:
    """None is the destination's own."""
    rules = [Rule(name=f"r{n}", destinations=("vault",), retention_s=s) for n, s in enumerate((first, second))]
    wanted = by(WEB, *rules, mode="additive")
    assert wanted is not None
    assert [(copy.destination, copy.retention_s) for copy in wanted.copies] == [("vault", kept)]


def test_the_retention_of_one_destination_is_not_that_of_another() -> None:
    rules = (
        Rule(name="a", destinations=("vault",), retention_s=DAY),
        Rule(name="b", destinations=("tape", "vault"), retention_s=3 * DAY),
        Rule(name="c", destinations=("disk",)),
    )
    wanted = by(WEB, *rules, mode="additive")
    assert wanted is not None
    kept = {str(copy.destination): copy.retention_s for copy in wanted.copies}
    assert kept == {"vault": 3 * DAY, "tape": 3 * DAY, "disk": None}
    wanted = by(WEB, *rules)
    assert wanted is not None
    assert [(copy.destination, copy.retention_s) for copy in wanted.copies] == [("vault", DAY)]


def _with_disks() -> list[tuple[DiskKind, ...]]:
    others = [kind for kind in DiskKind if kind is not DiskKind.ROOT]
    return [(DiskKind.ROOT, *some) for count in range(4) for some in itertools.combinations(others, count)]


def test_the_disks_are_those_of_the_rule_and_of_all_rules_that_add_up() -> None:
    """Every pair of selections."""
    for one, two in itertools.product(_with_disks(), repeat=2):
        rules = [Rule(name=f"r{n}", destinations=("vault",), disks=disks) for n, disks in enumerate((one, two))]
        first, added = by(WEB, *rules), by(WEB, *rules, mode="additive")
        assert first is not None
        assert added is not None
        assert first.disks == frozenset(one)
        assert added.disks == frozenset(one) | frozenset(two)


def test_a_rule_takes_every_disk_unless_it_says_which() -> None:
    wanted = by(WEB, EVERYTHING)
    assert wanted is not None
    assert wanted.disks == frozenset(DiskKind)


def test_a_rulebook_is_the_configurations() -> None:
    config = Config(rule=(Rule(name="x", exclude=True),), rule_mode="additive", aggregates=("ssd",))
    assert rulebook(config) == Rulebook(
        rules=config.rule, mode="additive", requests=config.request, aggregates=("ssd",), hears_owners=False
    )
