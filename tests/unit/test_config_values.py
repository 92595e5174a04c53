"""What a value may be: its unit, its kind, its limits, an absolute path."""

import dataclasses
import re
from pathlib import Path

import pytest
from tests.unit.config_files import DESTINATION, HEADS, RULE, SECTIONS, Folder, dotted, header

from autobackup.units import GiB, KiB


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- values -------------------------------------------------------------------------------------------------

DURATIONS = [
    ("libvirt", "call_timeout"), ("libvirt", "keepalive_interval"), ("libvirt", "reconnect_longest"),
    ("capture", "quiet_period"), ("capture", "leaked_after"), ("capture", "scan_interval"),
    ("capture", "undecided_longest"), ("sealing", "detach_after"), ("retry", "first"), ("retry", "longest"),
    ("openstack", "call_timeout"), ("openstack", "stall_timeout"), ("openstack", "reply_timeout"),
    ("destination[1]", "retention"), ("nova", "refresh_interval"), ("rule[1]", "retention"),
    ("request", "retention_longest"),
]  # fmt: skip
RATES = [("sealing", "rate"), ("destination[1]", "rate")]
SIZES = [
    ("", "reserve"), ("destination[1]", "reserve"), ("request", "disk_at_most"), ("rule[1].match", "disk_at_least"),
    ("rule[1].match", "disk_at_most"), *RATES,
]  # fmt: skip


def test_no_duration_and_no_size_is_forgotten_here() -> None:
    fields = [(where, field.name) for section, where in SECTIONS.items() for field in dataclasses.fields(section)]
    assert {(where, name.removesuffix("_s")) for where, name in fields if name.endswith("_s")} == set(DURATIONS)
    assert {(where, name.removesuffix("_bytes")) for where, name in fields if name.endswith("_bytes")} == set(SIZES)


@pytest.mark.parametrize("number", ["5", "0", "5.0", "true"])
@pytest.mark.parametrize(("where", "key"), DURATIONS + SIZES)
def test_a_bare_number_is_refused_with_what_to_write(folder: Folder, where: str, key: str, number: str) -> None:
    line = folder.refuse_once(HEADS[where] + f"{key} = {number}\n")
    example = '"64MiB"' if (where, key) in SIZES else '"30s"'
    assert line == f"{folder.main}: {dotted(where, key)}: write it in quotes with its unit, as in {example}"


@pytest.mark.parametrize(("where", "key"), DURATIONS)
@pytest.mark.parametrize("text", ["5", "", "-5s", "5 parsecs", "64MiB"])
def test_a_duration_without_a_unit_is_refused_with_the_units(folder: Folder, where: str, key: str, text: str) -> None:
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert line.startswith(f"{folder.main}: {dotted(where, key)}: {text!r} is not a duration; write numbers with ms,")


@pytest.mark.parametrize(("where", "key"), SIZES)
@pytest.mark.parametrize("text", ["64", "", "-64MiB", "64MB", "5s"])
def test_a_size_without_a_unit_is_refused_with_the_units(folder: Folder, where: str, key: str, text: str) -> None:
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert line.startswith(f"{folder.main}: {dotted(where, key)}: {text!r} is not a size; write a number and one of")


@pytest.mark.parametrize("text", ["0s", "1ms", "99ms", "2000w", "999999999999999w"])
@pytest.mark.parametrize(("where", "key"), DURATIONS)
def test_a_duration_that_makes_no_sense_is_refused_with_its_limits(
    folder: Folder, where: str, key: str, text: str
) -> None:
    """A pause of nothing is a busy loop; a scan once in forty years is none."""
    if key.startswith("retention") and text == "2000w":
        return
    line = folder.refuse_once(HEADS[where] + f'{key} = "{text}"\n')
    assert re.search(rf": {re.escape(dotted(where, key))}: must be \d+m?s to \d+[a-z]+$", line)


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
    assert line == f"{folder.main}: {dotted(where, key)}: must be 64KiB to 1TiB"


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
        ('verdict = "keystone"', "verdict"),
        ('rule_mode = "all"', "rule_mode"),
        ('aggregates = "ssd"', "aggregates"),
        ("aggregates = [1]", "aggregates[1]"),
        ("[nova]\ncloud = 1", "nova.cloud"),
        ("[nova]\nhost = ['a']", "nova.host"),
        ('[request]\nsources = ["letter"]', "request.sources[1]"),
        ('[request]\nsources = "socket"', "request.sources"),
        ('[request]\nprojects = ["demo"]', "request.projects[1]"),
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
        (DESTINATION + RULE + 'on = ["terminate", "reboot"]', "rule[1].on[2]"),
        (DESTINATION + RULE + 'on = "terminate"', "rule[1].on"),
        (DESTINATION + RULE + 'disks = ["root", "disk.local"]', "rule[1].disks[2]"),
        (DESTINATION + RULE + 'requests = "deny"', "rule[1].requests"),
        (DESTINATION + RULE + 'exclude = "perhaps"', "rule[1].exclude"),
        (DESTINATION + RULE + "may_decline = 2", "rule[1].may_decline"),
        (DESTINATION + RULE + '[rule.match]\nextra_specs = "large"', "rule[1].match.extra_specs"),
        (DESTINATION + RULE + "[rule.match]\nextra_specs = { a = 1 }", "rule[1].match.extra_specs.a"),
        (DESTINATION + RULE + "[rule.match]\nimage_properties = { a = true }", "rule[1].match.image_properties.a"),
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
    assert line.startswith(f"{folder.main}: {dotted(where, key)}: '")
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
