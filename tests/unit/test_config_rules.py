"""Destinations and rules: their names, what they name, and what of a rule goes together."""

import tomllib
from pathlib import Path

import pytest
from tests.unit.config_files import DESTINATION, RULE, Folder, header

from autobackup.terms import Match, Rule


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- destinations and rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v", "vault", "9", "a.B_c-9", "a" * 64])
def test_a_destination_name_that_is_taken_fits_into_a_header(folder: Folder, name: str) -> None:
    assert folder.read(DESTINATION.replace("vault", name)).destination[0].name == name
    header(destination=name)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "-", "_x", ".x", "a b", "a/b", "a\\nb", "größe", "²", "a" * 65, "a\\u0000"]
)
def test_a_destination_name_that_no_header_can_hold_is_refused_at_once(folder: Folder, name: str) -> None:
    """Found when the first backup is sealed, it would end the process, and the next one too."""
    text = DESTINATION.replace('"vault"', f'"{name}"')
    assert folder.refuse_once(text).startswith(f"{folder.main}: destination[1].name: ")
    with pytest.raises(ValueError, match="must match"):
        header(destination=tomllib.loads(text)["destination"][0]["name"])


def test_an_undefined_destination_is_told_the_nearest(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + DESTINATION.replace("vault", "tape") + RULE.replace("vault", "vualt"))
    assert line == (
        f"{folder.main}: rule[1].destinations[1]: rule 'everything' names the destination 'vualt', "
        "which is not defined; did you mean 'vault'?"
    )


def test_an_undefined_destination_like_no_other_is_told_all(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + DESTINATION.replace("vault", "tape") + RULE.replace("vault", "glance"))
    assert line.endswith("'glance', which is not defined; known here: vault, tape")


def test_an_undefined_destination_where_there_is_none(folder: Folder) -> None:
    assert folder.refuse_once(RULE).endswith("which is not defined; there is no [[destination]]")


def test_the_second_destination_of_a_rule_is_looked_at_too(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + RULE.replace('["vault"]', '["vault", "vault2"]'))
    assert line.startswith(f"{folder.main}: rule[1].destinations[2]: ")


def test_two_destinations_of_one_name_are_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION * 2)
    assert line == f"{folder.main}: destination[2].name: two are named 'vault'; rename one"


def test_two_rules_of_one_name_are_refused(folder: Folder) -> None:
    """The queue and the receipts tell rules by their names."""
    line = folder.refuse_once(DESTINATION + RULE * 2)
    assert line == f"{folder.main}: rule[2].name: two are named 'everything'; rename one"


def test_a_rule_that_names_a_destination_twice_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + RULE.replace('["vault"]', '["vault", "vault"]'))
    assert line == (f"{folder.main}: rule[1].destinations[2]: rule 'everything' names 'vault' twice; remove one")


def test_a_rule_without_a_destination_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + RULE.replace('["vault"]', "[]"))
    assert line == (
        f"{folder.main}: rule[1].destinations: rule 'everything' names no destination; add one, or write exclude = true"
    )
    assert folder.refuse_once('[[rule]]\nname = "everything"\n') == line


def test_a_rule_without_a_name_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + RULE.replace("everything", ""))
    assert line == f"{folder.main}: rule[1].name: must not be empty"


def test_a_rule_matches_anything_unless_told_otherwise(folder: Folder) -> None:
    assert folder.read(DESTINATION + RULE).rule[0].match == Match(name="*", uuid="*", project="*")


# ---- what of a rule goes together -----------------------------------------------------------------------------------

EXCLUDING = '[[rule]]\nname = "scratch"\nexclude = true\n'


def test_a_rule_that_excludes_needs_no_destination(folder: Folder) -> None:
    assert folder.read(EXCLUDING).rule == (Rule(name="scratch", exclude=True),)


@pytest.mark.parametrize(
    ("key", "value"), [("destinations", '["vault"]'), ("retention", '"30d"'), ("may_decline", "true")]
)
def test_a_rule_that_excludes_has_no_terms(folder: Folder, key: str, value: str) -> None:
    """It would read as if something were kept."""
    line = folder.refuse_once(DESTINATION + EXCLUDING + f"{key} = {value}\n")
    assert line == f"{folder.main}: rule[1].{key}: has no meaning in rule 'scratch' with exclude = true; remove it"


@pytest.mark.parametrize("text", ['on = ["rebuild"]', 'requests = "forbid"', '[rule.match]\nflavor = "tmp.*"'])
def test_a_rule_that_excludes_may_say_when_whom_and_of_requests(folder: Folder, text: str) -> None:
    assert folder.read(EXCLUDING + text).rule[0].exclude


@pytest.mark.parametrize("head", [DESTINATION + RULE, EXCLUDING])
def test_a_rule_for_no_occasion_never_applies_and_is_refused(folder: Folder, head: str) -> None:
    line = folder.refuse_once(head + "on = []\n")
    assert line.startswith(f"{folder.main}: rule[1].on: rule '")
    assert line.endswith("' names no occasion, so it never applies")


@pytest.mark.parametrize("disks", ["[]", '["swap"]', '["ephemeral", "swap", "config-drive"]'])
def test_a_rule_without_the_root_disk_is_refused(folder: Folder, disks: str) -> None:
    line = folder.refuse_once(DESTINATION + RULE + f"disks = {disks}\n")
    assert line.startswith(f"{folder.main}: rule[1].disks: rule 'everything' must have \"root\"")


def test_sizes_between_which_nothing_fits_are_refused(folder: Folder) -> None:
    head = DESTINATION + RULE + "[rule.match]\n"
    line = folder.refuse_once(head + 'disk_at_least = "2GiB"\ndisk_at_most = "1GiB"\n')
    assert line.startswith(f"{folder.main}: rule[1].match.disk_at_most: must not be less than disk_at_least")
    match = folder.read(head + 'disk_at_least = "1GiB"\ndisk_at_most = "1GiB"\n').rule[0].match
    assert match.disk_at_least_bytes == match.disk_at_most_bytes == 1 << 30


def test_the_names_in_a_table_of_properties_are_data_and_no_keys(folder: Folder) -> None:
    """`hw:mem_page_size`, or one that looks like a key with a unit."""
    text = '[rule.match.extra_specs]\n"hw:mem_page_size" = "large"\nquota_s = "1"\n'
    match = folder.read(DESTINATION + RULE + text).rule[0].match
    assert match.extra_specs == {"hw:mem_page_size": "large", "quota_s": "1"}


# ---- whose word is taken --------------------------------------------------------------------------------------------


def test_novas_word_needs_a_cloud(folder: Folder) -> None:
    for text in ('verdict = "nova"', 'verdict = "nova"\n[nova]\nhost = "compute-1"'):
        line = folder.refuse_once(text)
        assert line == f'{folder.main}: nova.cloud: is missing; verdict = "nova" needs it: an entry of clouds.yaml'
    assert folder.read('verdict = "nova"\n[nova]\ncloud = "lab"').nova.cloud == "lab"


def test_a_cloud_for_nova_may_be_written_down_before_its_word_is_taken(folder: Folder) -> None:
    assert folder.read('[nova]\ncloud = "lab"').verdict == "libvirt"
