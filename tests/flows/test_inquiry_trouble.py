"""Nova is silent, slow or wrong: nothing is ever concluded from it, and nothing ends."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from tests.contract.novas import OTHER_HOST, REMEDY
from tests.flows.asking import Asking, an_asking, archived, at_request, kinds, with_control
from tests.lab.fake_nova import Policy

from autobackup.cloud.nova import Server
from autobackup.errors import CloudUnavailable, SpoolUnavailable
from autobackup.model import InstanceId
from autobackup.rules.termination import Answer, Word

FIRST_PAUSE_S: Final = 2.0
"""The longest, after a first failure."""


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    with an_asking(tmp_path) as one:
        yield one


def said(words: Mapping[InstanceId, Word]) -> set[Answer]:
    return {word.answer for word in words.values()}


# ---- silence ----------------------------------------------------------------------------------------------


def refusing(asking: Asking) -> None:
    asking.fake.refuse()


def failing(asking: Asking) -> None:
    asking.fake.answer(500)


def limiting(asking: Asking) -> None:
    asking.fake.answer(429, retry_after_s=1)


def cutting(asking: Asking) -> None:
    asking.fake.cut(after_bytes=30)


def babbling(asking: Asking) -> None:
    asking.fake.babble()


def without_filters(asking: Asking) -> None:
    asking.nova.put(host=OTHER_HOST)
    asking.fake.policy = Policy(all_filters=False, is_admin=False)


def without_hosts(asking: Asking) -> None:
    asking.fake.policy = Policy(extended_attributes=False, is_admin=False)


def forbidden(asking: Asking) -> None:
    asking.fake.policy = Policy(all_tenants=False, is_admin=False)


TROUBLES: Final[Mapping[Callable[[Asking], None], str]] = {
    refusing: "make sure that it runs", failing: "500", limiting: "429", cutting: "broken", babbling: "not JSON",
    without_filters: REMEDY, without_hosts: REMEDY, forbidden: REMEDY,
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_nova_in_trouble_gives_each_candidate_a_reason_and_the_next_asking_succeeds(
    asking: Asking, trouble: Callable[[Asking], None]
) -> None:
    alive, lost, dead = with_control(asking), archived(asking), asking.nova.put()
    asking.fake.delete(dead)
    trouble(asking)
    for one in (alive, lost, dead):
        asking.inquiry.word(one, since_s=0.0)

    async with asking.running():
        words = await asking.words([alive, lost, dead], since_s=0.0)
        for word in words.values():
            assert word.answer is Answer.SILENT
            assert TROUBLES[trouble] in word.reason
        assert TROUBLES[trouble] in asking.inquiry.trouble
        assert not asking.is_reachable
        assert asking.heard == []

        asking.fake.heal()
        asking.fake.policy = Policy.least()
        words = await asking.words([alive, lost, dead], within_s=FIRST_PAUSE_S + 5)
        assert [words[one].answer for one in (alive, lost, dead)] == [Answer.SERVER, Answer.NO_RECORD, Answer.DELETED]
        assert words[lost].control
        assert asking.inquiry.trouble == ""
        assert asking.is_reachable


async def test_a_nova_that_never_answers_is_silent_in_time(tmp_path: Path) -> None:
    with an_asking(tmp_path, call_timeout_s=2.0) as asking:
        one = asking.nova.put()
        await asking.nova.nova.living()
        asking.fake.fall_silent()
        asking.inquiry.word(one, since_s=0.0)
        async with asking.running():
            assert said(await asking.words([one], since_s=0.0, within_s=20.0)) == {Answer.SILENT}


@pytest.mark.parametrize(("path", "letter"), [("detail$", "D"), ("detail$", "U"), ("[0-9a-f]$", "G")])
async def test_what_was_answered_before_the_trouble_stands(asking: Asking, path: str, letter: str) -> None:
    """The deleted are not listed: nobody has a word. One of them fails by itself: the others have theirs."""
    with_control(asking)
    dead, lost = asking.nova.put(), archived(asking)
    asking.fake.delete(dead)
    at_request(asking, letter, lambda: asking.fake.answer(500, path=path))
    for one in (dead, lost):
        asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        words = await asking.words([dead, lost], since_s=0.0)
    assert words[dead].answer is (Answer.SILENT if letter == "D" else Answer.DELETED)
    assert words[lost].answer is Answer.SILENT


async def test_a_control_that_cannot_be_asked_for_is_none(asking: Asking) -> None:
    """The second list of the living fails: no record is no word then."""
    with_control(asking)
    lost = archived(asking)
    at_request(asking, "G", lambda: asking.fake.answer(503, path="detail$"))
    asking.inquiry.word(lost, since_s=0.0)
    async with asking.running():
        assert said(await asking.words([lost], since_s=0.0)) == {Answer.SILENT}


async def test_the_living_are_heard_again_after_a_trouble_though_nobody_asks(tmp_path: Path) -> None:
    with an_asking(tmp_path, refresh_interval_s=0.5) as asking:
        asking.fake.answer(503)
        async with asking.running():
            while not asking.inquiry.trouble:
                await asyncio.sleep(0.01)
            asking.fake.heal()
            await asking.first_hearing(within_s=FIRST_PAUSE_S + 3)
            assert asking.inquiry.trouble == ""


async def test_nova_is_not_asked_before_the_time_that_it_names(asking: Asking) -> None:
    one = asking.nova.put()
    asking.fake.answer(503, retry_after_s=4, times=1)
    asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        assert said(await asking.words([one], since_s=0.0)) == {Answer.SILENT}
        silent_s = time.monotonic()
        with asking.fake.counted() as requests:
            asking.inquiry.refresh_soon()
            assert said(await asking.words([one])) == {Answer.SERVER}
        assert time.monotonic() - silent_s > 3.9
        assert kinds(requests) == "LD"


async def test_a_nova_that_stays_in_trouble_is_asked_ever_more_seldom(asking: Asking) -> None:
    asking.fake.answer(500)
    asked_s: list[float] = []
    async with asking.running():
        while len(asked_s) < 4:
            await asking.words([InstanceId("x")], within_s=20.0)
            asked_s.append(time.monotonic())
    pauses_s = [after - before for before, after in itertools.pairwise(asked_s)]
    for n, pause_s in enumerate(pauses_s, 1):
        assert 2**n * 0.5 - 0.1 < pause_s < 2**n + 1.5
    assert len(asking.fake.requests) == 4


async def test_the_same_trouble_is_said_once(asking: Asking, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are the same each time, or every candidate would seem to have news at every look."""
    asking.fake.answer(500)
    async with asking.running():
        first, second = [(await asking.words([InstanceId("x")]))[InstanceId("x")] for _ in range(2)]
    assert first == second
    said = capsys.readouterr()
    assert (said.out + said.err).count("nova.silent") == 1  # where to, another test may have said


