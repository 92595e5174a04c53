"""
The configuration is refused whole if a word of it is wrong, in words that name file, key and remedy.

Every promise is tested through `load`, on files: what an operator writes, and what he reads when it is wrong.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.unit.config_files import DESTINATION, RULE, Folder

from autobackup.config import (
    DEFAULT_PATH,
    ApiSection,
    CaptureSection,
    Config,
    Destination,
    LibvirtSection,
    Match,
    OpenstackSection,
    RequestSection,
    RetrySection,
    Rule,
    SealingSection,
)
from autobackup.configfile import load
from autobackup.container.header import Header
from autobackup.errors import ConfigError
from autobackup.units import GiB, KiB, MiB

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "packaging" / "autobackup.toml.example"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- what is written is what is read ------------------------------------------------------------------------


def test_an_empty_file_is_a_configuration_that_captures_nothing(folder: Folder) -> None:
    config = folder.read("")
    assert config == Config()
    assert config.rule == ()
    assert config.destination == ()


def test_every_key_arrives_in_its_field_and_unit(folder: Folder) -> None:
    config = folder.read(
        """
        instances_path = "/i"
        verdict = "libvirt"
        verdict_despite_nova = true
        nova_conf = "/n.conf"
        reserve = "8MiB"
        [libvirt]
        uri = "test:///default"
        call_timeout = "7s"
        keepalive_interval = "2s"
        reconnect_longest = "1m"
        [capture]
        quiet_period = "1m 30s"
        leaked_after = "2h"
        scan_interval = "10m"
        undecided_longest = "1h"
        undefined_is_released = true
        filesystems = ["tmpfs"]
        [sealing]
        compression = "none"
        compress_threads = 3
        parallel_jobs = 4
        cpu_tokens = 5
        detach_after = "500ms"
        rate = "100MiB"
        [retry]
        first = "250ms"
        longest = "6h"
        [request]
        destination = "images"
        scrub = "unlink"
        [openstack]
        clouds_yaml = "/etc/autobackup/clouds.yaml"
        call_timeout = "8s"
        stall_timeout = "45s"
        reply_timeout = "20m"
        [api]
        socket = "/run/a.sock"
        group = "ops"
        [[destination]]
        name = "a.B_c-9"
        store = "directory"
        path = "/srv/a"
        key = "keyfile"
        keyfile = "/k/new"
        older_keyfiles = ["/k/old", "/k/older"]
        retention = "30d"
        verify = "readback"
        must_be_mount = true
        reserve = "200GiB"
        rate = "64KiB"
        [[destination]]
        name = "images"
        store = "glance"
        cloud = "lab"
        project = "vault"
        project_domain = "backups"
        members = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"]
        key = "barbican"
        readers = ["0123456789abcdef0123456789abcdef"]
        project_access = true
        [[destination]]
        name = "offsite"
        store = "directory"
        path = "/srv/b"
        key = "recipient"
        recipients = ["/k/alice.pub", "/k/bob.pub"]
        [[rule]]
        name = "web"
        destinations = ["a.B_c-9"]
        scrub = "random"
        [rule.match]
        name = "web-*"
        uuid = "6a*"
        project = "5f*"
        """
    )
    assert config == Config(
        instances_path=Path("/i"),
        verdict="libvirt",
        verdict_despite_nova=True,
        nova_conf=Path("/n.conf"),
        reserve_bytes=8 * MiB,
        libvirt=LibvirtSection(uri="test:///default", call_timeout_s=7, keepalive_interval_s=2, reconnect_longest_s=60),
        capture=CaptureSection(
            quiet_period_s=90,
            leaked_after_s=7200,
            scan_interval_s=600,
            undecided_longest_s=3600,
            undefined_is_released=True,
            filesystems=("tmpfs",),
        ),
        sealing=SealingSection(
            compression="none",
            compress_threads=3,
            parallel_jobs=4,
            cpu_tokens=5,
            detach_after_s=0.5,
            rate_bytes=100 * MiB,
        ),
        retry=RetrySection(first_s=0.25, longest_s=21600),
        openstack=OpenstackSection(
            clouds_yaml=Path("/etc/autobackup/clouds.yaml"), call_timeout_s=8, stall_timeout_s=45, reply_timeout_s=1200
        ),
        api=ApiSection(socket=Path("/run/a.sock"), group="ops"),
        request=RequestSection(destination="images", scrub="unlink"),
        destination=(
            Destination(
                name="a.B_c-9",
                store="directory",
                path=Path("/srv/a"),
                key="keyfile",
                keyfile=Path("/k/new"),
                older_keyfiles=(Path("/k/old"), Path("/k/older")),
                retention_s=2_592_000,
                verify="readback",
                must_be_mount=True,
                reserve_bytes=200 * GiB,
                rate_bytes=64 * KiB,
            ),
            Destination(
                name="images",
                store="glance",
                cloud="lab",
                project="vault",
                project_domain="backups",
                members=("a" * 32, "b" * 32),
                key="barbican",
                readers=("0123456789abcdef0123456789abcdef",),
                project_access=True,
            ),
            Destination(
                name="offsite",
                store="directory",
                path=Path("/srv/b"),
                key="recipient",
                recipients=(Path("/k/alice.pub"), Path("/k/bob.pub")),
            ),
        ),
        rule=(
            Rule(
                name="web",
                destinations=("a.B_c-9",),
                scrub="random",
                match=Match(name="web-*", uuid="6a*", project="5f*"),
            ),
        ),
    )


def test_the_spool_is_inside_the_instances_folder(folder: Folder) -> None:
    """A hard link cannot cross a mount."""
    assert folder.read('instances_path = "/data/nova"').spool_path == Path("/data/nova/.autobackup")


def test_nothing_of_a_configuration_can_be_changed_afterwards() -> None:
    for section in _sections():
        assert section.__dataclass_params__.frozen  # type: ignore[attr-defined]


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


# ---- unknown and missing keys -------------------------------------------------------------------------------

HEADS = {
    "": "",
    "libvirt": "[libvirt]\n",
    "capture": "[capture]\n",
    "sealing": "[sealing]\n",
    "retry": "[retry]\n",
    "openstack": "[openstack]\n",
    "request": "[request]\n",
    "api": "[api]\n",
    "destination[1]": DESTINATION,
    "rule[1]": DESTINATION + RULE,
    "rule[1].match": DESTINATION + RULE + "[rule.match]\n",
}


def _sections() -> dict[type, str]:
    """Every table of the configuration: its class, and the words for it."""
    return {
        Config: "",
        LibvirtSection: "libvirt",
        CaptureSection: "capture",
        SealingSection: "sealing",
        RetrySection: "retry",
        OpenstackSection: "openstack",
        RequestSection: "request",
        ApiSection: "api",
        Destination: "destination[1]",
        Rule: "rule[1]",
        Match: "rule[1].match",
    }


def _keys(section: type) -> list[str]:
    """As an operator writes them: the value carries the unit."""
    names = [field.name for field in dataclasses.fields(section)]
    return [re.sub(r"_(bytes|s)$", "", name) for name in names]


ALL_KEYS = [(where, key) for section, where in _sections().items() for key in _keys(section)]


def test_no_table_is_forgotten_here() -> None:
    named = {hint for hint in get_type_hints(Config).values() if dataclasses.is_dataclass(hint)}
    assert named | {Config, Destination, Rule, Match} == set(_sections())


@pytest.mark.parametrize(("where", "key"), ALL_KEYS)
def test_a_misspelt_key_is_told_its_nearest_neighbour(folder: Folder, where: str, key: str) -> None:
    wrong = key + "x"
    line = folder.refuse_once(HEADS[where] + f"{wrong} = 1\n")
    assert line == f"{folder.main}: unknown key '{where}{'.' if where else ''}{wrong}'; did you mean '{key}'?"


@pytest.mark.parametrize("where", _sections().values())
def test_a_key_that_is_like_no_other_is_told_all_of_its_table(folder: Folder, where: str) -> None:
    line = folder.refuse_once(HEADS[where] + "zzz9 = 1\n")
    keys = next(_keys(section) for section, words in _sections().items() if words == where)
    assert line.endswith("; known here: " + ", ".join(sorted(keys)))


def test_the_name_of_a_field_is_not_a_key(folder: Folder) -> None:
    """`scan_interval_s` would read like a number of seconds."""
    line = folder.refuse_once('[capture]\nscan_interval_s = "5s"')
    assert line.endswith("unknown key 'capture.scan_interval_s'; did you mean 'scan_interval'?")


def test_a_table_that_does_not_exist_is_an_unknown_key(folder: Folder) -> None:
    assert folder.refuse_once("[captrue]\n").endswith("unknown key 'captrue'; did you mean 'capture'?")
    assert folder.refuse_once("[[destinations]]\n").endswith("unknown key 'destinations'; did you mean 'destination'?")


REQUIRED = [
    (head, where, field.name)
    for head, where, section in ((DESTINATION, "destination[1]", Destination), (RULE, "rule[1]", Rule))
    for field in dataclasses.fields(section)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
]


def test_what_must_be_said_is_said_here() -> None:
    assert [key for _, _, key in REQUIRED] == ["name", "store", "key", "name", "destinations"]


@pytest.mark.parametrize(("head", "where", "key"), REQUIRED)
def test_a_missing_key_is_named(folder: Folder, head: str, where: str, key: str) -> None:
    text = re.sub(rf"^{key} = .*\n", "", head, flags=re.MULTILINE)
    assert folder.refuse_once(text) == f"{folder.main}: '{where}.{key}' is missing; add it"


def test_every_mistake_is_named_at_once(folder: Folder) -> None:
    lines = folder.refuse(
        'colour = 1\n[capture]\nscan_interval = "5 parsecs"\n[sealing]\ncompression = "lz4"\n'
        + DESTINATION
        + "x = 1\n",
        more="[retry]\nfirst = 5\n",
    )
    assert len(lines) == 5
    for line, words in zip(
        sorted(lines, key=lambda line: line.split(": ")[1]),
        ["capture.scan_interval: ", "retry.first: ", "sealing.compression: ", "unknown key 'colour'", "unknown key"],
        strict=True,
    ):
        assert words in line


# ---- values -------------------------------------------------------------------------------------------------

DURATIONS = [
    ("libvirt", "call_timeout"), ("libvirt", "keepalive_interval"), ("libvirt", "reconnect_longest"),
    ("capture", "quiet_period"), ("capture", "leaked_after"), ("capture", "scan_interval"),
    ("capture", "undecided_longest"), ("sealing", "detach_after"), ("retry", "first"), ("retry", "longest"),
    ("openstack", "call_timeout"), ("openstack", "stall_timeout"), ("openstack", "reply_timeout"),
    ("destination[1]", "retention"),
]  # fmt: skip
RATES = [("sealing", "rate"), ("destination[1]", "rate")]
SIZES = [("", "reserve"), ("destination[1]", "reserve"), *RATES]


def test_no_duration_and_no_size_is_forgotten_here() -> None:
    fields = [(where, field.name) for section, where in _sections().items() for field in dataclasses.fields(section)]
    assert {(where, name.removesuffix("_s")) for where, name in fields if name.endswith("_s")} == set(DURATIONS)
    assert {(where, name.removesuffix("_bytes")) for where, name in fields if name.endswith("_bytes")} == set(SIZES)


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


@pytest.mark.parametrize("number", ["5", "0", "5.0", "true"])
@pytest.mark.parametrize(("where", "key"), DURATIONS + SIZES)
def test_a_bare_number_is_refused_with_what_to_write(folder: Folder, where: str, key: str, number: str) -> None:
    line = folder.refuse_once(HEADS[where] + f"{key} = {number}\n")
    example = '"64MiB"' if (where, key) in SIZES else '"30s"'
    assert line == f"{folder.main}: {_dotted(where, key)}: write it in quotes with its unit, as in {example}"


@pytest.mark.parametrize(("where", "key"), DURATIONS)
@pytest.mark.parametrize("text", ["5", "", "-5s", "5 parsecs", "64MiB"])
def test_a_duration_without_a_unit_is_refused_with_the_units(folder: Folder, where: str, key: str, text: str) -> None:
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert line.startswith(f"{folder.main}: {_dotted(where, key)}: {text!r} is not a duration; write numbers with ms,")


@pytest.mark.parametrize(("where", "key"), SIZES)
@pytest.mark.parametrize("text", ["64", "", "-64MiB", "64MB", "5s"])
def test_a_size_without_a_unit_is_refused_with_the_units(folder: Folder, where: str, key: str, text: str) -> None:
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert line.startswith(f"{folder.main}: {_dotted(where, key)}: {text!r} is not a size; write a number and one of")


@pytest.mark.parametrize("text", ["0s", "1ms", "99ms", "2000w", "999999999999999w"])
@pytest.mark.parametrize(("where", "key"), DURATIONS)
def test_a_duration_that_makes_no_sense_is_refused_with_its_limits(
    folder: Folder, where: str, key: str, text: str
) -> None:
    """A pause of nothing is a busy loop; a scan once in forty years is none."""
    if (where, key, text) == ("destination[1]", "retention", "2000w"):
        return
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert re.search(rf": {re.escape(_dotted(where, key))}: must be \d+m?s to \d+[a-z]+$", line)


@pytest.mark.parametrize(("where", "key"), DURATIONS)
def test_the_limits_themselves_are_allowed(folder: Folder, where: str, key: str) -> None:
    line = folder.refuse_once(HEADS[where] + f'{key} = "0s"\n')
    limits = re.search(r"must be (\S+) to (\S+)$", line)
    assert limits is not None
    neighbours = {"quiet_period": 'leaked_after = "30d"', "leaked_after": 'quiet_period = "1s"',
                  "first": 'longest = "1d"', "longest": 'first = "100ms"'}  # fmt: skip
    for limit in limits.groups():
        if (where, key, limit) == ("retry", "first", "1d"):
            continue
        folder.read(HEADS[where] + f'{key} = "{limit}"\n{neighbours.get(key, "")}\n')


def test_the_longest_retention_fits_into_a_header(folder: Folder) -> None:
    """Or the first backup would end the process, and the one after it too."""
    retention_s = folder.read(DESTINATION + 'retention = "36525d"').destination[0].retention_s
    assert retention_s is not None
    header(expires_at_s=4_000_000_000 + int(retention_s))


def test_without_a_retention_a_backup_is_kept(folder: Folder) -> None:
    assert folder.read(DESTINATION).destination[0].retention_s is None


@pytest.mark.parametrize("text", ["0B", "1B", "1023KiB", "2GiB", "1TiB"])
def test_a_reserve_that_cannot_help_is_refused(folder: Folder, text: str) -> None:
    assert folder.refuse_once(f'reserve = "{text}"') == f"{folder.main}: reserve: must be 1MiB to 1GiB"


@pytest.mark.parametrize("text", ["1MiB", "1GiB"])
def test_a_reserve_at_its_limits_is_allowed(folder: Folder, text: str) -> None:
    folder.read(f'reserve = "{text}"')


@pytest.mark.parametrize("text", ["0B", "1B", "63KiB", "65535B", "1.1TiB", "2TiB", "999999999999TiB"])
@pytest.mark.parametrize(("where", "key"), RATES)
def test_a_rate_that_makes_no_sense_is_refused_with_its_limits(folder: Folder, where: str, key: str, text: str) -> None:
    """A rate of nothing would let a job wait for ever, and look as if it were under way."""
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert line == f"{folder.main}: {_dotted(where, key)}: must be 64KiB to 1TiB"


def test_a_rate_at_its_limits_is_allowed_and_without_one_there_is_none(folder: Folder) -> None:
    for text, rate_bytes in (("64KiB", 64 * KiB), ("1TiB", 1024 * GiB)):
        config = folder.read(f'[sealing]\nrate = "{text}"\n' + DESTINATION + f'rate = "{text}"')
        assert (config.sealing.rate_bytes, config.destination[0].rate_bytes) == (rate_bytes, rate_bytes)
    config = folder.read(DESTINATION)
    assert (config.sealing.rate_bytes, config.destination[0].rate_bytes) == (None, None)


def test_a_store_may_be_filled_to_its_last_byte(folder: Folder) -> None:
    assert folder.read(DESTINATION + 'reserve = "0B"').destination[0].reserve_bytes == 0


def test_a_leaked_folder_is_not_judged_sooner_than_an_unlinked_disk(folder: Folder) -> None:
    text = '[capture]\nquiet_period = "2m"\nleaked_after = "1m"'
    assert folder.refuse_once(text) == f"{folder.main}: capture.leaked_after: must not be shorter than quiet_period"
    folder.read('[capture]\nquiet_period = "2m"\nleaked_after = "2m"')


def test_the_longest_pause_is_not_shorter_than_the_first(folder: Folder) -> None:
    text = '[retry]\nfirst = "2m"\nlongest = "1m"'
    assert folder.refuse_once(text) == f"{folder.main}: retry.longest: must not be shorter than first"
    folder.read('[retry]\nfirst = "2m"\nlongest = "2m"')


@pytest.mark.parametrize(
    ("text", "level"),
    [("none", None), ("zstd:-50", -50), ("zstd:-1", -1), ("zstd:1", 1), ("zstd:9", 9)],
)
def test_a_compression_is_a_level_or_none(folder: Folder, text: str, level: int | None) -> None:
    assert folder.read(f'[sealing]\ncompression = "{text}"').sealing.zstd_level == level


@pytest.mark.parametrize(
    "text",
    ["", "zstd", "zstd:", "zstd:fast", "zstd:-51", "zstd:10", "zstd:19", "zstd:1.5", "zstd:1:2", "ZSTD:1", "None",
     "none:1", "gzip:1", "zlib", " zstd:1"],
)  # fmt: skip
def test_any_other_compression_is_refused_with_the_choices(folder: Folder, text: str) -> None:
    line = folder.refuse_once(f'[sealing]\ncompression = "{text}"')
    assert line == (
        f"{folder.main}: sealing.compression: {text!r} is unknown; "
        'write "none" or "zstd:LEVEL" with LEVEL from -50 to 9'
    )


@pytest.mark.parametrize("key", ["compress_threads", "parallel_jobs"])
def test_some_thread_must_do_the_work_and_not_too_many(folder: Folder, key: str) -> None:
    for number in (0, -1, 65, 10**9):
        line = folder.refuse_once(f"[sealing]\n{key} = {number}")
        assert line == f"{folder.main}: sealing.{key}: must be 1 to 64"
    for number in (1, 64):
        assert getattr(folder.read(f"[sealing]\n{key} = {number}").sealing, key) == number


def test_cpu_tokens_are_counted_from_none(folder: Folder) -> None:
    assert folder.refuse_once("[sealing]\ncpu_tokens = -1") == f"{folder.main}: sealing.cpu_tokens: must be 0 or more"
    assert folder.read("[sealing]\ncpu_tokens = 0").sealing.cpu_tokens == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('verdict = "nova"', "verdict"),
        ("verdict = true", "verdict"),
        ('verdict_despite_nova = "perhaps"', "verdict_despite_nova"),
        ("instances_path = 5", "instances_path"),
        ('instances_path = ["/a"]', "instances_path"),
        ('libvirt = "qemu:///system"', "libvirt"),
        ("capture = []", "capture"),
        ("api = 5", "api"),
        ('destination = "vault"', "destination"),
        ("destination = [5]", "destination[1]"),
        ("rule = {}", "rule"),
        ("[libvirt]\nuri = 5", "libvirt.uri"),
        ('[capture]\nfilesystems = "ext4"', "capture.filesystems"),
        ("[capture]\nfilesystems = [4]", "capture.filesystems[1]"),
        ("[capture]\nundefined_is_released = 2", "capture.undefined_is_released"),
        ("[sealing]\ncompression = 3", "sealing.compression"),
        ("[sealing]\ncompress_threads = 1.5", "sealing.compress_threads"),
        ('[sealing]\nparallel_jobs = "many"', "sealing.parallel_jobs"),
        ("[api]\ngroup = 0", "api.group"),
        (DESTINATION.replace('"directory"', '"tape"'), "destination[1].store"),
        (DESTINATION.replace('"directory"', "5"), "destination[1].store"),
        (DESTINATION.replace('"keyfile"', '"vault"'), "destination[1].key"),
        (DESTINATION.replace('"keyfile"', "false"), "destination[1].key"),
        (DESTINATION + 'cloud = ["lab"]', "destination[1].cloud"),
        (DESTINATION + "project = 5", "destination[1].project"),
        (DESTINATION + "project_domain = true", "destination[1].project_domain"),
        (DESTINATION + 'members = "p"', "destination[1].members"),
        (DESTINATION + "members = [5]", "destination[1].members[1]"),
        (DESTINATION + 'readers = "0123456789abcdef0123456789abcdef"', "destination[1].readers"),
        (DESTINATION + 'recipients = "/k"', "destination[1].recipients"),
        (DESTINATION + 'project_access = "perhaps"', "destination[1].project_access"),
        ("openstack = []", "openstack"),
        (DESTINATION + 'verify = "none"', "destination[1].verify"),
        (DESTINATION + 'must_be_mount = "perhaps"', "destination[1].must_be_mount"),
        (DESTINATION + 'older_keyfiles = "/k"', "destination[1].older_keyfiles"),
        (DESTINATION + RULE + "scrub = 0", "rule[1].scrub"),
        (DESTINATION + RULE + 'match = "web-*"', "rule[1].match"),
        (DESTINATION + RULE + "[rule.match]\nname = 5", "rule[1].match.name"),
        (DESTINATION + RULE.replace('["vault"]', '"vault"'), "rule[1].destinations"),
    ],
)
def test_a_value_of_another_kind_is_refused_at_its_key(folder: Folder, text: str, key: str) -> None:
    assert folder.refuse_once(text).startswith(f"{folder.main}: {key}: ")


def test_a_table_where_a_table_is_wanted_is_asked_for_by_its_head(folder: Folder) -> None:
    line = folder.refuse_once('libvirt = "qemu:///system"')
    assert line == f"{folder.main}: libvirt: must be a table: write [libvirt] above its keys"
    assert folder.refuse_once("[rule]\nname = 'x'") == f"{folder.main}: rule: must be a list"


# ---- paths --------------------------------------------------------------------------------------------------

PATHS = [
    ("", "instances_path"), ("", "nova_conf"), ("api", "socket"), ("destination[1]", "path"),
    ("destination[1]", "keyfile"), ("openstack", "clouds_yaml"),
]  # fmt: skip


@pytest.mark.parametrize("path", ["", ".", "instances", "./instances", "../instances", "~/instances"])
@pytest.mark.parametrize(("where", "key"), PATHS)
def test_a_relative_path_is_refused(folder: Folder, where: str, key: str, path: str) -> None:
    """The service starts in `/`, and an operator's `check-config` anywhere: they would not mean the same."""
    head = re.sub(rf"^{key} = .*\n", "", HEADS[where], flags=re.MULTILINE)
    line = folder.refuse_once(head + f'{key} = "{path}"\n')
    assert line.startswith(f"{folder.main}: {_dotted(where, key)}: '")
    assert "must be an absolute path" in line


