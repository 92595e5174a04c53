"""
Every row of Nova's decision table, moment by moment. The numbers are those of facts/nova.md, section 1.

No row is let through as "some verdict that is not wrong": kind and occasion are what the row says.
"""

import re
from dataclasses import replace

import pytest
from tests.unit.rules.nova_rows import (
    ALIVE,
    ELSEWHERE,
    NOWHERE,
    ROWS,
    SILENT,
    TERMINATED,
    TERMINATING,
    UNDECIDED,
    Moment,
    deleted,
    server,
)

from autobackup.rules.termination import NOT_ASKED, Domain, Lease, decide

NUMBERS = [str(number) for number in range(1, 34)]
LETTERED = ["3r", "3d", "5b", "6s", "6d", "11f", "20c", "20r", "27s", "30c"]
MOMENTS = [(number, title, moment) for number, (title, moments) in ROWS.items() for moment in moments]


@pytest.mark.parametrize(
    "moment", [pytest.param(m, id=f"row-{number} {title}: {m.when}") for number, title, m in MOMENTS]
)
def test_row(moment: Moment) -> None:
    verdict = decide(moment.facts)

    assert (verdict.kind, verdict.occasion) == (moment.kind, moment.occasion), verdict.reason
    assert verdict.reason.strip()
    assert not verdict.asks_nova  # it was asked


def test_every_row_of_the_table_has_its_moments() -> None:
    """Row 6 is two rows, its source's and its destination's."""
    assert set(ROWS) == set(NUMBERS) - {"6"} | set(LETTERED)
    for number, (title, moments) in ROWS.items():
        assert moments, number
        assert len({moment.when for moment in moments}) == len(moments), number
        assert re.fullmatch(r"[a-zA-Z_, -]+", title), "it is part of a test's name"


@pytest.mark.parametrize("number", ROWS)
def test_a_row_ends_in_a_termination_as_the_table_says(number: str) -> None:
    """Row 15's rebuilt server is deleted in the end, as any other; what the rebuild itself took is not."""
    kinds = {moment.kind for moment in ROWS[number][1] if "the new disk" not in moment.when}
    assert (TERMINATED in kinds) is (number in TERMINATING)


def test_what_was_terminated_was_so_by_every_one_of_its_facts() -> None:
    for number, _, moment in MOMENTS:
        if moment.kind is TERMINATED:
            for hindrance in (
                {"domain": Domain.ACTIVE},
                {"domain": Domain.UNKNOWN},
                {"lease": Lease.BUSY},
                {"lease": Lease.NOT_TRIED},
                {"quiet_s": 0.0},
                {"migrated_away": True, "nova": server(task="migrating")},
                {"other_root_disk": True},
                {"nova": NOT_ASKED},
                {"nova": SILENT},
                {"nova": server()},
                {"nova": deleted(ELSEWHERE)},
                {"nova": deleted(NOWHERE)},
                {"nova": deleted(launched=False)},
            ):
                changed = replace(moment.facts, **hindrance)
                assert decide(changed).kind is not TERMINATED, (number, moment.when, hindrance)


def test_the_machine_alone_is_never_enough_where_there_is_a_nova() -> None:
    """Unasked or silent, Nova leaves undecided what it would have decided; what lives needs no word of it."""
    for number, _, moment in MOMENTS:
        for word in (NOT_ASKED, SILENT):
            verdict = decide(replace(moment.facts, nova=word))
            assert verdict.kind in (moment.kind, UNDECIDED), (number, moment.when)
            assert verdict.kind is not TERMINATED, (number, moment.when)
            if moment.kind is ALIVE:
                assert verdict.kind is ALIVE, (number, moment.when)


def test_libvirts_silence_leaves_every_moment_undecided() -> None:
    for number, _, moment in MOMENTS:
        assert decide(replace(moment.facts, domain=Domain.UNKNOWN)).kind is UNDECIDED, (number, moment.when)
