"""
What became of a candidate without a Nova: every combination of facts, and what Nova was measured to do on the host.

The first half enumerates: 43,008 combinations, of which few are terminations. The second half plays the sequences
of a real Nova, row by row, each with the facts that libvirt, the inode and the folders show at that moment.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from autobackup.model import VerdictKind
from autobackup.rules.termination import Domain, Facts, Lease, Place, Verdict, decide

QUIET_S = 60.0
LEAKED_S = 3600.0
# below, at and above both limits
AGES_S = (0.0, QUIET_S - 0.001, QUIET_S, QUIET_S + 1.0, LEAKED_S - 0.001, LEAKED_S, LEAKED_S + 1.0)

TERMINATED, ALIVE, MOVED = VerdictKind.TERMINATED, VerdictKind.ALIVE, VerdictKind.MOVED
REPLACED, UNDECIDED = VerdictKind.REPLACED, VerdictKind.UNDECIDED


def everything() -> Iterator[Facts]:
    yes_or_no = (False, True)
    for domain, link_count, named_at, last, other, migrated, lease, quiet_s, released, silent in itertools.product(
        Domain, (1, 2), Place, Place, yes_or_no, yes_or_no, Lease, AGES_S, yes_or_no, yes_or_no
    ):
        yield Facts(
            domain=domain,
            link_count=link_count,
            named_at=named_at,
            last_named_at=last,
            other_root_disk=other,
            migrated_away=migrated,
            lease=lease,
            quiet_s=quiet_s,
            quiet_required_s=QUIET_S,
            leaked_after_s=LEAKED_S,
            undefined_is_released=released,
            cloud_is_silent=silent,
        )


EVERYTHING = [(facts, decide(facts)) for facts in everything()]  # to decide them all is the test that none raises


def having(**wanted: Any) -> list[tuple[Facts, Verdict]]:
    """Every combination with these facts."""
    found = [
        (facts, verdict)
        for facts, verdict in EVERYTHING
        if all(getattr(facts, name) == value for name, value in wanted.items())
    ]
    assert found
    return found


def deciding(kind: VerdictKind) -> list[tuple[Facts, Verdict]]:
    found = [(facts, verdict) for facts, verdict in EVERYTHING if verdict.kind is kind]
    assert found
    return found


# ---- every combination --------------------------------------------------------------------------------------


def test_every_combination_of_facts_has_a_verdict_with_a_reason() -> None:
    assert len(EVERYTHING) == 4 * 2 * 4 * 4 * 2 * 2 * 3 * len(AGES_S) * 2 * 2
    for facts, verdict in EVERYTHING:
        assert isinstance(verdict.kind, VerdictKind)
        assert verdict.reason.strip(), facts
        assert "unreachable" not in verdict.reason


def test_every_fact_is_in_the_enumeration() -> None:
    """A new field of `Facts` must be enumerated too; those of Nova's are in `every_combination`."""
    varied = {"domain", "link_count", "named_at", "last_named_at", "other_root_disk", "migrated_away", "lease",
              "quiet_s", "undefined_is_released", "cloud_is_silent"}  # fmt: skip
    of_novas = {"was_defined": True, "is_current": True, "was_reverted": False, "nova": None}
    limits = {"quiet_required_s", "leaked_after_s"}
    assert {field.name for field in dataclasses.fields(Facts)} == varied | limits | set(of_novas)
    defaults = {field.name: field.default for field in dataclasses.fields(Facts)}
    assert {name: defaults[name] for name in of_novas} == of_novas


def test_a_fact_is_called_in_logs_what_it_is_called_here() -> None:
    for kind in (Domain, Place, Lease):
        assert [member.value for member in kind] == [member.name.lower() for member in kind]


def test_every_kind_of_verdict_comes_about() -> None:
    assert set(Counter(verdict.kind for _, verdict in EVERYTHING)) == set(VerdictKind)


def test_the_same_facts_have_the_same_verdict() -> None:
    for facts, verdict in EVERYTHING[::97]:
        assert decide(replace(facts)) == verdict


# What a termination needs, one by one. Invariants 2 and 8.


