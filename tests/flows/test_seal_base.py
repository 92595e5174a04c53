"""
A base is sealed once for all who stand on it, whoever sends it and whatever ends in the middle; and nobody stands on
anything but its bytes.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.rig import Rig, copy_of, rig_on
from tests.flows.sealed_bases import backups, bases, job_on, opened, sealed_job, standing_on

from autobackup.container.header import HEADER_BYTES
from autobackup.errors import StoreUnavailable
from autobackup.flows.places import Places
from autobackup.host.spool import Spool
from autobackup.model import AttemptId, CopyState
from autobackup.stores import BASE
from autobackup.stores.keyfile import KeyFile
from autobackup.stores.recipient import PrivateKeys, Recipients, write_key_pair
from autobackup.terms import Destination

KiB = 1 << 10
CONTENT = os.urandom(300 * KiB) + bytes(700 * KiB) + os.urandom(77)
DOWN = StoreUnavailable("the store is down")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path) as one:
        yield one


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Rig, Rig]]:
    """Two hosts with one destination."""
    with rig_on(tmp_path / "a", stores=tmp_path) as a, rig_on(tmp_path / "b", stores=tmp_path) as b:
        yield a, b


def edit(rig: Rig, attempt: str, at: int) -> None:
    path = rig.doors["one"].root / f"{attempt}.autobackup"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def forget(spool: Spool) -> None:
    """What this host knows of bases: a new one knows nothing."""
    for record in Path(spool.path, "bases").glob("*.json"):
        record.unlink()


# ---- once -------------------------------------------------------------------------------------------------------


async def test_one_base_of_three_jobs_is_sealed_once(rig: Rig) -> None:
    link = rig.base(CONTENT)
    children = [await sealed_job(rig, link) for _ in range(3)]
    [base] = await bases(rig)
    for child in children:
        assert (await opened(rig, child)).parents == (base,)
        assert await standing_on(rig, child) == [CONTENT]
        assert await rig.doors["one"].store.children(base) == sorted(children)


async def test_one_base_of_three_jobs_at_once_is_sealed_once(rig: Rig) -> None:
    link = rig.base(CONTENT)
    records = [await job_on(rig, link) for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for record in records:
            group.create_task(rig.run_to_the_end(record.job))
    assert len(await bases(rig)) == 1
    assert len(rig.keys["one"].drawn) == 4
    assert [await standing_on(rig, child) for child in await backups(rig)] == [[CONTENT]] * 3


async def test_a_base_says_nothing_of_any_instance(rig: Rig) -> None:
    """It is the same for all of them, whoever they belong to."""
    child = await sealed_job(rig, rig.base(CONTENT))
    [base] = await bases(rig)
    instance = (await opened(rig, child)).manifest.instance
    words = (rig.doors["one"].root / f"{base}.json").read_text()
    members = (await opened(rig, base)).members
    assert instance not in words + repr(members["manifest.json"])
    [name] = members.keys() - {"manifest.json", "digests.json"}
    assert name == f"bases/{hashlib.sha256(CONTENT).hexdigest()}"


async def test_bytes_make_a_base_not_its_path(hosts: tuple[Rig, Rig]) -> None:
    """The folder differs from host to host, and so does the name where the image was uploaded twice."""
    a, b = hosts
    first = await sealed_job(a, a.base(CONTENT))
    second = await sealed_job(b, b.base(CONTENT, name="0" * 40))
    assert len(await bases(a)) == 1
    assert (await opened(a, first)).parents == (await opened(b, second)).parents
    assert (await opened(b, second)).manifest.parents[0].path.endswith("0" * 40)


async def test_of_one_path_and_other_bytes_there_are_two(hosts: tuple[Rig, Rig]) -> None:
    a, b = hosts
    other = bytes(100) + CONTENT[100:]
    assert await standing_on(a, await sealed_job(a, a.base(CONTENT))) == [CONTENT]
    assert await standing_on(b, await sealed_job(b, b.base(other))) == [other]
    assert len(await bases(a)) == 2


async def test_a_chain_has_a_base_for_each_of_its_files(rig: Rig) -> None:
    """One that is shared with another chain is not sealed again."""
    lowest, middle = rig.base(b"lowest" * 999), rig.base(b"middle" * 777, name="middle")
    assert await standing_on(rig, await sealed_job(rig, middle, lowest)) == [b"middle" * 777, b"lowest" * 999]
    assert await standing_on(rig, await sealed_job(rig, lowest)) == [b"lowest" * 999]
    assert len(await bases(rig)) == 2


# ---- two senders ------------------------------------------------------------------------------------------------


async def test_of_two_hosts_at_once_one_takes_its_own_back(hosts: tuple[Rig, Rig]) -> None:
    """Both are in the middle of their puts when the other begins: neither could have found the other's."""
    met = asyncio.Barrier(2)
    for one in hosts:
        one.doors["one"].before_put = _meeting(met)
    a, _ = hosts
    jobs = [(one, await job_on(one, one.base(CONTENT))) for one in hosts]
    await asyncio.gather(*(one.run_to_the_end(record.job) for one, record in jobs))
    [base] = await bases(a)
    children = await backups(a)
    assert len(children) == 2
    for child in children:
        assert (await opened(a, child)).parents == (base,)
        assert await standing_on(a, child) == [CONTENT]


