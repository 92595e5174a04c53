"""Which files a configuration is, how they add up, and what is said of one that cannot be read."""

import re
from pathlib import Path

import pytest
from tests.unit.config_files import DESTINATION, RULE, Folder

from autobackup.config import (
    Config,
)
from autobackup.configfile import load
from autobackup.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- conf.d -------------------------------------------------------------------------------------------------


def test_drop_ins_are_merged_key_by_key_in_the_order_of_their_names(folder: Folder) -> None:
    config = folder.read(
        '[capture]\nquiet_period = "10s"\nscan_interval = "10s"\nundecided_longest = "10s"\n[retry]\nfirst = "10s"\n',
        b='[capture]\nquiet_period = "30s"\n',
        a='[capture]\nquiet_period = "20s"\nscan_interval = "20s"\n',
    )
    assert (config.capture.quiet_period_s, config.capture.scan_interval_s) == (30, 20)
    assert (config.capture.undecided_longest_s, config.retry.first_s) == (10, 10)


def test_a_value_of_a_later_file_wins_at_the_top_too(folder: Folder) -> None:
    assert folder.read('instances_path = "/a"', x='instances_path = "/b"').instances_path == Path("/b")


def test_destinations_and_rules_of_all_files_add_up_in_the_order_of_the_files(folder: Folder) -> None:
    """The order of rules decides: the first that matches wins."""

    def more(name: str) -> str:
        return DESTINATION.replace("vault", name) + RULE.replace("everything", f"r-{name}").replace("vault", name)

    config = folder.read(DESTINATION + RULE, b=more("second") + more("third"), a=more("first"))
    assert [d.name for d in config.destination] == ["vault", "first", "second", "third"]
    assert [r.name for r in config.rule] == ["everything", "r-first", "r-second", "r-third"]


def test_a_rule_may_name_a_destination_of_any_file(folder: Folder) -> None:
    assert folder.read(RULE, z=DESTINATION).rule[0].destinations == ("vault",)


def test_a_list_of_words_is_replaced_and_does_not_add_up(folder: Folder) -> None:
    main = '[capture]\nfilesystems = ["ext4", "xfs"]'
    assert folder.read(main, x='[capture]\nfilesystems = ["tmpfs"]').capture.filesystems == ("tmpfs",)


def test_an_empty_list_of_words_replaces_too(folder: Folder) -> None:
    line = folder.refuse_once('[capture]\nfilesystems = ["ext4"]', x="[capture]\nfilesystems = []")
    assert line.startswith(f"{folder.drop_in('x')}: capture.filesystems: ")


def test_only_the_drop_ins_of_conf_d_are_read(folder: Folder) -> None:
    folder.write("", x="")
    for name in ("x.toml.rpmsave", "x.conf", "README", ".hidden.toml", ".#x.toml"):
        (folder.conf_d / name).write_text("not = [valid")
    assert load(folder.main) == Config()


def test_a_conf_d_that_cannot_be_read_is_not_taken_for_an_empty_one(folder: Folder) -> None:
    """The rules in it would be lost without a word."""
    folder.conf_d.write_text("")
    assert folder.refuse_once("") == f"{folder.conf_d}: Not a directory"