def test_an_unanswered_question_is_never_a_no() -> None:
    for facts, verdict in having(domain=Domain.UNKNOWN):
        assert verdict.kind is UNDECIDED, facts


def test_nothing_terminated_has_a_domain() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.domain is Domain.ABSENT


def test_nothing_terminated_is_open_anywhere() -> None:
    """A delete while nova-compute is down unlinks the disk under a guest that goes on writing."""
    for facts, _ in deciding(TERMINATED):
        assert facts.lease is Lease.GRANTED


def test_nothing_terminated_before_its_quiet_period_is_over() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.quiet_s >= facts.quiet_required_s


def test_a_leaked_folder_is_waited_for_as_long_as_it_takes_nova_to_come_back() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.named_at is not Place.DELETED or facts.quiet_s >= facts.leaked_after_s


def test_nothing_that_migrated_away_terminated_here() -> None:
    for facts, _ in deciding(TERMINATED):
        assert not facts.migrated_away


def test_no_side_of_a_resize_terminated() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.named_at is not Place.RESIZE
        assert facts.named_at is not Place.NOWHERE or facts.last_named_at is not Place.RESIZE


def test_nothing_terminated_while_the_cloud_is_silent() -> None:
    for facts, _ in deciding(TERMINATED):
        assert not facts.cloud_is_silent


def test_nothing_terminated_that_has_another_root_disk() -> None:
    for facts, _ in deciding(TERMINATED):
        assert not facts.other_root_disk


def test_nothing_terminated_has_a_name_that_is_not_novas() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.named_at is not Place.NOWHERE or facts.link_count == 1


def test_what_is_still_at_its_place_terminated_only_by_the_configurations_word() -> None:
    for facts, _ in deciding(TERMINATED):
        assert facts.named_at is not Place.INSTANCE or facts.undefined_is_released


# The verdicts, whole: what is told below is all that can be told, and the rest waits.


def over(facts: Facts) -> bool:
    return facts.quiet_s >= (facts.leaked_after_s if facts.named_at is Place.DELETED else facts.quiet_required_s)


def is_terminated(facts: Facts) -> bool:
    let_go = (
        (facts.named_at is Place.NOWHERE and facts.link_count == 1 and facts.last_named_at is not Place.RESIZE)
        or facts.named_at is Place.DELETED
        or (facts.named_at is Place.INSTANCE and facts.undefined_is_released)
    )
    hindered = facts.other_root_disk or facts.migrated_away or facts.cloud_is_silent
    return facts.domain is Domain.ABSENT and facts.lease is Lease.GRANTED and let_go and over(facts) and not hindered


def is_replaced(facts: Facts) -> bool:
    gone = facts.named_at in (Place.NOWHERE, Place.DELETED)
    settled = facts.domain in (Domain.ACTIVE, Domain.INACTIVE) or (
        facts.domain is Domain.ABSENT and facts.quiet_s >= facts.quiet_required_s
    )
    return facts.other_root_disk and gone and settled


def is_moved(facts: Facts) -> bool:
    confirmed = facts.named_at is Place.NOWHERE and facts.last_named_at is Place.RESIZE and facts.link_count == 1
    return facts.domain is Domain.ABSENT and not facts.other_root_disk and (facts.migrated_away or confirmed)


def is_alive(facts: Facts) -> bool:
    if facts.other_root_disk:
        return facts.domain is not Domain.UNKNOWN and facts.named_at in (Place.INSTANCE, Place.RESIZE)
    unlinked = facts.named_at is Place.NOWHERE and facts.link_count == 1  # under the guest: its content is not final
    return facts.domain is Domain.INACTIVE or (facts.domain is Domain.ACTIVE and not unlinked)


WHAT_IT_TAKES = {TERMINATED: is_terminated, REPLACED: is_replaced, MOVED: is_moved, ALIVE: is_alive}


@pytest.mark.parametrize("kind", WHAT_IT_TAKES)
def test_a_verdict_is_reached_exactly_when_its_facts_are_there(kind: VerdictKind) -> None:
    for facts, verdict in EVERYTHING:
        assert (verdict.kind is kind) is WHAT_IT_TAKES[kind](facts), facts


