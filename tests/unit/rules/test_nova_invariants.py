"""
What holds of every combination of facts, Nova's word included: none is sampled, see `every_combination`.

The second half says, from facts/nova.md and not from the code, exactly which facts each verdict takes, when it is worth
looking again, and when Nova is to be asked.
"""

import dataclasses
from fractions import Fraction

import pytest
from tests.unit.rules.every_combination import OF_A_WORD, OF_FACTS, every_combination, walk
from tests.unit.rules.nova_rows import ALIVE, MOVED, REPLACED, TERMINATED, UNDECIDED

from autobackup.model import Occasion, VerdictKind
from autobackup.rules.termination import Answer, Domain, Facts, Host, Lease, Place, Verdict, Word, decide, ordered

# ---- the enumeration ------------------------------------------------------------------------------------------------


def test_every_fact_has_all_its_values() -> None:
    assert {field.name for field in dataclasses.fields(Facts)} == set(OF_FACTS)
    assert {field.name for field in dataclasses.fields(Word)} == set(OF_A_WORD)


def test_it_is_whole() -> None:
    share, kinds = Fraction(0), set()
    for _, verdict, choices in walk():
        share += choices.share()
        kinds.add(verdict.kind)
    assert share == 1
    assert kinds == set(VerdictKind)


def test_what_is_not_read_makes_no_difference() -> None:
    """The stand-in is decided as the facts that it stands for."""
    for facts, verdict, _ in walk():
        for unread in (0, -1):
            assert decide(facts.real(unread=unread)) == verdict


# ---- a termination --------------------------------------------------------------------------------------------------


def test_every_combination_has_an_answer_with_a_reason() -> None:
    for facts, verdict in every_combination():
        assert isinstance(verdict, Verdict), facts
        assert verdict.reason.strip(), facts
        assert "unreachable" not in verdict.reason, facts


def test_terminated_only_under_a_granted_lease() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED:
            assert facts.lease is Lease.GRANTED, facts


def test_terminated_only_without_a_running_domain_and_with_libvirts_answer() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED:
            assert facts.domain not in (Domain.ACTIVE, Domain.UNKNOWN), facts


def test_terminated_while_defined_only_if_its_disk_is_dropped() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED and facts.domain is Domain.INACTIVE:
            assert (facts.named_at, facts.link_count) == (Place.NOWHERE, 1), facts
            assert facts.nova is not None, facts


def test_terminated_only_after_the_quiet_period() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED:
            assert facts.quiet_s >= facts.quiet_required_s, facts


def test_terminated_only_by_novas_word() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED and facts.nova is not None:
            assert facts.nova.answer in (Answer.DELETED, Answer.NO_RECORD), facts


def test_terminated_by_a_record_only_of_this_host_and_of_what_was_launched() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED and facts.nova is not None and facts.nova.answer is Answer.DELETED:
            assert facts.nova.host is Host.HERE, facts
            assert facts.nova.launched, facts


def test_terminated_by_no_record_only_with_a_control_and_of_what_was_defined_here() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED and facts.nova is not None and facts.nova.answer is Answer.NO_RECORD:
            assert facts.nova.control, facts
            assert facts.was_defined, facts
            assert facts.last_named_at is not Place.RESIZE, facts
            assert facts.named_at in (Place.DELETED, Place.NOWHERE), facts


def test_terminated_only_where_nothing_else_explains_the_end() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED:
            assert not facts.migrated_away, facts
            assert not facts.other_root_disk, facts
            assert facts.is_current or facts.named_at is Place.INSTANCE, facts


def test_a_name_that_lingers_is_waited_for() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is TERMINATED and facts.nova is not None and not facts.is_dropped:
            assert facts.quiet_s >= facts.leaked_after_s, facts


def test_the_configurations_word_is_not_asked_where_there_is_a_nova() -> None:
    """`undefined_is_released` and `cloud_is_silent` are for hosts without."""
    for facts, verdict, _ in walk():
        if facts.nova is not None:
            for changed in ({"undefined_is_released": True, "cloud_is_silent": True}, {"undefined_is_released": False}):
                assert decide(dataclasses.replace(facts.real(unread=0), **changed)) == verdict, facts