async def test_a_base_that_is_taken_back_is_not_stood_on(hosts: tuple[Rig, Rig]) -> None:
    """A third job found it meanwhile and is about to send: it looks again when it can be seen, and goes elsewhere."""
    a, b = hosts
    link = a.base(CONTENT)
    await sealed_job(a, link)
    [first] = await bases(a)

    async def take_back() -> None:
        await b.doors["one"].store.retire(AttemptId(first))
        if not await b.doors["one"].store.children(first):
            await b.doors["one"].store.delete(AttemptId(first))

    for child in await backups(a):
        await a.doors["one"].store.delete(AttemptId(child))
    arrived: list[str] = []
    a.doors["one"].after_put = arrived.append
    a.doors["one"].before_put = _once(take_back)
    child = await sealed_job(a, link)
    assert await standing_on(a, child) == [CONTENT]
    assert (await opened(a, child)).parents != (first,)
    assert arrived == [*await bases(a), child], "not a byte was sent to stand on what goes"


async def test_a_retired_base_is_not_found(rig: Rig) -> None:
    link = rig.base(CONTENT)
    await sealed_job(rig, link)
    [first] = await bases(rig)
    await rig.doors["one"].retire(AttemptId(first))
    child = await sealed_job(rig, link)
    assert (await opened(rig, child)).parents != (first,)
    assert await standing_on(rig, child) == [CONTENT]


async def test_a_base_that_goes_before_its_child_is_proven_is_sent_again(rig: Rig) -> None:
    """A copy without what it stands on proves nothing, and its disk is not scrubbed for it."""
    link = rig.base(CONTENT)
    await sealed_job(rig, link)
    [first] = await bases(rig)
    gone: list[str] = []

    def lose(attempt: AttemptId) -> None:
        if not gone:
            gone.append(attempt)
            (rig.doors["one"].root / f"{first}.autobackup").unlink()

    rig.doors["one"].after_put = lose
    child = await sealed_job(rig, link)
    assert gone != [child]
    assert await standing_on(rig, child) == [CONTENT]


# ---- what somebody put there ------------------------------------------------------------------------------------