def test_no_facts_stand_for_two_verdicts_and_whatever_stands_for_none_waits() -> None:
    for facts, verdict in EVERYTHING:
        reached = [kind for kind, is_reached in WHAT_IT_TAKES.items() if is_reached(facts)]
        assert reached == ([] if verdict.kind is UNDECIDED else [verdict.kind]), facts


# When to look again.


def test_only_what_is_undecided_is_looked_at_again() -> None:
    for facts, verdict in EVERYTHING:
        if verdict.kind is not UNDECIDED:
            assert verdict.look_again_s is None, facts


def test_a_wait_ends_exactly_with_its_quiet_period() -> None:
    """Not a look too early, and none too late."""
    waits = 0
    for facts, verdict in EVERYTHING:
        if verdict.look_again_s is not None:
            waits += 1
            assert verdict.look_again_s > 0
            limit_s = QUIET_S if facts.other_root_disk or facts.named_at is not Place.DELETED else LEAKED_S
            assert facts.quiet_s + verdict.look_again_s == pytest.approx(limit_s)
            assert decide(replace(facts, quiet_s=limit_s)).look_again_s is None
            assert "quiet period" in verdict.reason
    assert waits


def test_whatever_only_time_can_tell_says_how_much_of_it() -> None:
    for facts, verdict in EVERYTHING:
        later = decide(replace(facts, quiet_s=LEAKED_S))
        if verdict.kind is UNDECIDED and later.kind is not UNDECIDED:
            assert verdict.look_again_s is not None, facts


def test_time_alone_takes_no_verdict_back() -> None:
    """A verdict that stands, stands for as long as the facts do."""
    for facts, verdict in EVERYTHING:
        if verdict.kind is not UNDECIDED:
            assert decide(replace(facts, quiet_s=facts.quiet_s + 10 * LEAKED_S)) == verdict


def test_the_reason_says_what_kept_it_from_being_a_termination() -> None:
    terminated = Facts(
        domain=Domain.ABSENT, link_count=1, named_at=Place.NOWHERE, last_named_at=Place.INSTANCE,
        other_root_disk=False, migrated_away=False, lease=Lease.GRANTED, quiet_s=QUIET_S, quiet_required_s=QUIET_S,
        leaked_after_s=LEAKED_S,
    )  # fmt: skip
    assert decide(terminated).kind is TERMINATED
    for hindrance, words in (
        ({"domain": Domain.UNKNOWN}, "libvirt did not answer"),
        ({"domain": Domain.ACTIVE}, "unlinked while the guest runs on"),
        ({"domain": Domain.INACTIVE}, "defined"),
        ({"link_count": 2}, "neither ours nor Nova's"),
        ({"named_at": Place.INSTANCE}, "its folder still names the disk"),
        ({"named_at": Place.RESIZE}, "confirmed or reverted"),
        ({"named_at": Place.DELETED}, "quiet period"),
        ({"last_named_at": Place.RESIZE}, "confirmed resize"),
        ({"other_root_disk": True}, "another root disk now"),
        ({"other_root_disk": True, "quiet_s": 0.0}, "another root disk appeared"),
        ({"other_root_disk": True, "named_at": Place.RESIZE}, "a resize in flight"),
        ({"migrated_away": True}, "migrated to another host"),
        ({"lease": Lease.BUSY}, "open"),
        ({"lease": Lease.NOT_TRIED}, "open"),
        ({"quiet_s": 0.0}, "quiet period"),
        ({"cloud_is_silent": True}, "verdict_despite_nova"),
    ):
        verdict = decide(replace(terminated, **hindrance))
        assert verdict.kind is not TERMINATED, hindrance
        assert words in verdict.reason, hindrance


def test_the_reason_of_a_termination_says_how_the_disk_was_let_go() -> None:
    words = {
        Place.NOWHERE: "Nova unlinked the disk",
        Place.DELETED: "_del folder",
        Place.INSTANCE: "which the configuration takes as its release",
    }
    for facts, verdict in deciding(TERMINATED):
        assert words[facts.named_at] in verdict.reason


