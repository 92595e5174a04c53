"""
The 22 traps of facts/nova.md, section 8, by their numbers, and its order of decision, step by step.

A trap that another room has to avoid has its test there; the one here names it, fails when it is gone, and says what
the verdict does about the same trap. What holds of every combination of facts is in `test_nova_invariants`.
"""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.rules.every_combination import TASKS, VM_STATES
from tests.unit.rules.nova_rows import (
    ALIVE,
    ELSEWHERE,
    HERE,
    LEAKED_S,
    MOVED,
    NOWHERE,
    OFFLOADED,
    QUIET_S,
    REBUILD,
    REPLACED,
    SHELVE_OFFLOAD,
    SILENT,
    TERMINATE,
    TERMINATED,
    UNDECIDED,
    deleted,
    gone,
    no_record,
    off,
    running,
    server,
    undefined,
    under_the_guest,
    unlinked,
)

from autobackup.model import VerdictKind
from autobackup.rules.termination import NOT_ASKED, Answer, Domain, Facts, Host, Lease, Place, Word, decide

TESTS = Path(__file__).parents[2]


def kind_of(facts: Facts) -> VerdictKind:
    return decide(facts).kind


def kept_by(module: str, *names: str) -> None:
    """These tests exist; they keep the promise of which this trap is another room's part."""
    text = (TESTS / module).read_text()
    for name in names:
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{module} has no {name} any more"


# ---- the traps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["rebuilding", "rebuild_block_device_mapping", "rebuild_spawning"])
def test_trap_01_rebuild(task: str) -> None:
    """On the host a delete to the last fact, for minutes: nothing but Nova's word differs."""
    asked = gone(NOT_ASKED, quiet_s=LEAKED_S)
    assert decide(asked).asks_nova
    assert kind_of(replace(asked, nova=server(task=task))) is UNDECIDED
    assert kind_of(replace(asked, nova=deleted())) is TERMINATED
    assert decide(replace(asked, nova=server(task=task), other_root_disk=True)).occasion is REBUILD


def test_trap_02_confirm() -> None:
    """Stopped for days, then unlinked and undefined: the server lives elsewhere, by its record's host."""
    for end in (unlinked, gone):
        assert kind_of(end(server(host=ELSEWHERE), last=Place.RESIZE)) is MOVED
    assert kind_of(gone(deleted(ELSEWHERE), last=Place.RESIZE)) is MOVED
    # without a record the folder is the only hint, and it is enough to wait
    assert kind_of(gone(no_record(), last=Place.RESIZE, quiet_s=LEAKED_S)) is UNDECIDED
    assert kind_of(gone(no_record(), last=Place.INSTANCE, quiet_s=LEAKED_S)) is TERMINATED


def test_trap_03_shelve() -> None:
    """A choice of policy, under its own name: never a termination, and never without a word that can be chosen."""
    verdict = decide(gone(OFFLOADED))
    assert (verdict.kind, verdict.occasion) == (MOVED, SHELVE_OFFLOAD)
    for task in ("shelving", "shelving_image_pending_upload", "shelving_image_uploading", "shelving_offloading"):
        assert kind_of(gone(server("active", task), quiet_s=LEAKED_S)) is UNDECIDED
    # deleted after that: no host's record, and an operator must say
    assert kind_of(gone(deleted(NOWHERE), quiet_s=LEAKED_S)) is UNDECIDED


def test_trap_04_revert() -> None:
    """On the same host the new disk is unlinked after UNDEFINED; on another the record goes back to the source."""
    reverting = server("resized", "resize_reverting")
    for new in (undefined(reverting), gone(reverting), gone(reverting, quiet_s=LEAKED_S)):
        assert kind_of(new) is UNDECIDED
    assert kind_of(gone(server(host=ELSEWHERE))) is MOVED
    verdict = decide(gone(server(), other_root_disk=True, was_reverted=True))
    assert (verdict.kind, verdict.occasion) == (REPLACED, None)
    for old in (undefined(reverting, place=Place.RESIZE, is_current=False), undefined(reverting, is_current=False)):
        assert kind_of(old) is UNDECIDED, "the old disk comes back: it must be held"


