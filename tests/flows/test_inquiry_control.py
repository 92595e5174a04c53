"""When it proves something that Nova has no record of a server: only where it shows another one, as it is asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.novas import OTHER_HOST
from tests.flows.asking import Asking, an_asking, archived, at_request, kinds, with_control

from autobackup.rules.termination import Answer, Word


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    with an_asking(tmp_path) as one:
        yield one


async def no_record(asking: Asking) -> Word:
    lost = archived(asking)
    asking.held.add(lost)
    asking.inquiry.word(lost, since_s=0.0)
    async with asking.running():
        word = (await asking.words([lost], since_s=0.0))[lost]
    assert word.answer is Answer.NO_RECORD
    return word


async def test_no_record_is_controlled_by_another_server(asking: Asking) -> None:
    with_control(asking)
    assert (await no_record(asking)).control
    assert kinds(asking.fake.requests).startswith("LDUUGL")


def nobody(_asking: Asking) -> None:
    """Only the candidate itself is held, and it is nowhere."""


def not_held(asking: Asking) -> None:
    asking.nova.put()


def elsewhere(asking: Asking) -> None:
    asking.held.add(asking.nova.put(host=OTHER_HOST))


def soft_deleted(asking: Asking) -> None:
    asking.fake.soft_delete(with_control(asking))


def deleted(asking: Asking) -> None:
    asking.fake.delete(with_control(asking))


def ended(asking: Asking) -> None:
    """Its row is still among those of the living, and says that it is deleted."""
    asking.fake.end(with_control(asking))


def of_a_cell_that_goes_down(asking: Asking) -> None:
    with_control(asking)
    at_request(asking, "G", lambda: asking.fake.down_cells.add("cell1"))


def only_before(asking: Asking) -> None:
    one = with_control(asking)
    at_request(asking, "G", lambda: asking.fake.delete(one))


def only_after(asking: Asking) -> None:
    at_request(asking, "G", lambda: with_control(asking))


def one_before_and_one_after(asking: Asking) -> None:
    one = with_control(asking)

    def change() -> None:
        asking.fake.delete(one)
        with_control(asking)

    at_request(asking, "G", change)


@pytest.mark.parametrize(
    "who",
    [
        nobody, not_held, elsewhere, soft_deleted, deleted, of_a_cell_that_goes_down, only_before, only_after,
        one_before_and_one_after, ended,
    ],
)  # fmt: skip
async def test_without_another_living_server_no_record_proves_nothing(
    asking: Asking, who: Callable[[Asking], None]
) -> None:
    """It must be held here, on this host, and alive; the same one right before and right after."""
    who(asking)
    assert not (await no_record(asking)).control


async def test_one_that_comes_back_as_the_control_is_looked_for_is_not_its_own(asking: Asking) -> None:
    """A restore from the archive, or a cell that comes up: it is among the living of the second list."""
    lost = asking.nova.put()
    server = asking.fake.server(lost)
    asking.fake.archive(lost)
    asking.held.add(lost)
    at_request(asking, "G", lambda: asking.fake.put(server))
    asking.inquiry.word(lost, since_s=0.0)
    async with asking.running():
        word = (await asking.words([lost], since_s=0.0))[lost]
    assert not word.control