def test_nothing_is_released_and_no_cloud_is_silent_unless_said_so() -> None:
    """Plain libvirt's word must be configured; without metadata of Nova's there is no cloud to ask."""
    defaults = {field.name: field.default for field in dataclasses.fields(Facts)}
    assert defaults["undefined_is_released"] is False
    assert defaults["cloud_is_silent"] is False


def test_a_disk_that_other_links_hold_too_is_told_from_ours_alone() -> None:
    for link_count in (2, 3, 100):
        for facts, _ in having(named_at=Place.NOWHERE, domain=Domain.ABSENT, link_count=2)[::7]:
            assert decide(replace(facts, link_count=link_count)).kind is not TERMINATED


# ---- what Nova does, row by row (numbers: facts/nova.md) ------------------------------------------------------


RUNNING = Facts(
    domain=Domain.ACTIVE, link_count=2, named_at=Place.INSTANCE, last_named_at=Place.INSTANCE, other_root_disk=False,
    migrated_away=False, lease=Lease.BUSY, quiet_s=0.0, quiet_required_s=QUIET_S, leaked_after_s=LEAKED_S,
)  # fmt: skip


@dataclass(frozen=True)
class Disk:
    """The facts of one claimed root disk, changed step by step."""

    facts: Facts = RUNNING

    def then(self, **changed: Any) -> "Disk":
        """An event, or a change: the quiet period begins anew."""
        return Disk(replace(self.facts, quiet_s=0.0, **changed))

    def stopped(self) -> "Disk":
        return self.then(domain=Domain.INACTIVE, lease=Lease.GRANTED)

    def started(self) -> "Disk":
        return self.then(domain=Domain.ACTIVE, lease=Lease.BUSY)

    def undefined(self) -> "Disk":
        return self.then(domain=Domain.ABSENT)

    def defined(self) -> "Disk":
        return self.then(domain=Domain.INACTIVE)

    def moved_to(self, place: Place) -> "Disk":
        """A rename of its folder."""
        return self.then(named_at=place, last_named_at=place)

    def unlinked(self) -> "Disk":
        return self.then(named_at=Place.NOWHERE, link_count=1)

    def beside_another(self, other: bool = True) -> "Disk":
        """Another inode is `disk` now."""
        return self.then(other_root_disk=other)

    def after(self, quiet_s: float = QUIET_S) -> "Disk":
        """Nothing happens for that long."""
        return Disk(replace(self.facts, quiet_s=quiet_s))

    def is_(self, kind: VerdictKind) -> "Disk":
        verdict = decide(self.facts)
        assert verdict.kind is kind, f"{verdict.reason}: {self.facts}"
        return self


def test_running() -> None:
    Disk().is_(ALIVE).after(LEAKED_S).is_(ALIVE)


def test_row_1_delete_of_a_running_instance() -> None:
    """STOPPED, rename to _del, unlink, rmdir, UNDEFINED; then nothing."""
    disk = Disk().stopped().is_(ALIVE)
    disk = disk.moved_to(Place.DELETED).is_(ALIVE)
    disk = disk.unlinked().is_(ALIVE)
    disk = disk.undefined().is_(UNDECIDED)
    disk.after(QUIET_S - 1).is_(UNDECIDED)
    disk.after(QUIET_S).is_(TERMINATED)


def test_row_1_what_the_link_count_says_is_not_enough() -> None:
    """Between the unlink and UNDEFINED the link is the last name, and the domain is still there."""
    disk = Disk().stopped().moved_to(Place.DELETED).unlinked()
    disk.after(LEAKED_S).is_(ALIVE)


def test_row_1_delete_with_a_libvirtd_that_dies_meanwhile() -> None:
    disk = Disk().stopped().moved_to(Place.DELETED).unlinked().undefined()
    disk.then(domain=Domain.UNKNOWN).after(LEAKED_S).is_(UNDECIDED)