def test_trap_05_evacuation() -> None:
    """That Nova says "here" of a server proves nothing, whatever else it says: the record of a deleted one does."""
    for vm_state in VM_STATES:
        for task in TASKS:
            assert kind_of(gone(server(vm_state, task), quiet_s=LEAKED_S)) is UNDECIDED, (vm_state, task)
    assert kind_of(gone(server(task="rebuilding"))) is UNDECIDED
    assert kind_of(gone(server(host=ELSEWHERE))) is MOVED


def test_trap_06_failed_incoming_migration_and_failed_build() -> None:
    """Never defined, or never launched: no end of anything."""
    assert kind_of(gone(no_record(), was_defined=False, quiet_s=LEAKED_S)) is UNDECIDED
    assert kind_of(gone(server(task="migrating", host=ELSEWHERE), was_defined=False)) is MOVED
    for host in Host:
        assert kind_of(gone(deleted(host, launched=False), quiet_s=LEAKED_S)) is MOVED
        assert kind_of(gone(server("error", host=host, launched=False), quiet_s=LEAKED_S)) is MOVED
        assert kind_of(gone(server("building", "spawning", host=host, launched=False))) in (UNDECIDED, MOVED)


def test_trap_07_missed_stopped_migrated() -> None:
    """Domain gone, last name ours, no event: Nova still says "here, migrating", and then "there"."""
    for end in (gone, undefined):
        assert kind_of(end(server(task="migrating"), quiet_s=LEAKED_S)) is UNDECIDED
    assert kind_of(gone(server(host=ELSEWHERE))) is MOVED
    assert kind_of(gone(deleted(ELSEWHERE))) is MOVED
    # had it been heard, nobody would have to be asked, not even after the record is gone
    for word in (NOT_ASKED, SILENT, server(task="migrating"), no_record()):
        assert kind_of(gone(word, migrated_away=True, quiet_s=0.0)) is MOVED


def test_trap_08_shared_storage() -> None:
    """The old host's link falls to 1 when the new host's server is deleted: only the record's host is the one."""
    for quiet_s in (QUIET_S, LEAKED_S):
        assert kind_of(undefined(server(host=ELSEWHERE), quiet_s=quiet_s, lease=Lease.BUSY)) is UNDECIDED
        assert kind_of(gone(deleted(ELSEWHERE), quiet_s=quiet_s)) is MOVED
        assert kind_of(gone(deleted(HERE), quiet_s=quiet_s)) is TERMINATED


def test_trap_09_stale_inode() -> None:
    """
    A link from an earlier start is not the disk that was terminated. That every new inode is linked, and which one the
    domain has, is `host.claims` and `flows.learn`.
    """
    kept_by("unit/host/test_claims.py", "test_a_replaced_disk_is_a_claim_more")
    for word in (deleted(), no_record()):
        assert kind_of(gone(word, quiet_s=LEAKED_S)) is TERMINATED
        before, beside = gone(word, is_current=False), gone(word, other_root_disk=True)
        assert (kind_of(before), kind_of(beside)) == (REPLACED, REPLACED)
        assert "had another root disk later" in decide(before).reason
        assert "has another root disk now" in decide(beside).reason


def test_trap_10_wrong_file() -> None:
    """
    Legacy rescue lists `disk.rescue` first; the disk is claimed by its name. Should the domain's first disk be taken
    for its root all the same, the one that Nova names as such is not let go for it.
    """
    kept_by("e2e/test_lab.py", "test_a_rescue_puts_another_disk_first")
    kept_by("unit/host/test_claims.py", "test_only_the_allow_list_is_claimable")
    assert kind_of(running(server("rescued"), is_current=False)) is ALIVE
    assert kind_of(off(server("rescued"), is_current=False)) is ALIVE