async def test_a_base_with_a_flipped_bit_is_not_stood_on(hosts: tuple[Rig, Rig]) -> None:
    """Every 20 KiB of it, and its ends; a host that has not read it yet does so before it relies on it."""
    a, b = hosts
    await sealed_job(a, a.base(CONTENT))
    [bad] = await bases(a)
    link = b.base(CONTENT)
    size_bytes = (a.doors["one"].root / f"{bad}.autobackup").stat().st_size
    for at in (*range(HEADER_BYTES, size_bytes, 20 * KiB), size_bytes - 1):
        edit(a, bad, at)
        [base] = await b.ancestry.of(await job_on(b, link))
        assert await b.bases.find(b.places.all()["one"], base) is None, at  # type: ignore[index]
        edit(a, bad, at)
    edit(a, bad, size_bytes // 2)
    child = await sealed_job(b, link)
    assert (await opened(b, child)).parents != (bad,)
    assert await standing_on(b, child) == [CONTENT]


async def test_another_base_under_its_name_is_not_stood_on(hosts: tuple[Rig, Rig]) -> None:
    """Whole, authentic, under a key of ours; whoever can write to the folder can give it any description."""
    a, b = hosts
    await sealed_job(a, a.base(b"other bytes" * 999))
    [other] = await bases(a)
    [base] = await b.ancestry.of(await job_on(b, b.base(CONTENT)))
    path = a.doors["one"].root / f"{other}.json"
    words = json.loads(path.read_text())
    content = words["properties"][BASE].replace(words["properties"][BASE][:64], base.record.sha256)  # type: ignore[union-attr]
    path.write_text(json.dumps(words | {"properties": words["properties"] | {BASE: content}}))
    assert [one.attempt for one in await b.doors["one"].store.bases(content)] == [other]

    child = await sealed_job(b, b.base(CONTENT))
    assert await standing_on(b, child) == [CONTENT]


async def test_a_backup_that_says_it_is_a_base_is_not_stood_on(hosts: tuple[Rig, Rig]) -> None:
    a, b = hosts
    backup = await sealed_job(a, a.base(CONTENT))
    [base] = await bases(a)
    for name in (base, backup):
        path = a.doors["one"].root / f"{name}.json"
        words = json.loads(path.read_text())
        if name == base:
            marks = {BASE: words["properties"][BASE]}
            path.unlink()
        else:
            path.write_text(json.dumps(words | {"properties": words["properties"] | marks}))
    child = await sealed_job(b, b.base(CONTENT))
    assert (await opened(b, child)).parents not in ((base,), (backup,))
    assert await standing_on(b, child) == [CONTENT]


async def test_a_found_base_is_read_once_by_each_host(hosts: tuple[Rig, Rig]) -> None:
    a, b = hosts
    await sealed_job(a, a.base(CONTENT))
    [base] = await bases(a)
    link = b.base(CONTENT)
    for _ in range(3):
        await sealed_job(b, link)
    streamed = [attempt for call, attempt in b.doors["one"].calls if call == "stream"]
    assert streamed == [base]
    forget(b.spool)
    await sealed_job(b, link)
    assert [attempt for call, attempt in b.doors["one"].calls if call == "stream"] == [base, base]


async def test_a_base_that_was_just_sent_is_not_read_back(rig: Rig) -> None:
    """It is proven as any copy is; to read it whole once more would double what goes over the wire."""
    await sealed_job(rig, rig.base(CONTENT))
    assert [attempt for call, attempt in rig.doors["one"].calls if call == "stream"] == []


async def test_a_base_that_changed_since_it_was_read_is_read_again(rig: Rig) -> None:
    """A bad disk, or whoever can write there: its length and its name stay."""
    link = rig.base(CONTENT)
    await sealed_job(rig, link)
    [bad] = await bases(rig)
    edit(rig, bad, (rig.doors["one"].root / f"{bad}.autobackup").stat().st_size // 2)
    child = await sealed_job(rig, link)
    assert (await opened(rig, child)).parents != (bad,)
    assert await standing_on(rig, child) == [CONTENT]


async def test_a_base_under_another_attempts_name_is_not_stood_on(hosts: tuple[Rig, Rig]) -> None:
    """Its key is the other's, and goes with it."""
    a, b = hosts
    await sealed_job(a, a.base(CONTENT))
    [base] = await bases(a)
    copied = "11111111-2222-3333-4444-555555555555"
    for end in ("autobackup", "json"):
        (a.doors["one"].root / f"{base}.{end}").rename(a.doors["one"].root / f"{copied}.{end}")
    child = await sealed_job(b, b.base(CONTENT))
    assert (await opened(b, child)).parents != (copied,)
    assert await standing_on(b, child) == [CONTENT]


async def test_a_base_that_arrives_damaged_is_sent_again(rig: Rig) -> None:
    """As a backup is; what did not prove itself does not stay."""
    damaged: list[str] = []

    def damage(attempt: AttemptId) -> None:
        if not damaged:
            damaged.append(attempt)
            edit(rig, attempt, HEADER_BYTES + 99)

    rig.doors["one"].after_put = damage
    child = await sealed_job(rig, rig.base(CONTENT))
    assert await standing_on(rig, child) == [CONTENT]
    assert not set(damaged) & set(rig.doors["one"].held())


# ---- for whom ---------------------------------------------------------------------------------------------------


async def test_other_readers_have_a_base_of_their_own(tmp_path: Path) -> None:
    """
    Who may open the backup must be able to open what it stands on; and nobody else is to learn what that is.

    That this host could open the other, with a key file of earlier, says nothing of the readers.
    """
    earlier = KeyFile(str(tmp_path / "earlier.kek"))
    both = {"key_source": lambda path: KeyFile(str(path), older=[str(tmp_path / "earlier.kek")])}
    with rig_on(tmp_path / "a", stores=tmp_path) as a:
        first = await sealed_job(a, a.base(CONTENT))
        (tmp_path / "one.kek").rename(tmp_path / "earlier.kek")
        with rig_on(tmp_path / "b", stores=tmp_path, **both) as b:
            second = await sealed_job(b, b.base(CONTENT))
            assert len(await bases(b)) == 2
            assert await standing_on(b, second, keys=KeyFile(str(tmp_path / "one.kek"))) == [CONTENT]
            assert await standing_on(b, first, keys=earlier) == [CONTENT]


async def test_a_project_that_is_shared_with_has_a_base_of_its_own(rig: Rig) -> None:
    """An image is seen by its members: a base that was sealed for others alone would be missing to them."""
    link = rig.base(CONTENT)
    [place] = rig.places.all().values()
    for members in ((), ("a" * 32,), ("b" * 32, "a" * 32), ("a" * 32, "b" * 32)):
        shared = Destination(name="one", store="glance", cloud="lab", key="none", members=members)
        rig.places = Places([shared], lambda one: replace(place, destination=one))
        await sealed_job(rig, link)
    assert len(await bases(rig)) == 3


async def test_what_a_host_cannot_open_it_does_not_stand_on(tmp_path: Path) -> None:
    """Sealed to public keys, only what it sent itself is known to it; another host sends its own."""
    write_key_pair(str(tmp_path / "alice"), post_quantum=False)
    how = {"stores": tmp_path, "key_source": lambda _path: Recipients([str(tmp_path / "alice.pub")])}
    with rig_on(tmp_path / "a", **how) as a, rig_on(tmp_path / "b", **how) as b:
        link = a.base(CONTENT)
        first = [await sealed_job(a, link) for _ in range(2)]
        assert len(await bases(a)) == 1
        second = await sealed_job(b, b.base(CONTENT))
        [of_a, of_b] = await bases(a)
        alice = PrivateKeys([str(tmp_path / "alice")])
        parents = [(await opened(a, child, keys=alice)).parents for child in (*first, second)]
        assert parents == [(of_a,), (of_a,), (of_b,)]
        assert await standing_on(b, second, keys=alice) == [CONTENT]


# ---- moments ----------------------------------------------------------------------------------------------------


def _meeting(met: asyncio.Barrier) -> Callable[[], Awaitable[None]]:
    """The first put of each waits for the other's; the later ones do not."""

    async def meet() -> None:
        await met.wait()

    return _once(meet)


def _once(work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    left = [work]

    async def do() -> None:
        if left:
            await left.pop()()

    return do


# ---- what stops in the middle -----------------------------------------------------------------------------------


class Stopped(Exception):
    """The process ends here: nobody handles it."""


def _stop() -> None:
    raise Stopped


@pytest.mark.parametrize("moment", ["journaled", "drawn", "in the put", "put", "child journaled", "child put"])
async def test_what_a_stop_leaves_is_used_or_deleted(tmp_path: Path, moment: str) -> None:
    """The next process ends with one base, one backup on it, and nothing else in the store."""
    with rig_on(tmp_path) as rig:
        record = await job_on(rig, rig.base(CONTENT))
        await stopped_at(rig, moment, rig.backup.advance(record.job))
        rig.spool.close()
        left = await bases(rig)
        cut = copy_of(rig.jobs.get(record.job), "one").base_attempt
        if cut is not None and not left:  # as SIGKILL would have left it: nobody cleans up
            (rig.doors["one"].root / f".partial-{cut}").write_bytes(b"half a base")
    with rig_on(tmp_path) as again:
        await again.run_to_the_end(record.job)
        assert again.is_gone(record.job)
        [base] = await bases(again)
        [child] = await backups(again)
        assert await standing_on(again, child) == [CONTENT]
        assert left in ([], [base]), "what arrived is used"
        whole = {f"{one}.{end}" for one in (base, child) for end in ("autobackup", "json")}
        assert set(again.doors["one"].files()) == whole


async def stopped_at(rig: Rig, moment: str, work: Awaitable[object]) -> None:
    """Let *work* come to *moment* and no further."""
    door, keys = rig.doors["one"], rig.keys["one"]
    is_journaled = {
        "journaled": lambda copy: copy.base_attempt is not None,
        "child journaled": lambda copy: copy.state is CopyState.SENDING,
    }.get(moment)
    if is_journaled is not None:
        rig.on_record = lambda now: _stop() if is_journaled(copy_of(now, "one")) else None
    elif moment == "drawn":
        keys.after_draw = _stop
    elif moment == "in the put":
        door.in_put = _stop
    else:
        is_due = {"put": 1, "child put": 2}[moment]
        door.after_put = lambda _attempt: _stop() if len(door.held()) == is_due else None
    came = False
    try:
        await work
    except* Stopped:
        came = True
    assert came
