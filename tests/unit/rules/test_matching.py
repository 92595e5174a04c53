"""Each condition of a rule: what fits, what does not, and what nobody has told. Globs, case, ids and names, borders."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.rules.rulebooks import PLAIN, PROJECT, UNSEEN, UUID, WEB

from autobackup.model import InstanceRecord, ServerRecord
from autobackup.rules.matching import Condition, Surroundings, conditions
from autobackup.terms import Match
from autobackup.units import GiB, MiB

HERE = Surroundings(aggregates=("ssd", "rack-7"), disk_bytes=2 * GiB)
NOWHERE = Surroundings()
FITS = {
    "uuid": (UUID, "6a0b*"),
    "name": ("Web-01", "Web-*", "instance-0000002a", "*2a"),
    "project": (PROJECT, "5f*", "Finance", "F?nance"),
    "user": ("4d" * 16, "4d*", "Alice", "[A-C]lice"),
    "domain": ("default", "def*"),
    "flavor": ("m1.small", "m1.*", "*.small"),
    "image": ("155d900f-*", "155d900f-4e14-4e4c-a73d-069cbf4541e6"),
    "aggregate": ("ssd", "rack-*"),
}
DOES_NOT = {
    "uuid": ("6A0B*", "7*", "6a0b"),
    "name": ("web-01", "WEB-*", "Web", "instance-2*", ""),
    "project": ("5F*", "finance", "Fin", ""),
    "user": ("4D*", "alice", "Bob"),
    "domain": ("Default", "default ", "users"),
    "flavor": ("M1.*", "m1", "m1.smal?l"),
    "image": ("155D*", "155d900f"),
    "aggregate": ("SSD", "rack", "ssd,rack-7"),
}
TABLES = {"extra_specs": ("class", "gold-1"), "image_properties": ("os_distro", "debian")}


def answer(instance: InstanceRecord, match: Match, around: Surroundings = HERE) -> Condition:
    (held,) = conditions(instance, match, around)
    return held


def matching(conditions: Mapping[str, Any]) -> Match:
    return Match(**conditions)


def all_hold(instance: InstanceRecord, match: Match, around: Surroundings = HERE) -> bool | None:
    held = [one.holds for one in conditions(instance, match, around)]
    return False if False in held else None if None in held else True


def test_every_key_is_looked_at_here() -> None:
    sizes = {"disk_at_least_bytes", "disk_at_most_bytes"}
    assert {field.name for field in dataclasses.fields(Match)} == FITS.keys() | TABLES.keys() | sizes
    assert FITS.keys() == DOES_NOT.keys()


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "pattern"), [(key, one) for key, some in FITS.items() for one in some])
def test_what_fits(key: str, pattern: str) -> None:
    held = answer(WEB, matching({key: pattern}))
    assert (held.key, held.wanted, held.holds) == (key, pattern, True)


@pytest.mark.parametrize(("key", "pattern"), [(key, one) for key, some in DOES_NOT.items() for one in some])
def test_what_does_not_fit(key: str, pattern: str) -> None:
    held = answer(WEB, matching({key: pattern}))
    assert (held.key, held.wanted, held.holds) == (key, pattern, False)


@pytest.mark.parametrize("key", sorted(FITS.keys() - {"uuid", "aggregate"}))
def test_what_nobody_has_told(key: str) -> None:
    for pattern in (*FITS[key], *DOES_NOT[key]):
        held = answer(UNSEEN, matching({key: pattern}))
        assert held.holds is None, pattern
        assert held.found == "not known"


@pytest.mark.parametrize("key", sorted(FITS.keys() - {"uuid", "aggregate", "name"}))
def test_what_a_domain_that_was_seen_does_not_have_is_not_missing(key: str) -> None:
    for pattern in (*FITS[key], *DOES_NOT[key], "?*", ""):
        held = answer(PLAIN, matching({key: pattern}))
        assert held.holds is False, pattern
        assert held.found == "none"


@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_a_condition_that_is_left_out_is_none(instance: InstanceRecord) -> None:
    assert conditions(instance, Match(), NOWHERE) == ()
    assert [one.key for one in conditions(instance, Match(name="*", uuid="6a*"), NOWHERE)] == ["uuid"]


@pytest.mark.parametrize("instance", [WEB, PLAIN, UNSEEN])
def test_the_uuid_is_known_of_every_instance(instance: InstanceRecord) -> None:
    assert [answer(instance, Match(uuid=pattern)).holds for pattern in (UUID, "6a0b*", "6A0B*", "7*")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("**", True),
        ("Web-0?", True),
        ("Web-0[0-3]", True),
        ("[!w]eb*", True),
        ("eb-01", False),
        ("Web-0", False),
        ("Web-01?", False),
        ("Web-0[2-9]", False),
        ("Instance-*", False),
        ("Web-01 ", False),
        ("Web-01*instance*", False),
    ],
)
def test_a_text_is_a_glob_over_the_whole_of_one_name(pattern: str, fits: bool) -> None:
    assert answer(WEB, Match(name=pattern)).holds is fits


def test_a_domain_without_novas_name_is_called_by_libvirts() -> None:
    assert answer(PLAIN, Match(name="build*")).holds is True
    assert answer(PLAIN, Match(name="Web-*")).holds is False


# ---- half of it known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "key"),
    [
        (InstanceRecord(instance=UUID, display_name="Web-01"), "name"),
        (InstanceRecord(instance=UUID, libvirt_name="Web-01"), "name"),
        (InstanceRecord(instance=UUID, owner_project="Web-01"), "project"),
        (InstanceRecord(instance=UUID, server=ServerRecord(project_name="Web-01")), "project"),
        (InstanceRecord(instance=UUID, server=ServerRecord(user="Web-01")), "user"),
        (InstanceRecord(instance=UUID, server=ServerRecord(user_name="Web-01")), "user"),
    ],
)
def test_with_one_of_two_names_known_what_fits_fits_and_what_does_not_may_yet(known: InstanceRecord, key: str) -> None:
    """Nova's API tells the ids of project and user alone: their names come with the domain."""
    assert answer(known, matching({key: "Web-*"})).holds is True
    other = answer(known, matching({key: "db-*"}))
    assert (other.holds, other.found) == (None, "Web-01")
    assert answer(replace(known, domain_xml="<domain/>"), matching({key: "db-*"})).holds is False