def test_what_goes_with_a_verdict() -> None:
    for facts, verdict in every_combination():
        assert (verdict.occasion is Occasion.TERMINATE) is (verdict.kind is TERMINATED), facts
        assert verdict.occasion is not Occasion.REBUILD or verdict.kind is REPLACED, facts
        assert verdict.occasion is not Occasion.SHELVE_OFFLOAD or verdict.kind is MOVED, facts
        assert verdict.look_again_s is None or (verdict.kind is UNDECIDED and verdict.look_again_s > 0), facts
        assert not verdict.asks_nova or verdict.kind is UNDECIDED, facts


def test_an_order_takes_only_what_nobody_can_write_to_and_makes_no_termination() -> None:
    """Undecided it stays: an operator's word starts a capture and never a scrub."""
    for facts, verdict in every_combination():
        taken = ordered(facts, verdict, take=True)
        may_be_read = facts.domain is Domain.ABSENT and facts.lease is Lease.GRANTED
        assert (taken.kind, taken.look_again_s, taken.asks_nova) == (UNDECIDED, None, False), facts
        assert taken.occasion is (Occasion.TERMINATE if may_be_read else None), facts
        assert not may_be_read or verdict.reason in taken.reason, facts


def test_an_order_to_let_go_needs_nothing_and_is_no_occasion() -> None:
    for facts, verdict in every_combination():
        let_go = ordered(facts, verdict, take=False)
        assert (let_go.kind, let_go.look_again_s, let_go.asks_nova) == (UNDECIDED, None, False), facts
        assert let_go.occasion is None, facts
        assert verdict.reason in let_go.reason, facts


# ---- exactly what each verdict takes, where there is a Nova ---------------------------------------------------------


def word_of(facts: Facts) -> Word:
    assert facts.nova is not None
    return facts.nova


def still_named(facts: Facts) -> bool:
    return facts.named_at in (Place.INSTANCE, Place.RESIZE)


def is_outlived(facts: Facts) -> bool:
    """Another disk has its place, and it is not kept for a revert."""
    return (facts.other_root_disk or not facts.is_current) and not still_named(facts)


def is_candidate(facts: Facts) -> bool:
    """Nobody can write to it by libvirt's word, and nothing on this host says yet what became of it."""
    is_over = facts.is_dropped if facts.domain is Domain.INACTIVE else facts.domain is Domain.ABSENT
    return is_over and not is_outlived(facts) and not facts.other_root_disk


def is_asked_of_nova(facts: Facts) -> bool:
    return is_candidate(facts) and not facts.migrated_away and is_quiet(facts)


def is_quiet(facts: Facts) -> bool:
    return facts.quiet_s >= facts.quiet_required_s


def says_terminated(facts: Facts) -> bool:
    nova = word_of(facts)
    if nova.answer is Answer.DELETED:
        return nova.host is Host.HERE and nova.launched
    let_go = facts.named_at in (Place.DELETED, Place.NOWHERE) and facts.last_named_at is not Place.RESIZE
    seen_here = facts.was_defined and let_go
    return nova.answer is Answer.NO_RECORD and nova.control and seen_here


def is_final(facts: Facts) -> bool:
    return facts.is_dropped or facts.quiet_s >= facts.leaked_after_s


def is_terminated(facts: Facts) -> bool:
    return is_asked_of_nova(facts) and says_terminated(facts) and is_final(facts) and facts.lease is Lease.GRANTED


def is_offloaded(facts: Facts) -> bool:
    nova = word_of(facts)
    return nova.answer is Answer.SERVER and nova.host is Host.NONE and nova.vm_state == "shelved_offloaded"


def is_moved(facts: Facts) -> bool:
    if not is_candidate(facts) or facts.migrated_away:
        return is_candidate(facts) and facts.migrated_away
    nova, let_go = word_of(facts), facts.link_count == 1 or facts.named_at is Place.RESIZE
    if not is_quiet(facts) or nova.answer not in (Answer.DELETED, Answer.SERVER):
        return False
    if nova.answer is Answer.DELETED:
        return nova.host is Host.ELSEWHERE or not nova.launched
    if nova.host is Host.ELSEWHERE:
        return let_go
    if is_offloaded(facts):
        return facts.link_count == 1
    return let_go and not nova.launched and not nova.task_state and nova.vm_state != "soft-delete"