# ---- one among many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"null", b"{}", b"<html>", b'{"server": []}', b'{"server": {"id": "x", "OS-EXT-STS:vm_state": "active"}}']
)
async def test_one_that_is_answered_strangely_ends_nothing(asking: Asking, body: bytes) -> None:
    with_control(asking)
    strange, dead = archived(asking), asking.nova.put()
    asking.fake.delete(dead)
    asking.fake.babble(body, path=f"{strange}$")
    for one in (strange, dead):
        asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        words = await asking.words([strange, dead], since_s=0.0)
        assert (words[strange].answer, words[dead].answer) == (Answer.SILENT, Answer.DELETED)
        asking.fake.heal()
        assert said(await asking.words([strange])) == {Answer.NO_RECORD}


async def test_one_that_cannot_be_told_does_not_keep_the_others_from_their_words(asking: Asking) -> None:
    """Its cell is down, and stays so."""
    with_control(asking)
    strange = asking.nova.put(cell="cell2", host=OTHER_HOST)
    lost = [archived(asking) for _ in range(3)]
    asking.fake.down_cells = {"cell2"}
    for one in (strange, *lost):
        asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        words = await asking.words([strange, *lost], since_s=0.0)
    assert words[strange].answer is Answer.SILENT
    assert said({one: words[one] for one in lost}) == {Answer.NO_RECORD}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_nova_that_asks_for_a_pause_is_left_in_peace_by_all(asking: Asking, status: int) -> None:
    """Also where it says so of one server: the others are not asked for first."""
    with_control(asking)
    lost = [archived(asking) for _ in range(5)]
    asking.fake.answer(status, path="[0-9a-f]$", retry_after_s=60)
    for one in lost:
        asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        assert said(await asking.words(lost, since_s=0.0)) == {Answer.SILENT}
        assert str(status) in asking.inquiry.trouble
    assert kinds(asking.fake.requests).count("G") == 1


async def test_whoever_cannot_keep_what_was_heard_does_not_end_the_asking(asking: Asking) -> None:
    """The spool is full: Nova's words are good all the same, and a scrub may be what makes room."""
    one = asking.nova.put()

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        raise SpoolUnavailable("/spool/instances/x.json: No space left on device")

    asking.on_servers = on_servers
    asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        assert said(await asking.words([one], since_s=0.0)) == {Answer.SERVER}


async def test_a_cloud_that_cannot_be_asked_by_a_hearer_is_a_trouble_like_another(asking: Asking) -> None:
    one = asking.nova.put()

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        asking.on_servers = None
        raise CloudUnavailable("Keystone: no answer", retry_after_s=1.0)

    asking.on_servers = on_servers
    asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        await asking.words([one], since_s=0.0)
        assert said(await asking.words([one])) == {Answer.SERVER}


# ---- cancellation -----------------------------------------------------------------------------------------


async def asleep(_asking: Asking) -> None:
    """Before its first asking."""


async def idle(asking: Asking) -> None:
    await asking.first_hearing()
    await asyncio.sleep(0.1)


async def gathering(asking: Asking) -> None:
    await idle(asking)
    asking.inquiry.word(asking.nova.put(), since_s=time.monotonic())
    await asyncio.sleep(0.1)


async def in_a_request(asking: Asking) -> None:
    asking.fake.fall_silent()
    asking.inquiry.word(asking.nova.put(), since_s=0.0)
    while not asking.fake.requests:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


async def while_it_is_heard(asking: Asking) -> None:
    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        await asyncio.Event().wait()

    asking.on_servers = on_servers
    await asking.first_hearing()


async def in_a_pause(asking: Asking) -> None:
    asking.fake.answer(503, retry_after_s=60)
    while not asking.inquiry.trouble:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("where", [asleep, idle, gathering, in_a_request, while_it_is_heard, in_a_pause])
async def test_an_end_at_any_time_leaves_nothing_behind(
    asking: Asking, where: Callable[[Asking], Awaitable[None]]
) -> None:
    lost = archived(asking)
    task = asyncio.create_task(asking.inquiry.run())
    await asyncio.sleep(0)
    await where(asking)
    told = list(asking.told)
    task.cancel()
    began_s = time.monotonic()
    await asyncio.wait({task})

    assert task.cancelled()
    assert time.monotonic() - began_s < 1
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert asking.told == told  # nobody is given a word that nobody said
    asking.fake.heal()
    asking.on_servers = None
    asking.inquiry.word(lost, since_s=0.0)
    async with asking.running():  # and it can begin again
        assert said(await asking.words([lost], since_s=0.0)) == {Answer.NO_RECORD}
