"""Who is backed up: the first rule that matches, or may match, and nobody without one."""

import itertools

import pytest

from autobackup.config import Match, Rule
from autobackup.model import InstanceId, InstanceRecord
from autobackup.rules.policy import Plan, matches, plan

UUID = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
WEB = InstanceRecord(
    instance=UUID,
    libvirt_name="instance-0000002a",
    display_name="Web-01",
    owner_project="5f705771f3824b2ab3bd4ad10e3ee0a2",
    domain_xml="<domain/>",
)
PLAIN = InstanceRecord(instance=UUID, libvirt_name="builder", domain_xml="<domain/>")  # libvirt without a cloud
UNSEEN = InstanceRecord(instance=UUID)  # lived and died while nobody looked


def rule(
    name: str = "r", *, match: Match | None = None, destinations: tuple[str, ...] = ("vault",), scrub: str = "zero"
) -> Rule:
    return Rule(name=name, match=match or Match(), destinations=destinations, scrub=scrub)


EVERYTHING = rule("everything")


# ---- which rule decides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_without_a_rule_nothing_is_wanted(instance: InstanceRecord) -> None:
    assert plan(instance, []) is None


def test_without_a_matching_rule_nothing_is_wanted() -> None:
    assert plan(WEB, [rule(match=Match(name="db-*")), rule(match=Match(project="0*"))]) is None


@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_a_rule_without_conditions_wants_everything_for_certain(instance: InstanceRecord) -> None:
    """No fact is asked for, so none can be missing."""
    wanted = plan(instance, [EVERYTHING])
    assert wanted == Plan(rule="everything", destinations=("vault",), scrub_method="zero", certain=True)  # type: ignore[arg-type]


def test_the_terms_are_those_of_the_rule() -> None:
    wanted = plan(WEB, [rule("web", match=Match(name="Web-*"), destinations=("b", "a"), scrub="unlink")])
    assert wanted == Plan(rule="web", destinations=("b", "a"), scrub_method="unlink", certain=True)  # type: ignore[arg-type]


def test_the_first_rule_that_matches_decides() -> None:
    no, web, also = rule("no", match=Match(name="db-*")), rule("web", match=Match(name="Web-*")), rule("also")
    for order in itertools.permutations([no, web, also]):
        first = next(one.name for one in order if one is not no)
        wanted = plan(WEB, order)
        assert wanted is not None
        assert wanted.rule == first


def test_a_rule_that_may_match_stands_before_one_that_does() -> None:
    """It could have sent the disk elsewhere, or to fewer: an operator decides."""
    asks, all_of_it = rule("asks", match=Match(name="Web-*")), rule("all", destinations=("tape",))
    wanted = plan(UNSEEN, [asks, all_of_it])
    assert wanted is not None
    assert (wanted.rule, wanted.certain) == ("asks", False)
    wanted = plan(UNSEEN, [all_of_it, asks])
    assert wanted is not None
    assert (wanted.rule, wanted.certain) == ("all", True)


# ---- what matches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("*", True),
        ("Web-01", True),
        ("Web-*", True),
        ("Web-0?", True),
        ("Web-0[0-3]", True),
        ("[!w]eb*", True),
        ("instance-0000002a", True),
        ("instance-*", True),
        ("**", True),
        ("web-01", False),
        ("WEB-*", False),
        ("Web", False),
        ("eb-01", False),
        ("Web-0", False),
        ("Web-01?", False),
        ("Web-0[2-9]", False),
        ("Instance-*", False),
        ("", False),
        ("Web-01 ", False),
        ("Web-01*instance*", False),
    ],
)
def test_a_name_is_a_case_sensitive_glob_over_novas_or_libvirts(pattern: str, fits: bool) -> None:
    assert matches(WEB, rule(match=Match(name=pattern))) is fits