MISTAKES = {
    "": ("instance_path = 1", "unknown key 'instance_path'; did you mean 'instances_path'?"),
    "section": ("[capture]\nscan_intervall = '5s'", "unknown key 'capture.scan_intervall'; did you mean"),
    "value": ("[capture]\nscan_interval = '5x'", "capture.scan_interval: '5x' is not a duration"),
    "compared": ("[sealing]\ncompression = 'lz4'", "sealing.compression: 'lz4' is unknown"),
    "threads": ("[sealing]\ncompress_threads = 0", "sealing.compress_threads: must be 1 to 64"),
    "cross": ("[retry]\nlongest = '1s'", "retry.longest: must not be shorter than first"),
    "missing": ("[[destination]]\nname = 'b'\nstore = 'directory'\npath = '/b'\nkey = 'keyfile'",
                "destination[1].keyfile: is missing; key = \"keyfile\" needs it"),
    "together": (DESTINATION.replace("vault", "b") + "members = ['aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa']",
                 "destination[1].members: has a meaning only with store = \"glance\"; remove it"),
    "required": ("[[destination]]\nname = 'b'\nkey = 'none'", "'destination[1].store' is missing; add it"),
    "twice": (DESTINATION, "destination[1].name: two are named 'vault'; rename one"),
    "undefined": ("[[rule]]\nname = 'x'\ndestinations = ['vualt']", "rule[1].destinations[1]: rule 'x' names"),
    "nested": (RULE.replace("everything", "x") + "[rule.match]\nprojekt = 'x'", "unknown key 'rule[1].match.projekt'"),
    "toml": ("[capture", "not valid TOML: "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_drop_in_names_the_drop_in(folder: Folder, mistake: str) -> None:
    """Even where the main file has the same table: an operator edits what the message names."""
    text, words = MISTAKES[mistake]
    main = '[capture]\nquiet_period = "10s"\n[sealing]\n[retry]\nfirst = "5s"\n' + DESTINATION + RULE
    line = folder.refuse_once(main, good="[capture]", wrong=text)
    assert line.startswith(f"{folder.drop_in('wrong')}: {words}")


def test_entries_are_counted_as_their_own_file_has_them(folder: Folder) -> None:
    other = DESTINATION.replace("vault", "other")
    line = folder.refuse_once(DESTINATION, a=other + DESTINATION.replace("vault", "b") + 'retention = "1y"\n')
    assert line.startswith(f"{folder.drop_in('a')}: destination[2].retention: ")
    line = folder.refuse_once(DESTINATION, a=other, b=DESTINATION.replace("vault", "c") + "verify = 'no'\n")
    assert line.startswith(f"{folder.drop_in('b')}: destination[1].verify: ")


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"twice"}))
def test_a_mistake_in_the_main_file_names_the_main_file(folder: Folder, mistake: str) -> None:
    text, words = MISTAKES[mistake]
    line = folder.refuse_once(text, good=DESTINATION + "[capture]\n[sealing]\n[retry]\n")
    assert line.startswith(f"{folder.main}: {words}")


@pytest.mark.parametrize(
    ("one", "two", "key"),
    [
        ("[destination]\nname = 'a'", DESTINATION, "destination"),
        ("[rule]\nname = 'a'", DESTINATION + RULE, "rule"),
        (DESTINATION + RULE, "rule = 'none'", "rule"),
        ("libvirt = 'qemu:///system'", "[libvirt]", "libvirt"),
        ("[capture]\nfilesystems = ['xfs']", "[capture]\nfilesystems = 'ext4'", "capture.filesystems"),
    ],
)
def test_a_table_in_one_file_never_hides_a_mistake_in_another(folder: Folder, one: str, two: str, key: str) -> None:
    """`[rule]` for `[[rule]]`, overwritten by a drop-in's `[[rule]]`: the operator's rule would be gone."""
    line = folder.refuse_once(one, x=two)
    assert line.startswith(f"{folder.drop_in('x')}: '{key}' is a")
    assert str(folder.main) in line


# ---- files that cannot be read ------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{folder.main}: not found; name the file with --config")):
        load(folder.main)


def test_a_folder_is_not_a_file(folder: Folder) -> None:
    folder.main.mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"{folder.main}: Is a directory")):
        load(folder.main)


def test_a_link_to_nothing_is_not_a_drop_in(folder: Folder) -> None:
    folder.write("", a="")
    folder.drop_in("b").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=re.escape(f"{folder.drop_in('b')}: not found; the link leads nowhere")):
        load(folder.main)


@pytest.mark.parametrize("data", [b"a = [", b"a = 1\na = 2", b"caf\xe9 = 1", b"\xff\xfe", b"a"])
def test_what_is_not_toml_is_refused_with_its_place(folder: Folder, data: bytes) -> None:
    folder.main.write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(f"{folder.main}: not valid TOML: ")):
        load(folder.main)