def test_trap_11_undefined_is_noise() -> None:
    """Start, hard reboot, snapshot: the look-up counts, and then the quiet period. There is no event in `Facts`."""
    kept_by("e2e/test_bad_input.py", "test_what_only_looks_like_an_end_is_none")
    assert not [field.name for field in dataclasses.fields(Facts) if "event" in field.name]
    assert kind_of(running(server(task="image_snapshot"), quiet_s=0.0)) is ALIVE
    for word in (NOT_ASKED, deleted(), no_record(), server(host=ELSEWHERE)):
        verdict = decide(gone(word, quiet_s=QUIET_S - 1.0))
        assert (verdict.kind, verdict.look_again_s, verdict.asks_nova) == (UNDECIDED, 1.0, False)
    assert kind_of(undefined(server("stopped", "powering-on"), quiet_s=LEAKED_S)) is UNDECIDED


def test_trap_12_undefined_is_missing() -> None:
    """Nor is any event needed: a transient domain's end, or one that nobody was there to hear, is found by looking."""
    kept_by("e2e/test_bad_input.py", "test_an_agent_that_slept_through_the_whole_end_finds_it")
    assert kind_of(gone(deleted(), last=Place.INSTANCE, was_defined=False)) is TERMINATED
    assert kind_of(unlinked(deleted())) is TERMINATED, "the domain stays defined for ever"


def test_trap_13_the_link_count_never_drops() -> None:
    """
    A record of the deletion, no domain and nobody who has it open, for long enough, are enough, wherever it is named.
    Where the link count drops too early, a writer still runs.
    """
    for place in Place:
        leaked = undefined(deleted(), place=place, quiet_s=LEAKED_S)
        assert kind_of(leaked) is TERMINATED
        assert kind_of(replace(leaked, lease=Lease.BUSY)) is UNDECIDED
        assert kind_of(replace(leaked, lease=Lease.NOT_TRIED)) is UNDECIDED
        early = decide(replace(leaked, quiet_s=LEAKED_S - 7.0))
        assert (early.kind, early.look_again_s) == (UNDECIDED, 7.0)
        assert kind_of(replace(leaked, domain=Domain.INACTIVE)) is ALIVE
    for lease in Lease:
        assert kind_of(under_the_guest(deleted(), lease=lease, quiet_s=LEAKED_S)) is UNDECIDED
    assert kind_of(gone(deleted(), lease=Lease.BUSY, quiet_s=LEAKED_S)) is UNDECIDED


def test_trap_14_local_delete() -> None:
    """404 for hours while the guest writes: known to be deleted, and not final before it has stopped."""
    for word in (deleted(), no_record()):
        assert kind_of(running(word, quiet_s=LEAKED_S)) is ALIVE
        assert kind_of(under_the_guest(word, quiet_s=LEAKED_S)) is UNDECIDED
        assert kind_of(gone(word)) is TERMINATED, "and no event or action tells that it was reaped"


def test_trap_15_order_and_latency() -> None:
    """The disk goes first, then UNDEFINED, and the 404 follows in minutes or not at all."""
    pending = [server(task="deleting"), server("error"), server("error", "deleting"), server("resized"), server()]
    for word in pending:
        verdict = decide(gone(word, quiet_s=LEAKED_S))
        assert (verdict.kind, verdict.look_again_s, verdict.asks_nova) == (UNDECIDED, None, False)
    # "deleting" is no promise: it may fail, and it may move
    assert kind_of(gone(server(task="deleting", host=ELSEWHERE))) is MOVED
    assert kind_of(running(server(task="deleting"))) is ALIVE
    assert kind_of(gone(deleted())) is TERMINATED


