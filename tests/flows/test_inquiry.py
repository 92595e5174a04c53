"""
What is asked of Nova, how often, and what becomes of its answers.

What it does without an answer is in `test_inquiry_trouble.py`, and without a record in `test_inquiry_control.py`.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.contract.novas import OTHER_HOST
from tests.flows.asking import Asking, an_asking, archived, kinds, with_control
from tests.lab.nova_servers import HOST

from autobackup.cloud.nova import Server
from autobackup.model import InstanceId
from autobackup.rules.termination import NOT_ASKED, Answer, Host, Word


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    with an_asking(tmp_path) as one:
        yield one


# ---- words ------------------------------------------------------------------------------------------------


async def test_each_record_is_told_as_it_is(asking: Asking) -> None:
    with_control(asking)
    put, fake = asking.nova.put, asking.fake
    expected = {
        put(task_state="deleting"): Word(
            answer=Answer.SERVER, host=Host.HERE, vm_state="active", task_state="deleting"
        ),
        put(vm_state="building", launched_at_s=None): Word(
            answer=Answer.SERVER, host=Host.HERE, vm_state="building", launched=False
        ),
        put(host=OTHER_HOST): Word(answer=Answer.SERVER, host=Host.ELSEWHERE, vm_state="active"),
        put(host=None, vm_state="shelved_offloaded"): Word(
            answer=Answer.SERVER, host=Host.NONE, vm_state="shelved_offloaded"
        ),
    }
    soft, ended, dead, reclaimed, dead_elsewhere, dead_nowhere, unborn = (
        put(), put(), put(), put(), put(host=OTHER_HOST), put(host=None), put(vm_state="building", launched_at_s=None)
    )  # fmt: skip
    fake.soft_delete(soft)
    fake.soft_delete(reclaimed)
    fake.destroy(reclaimed)
    fake.end(ended)
    for one in (dead, dead_elsewhere, dead_nowhere):
        fake.delete(one)
    fake.destroy(unborn)
    expected |= {
        soft: Word(answer=Answer.SERVER, host=Host.HERE, vm_state="soft-delete"),
        ended: Word(answer=Answer.DELETED, host=Host.HERE, vm_state="deleted"),
        dead: Word(answer=Answer.DELETED, host=Host.HERE, vm_state="deleted"),
        reclaimed: Word(answer=Answer.DELETED, host=Host.HERE, vm_state="soft-delete"),
        dead_elsewhere: Word(answer=Answer.DELETED, host=Host.ELSEWHERE, vm_state="deleted"),
        dead_nowhere: Word(answer=Answer.DELETED, host=Host.NONE, vm_state="deleted"),
        unborn: Word(answer=Answer.DELETED, host=Host.HERE, vm_state="building", launched=False),
        archived(asking): Word(answer=Answer.NO_RECORD, control=True),
    }
    since_s = time.monotonic()
    for one in expected:
        assert asking.inquiry.word(one, since_s=since_s) == NOT_ASKED

    async with asking.running():
        assert await asking.words(list(expected), since_s=since_s) == expected


@pytest.mark.parametrize("since_start", ["asked before it ran", "asked while it ran"])
async def test_five_hundred_at_once_are_two_lists(asking: Asking, since_start: str) -> None:
    """Those that were deleted here, as after the end of a tenant; and as many that live."""
    ones = [asking.nova.put() for _ in range(1000)]
    for one in ones[:500]:
        asking.fake.delete(one)
    if since_start == "asked before it ran":
        for one in ones:
            asking.inquiry.word(one, since_s=time.monotonic())
    async with asking.running():
        if since_start == "asked while it ran":
            await asking.first_hearing()
        with asking.fake.counted() as requests:
            words = await asking.words(ones, since_s=0.0)
    assert kinds([request for request in requests if "marker" not in request.query]) == "LD"
    assert set(kinds(requests)) == {"L", "D"}
    assert len(requests) <= 12  # each a page of a hundred or less
    assert [words[one].answer for one in ones] == [Answer.DELETED] * 500 + [Answer.SERVER] * 500
    assert set(asking.fake.methods) == {"GET"}


async def test_questions_of_a_second_are_asked_together(asking: Asking) -> None:
    ones = [asking.nova.put() for _ in range(10)]
    async with asking.running():
        await asking.first_hearing()
        since_s = time.monotonic()
        with asking.fake.counted() as requests:
            for one in ones:
                asking.inquiry.word(one, since_s=since_s)
                await asyncio.sleep(0.05)
            assert {word.answer for word in (await asking.words(ones, since_s=since_s)).values()} == {Answer.SERVER}
        assert kinds(requests) == "LD"


async def test_what_is_in_no_list_is_asked_for_by_turns(asking: Asking) -> None:
    """At most 25 in one asking, so that a list of the living is never old; and nobody is left out."""
    with_control(asking)
    lost = [archived(asking) for _ in range(60)]
    deleted = [asking.nova.put() for _ in range(60)]
    for one in deleted:
        asking.fake.delete(one)
    since_s = time.monotonic()
    for one in lost + deleted:
        asking.inquiry.word(one, since_s=since_s)

    async with asking.running():
        words = await asking.words(lost + deleted, since_s=since_s)
        requests = asking.fake.requests

    assert {words[one].answer for one in deleted} == {Answer.DELETED}
    assert {words[one] for one in lost} == {Word(answer=Answer.NO_RECORD, control=True)}
    turns = [turn for turn in kinds(requests).split("L") if "U" in turn or "G" in turn]
    assert [turn.count("G") for turn in turns] == [25, 25, 10]
    assert max(len(turn) for turn in turns) <= 1 + 25 * 3
    assert not {request.query["uuid"] for request in requests if "uuid" in request.query} & set(deleted)


async def test_the_lists_reach_an_hour_back(asking: Asking) -> None:
    """The end of a record is not its change: who was last changed before the question may be deleted after it."""
    now_s = time.time()
    recent, old = (asking.nova.put(updated_at_s=now_s - ago_s) for ago_s in (3500.0, 7200.0))
    for one in (recent, old):
        asking.fake.destroy(one)
        asking.inquiry.word(one, since_s=0.0)

    async with asking.running():
        words = await asking.words([recent, old], since_s=0.0)
    assert {word.answer for word in words.values()} == {Answer.DELETED}
    assert [request.query["uuid"] for request in asking.fake.requests if "uuid" in request.query] == [old]


# ---- how old a word may be --------------------------------------------------------------------------------


async def test_a_word_is_never_older_than_the_question(asking: Asking) -> None:
    one = asking.nova.put()
    async with asking.running():
        before_s = time.monotonic()
        assert (await asking.words([one]))[one].answer is Answer.SERVER
        asking.fake.delete(one)
        changed_s = time.monotonic()
        with asking.fake.counted() as requests:
            assert asking.inquiry.word(one, since_s=before_s).answer is Answer.SERVER
            await asyncio.sleep(1.5)
        assert requests == []  # that question has its answer
        assert asking.inquiry.word(one, since_s=changed_s) is NOT_ASKED
        assert (await asking.words([one], since_s=changed_s))[one].answer is Answer.DELETED


async def test_an_asking_under_way_is_no_answer_to_a_later_question(asking: Asking) -> None:
    """The living were listed already: what became of it since is not in there."""
    one = asking.nova.put()
    asked_s: list[float] = []

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        if not asked_s:
            asking.fake.delete(one)
            asked_s.append(time.monotonic())
            assert asking.inquiry.word(one, since_s=asked_s[0]) is NOT_ASKED

    asking.on_servers = on_servers
    first_s = time.monotonic()
    asking.inquiry.word(one, since_s=first_s)
    async with asking.running():
        await asking.words([one], since_s=first_s)
        assert asking.inquiry.word(one, since_s=asked_s[0]) is NOT_ASKED
        assert (await asking.words([one], since_s=asked_s[0]))[one].answer is Answer.DELETED
    assert kinds(asking.fake.requests) == "LDLD"


async def test_a_question_that_is_repeated_is_asked_once(asking: Asking) -> None:
    """Candidates are looked at whenever something happens, also while Nova is asked about them."""
    one = asking.nova.put()

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        assert asking.inquiry.word(one, since_s=0.0) is NOT_ASKED

    asking.on_servers = on_servers
    asking.inquiry.word(one, since_s=0.0)
    async with asking.running():
        await asking.words([one], since_s=0.0)
        await asyncio.sleep(2.5)
    assert kinds(asking.fake.requests) == "LD"


async def test_what_is_forgotten_is_gone(asking: Asking) -> None:
    gone, kept = asking.nova.put(), asking.nova.put()
    async with asking.running():
        await asking.words([gone, kept])
        asking.inquiry.forget(gone)
        assert asking.inquiry.word(kept, since_s=0.0).answer is Answer.SERVER
        with asking.fake.counted() as requests:
            assert asking.inquiry.word(gone, since_s=0.0) is NOT_ASKED
            asking.inquiry.forget(gone)  # and the question, too
            count = len(asking.told)
            await asyncio.sleep(2.0)
        assert gone not in asking.told[count:]
        assert "D" not in kinds(requests)
        asking.inquiry.forget(InstanceId("never heard of"))


async def test_what_is_forgotten_while_it_is_asked_for_is_gone(asking: Asking) -> None:
    gone, kept = asking.nova.put(), asking.nova.put()

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        asking.inquiry.forget(gone)

    asking.on_servers = on_servers
    asking.inquiry.word(gone, since_s=0.0)
    async with asking.running():
        await asking.words([kept])
        assert gone not in asking.told
        assert asking.inquiry.word(gone, since_s=0.0) is NOT_ASKED


# ---- the living -------------------------------------------------------------------------------------------


async def test_the_living_are_heard_before_any_word(asking: Asking) -> None:
    """A word may end a server: what its owner last said must be known by then."""
    living, dead, lost = with_control(asking), asking.nova.put(), archived(asking)
    asking.fake.delete(dead)
    for one in (living, dead, lost):
        asking.inquiry.word(one, since_s=0.0)
    hearing = asyncio.Event()

    async def on_servers(servers: Mapping[InstanceId, Server]) -> None:
        assert set(servers) == {living}
        assert servers[living].host == HOST
        await asyncio.sleep(0.3)
        assert [one for one in asking.told if not isinstance(one, frozenset)] == []
        hearing.set()

    asking.on_servers = on_servers
    async with asking.running():
        await asking.words([living, dead, lost], since_s=0.0)
    assert hearing.is_set()
    assert asking.told[0] == frozenset({living})
    assert set(asking.told[1:4]) == {living, dead, lost}


async def test_the_living_are_heard_again_and_again_while_nobody_asks(tmp_path: Path) -> None:
    with an_asking(tmp_path, refresh_interval_s=0.5) as asking:
        one = asking.nova.put()
        async with asking.running():
            await asking.first_hearing(count=2)
            other = asking.nova.put()
            await asking.first_hearing(count=4)
        assert asking.heard[0] == {one}
        assert asking.heard[-1] == {one, other}
        assert set(kinds(asking.fake.requests)) == {"L"}
        assert all(isinstance(told, frozenset) for told in asking.told)


async def test_the_refresh_keeps_its_pace(tmp_path: Path) -> None:
    with an_asking(tmp_path, refresh_interval_s=2.0) as asking:
        async with asking.running():
            await asking.first_hearing(count=2)
            with asking.fake.counted() as requests:
                await asyncio.sleep(7.0)
        assert 2 <= len(requests) <= 5


async def test_a_new_server_is_heard_soon(asking: Asking) -> None:
    async with asking.running():
        await asking.first_hearing()
        new = asking.nova.put()
        asking.inquiry.refresh_soon()
        await asking.first_hearing(count=2, within_s=3.0)
        assert new in asking.heard[-1]
        with asking.fake.counted() as requests:
            await asyncio.sleep(2.0)
        assert requests == []  # once


async def test_a_server_that_is_new_while_the_living_are_heard_is_heard_soon(asking: Asking) -> None:
    new: list[InstanceId] = []

    async def on_servers(_servers: Mapping[InstanceId, Server]) -> None:
        if not new:
            new.append(asking.nova.put())
            asking.inquiry.refresh_soon()

    asking.on_servers = on_servers
    async with asking.running():
        await asking.first_hearing(count=2, within_s=6.0)
    assert new[0] in asking.heard[1]