def test_a_relative_older_key_file_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + 'older_keyfiles = ["/k/old", "kek"]')
    assert line.startswith(f"{folder.main}: destination[1].older_keyfiles[2]: 'kek' must be an absolute path")


def test_a_relative_recipient_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + 'recipients = ["/k/alice.pub", "bob.pub"]')
    assert line.startswith(f"{folder.main}: destination[1].recipients[2]: 'bob.pub' must be an absolute path")


def test_a_path_is_taken_as_it_is_written(folder: Folder) -> None:
    """
    The text does not depend on the machine: a symbolic link is neither followed nor refused here.

    Whether one will do is said at start, by the room that uses it.
    """
    real, link = folder.path / "data", folder.path / "instances"
    real.mkdir()
    link.symlink_to(real)
    config = folder.read(f'instances_path = "{link}"')
    assert config.instances_path == link
    assert config.spool_path == link / ".autobackup"


def test_a_socket_path_that_no_kernel_takes_is_refused(folder: Folder) -> None:
    longest = "/" + "s" * 106
    assert folder.read(f'[api]\nsocket = "{longest}"').api.socket == Path(longest)
    for path in (longest + "s", "/" + "ß" * 60):
        line = folder.refuse_once(f'[api]\nsocket = "{path}"')
        assert line.startswith(f"{folder.main}: api.socket: a socket's path has at most 107 bytes")