def test_trap_16_not_found_for_lack_of_rights() -> None:
    """A token of another project gets 404 for every living server: another one must have been seen, here and alive."""
    for quiet_s in (QUIET_S, LEAKED_S, 100 * LEAKED_S):
        assert kind_of(gone(no_record(control=False), quiet_s=quiet_s)) is UNDECIDED
        assert kind_of(gone(no_record(control=True), quiet_s=quiet_s)) is TERMINATED
    unsaid = Word(answer=Answer.NO_RECORD)
    assert (unsaid.control, unsaid.host) == (False, NOWHERE), "what was not seen is not taken for granted"


def test_trap_17_the_owners_wish_is_lost() -> None:
    """
    Properties and tags are gone with the server: they are cached while it lives, and no fact of the verdict is one.
    """
    kept_by("e2e/test_openstack.py", "test_a_backup_lands_in_the_project_that_the_owner_asks_for")
    assert {field.name for field in dataclasses.fields(Word)} == {
        "answer", "host", "vm_state", "task_state", "launched", "control", "reason"}  # fmt: skip


def test_trap_18_the_base_ages_out() -> None:
    """A day after its last user: it is held with the disk, so a verdict may take as long as it needs."""
    kept_by("crash/test_kill_at_every_state.py", "test_killed_between_a_job_and_the_end_of_its_record")
    kept_by("flows/test_verify_restore.py", "test_a_chain_comes_back_put_together")
    days_s = 10 * 86400.0
    assert kind_of(gone(server(task="deleting"), quiet_s=days_s)) is UNDECIDED
    assert kind_of(gone(deleted(), quiet_s=days_s)) is TERMINATED


def test_trap_19_no_space() -> None:
    """The scheduler does not see what the spool holds. A full disk is `host.spool`'s; it changes no verdict."""
    kept_by("e2e/test_store_trouble.py", "test_a_full_spool_still_lets_jobs_finish")
    kept_by("flows/test_job_states.py", "test_on_a_full_disk_the_reserve_carries_the_journal")
    assert not [field.name for field in dataclasses.fields(Facts) if "byte" in field.name or "free" in field.name]


def test_trap_20_a_delete_is_a_power_cut() -> None:
    """
    How it was stopped, and in which state it was then, makes no verdict; the RAM and firmware state that the undefine
    removes is named in the manifest if it could not be held.
    """
    kept_by("e2e/test_bad_input.py", "test_firmware_state_that_cannot_be_held_is_named_with_the_reason")
    for vm_state in VM_STATES:
        word = Word(answer=Answer.DELETED, host=HERE, vm_state=vm_state)
        assert decide(gone(word)).occasion is TERMINATE


def test_trap_21_no_disk_that_can_be_linked() -> None:
    """Ceph, LVM, a volume: there is no claim, so there is nothing here to decide; a link count is always of one."""
    kept_by("unit/host/test_domain_xml.py", "test_what_lies_on_no_file_of_this_host_is_not_a_disk")
    [link_count] = [field for field in dataclasses.fields(Facts) if field.name == "link_count"]
    assert link_count.type is int
    assert link_count.default is dataclasses.MISSING


def test_trap_22_archived() -> None:
    """No record left: a 404 with its control, no domain, the last name ours, and no folder that names it."""
    archived = gone(no_record(), last=Place.INSTANCE)
    verdict = decide(archived)
    assert (verdict.kind, verdict.occasion) == (TERMINATED, TERMINATE)
    assert kind_of(replace(archived, domain=Domain.ACTIVE)) is UNDECIDED
    for place in (Place.INSTANCE, Place.RESIZE):
        assert kind_of(undefined(no_record(), place=place, quiet_s=LEAKED_S)) is UNDECIDED


# ---- the order of decision ------------------------------------------------------------------------------------------


def test_decision_1_no_answer_is_waited_for() -> None:
    for reason in ("503", "status UNKNOWN", "timed out"):
        for facts in (gone(SILENT), unlinked(SILENT), undefined(SILENT, quiet_s=LEAKED_S)):
            word = Word(answer=Answer.SILENT, host=HERE, vm_state="deleted", control=True, reason=reason)
            verdict = decide(replace(facts, nova=word))
            assert (verdict.kind, verdict.asks_nova) == (UNDECIDED, False)
            assert reason in verdict.reason, "an operator must see what Nova said"