def is_replaced(facts: Facts) -> bool:
    if not is_outlived(facts) or facts.domain is Domain.UNKNOWN:
        return False
    return facts.domain is not Domain.ABSENT or is_quiet(facts)


def is_alive(facts: Facts) -> bool:
    if facts.domain is Domain.UNKNOWN or is_outlived(facts):
        return False
    return facts.other_root_disk or (facts.domain is not Domain.ABSENT and not facts.is_dropped)


def is_stale_and_leaked(facts: Facts) -> bool:
    """Row 9: one end of a resize, left in `_resize` by a delete; it has its moment, and Nova may say more of it."""
    lone = not facts.other_root_disk and not facts.is_current
    return lone and facts.named_at is Place.RESIZE and facts.domain is Domain.ABSENT


def is_contradictory(facts: Facts) -> bool:
    """Named in one place and last seen in another."""
    return facts.named_at is not Place.NOWHERE and facts.last_named_at is not facts.named_at


WHAT_IT_TAKES = {TERMINATED: is_terminated, MOVED: is_moved, REPLACED: is_replaced, ALIVE: is_alive}


@pytest.mark.parametrize("kind", WHAT_IT_TAKES)
def test_a_verdict_is_reached_exactly_when_its_facts_are_there(kind: VerdictKind) -> None:
    for facts, verdict in every_combination():
        if facts.nova is not None and not is_stale_and_leaked(facts) and not is_contradictory(facts):
            assert (verdict.kind is kind) is WHAT_IT_TAKES[kind](facts), (verdict, facts)


def test_a_stale_end_of_a_resize_is_never_a_termination() -> None:
    for facts, verdict in every_combination():
        if is_stale_and_leaked(facts):
            assert verdict.kind in (UNDECIDED, MOVED, REPLACED), facts
            if facts.nova is not None and facts.nova.answer is not Answer.DELETED and verdict.kind is not UNDECIDED:
                assert facts.migrated_away or facts.nova.answer is Answer.SERVER, facts


def test_the_occasion_is_said_exactly() -> None:
    for facts, verdict in every_combination():
        if verdict.kind is REPLACED and not is_stale_and_leaked(facts):
            is_rebuild = facts.last_named_at is not Place.RESIZE and not facts.was_reverted
            assert verdict.occasion is (Occasion.REBUILD if is_rebuild else None), facts
        if verdict.kind is MOVED and facts.nova is not None:
            offloaded = not facts.migrated_away and is_offloaded(facts)
            assert verdict.occasion is (Occasion.SHELVE_OFFLOAD if offloaded else None), facts


def test_nova_is_asked_exactly_when_only_its_word_is_missing() -> None:
    for facts, verdict in every_combination():
        if facts.nova is None:
            assert not verdict.asks_nova, facts
        elif not is_stale_and_leaked(facts):
            wanted = is_asked_of_nova(facts) and facts.nova.answer is Answer.NOT_ASKED
            assert verdict.asks_nova is wanted, facts


def wait_s(facts: Facts) -> float | None:
    """What is left of the period that it waits for, if it waits for one."""
    if not is_quiet(facts):
        waits_to_be_replaced = is_outlived(facts) and facts.domain is Domain.ABSENT
        waits_for_nova = is_candidate(facts) and not facts.migrated_away
        return facts.quiet_required_s - facts.quiet_s if waits_to_be_replaced or waits_for_nova else None
    if is_candidate(facts) and not facts.migrated_away and says_terminated(facts) and not is_final(facts):
        return facts.leaked_after_s - facts.quiet_s
    return None


def test_it_is_looked_at_again_exactly_when_its_period_is_over() -> None:
    """Not a look too early, and none too late; for Nova's sake it is looked at with a back-off."""
    for facts, verdict in every_combination():
        if facts.nova is not None and not is_stale_and_leaked(facts) and not is_contradictory(facts):
            assert verdict.look_again_s == (None if (left_s := wait_s(facts)) is None else pytest.approx(left_s)), facts