# ---- destinations and rules ---------------------------------------------------------------------------------


def header(*, destination: str = "vault", expires_at_s: int | None = None) -> Header:
    """What a bundle's header can hold: it refuses the rest with `ValueError`."""
    return Header(
        job="job", attempt="attempt", instance="6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e", destination=destination,
        created_at_s=0, expires_at_s=expires_at_s,
        key={"source": "keyfile", "kek_id": "0" * 16, "wrapped": "A" * 53 + "A=="}, parent=None,
    )  # fmt: skip


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
    assert line == f"{folder.main}: rule[1].destinations: rule 'everything' names no destination; add one"


def test_a_rule_without_a_name_is_refused(folder: Folder) -> None:
    line = folder.refuse_once(DESTINATION + RULE.replace("everything", ""))
    assert line == f"{folder.main}: rule[1].name: must not be empty"


def test_a_rule_matches_anything_unless_told_otherwise(folder: Folder) -> None:
    assert folder.read(DESTINATION + RULE).rule[0].match == Match(name="*", uuid="*", project="*")


# ---- the example that is shipped ----------------------------------------------------------------------------

COMMENTED = re.compile(r"^#(?=[a-z\[])", re.MULTILINE)


@pytest.fixture(scope="module")
def example() -> str:
    return EXAMPLE.read_text("utf-8")


