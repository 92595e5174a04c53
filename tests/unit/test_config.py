"""
The configuration is refused whole if a word of it is wrong, in words that name file, key and remedy.

Every promise is tested through `load`, on files: what an operator writes, and what he reads when it is wrong.
"""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from tests.unit.config_files import ALL_KEYS, DESTINATION, HEADS, RULE, SECTIONS, Folder, keys_of

from autobackup.config import (
    ApiSection,
    CaptureSection,
    Config,
    LibvirtSection,
    NovaSection,
    OpenstackSection,
    RetrySection,
    SealingSection,
)
from autobackup.model import DiskKind, Occasion, RequestSource
from autobackup.terms import Destination, Match, RequestSection, Rule
from autobackup.units import GiB, KiB, MiB


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
        verdict = "nova"
        verdict_despite_nova = true
        nova_conf = "/n.conf"
        reserve = "8MiB"
        rule_mode = "additive"
        aggregates = ["ssd", "rack-7"]
        [nova]
        cloud = "lab"
        project = "backup"
        project_domain = "ops"
        host = "compute-1"
        refresh_interval = "1m"
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
        sources = ["flavor", "socket"]
        projects = ["cccccccccccccccccccccccccccccccc"]
        retention_longest = "90d"
        disk_at_most = "100GiB"
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
        on = ["shelve-offload", "rebuild"]
        retention = "1w"
        disks = ["root", "swap"]
        requests = "forbid"
        may_decline = true
        [rule.match]
        name = "web-*"
        uuid = "6a*"
        project = "5f*"
        user = "alice"
        domain = "default"
        flavor = "m1.*"
        extra_specs = { "hw:mem_page_size" = "large" }
        image = "1*"
        image_properties = { os_distro = "debian", os_version = "12*" }
        aggregate = "ssd"
        disk_at_least = "1GiB"
        disk_at_most = "2TiB"
        [[rule]]
        name = "scratch"
        exclude = true
        """
    )
    assert config == Config(
        instances_path=Path("/i"),
        verdict="nova",
        verdict_despite_nova=True,
        nova_conf=Path("/n.conf"),
        reserve_bytes=8 * MiB,
        rule_mode="additive",
        aggregates=("ssd", "rack-7"),
        nova=NovaSection(cloud="lab", project="backup", project_domain="ops", host="compute-1", refresh_interval_s=60),
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
        request=RequestSection(
            destination="images",
            scrub="unlink",
            sources=(RequestSource.FLAVOR, RequestSource.SOCKET),
            projects=("c" * 32,),
            retention_longest_s=7_776_000,
            disk_at_most_bytes=100 * GiB,
        ),
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
                on=(Occasion.SHELVE_OFFLOAD, Occasion.REBUILD),
                retention_s=604_800,
                disks=(DiskKind.ROOT, DiskKind.SWAP),
                requests="forbid",
                may_decline=True,
                match=Match(
                    name="web-*",
                    uuid="6a*",
                    project="5f*",
                    user="alice",
                    domain="default",
                    flavor="m1.*",
                    extra_specs={"hw:mem_page_size": "large"},
                    image="1*",
                    image_properties={"os_distro": "debian", "os_version": "12*"},
                    aggregate="ssd",
                    disk_at_least_bytes=1 * GiB,
                    disk_at_most_bytes=2048 * GiB,
                ),
            ),
            Rule(name="scratch", exclude=True),
        ),
    )


def test_the_spool_is_inside_the_instances_folder(folder: Folder) -> None:
    """A hard link cannot cross a mount."""
    assert folder.read('instances_path = "/data/nova"').spool_path == Path("/data/nova/.autobackup")


def test_nothing_of_a_configuration_can_be_changed_afterwards() -> None:
    for section in SECTIONS:
        assert section.__dataclass_params__.frozen  # type: ignore[attr-defined]


# ---- unknown and missing keys -------------------------------------------------------------------------------


def test_no_table_is_forgotten_here() -> None:
    named = {hint for hint in get_type_hints(Config).values() if dataclasses.is_dataclass(hint)}
    assert named | {Config, Destination, Rule, Match} == set(SECTIONS)


@pytest.mark.parametrize(("where", "key"), ALL_KEYS)
def test_a_misspelt_key_is_told_its_nearest_neighbour(folder: Folder, where: str, key: str) -> None:
    wrong = key + "x"
    line = folder.refuse_once(HEADS[where] + f"{wrong} = 1\n")
    assert line == f"{folder.main}: unknown key '{where}{'.' if where else ''}{wrong}'; did you mean '{key}'?"


@pytest.mark.parametrize("where", SECTIONS.values())
def test_a_key_that_is_like_no_other_is_told_all_of_its_table(folder: Folder, where: str) -> None:
    line = folder.refuse_once(HEADS[where] + "zzz9 = 1\n")
    keys = next(keys_of(section) for section, words in SECTIONS.items() if words == where)
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
    assert [key for _, _, key in REQUIRED] == ["name", "store", "key", "name"]


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