def test_row_2_delete_of_a_stopped_instance() -> None:
    """No STOPPED at delete time: that came when it was stopped."""
    disk = Disk().stopped().after(LEAKED_S).is_(ALIVE)
    disk = disk.moved_to(Place.DELETED).is_(ALIVE).unlinked().is_(ALIVE)
    disk.undefined().is_(UNDECIDED).after(QUIET_S).is_(TERMINATED)


def test_row_3_soft_delete_and_reclaim() -> None:
    disk = Disk().stopped().is_(ALIVE).after(LEAKED_S).is_(ALIVE)
    disk = disk.moved_to(Place.DELETED).unlinked().undefined().is_(UNDECIDED)
    disk.after(QUIET_S).is_(TERMINATED)


def test_row_3r_soft_delete_and_restore() -> None:
    disk = Disk().stopped().is_(ALIVE).undefined().is_(UNDECIDED)
    disk.defined().is_(ALIVE).started().is_(ALIVE)


def test_row_5_local_delete_with_a_running_writer() -> None:
    """nova-compute was down: the API says gone, the guest writes on until the reaper destroys it."""
    disk = Disk().after(LEAKED_S).is_(ALIVE)
    disk.stopped().moved_to(Place.DELETED).unlinked().undefined().after(QUIET_S).is_(TERMINATED)


def test_row_5b_unlinked_under_a_running_guest() -> None:
    """`running_deleted_instance_action = noop`: the last name is ours, and the content is not final."""
    disk = Disk().moved_to(Place.DELETED).is_(ALIVE).unlinked().is_(UNDECIDED).after(LEAKED_S).is_(UNDECIDED)
    disk = disk.undefined().after(QUIET_S).is_(UNDECIDED)  # a transient domain that QEMU outlives: BUSY
    disk.then(lease=Lease.NOT_TRIED).after(QUIET_S).is_(UNDECIDED)
    disk.then(lease=Lease.GRANTED).after(QUIET_S).is_(TERMINATED)


def test_row_6_delete_while_a_resize_waits_on_the_same_host() -> None:
    """The stale copy is not backed up as if it were the instance; the instance is."""
    old = Disk().stopped().moved_to(Place.RESIZE).beside_another().started()
    old = old.unlinked().is_(REPLACED)
    new = Disk().is_(ALIVE)
    new.stopped().moved_to(Place.DELETED).unlinked().undefined().after(QUIET_S).is_(TERMINATED)
    # if the old one is looked at only after the new one is gone, it was last seen in _resize
    old.beside_another(False).undefined().after(LEAKED_S).is_(MOVED)


def test_row_8_delete_of_a_lost_domain() -> None:
    """A hard reboot failed, or the domain was transient: the folder stays until the delete, which is silent."""
    disk = Disk().stopped().undefined().is_(UNDECIDED).after(10 * LEAKED_S).is_(UNDECIDED)
    disk.moved_to(Place.DELETED).unlinked().is_(UNDECIDED).after(QUIET_S).is_(TERMINATED)


def test_row_9_a_leaked_del_folder() -> None:
    """rmtree failed: Nova's name stays for ever, and time is the only thing that tells."""
    disk = Disk().stopped().moved_to(Place.DELETED).undefined().is_(UNDECIDED)
    disk.after(QUIET_S).is_(UNDECIDED)
    disk.after(LEAKED_S).is_(TERMINATED)
    disk.unlinked().after(QUIET_S).is_(TERMINATED)  # Nova's periodic task comes back for it


def test_row_9_a_leaked_del_folder_beside_a_leaked_resize_folder() -> None:
    """The delete renames `<uuid>`, finds `_resize`, and gives up on both."""
    new = Disk().stopped().moved_to(Place.DELETED).undefined()
    new.after(LEAKED_S).is_(TERMINATED)
    old = Disk().stopped().moved_to(Place.RESIZE).undefined()
    old.after(10 * LEAKED_S).is_(UNDECIDED)


@pytest.mark.parametrize("how", ["shutdown", "crash", "suspend"])
def test_row_10_stop_crash_suspend(how: str) -> None:
    Disk().stopped().is_(ALIVE).after(10 * LEAKED_S).is_(ALIVE).started().is_(ALIVE)