def _uncommented(example: str) -> Mapping[str, Any]:
    return tomllib.loads(COMMENTED.sub("", example))


def test_the_example_as_it_is_shipped_says_nothing(folder: Folder, example: str) -> None:
    """It is installed as the configuration: the agent starts with it, and captures nothing."""
    assert folder.read(example) == Config()
    assert folder.read(re.sub(r"^(?!#|$)", "#", example, flags=re.MULTILINE)) == Config()


def _without_optional(config: Config) -> Config:
    """*config* without the keys that have no default: the example shows what could stand there."""
    return dataclasses.replace(
        config,
        sealing=dataclasses.replace(config.sealing, rate_bytes=None),
        openstack=dataclasses.replace(config.openstack, clouds_yaml=None),
    )


def test_the_example_uncommented_says_every_default(folder: Folder, example: str) -> None:
    config = folder.read(COMMENTED.sub("", example))
    assert dataclasses.replace(_without_optional(config), destination=(), rule=()) == Config()
    assert config.sealing.rate_bytes is not None
    assert config.openstack.clouds_yaml is not None
    for destination in config.destination:
        assert dataclasses.replace(destination, retention_s=None, rate_bytes=None) == Destination(
            name=destination.name,
            store=destination.store,
            path=destination.path,
            cloud=destination.cloud,
            key=destination.key,
            keyfile=destination.keyfile,
            recipients=destination.recipients,
        )
    (rule,) = config.rule
    assert rule == Rule(name=rule.name, destinations=(config.destination[0].name,))


