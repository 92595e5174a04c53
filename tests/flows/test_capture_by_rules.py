"""From a disk that is held to a job, as the rules have it: which disks and copies, on which occasion, and who waits."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.capturing import Capturing, capturing

from autobackup.config import Config
from autobackup.model import DiskKind, JobState, Occasion, Request, RequestSource, VerdictKind
from autobackup.rules.policy import Rulebook
from autobackup.rules.termination import Answer, Host, Word
from autobackup.service.witness import rulebook
from autobackup.terms import Match, RequestSection, Rule

DISKS = {
    name: os.urandom(5000)
    for name in ("disk", "disk.eph0", "disk.eph1", "disk.local", "disk.swap", "disk.config", "console.log")
}
KINDS = {
    DiskKind.ROOT: {"disk"},
    DiskKind.EPHEMERAL: {"disk.eph0", "disk.eph1", "disk.local"},
    DiskKind.SWAP: {"disk.swap"},
    DiskKind.CONFIG_DRIVE: {"disk.config"},
}
ALWAYS = {"console.log"}
ALL = Rule(name="all", destinations=("one",))
OWN = "a" * 32
NOVAS = '<n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1"><n:name>w</n:name></n:instance>'
DELETED_HERE = Word(answer=Answer.DELETED, host=Host.HERE)
SHELVED = Word(answer=Answer.SERVER, host=Host.NONE, vm_state="shelved_offloaded")


def _selections() -> list[tuple[DiskKind, ...]]:
    others = [kind for kind in DiskKind if kind is not DiskKind.ROOT]
    return [(DiskKind.ROOT, *some) for count in range(4) for some in itertools.combinations(others, count)]


@pytest.mark.parametrize("disks", _selections(), ids=lambda disks: "+".join(disks))
async def test_the_disks_of_a_rule_are_captured_and_the_others_let_go(
    tmp_path: Path, disks: tuple[DiskKind, ...]
) -> None:
    with capturing(tmp_path, Rulebook(rules=[replace(ALL, disks=disks)])) as host:
        instance = await host.lived(DISKS)
        assert host.held(instance) == DISKS.keys(), "a disk that is left out may be wanted by the rules of tomorrow"
        await host.died(instance)
        assert host.captured() == ALWAYS.union(*(KINDS[kind] for kind in disks))
        assert host.job().files[0].disk == "disk"
        assert host.held(instance) == set()
        links = {path.name.split(".", 1)[1].rpartition(".")[0] for path in _claims(host).iterdir()}
        assert links == host.captured(), "what was let go still takes its room"


def _claims(host: Capturing) -> Path:
    return Path(host.rig.spool.path) / "claims"


async def test_a_rule_takes_them_all_unless_it_says_which(tmp_path: Path) -> None:
    with capturing(tmp_path, Rulebook(rules=[ALL])) as host:
        await host.died(await host.lived(DISKS))
        assert host.captured() == DISKS.keys()


async def test_no_disk_is_let_go_while_it_cannot_be_told_which_rule_applies(tmp_path: Path) -> None:
    """The operator who decides may decide for the rule that wants it."""
    rules = [replace(ALL, name="gold", match=Match(domain="gold"), disks=(DiskKind.ROOT,)), ALL]
    with capturing(tmp_path, Rulebook(rules=rules)) as host:
        await host.died(await host.lived(DISKS, metadata=NOVAS))
        assert host.job().state is JobState.PARKED
        assert "domain" in host.job().last_error
        assert host.captured() == DISKS.keys()


async def test_an_uncertain_job_is_parked_from_its_first_record_on(tmp_path: Path) -> None:
    """A kill between two writes must not send what an operator was to decide."""
    rules = [replace(ALL, match=Match(domain="gold"))]
    with capturing(tmp_path, Rulebook(rules=rules)) as host:
        await host.died(await host.lived(DISKS, metadata=NOVAS))
        assert {record.state for record in host.rig.journal} <= {JobState.PARKED}
        assert host.job().state is JobState.PARKED


@pytest.mark.parametrize("asks_nova", [False, True])
async def test_the_default_configuration_lets_every_disk_go_and_asks_nobody(tmp_path: Path, asks_nova: bool) -> None:
    with capturing(tmp_path, rulebook(Config()), asks_nova=asks_nova) as host:
        instance = await host.lived(DISKS)
        await host.died(instance)
        assert host.rig.jobs.all() == []
        assert host.held(instance) == set()
        assert host.inquiry.asked == []
        assert list(_claims(host).iterdir()) == []


async def test_what_is_excluded_never_waits_for_nova(tmp_path: Path) -> None:
    rules = [Rule(name="scratch", exclude=True, match=Match(name="tmp-*")), ALL]
    with capturing(tmp_path, Rulebook(rules=rules), asks_nova=True) as host:
        instance = await host.lived(DISKS, name="tmp-1")
        await host.died(instance)
        assert (host.rig.jobs.all(), host.held(instance), host.inquiry.asked) == ([], set(), [])
        kept = await host.lived(DISKS, name="web-1")
        await host.died(kept)
        assert host.held(kept) == DISKS.keys()
        assert host.inquiry.asked == [kept]


async def test_a_rule_for_a_rebuild_alone_excludes_no_termination(tmp_path: Path) -> None:
    """Whether a disk may be wanted is asked before anybody knows what became of it."""
    rules = [Rule(name="no", exclude=True, on=(Occasion.REBUILD, Occasion.SHELVE_OFFLOAD)), ALL]
    with capturing(tmp_path, Rulebook(rules=rules), asks_nova=True) as host:
        instance = await host.lived(DISKS)
        host.inquiry.words[instance] = DELETED_HERE
        await host.died(instance)
        assert (host.job().verdict, host.job().occasion) == (VerdictKind.TERMINATED, Occasion.TERMINATE)


@pytest.mark.parametrize("on", [(Occasion.TERMINATE,), (Occasion.SHELVE_OFFLOAD,), tuple(Occasion)])
async def test_a_shelved_disk_is_taken_where_a_rule_names_that_and_let_go_otherwise(
    tmp_path: Path, on: tuple[Occasion, ...]
) -> None:
    with capturing(tmp_path, Rulebook(rules=[replace(ALL, on=on)]), asks_nova=True) as host:
        instance = await host.lived(DISKS)
        host.inquiry.words[instance] = SHELVED
        await host.died(instance)
        assert host.held(instance) == set()
        if Occasion.SHELVE_OFFLOAD in on:
            assert (host.job().verdict, host.job().occasion) == (VerdictKind.MOVED, Occasion.SHELVE_OFFLOAD)
        else:
            assert host.rig.jobs.all() == []


async def test_the_terms_of_rule_and_owner_go_with_their_copies(tmp_path: Path) -> None:
    caps = RequestSection(destination="owners", scrub="unlink")
    rules = [Rule(name="a", destinations=("one",), retention_s=60.0), Rule(name="b", destinations=("one", "two"))]
    wish = Request(project=OWN, retention_s=9.0, source=RequestSource.SERVER)
    with capturing(tmp_path, Rulebook(rules=rules, mode="additive", requests=caps)) as host:
        instance = await host.lived(DISKS)
        await host.learn.set_request(instance, wish)
        await host.died(instance)
        copies = {copy.destination: (copy.retention_s, copy.request) for copy in host.job().copies}
        assert copies == {"one": (None, None), "two": (None, None), f"owners.{OWN}": (None, wish)}
        assert host.job().rule == "a, b"


async def test_a_wish_whose_project_was_not_asked_yet_is_waited_for(tmp_path: Path) -> None:
    caps = RequestSection(destination="owners")
    with capturing(tmp_path, Rulebook(requests=caps), asks_nova=True) as host:
        instance = await host.lived(DISKS)
        await host.learn.set_request(instance, Request(project=OWN, source=RequestSource.SERVER, asked=False))
        host.inquiry.words[instance] = DELETED_HERE
        await host.died(instance)
        assert host.rig.jobs.all() == []
        assert host.held(instance) == DISKS.keys()
        (waiting,) = host.capture.undecided()
        assert "has not been asked yet" in str(waiting["reason"])
        await host.learn.set_request(instance, Request(project=OWN, source=RequestSource.SERVER))
        await host.look(instance)
        assert [copy.destination for copy in host.job().copies] == [f"owners.{OWN}"]


async def test_an_owner_who_was_never_heard_makes_a_job_that_an_operator_decides(tmp_path: Path) -> None:
    """It has nowhere to go, and its disks are nobody's to let go."""
    book = Rulebook(requests=RequestSection(destination="owners"), hears_owners=True)
    with capturing(tmp_path, book, asks_nova=True) as host:
        instance = await host.lived(DISKS, metadata=NOVAS)
        assert host.inquiry.refreshed_count == 1
        host.inquiry.words[instance] = DELETED_HERE
        await host.died(instance)
        assert (host.job().state, host.job().copies) == (JobState.PARKED, ())
        assert "owner" in host.job().last_error
        await host.rig.jobs.order_retry(host.job().job)
        await host.rig.run_to_the_end(host.job().job)
        assert host.job().state is JobState.PARKED, "it was taken for done with no copy at all"
        assert host.captured() == DISKS.keys()