def test_decision_2_deleted_here_is_terminated() -> None:
    for vm_state in VM_STATES:
        for task in TASKS:
            word = Word(answer=Answer.DELETED, host=HERE, vm_state=vm_state, task_state=task)
            assert kind_of(gone(word)) is TERMINATED, (vm_state, task)


def test_decision_3_deleted_elsewhere_is_dropped_and_nowhere_is_held() -> None:
    for facts in (gone(SILENT), undefined(SILENT), undefined(SILENT, place=Place.DELETED)):
        for quiet_s in (QUIET_S, LEAKED_S):
            assert kind_of(replace(facts, nova=deleted(ELSEWHERE), quiet_s=quiet_s)) is MOVED
            assert kind_of(replace(facts, nova=deleted(NOWHERE), quiet_s=quiet_s)) is UNDECIDED


def test_decision_4_a_server_elsewhere_is_dropped_when_its_disk_is_let_go() -> None:
    there = server(host=ELSEWHERE)
    assert kind_of(gone(there)) is MOVED
    assert kind_of(undefined(there, place=Place.RESIZE)) is MOVED
    assert kind_of(undefined(there, migrated_away=True)) is MOVED
    for place in (Place.INSTANCE, Place.DELETED, Place.NOWHERE):
        assert kind_of(undefined(there, place=place, quiet_s=LEAKED_S)) is UNDECIDED


def test_decision_4_a_server_here_is_held() -> None:
    """Whatever its state and task: at work, in error, soft-deleted, or with its domain lost."""
    for facts in (gone(SILENT), unlinked(SILENT), undefined(SILENT), undefined(SILENT, place=Place.RESIZE)):
        for vm_state in VM_STATES:
            for task in TASKS:
                word = server(vm_state, task)
                assert kind_of(replace(facts, nova=word, quiet_s=LEAKED_S)) is UNDECIDED, (vm_state, task)


def test_decision_4_on_no_host_only_an_offloaded_one_is_told() -> None:
    for vm_state in VM_STATES:
        word = server(vm_state, host=NOWHERE)
        offloaded = vm_state == "shelved_offloaded"
        assert kind_of(gone(word, quiet_s=LEAKED_S)) is (MOVED if offloaded else UNDECIDED), vm_state
        assert kind_of(undefined(word, quiet_s=LEAKED_S)) is UNDECIDED, vm_state


def test_decision_5_no_record_needs_everything_else() -> None:
    whole = gone(no_record(), quiet_s=LEAKED_S)
    assert kind_of(whole) is TERMINATED
    for missing, kind in (
        ({"nova": no_record(control=False)}, UNDECIDED),
        ({"last_named_at": Place.RESIZE}, UNDECIDED),
        ({"migrated_away": True}, MOVED),
        ({"was_defined": False}, UNDECIDED),
        ({"lease": Lease.BUSY}, UNDECIDED),
        ({"quiet_s": QUIET_S - 1.0}, UNDECIDED),
    ):
        assert kind_of(replace(whole, **missing)) is kind, missing


# ---- the reasons, for an operator -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (gone(server("error")), "has it in error"),
        (gone(server("active")), "has it as active, but its domain is gone"),
        (gone(server("")), "has it as a server, but its domain is gone"),
        (gone(server("error", "deleting")), "at work on it: deleting"),
        (gone(server("soft-delete")), "can be restored"),
        (gone(deleted()), "its disk has no other name"),
        (undefined(deleted(), place=Place.DELETED, quiet_s=LEAKED_S), "left behind"),
    ],
)
def test_the_reason_says_what_nova_said_and_how_a_disk_was_let_go(facts: Facts, words: str) -> None:
    assert words in decide(facts).reason