def test_the_example_shows_every_store_and_every_source_of_keys_that_needs_a_key_of_its_own(
    folder: Folder, example: str
) -> None:
    destinations = folder.read(COMMENTED.sub("", example)).destination
    assert {one.store for one in destinations} == {"directory", "glance"}
    assert {one.key for one in destinations} == {"keyfile", "barbican", "recipient"}
    assert '"none"' in example


def test_every_destination_of_the_example_can_be_uncommented_by_itself(folder: Folder, example: str) -> None:
    """They are ways to do it, not parts of one."""
    everything = folder.read(COMMENTED.sub("", example)).destination
    before, *blocks = example.split("#[[destination]]")
    for one, block in zip(everything, blocks, strict=True):
        alone = COMMENTED.sub("", "#[[destination]]" + block.partition("#[[rule]]")[0])
        assert folder.read(before + alone).destination == (one,)


def test_every_line_of_the_example_can_be_uncommented_by_itself(folder: Folder, example: str) -> None:
    """The heads of the sections are not commented: a key never lands in another table."""
    lines = example.splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("#[[")]
    for n, line in enumerate(lines[: heads[0]]):
        if COMMENTED.match(line):
            read = folder.read("\n".join([*lines[:n], line[1:], *lines[n + 1 :]]))
            assert _without_optional(read) == Config(), line