def test_row_11_start_and_hard_reboot() -> None:
    """UNDEFINED with the disk in its place, for 0.4 to 1.2 s."""
    disk = Disk().stopped().undefined().is_(UNDECIDED).after(1.2).is_(UNDECIDED)
    disk.defined().is_(ALIVE).started().is_(ALIVE)


def test_row_11f_a_hard_reboot_that_fails() -> None:
    Disk().stopped().undefined().after(10 * LEAKED_S).is_(UNDECIDED)


def test_row_11_a_start_is_no_release_even_where_undefining_is_one() -> None:
    """Plain libvirt: `virsh undefine` of a running domain makes it transient; `virsh define` brings one back."""
    disk = Disk().then(undefined_is_released=True)
    disk.after(LEAKED_S).is_(ALIVE)
    disk = disk.stopped().undefined().is_(UNDECIDED).after(QUIET_S - 1).is_(UNDECIDED)
    disk.defined().after(LEAKED_S).is_(ALIVE)
    disk.after(QUIET_S).is_(TERMINATED)


def test_row_14_rescue_and_unrescue() -> None:
    """`disk.rescue` comes and goes; `disk` stays, and is no other root disk."""
    Disk().stopped().is_(ALIVE).defined().is_(ALIVE).started().is_(ALIVE).stopped().is_(ALIVE).started().is_(ALIVE)


def test_row_15_rebuild_before_the_new_folder() -> None:
    """Until then it is a perfect delete: only the quiet period stands between."""
    disk = Disk().stopped().moved_to(Place.DELETED).unlinked().undefined().is_(UNDECIDED)
    disk.after(QUIET_S - 1).is_(UNDECIDED)


def test_row_15_rebuild_after_the_new_folder() -> None:
    disk = Disk().stopped().moved_to(Place.DELETED).unlinked().undefined()
    disk = disk.beside_another().is_(UNDECIDED)
    disk.after(QUIET_S).is_(REPLACED)  # a spawn that takes longer, or failed: the old disk is not its last state
    disk.defined().is_(REPLACED).started().is_(REPLACED)
    Disk().undefined().is_(UNDECIDED).defined().started().is_(ALIVE)  # the new one meanwhile


def test_row_15_rebuild_of_a_cloud_that_is_not_asked() -> None:
    """With Nova's metadata in the domain, no quiet period is long enough: an image can take minutes to come."""
    disk = Disk().then(cloud_is_silent=True).stopped().moved_to(Place.DELETED).unlinked().undefined()
    disk.after(10 * LEAKED_S).is_(UNDECIDED)


def test_row_16_and_17_resize_to_another_host_and_confirm() -> None:
    disk = Disk().stopped().moved_to(Place.RESIZE).is_(ALIVE).after(LEAKED_S).is_(ALIVE)
    disk.unlinked().is_(ALIVE).undefined().is_(MOVED)
    disk.undefined().is_(UNDECIDED).after(10 * LEAKED_S).is_(UNDECIDED)  # undefined first: nothing is settled


def test_row_19_resize_to_another_host_and_revert() -> None:
    disk = Disk().stopped().moved_to(Place.RESIZE).is_(ALIVE).moved_to(Place.INSTANCE).is_(ALIVE)
    disk = disk.defined().started().is_(ALIVE)
    disk.stopped().moved_to(Place.DELETED).unlinked().undefined().after(QUIET_S).is_(TERMINATED)


def test_row_20_resize_on_the_same_host_waiting() -> None:
    old = Disk().stopped().moved_to(Place.RESIZE).is_(ALIVE).beside_another().is_(ALIVE).started().is_(ALIVE)
    old.after(10 * LEAKED_S).is_(ALIVE)
    old.stopped().undefined().after(10 * LEAKED_S).is_(ALIVE)  # stopped and started meanwhile


def test_row_20c_resize_on_the_same_host_confirmed() -> None:
    """No event at all: the link count of the old disk falls to 1 while the instance lives."""
    old = Disk().stopped().moved_to(Place.RESIZE).beside_another().started()
    old.unlinked().is_(REPLACED)