@pytest.mark.parametrize(
    ("pattern", "fits"), [("5f705771f3824b2ab3bd4ad10e3ee0a2", True), ("5f*", True), ("5F*", False), ("6*", False)]
)
def test_a_project_is_a_case_sensitive_glob(pattern: str, fits: bool) -> None:
    assert matches(WEB, rule(match=Match(project=pattern))) is fits


@pytest.mark.parametrize(("pattern", "fits"), [(UUID, True), ("6a0b*", True), ("6A0B*", False), ("7*", False)])
@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_the_uuid_is_known_of_every_instance(instance: InstanceRecord, pattern: str, fits: bool) -> None:
    assert matches(instance, rule(match=Match(uuid=pattern))) is fits


def test_all_conditions_must_hold() -> None:
    """Every combination of three conditions that hold, fail, or ask for nothing."""
    conditions = {
        "name": {"Web-*": True, "db-*": False, "*": True},
        "uuid": {"6a*": True, "7b*": False, "*": True},
        "project": {"5f*": True, "00*": False, "*": True},
    }
    for name, uuid, project in itertools.product(*conditions.values()):
        hold = conditions["name"][name] and conditions["uuid"][uuid] and conditions["project"][project]
        assert matches(WEB, rule(match=Match(name=name, uuid=uuid, project=project))) is hold, (name, uuid, project)


# ---- missing facts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", [Match(name="Web-*"), Match(project="5f*"), Match(name="Web-*", project="5f*")])
def test_what_is_not_known_neither_matches_nor_fails(match: Match) -> None:
    assert matches(UNSEEN, rule(match=match)) is None
    wanted = plan(UNSEEN, [rule("r", match=match)])
    assert wanted is not None
    assert not wanted.certain
    assert wanted.destinations == ("vault",)


def test_one_condition_that_fails_is_enough_whatever_is_unknown() -> None:
    assert matches(UNSEEN, rule(match=Match(name="Web-*", uuid="7b*", project="5f*"))) is False
    assert plan(UNSEEN, [rule(match=Match(name="Web-*", uuid="7b*"))]) is None


def test_one_condition_that_holds_does_not_make_up_for_an_unknown_one() -> None:
    assert matches(UNSEEN, rule(match=Match(name="Web-*", uuid="6a*"))) is None


def test_a_condition_that_asks_for_nothing_needs_no_fact() -> None:
    assert matches(UNSEEN, rule(match=Match(name="*", project="*", uuid="6a*"))) is True


def test_a_domain_without_a_project_is_in_none() -> None:
    """Its XML was seen: that nobody owns it is a fact, and no reason to capture it and ask an operator."""
    assert matches(PLAIN, rule(match=Match(project="5f*"))) is False
    assert plan(PLAIN, [rule(match=Match(project="5f*"))]) is None
    assert matches(PLAIN, rule(match=Match(project="*"))) is True


def test_a_domain_without_novas_name_is_called_by_libvirts() -> None:
    assert matches(PLAIN, rule(match=Match(name="build*"))) is True
    assert matches(PLAIN, rule(match=Match(name="Web-*"))) is False


@pytest.mark.parametrize("known", [{"libvirt_name": "builder"}, {"display_name": "builder"}])
def test_a_name_that_is_known_without_the_xml_decides(known: dict[str, str]) -> None:
    instance = InstanceRecord(instance=UUID, **known)  # type: ignore[arg-type]
    assert matches(instance, rule(match=Match(name="build*"))) is True
    assert matches(instance, rule(match=Match(name="Web-*"))) is False
    assert matches(instance, rule(match=Match(name="build*", project="5f*"))) is None


def test_a_name_of_nothing_is_no_name() -> None:
    """An empty pattern, or one that fits the empty text, finds no instance that lacks the fact."""
    for pattern in ("", "[!x]", "?*"):
        assert matches(UNSEEN, rule(match=Match(name=pattern))) is None
        assert matches(PLAIN, rule(match=Match(project=pattern))) is False