@pytest.mark.parametrize(("section", "where"), _sections().items(), ids=lambda one: getattr(one, "__name__", None))
def test_every_key_appears_in_the_example(example: str, section: type, where: str) -> None:
    """No destination has all of them: not all go together."""
    tables: list[Any] = [_uncommented(example)]
    for part in where.split(".") if where else ():
        found = [table[part.removesuffix("[1]")] for table in tables]
        tables = [one for entries in found for one in entries] if part.endswith("[1]") else found
    # `match` stands last in the example, since whatever follows a table's head belongs to the table
    assert {key for table in tables for key in table} == set(_keys(section))


def test_every_key_of_the_example_is_explained_in_one_line(example: str) -> None:
    lines = example.splitlines()
    for n, line in enumerate(lines):
        if re.match(r"#[a-z_]+ = ", line):
            assert re.match(r"# .+[.?)]|# .+: ", lines[n - 1]), line
            assert not lines[n - 2].startswith("#"), f"{line}: explained in more than one line"
        assert len(line) <= 120


def test_no_key_holds_a_secret() -> None:
    """Keys are named by file: a configuration may lie in a repository, and is printed by `check-config`."""
    for where, key in ALL_KEYS:
        assert not re.search("secret|password|token$|private", key), (where, key)


def _toml_blocks(file: Path) -> Iterator[str]:
    yield from re.findall(r"^```toml\n(.*?)^```", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_in_the_readme_loads(folder: Folder) -> None:
    blocks = list(_toml_blocks(REPOSITORY / "README.md"))
    assert blocks
    for block in blocks:
        assert folder.read(block).rule


def test_the_file_is_where_the_readme_says() -> None:
    assert f" {DEFAULT_PATH}\n" in (REPOSITORY / "README.md").read_text("utf-8")