@pytest.mark.parametrize(("key", "field"), [("flavor", "flavor"), ("image", "image"), ("domain", "domain")])
def test_what_has_one_name_is_known_as_soon_as_that_is(key: str, field: str) -> None:
    told: dict[str, Any] = {field: "a"}
    known = InstanceRecord(instance=UUID, server=ServerRecord(**told))
    assert answer(known, matching({key: "a"})).holds is True
    assert answer(known, matching({key: "b"})).holds is False


def test_an_instance_that_is_in_no_domain_of_keystone_is_known_not_to_be() -> None:
    assert answer(InstanceRecord(instance=UUID, server=ServerRecord(domain="")), Match(domain="d*")).holds is False


def test_this_host_is_in_its_aggregates_and_in_no_other() -> None:
    assert answer(UNSEEN, Match(aggregate="ssd")).holds is True
    assert answer(UNSEEN, Match(aggregate="ssd"), NOWHERE).holds is False


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "name", "value"), [(key, *pair) for key, pair in TABLES.items()])
def test_a_property_is_a_glob_over_its_value(key: str, name: str, value: str) -> None:
    for pattern, fits in ((value, True), (value[:3] + "*", True), ("*", True), (value.upper(), False), ("x", False)):
        held = answer(WEB, matching({key: {name: pattern}}))
        assert (held.key, held.wanted, held.found, held.holds) == (f"{key}.{name}", pattern, value, fits)


@pytest.mark.parametrize("key", TABLES)
@pytest.mark.parametrize("pattern", ["*", "", "true", "[!x]"])
def test_a_property_that_is_not_there_fits_nothing(key: str, pattern: str) -> None:
    held = answer(WEB, matching({key: {"nothing": pattern}}))
    assert (held.holds, held.found) == (False, "none")


@pytest.mark.parametrize("key", TABLES)
def test_the_name_of_a_property_is_a_name_and_no_glob(key: str) -> None:
    for name in ("c*", "CLASS", "OS_distro", "*"):
        assert answer(WEB, matching({key: {name: "*"}})).holds is False


@pytest.mark.parametrize("key", TABLES)
def test_a_table_that_nobody_has_told_of_is_not_an_empty_one(key: str) -> None:
    match = matching({key: {"class": "gold"}})
    held = answer(UNSEEN, match)
    assert (held.holds, held.found) == (None, "not known")
    seen = replace(UNSEEN, domain_xml="<domain/>")  # by an older Nova, which does not write them
    assert answer(seen, match).holds is None
    assert answer(PLAIN, match).holds is False