def test_row_20r_resize_on_the_same_host_reverted() -> None:
    """The new disk is unlinked after UNDEFINED; the old one comes back to its place."""
    new = Disk().stopped().undefined().is_(UNDECIDED).unlinked().is_(UNDECIDED)
    old = Disk().stopped().moved_to(Place.RESIZE).beside_another().started().stopped().undefined().is_(ALIVE)
    old = old.beside_another(False).is_(UNDECIDED).moved_to(Place.INSTANCE).is_(UNDECIDED)
    new = new.beside_another().is_(UNDECIDED)
    old.defined().is_(ALIVE).started().is_(ALIVE)
    new.defined().is_(REPLACED).started().is_(REPLACED)
    new.after(QUIET_S).is_(REPLACED)


def test_row_22_live_migration_with_shared_storage() -> None:
    """STOPPED_MIGRATED; the other host goes on with the same inode: the claim must not last."""
    disk = Disk().then(migrated_away=True).undefined()
    disk.is_(MOVED).after(LEAKED_S).is_(MOVED)


def test_row_23_live_migration_without_shared_storage() -> None:
    disk = Disk().then(migrated_away=True).undefined().is_(MOVED)
    disk.moved_to(Place.DELETED).is_(MOVED).unlinked().is_(MOVED).after(LEAKED_S).is_(MOVED)


def test_row_23_back_again_and_deleted_here() -> None:
    disk = Disk().then(migrated_away=True).undefined().is_(MOVED)
    disk = disk.then(migrated_away=False).started().is_(ALIVE)
    disk.stopped().moved_to(Place.DELETED).unlinked().undefined().after(QUIET_S).is_(TERMINATED)


def test_row_26_delete_during_a_live_migration() -> None:
    """The migration never ended: the last stop is the destroy."""
    disk = Disk().stopped().moved_to(Place.DELETED).unlinked().undefined()
    disk.after(QUIET_S).is_(TERMINATED)


def test_row_27_shelve_of_a_cloud_that_is_not_asked() -> None:
    """Offloading looks like a delete; Nova's metadata in the domain keeps it from being taken for one."""
    disk = Disk().then(cloud_is_silent=True).stopped().is_(ALIVE)
    disk.moved_to(Place.DELETED).unlinked().undefined().after(10 * LEAKED_S).is_(UNDECIDED)


def test_row_30_live_snapshot() -> None:
    """UNDEFINED while the guest runs: the look-up still finds it."""
    Disk().then().is_(ALIVE).after(0.55).is_(ALIVE).then().is_(ALIVE)


def test_row_33_failed_spawn_of_a_domain_that_was_seen() -> None:
    disk = Disk().then(cloud_is_silent=True).stopped().moved_to(Place.DELETED).unlinked().undefined()
    disk.after(10 * LEAKED_S).is_(UNDECIDED)


def test_row_33_failed_spawn_that_never_had_a_domain() -> None:
    """
    Folder and disk come and go without one event of libvirt's. From here it cannot be told from a delete that was
    missed, so it is not let go; `rules.policy` knows that nothing is known of it, and an operator decides.
    """
    disk = Disk().undefined().then(lease=Lease.GRANTED).is_(UNDECIDED).after(QUIET_S).is_(UNDECIDED)
    disk.moved_to(Place.DELETED).unlinked().is_(UNDECIDED).after(QUIET_S).is_(TERMINATED)


def test_a_name_that_somebody_else_gave_the_disk_is_never_scrubbed_away() -> None:
    """An operator's own hard link: whose it is cannot be told."""
    disk = Disk().stopped().then(named_at=Place.NOWHERE, link_count=2).undefined()
    disk.after(10 * LEAKED_S).is_(UNDECIDED)
    disk.unlinked().after(QUIET_S).is_(TERMINATED)


def test_a_disk_in_a_resize_folder_whose_domain_is_lost_waits() -> None:
    Disk().stopped().moved_to(Place.RESIZE).undefined().after(10 * LEAKED_S).is_(UNDECIDED)