def test_every_property_that_is_asked_for_must_fit() -> None:
    wanted = {"hw:mem_page_size": ("large", "small"), "class": ("gold*", "lead*")}
    for one, two in itertools.product(*wanted.values()):
        match = Match(extra_specs=dict(zip(wanted, (one, two), strict=True)))
        assert all_hold(WEB, match) is (one == "large" and two == "gold*")


# ---- what Glance alone could tell -----------------------------------------------------------------------------------


def test_what_a_domain_leaves_out_of_its_image_is_not_known_where_glance_is_asked() -> None:
    """Nova writes those properties into a domain that it knows itself: `class` is never among them (measured)."""
    asked = replace(HERE, hears_images=True)
    by_xml = replace(WEB, server=replace(WEB.server, image_heard=False))
    by_glance = replace(WEB, server=replace(WEB.server, image_heard=True))
    custom, known = Match(image_properties={"class": "gold"}), Match(image_properties={"os_distro": "debian"})
    assert [answer(by_xml, custom, around).holds for around in (HERE, asked)] == [False, None]
    assert [answer(by_glance, custom, around).holds for around in (HERE, asked)] == [False, False]
    for instance, around in itertools.product((by_xml, by_glance), (HERE, asked)):
        assert answer(instance, known, around).holds is True
        assert answer(instance, Match(image_properties={"os_distro": "x"}), around).holds is False


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk_bytes", "least", "most", "fits"),
    [
        (0, 0, None, True),
        (0, 1, None, False),
        (10 * MiB - 1, 10 * MiB, None, False),
        (10 * MiB, 10 * MiB, None, True),
        (10 * MiB + 1, 10 * MiB, None, True),
        (10 * MiB - 1, None, 10 * MiB, True),
        (10 * MiB, None, 10 * MiB, True),
        (10 * MiB + 1, None, 10 * MiB, False),
        (0, None, 0, True),
        (1, None, 0, False),
        (10 * MiB, 10 * MiB, 10 * MiB, True),
        (10 * MiB - 1, 10 * MiB, 10 * MiB, False),
        (10 * MiB + 1, 10 * MiB, 10 * MiB, False),
    ],
)
def test_the_borders_of_a_size_belong_to_it(disk_bytes: int, least: int | None, most: int | None, fits: bool) -> None:
    match, around = Match(disk_at_least_bytes=least, disk_at_most_bytes=most), Surroundings(disk_bytes=disk_bytes)
    for instance in (WEB, UNSEEN):
        assert all_hold(instance, match, around) is fits


def test_a_size_that_nobody_has_told() -> None:
    for match in (Match(disk_at_least_bytes=0), Match(disk_at_most_bytes=2**62)):
        held = answer(WEB, match, NOWHERE)
        assert (held.holds, held.found) == (None, "not known")


def test_sizes_are_told_as_people_read_them() -> None:
    least, most = conditions(WEB, Match(disk_at_least_bytes=GiB, disk_at_most_bytes=3 * GiB), HERE)
    assert (least.key, least.wanted, least.found) == ("disk_at_least", "1.0 GiB", "2.0 GiB")
    assert (most.key, most.wanted, most.found) == ("disk_at_most", "3.0 GiB", "2.0 GiB")


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_all_conditions_must_hold() -> None:
    """Every combination of conditions that hold, fail, are not known, or ask for nothing."""
    known = replace(WEB, server=replace(WEB.server, domain=None))
    keys: dict[str, dict[str, bool | None]] = {
        "name": {"Web-*": True, "db-*": False, "*": True},
        "uuid": {"6a*": True, "7b*": False, "*": True},
        "project": {"5f*": True, "00*": False, "*": True},
        "domain": {"def*": None, "*": True},
        "aggregate": {"ssd": True, "hdd": False, "*": True},
    }
    for some in itertools.product(*keys.values()):
        hold = [keys[key][pattern] for key, pattern in zip(keys, some, strict=True)]
        expected = False if False in hold else None if None in hold else True
        assert all_hold(known, matching(dict(zip(keys, some, strict=True)))) is expected, some


def test_what_is_found_is_told_with_both_its_names() -> None:
    assert answer(WEB, Match(project="x")).found == f"{PROJECT} / Finance"
    assert answer(WEB, Match(name="x")).found == "Web-01 / instance-0000002a"
    assert answer(WEB, Match(aggregate="x")).found == "ssd / rack-7"
