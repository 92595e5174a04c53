"""
What a backup stands on is not lost in the worst moment: while it is let go, its words edited, or it cannot be read.

Where two do something at once, the one is done in front of every single step of the other.
"""

import asyncio
import fcntl
import json
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pytest
from tests.flows.rig import Rig, rig_on
from tests.flows.sealed_bases import backups, bases, job_on, sealed_job, standing_on
from tests.unit.qcow2.material import KiB, MiB, needs_qemu_img, qemu_img

from autobackup.errors import Damaged, KeyRefused, Refused, StoreRefused, StoreUnavailable
from autobackup.flows.fetch import Origins
from autobackup.flows.release import Release
from autobackup.flows.restore import Restored, Wanted, restore
from autobackup.flows.verify import open_sealed
from autobackup.model import AttemptId, DestinationName, JobRecord
from autobackup.stores import BASE, KIND, KIND_BASE, PARENTS, OpenDestination

pytestmark = needs_qemu_img
CONTENT: Final = os.urandom(300 * KiB + 77)


class Steps:
    """A store, and what is done in front of one of its calls. *taken* counts them."""

    def __init__(self, store: object, at: int, then: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._at = at
        self._then = then
        self.taken = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if not asyncio.iscoroutinefunction(real):
            return real

        async def step(*args: object, **more: object) -> object:
            self.taken += 1
            if self.taken == self._at:
                await self._then()
            return await real(*args, **more)

        return step


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path / "rig") as one:
        yield one


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Rig, Rig]]:
    stores = folder / "stores"
    stores.mkdir(exist_ok=True)
    with rig_on(folder / "a", stores=stores) as a, rig_on(folder / "b", stores=stores) as b:
        yield a, b


def place_of(rig: Rig, name: str = "one", **other: object) -> OpenDestination:
    return replace(rig.places.all()[DestinationName(name)], **other)  # type: ignore[arg-type]


def a_release() -> Release:
    return Release(clock=lambda: 2_000_000_000.0)


async def only_a_base(rig: Rig, record: JobRecord) -> AttemptId:
    """What *record* stands on, sealed, and nothing else in the store."""
    door = rig.doors["one"]
    for attempt in door.held():
        await door.store.delete(AttemptId(attempt))

    async def unheard(_attempt: AttemptId) -> None:
        pass

    [base] = await rig.ancestry.of(record)
    return await rig.bases.send(place_of(rig), base, journal=unheard)


def words(rig: Rig, attempt: str, change: Callable[[dict[str, str]], Mapping[str, str]]) -> None:
    """As whoever may write to the store edits the properties of *attempt*."""
    path = rig.doors["one"].root / f"{attempt}.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "properties": dict(change(said["properties"]))}))


@pytest.mark.parametrize("is_under_way", [False, True], ids=["new", "under way"])
async def test_a_child_that_comes_at_any_step_of_a_release_has_its_base(rig: Rig, is_under_way: bool) -> None:
    """One that is *under way* found the base before, and shows itself only now."""
    link, door, came = rig.base(CONTENT), rig.doors["one"], list[str]()
    record = await job_on(rig, link)

    async def child() -> None:
        may_be_put.set()
        came.append(await coming)

    at, was_reached = 0, True
    while was_reached:
        at += 1
        base = await only_a_base(rig, record)
        is_ready, may_be_put = asyncio.Event(), asyncio.Event()

        async def before_put(is_ready: asyncio.Event = is_ready, may_be_put: asyncio.Event = may_be_put) -> None:
            is_ready.set()
            await may_be_put.wait()

        door.before_put = before_put
        coming: Awaitable[str] = sealed_job(rig, link)
        if is_under_way:
            coming = asyncio.ensure_future(coming)
            await is_ready.wait()
        steps = Steps(door.store, at, child)
        await a_release().base(place_of(rig, store=steps), base)
        was_reached = steps.taken >= at
        if not was_reached:
            await child()
        assert await standing_on(rig, came[-1]) == [CONTENT], f"lost at step {at}"
    assert at > 5, "nothing was enumerated"


async def test_a_release_at_any_step_of_a_childs_sending_leaves_it_its_base(rig: Rig) -> None:
    link, door = rig.base(CONTENT), rig.doors["one"]
    record, real = await job_on(rig, link), door.store

    async def release() -> None:
        for base in await bases(rig):
            await a_release().base(place_of(rig, store=real), AttemptId(base))

    at, was_reached = 0, True
    while was_reached:
        at += 1
        await only_a_base(rig, record)
        steps = Steps(real, at, release)
        door.store = cast(Any, steps)
        child = await sealed_job(rig, link)
        door.store = real
        was_reached = steps.taken >= at
        assert await standing_on(rig, child) == [CONTENT], f"lost at step {at}"
    assert at > 5, "nothing was enumerated"


@pytest.mark.parametrize("edit", ["other parents", "nothing", "no record", "header not shown"])
async def test_no_edit_takes_a_base_from_under_its_child(rig: Rig, edit: str) -> None:
    child = await sealed_job(rig, rig.base(CONTENT))
    [base] = await bases(rig)
    door = rig.doors["one"]
    if edit == "other parents":
        words(rig, child, lambda said: {**said, PARENTS: child})
    elif edit == "nothing":
        words(rig, child, lambda _said: {})
    else:
        (door.root / f"{child}.json").unlink()
    store = Steps(door.store, 0, asyncio.Event().wait)  # type: ignore[arg-type]

    async def read(attempt: AttemptId, **where: int) -> bytes:
        if attempt == child:
            raise StoreRefused("it is deactivated")
        return await door.store.read(attempt, **where)

    if edit == "header not shown":
        store.read = read  # type: ignore[attr-defined]
    assert not await a_release().base(place_of(rig, store=store), AttemptId(base))
    assert await standing_on(rig, child) == [CONTENT]
    assert base not in rig.keys["one"].destroyed


async def test_a_backup_that_says_it_is_a_base_is_not_let_go(rig: Rig) -> None:
    child = await sealed_job(rig, rig.base(CONTENT))
    words(rig, child, lambda said: {**said, KIND: KIND_BASE, BASE: "x", "autobackup_created_at": "1"})
    now_s = [2_000_000_000.0]
    release = Release(clock=lambda: now_s[0])
    await release.look(place_of(rig))
    now_s[0] += 1_000_000.0
    await release.look(place_of(rig))
    assert await standing_on(rig, child) == [CONTENT]
    assert child not in rig.keys["one"].destroyed


async def test_a_base_that_its_sender_cannot_prove_stays_under_others(tmp_path: Path) -> None:
    """It could be found from the end of its put on; the other host's disk is scrubbed by now."""
    with two_hosts(tmp_path) as (a, b):
        door, real = a.doors["one"], a.doors["one"].store
        is_sent, may_go_on = asyncio.Event(), asyncio.Event()

        async def stat(_attempt: AttemptId) -> None:
            is_sent.set()
            await may_go_on.wait()
            raise StoreRefused("403, for a moment")

        steps = Steps(real, 0, may_go_on.wait)  # type: ignore[arg-type]
        steps.stat = stat  # type: ignore[attr-defined]
        door.store = cast(Any, steps)
        record = await job_on(a, a.base(CONTENT))
        sending = asyncio.create_task(a.backup.advance(record.job))
        await is_sent.wait()
        child = await sealed_job(b, b.base(CONTENT))
        may_go_on.set()
        await sending
        door.store = real
        await a.run_to_the_end(record.job)
        assert a.is_gone(record.job)
        assert await standing_on(b, child) == [CONTENT]


async def test_a_base_whose_sender_was_killed_stays_under_others(tmp_path: Path) -> None:
    """It arrived; when the sender is back, the store refuses to tell of it."""

    def kill(_attempt: AttemptId) -> None:
        raise GeneratorExit

    with two_hosts(tmp_path) as (a, b):
        record = await job_on(a, a.base(CONTENT))
        a.doors["one"].after_put = kill
        with pytest.raises(BaseExceptionGroup):
            await a.backup.advance(record.job)
    with two_hosts(tmp_path) as (a, b):
        child = await sealed_job(b, b.base(CONTENT))
        a.doors["one"].shut = {"stat": StoreRefused("it is deactivated: not all of it was stored")}
        a.clock.now_s += 100_000.0
        await a.backup.advance(record.job)
        assert await standing_on(b, child) == [CONTENT]


async def test_what_several_destinations_note_at_once_is_all_journaled(tmp_path: Path) -> None:
    names = ("one", "two", "three")
    with rig_on(tmp_path / "rig", destinations=names) as rig:
        record = await job_on(rig, rig.base(CONTENT))
        put: dict[str, set[str]] = {name: set() for name in names}
        for name in names:
            rig.doors[name].after_put = lambda attempt, name=name: put[name].add(attempt)  # type: ignore[misc]
        await rig.run_to_the_end(record.job)
        assert not [copy.last_error for state in rig.journal for copy in state.copies if copy.last_error]
        for name in names:
            copies = [copy for state in rig.journal for copy in state.copies if copy.destination == name]
            noted = {copy.base_attempt for copy in copies} | {copy.attempt and copy.attempt.attempt for copy in copies}
            assert put[name] <= noted, f"{name} was sent what no journal knew of"


@contextmanager
def leased(path: str) -> Iterator[None]:
    """Whoever opens *path* without waiting is told to try again."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


async def test_a_base_that_cannot_be_read_now_is_waited_for(rig: Rig) -> None:
    """It is not gone: sealed without it, the disk would be scrubbed for nothing."""
    link = rig.base(CONTENT)
    record = await job_on(rig, link)
    with leased(link.path):
        for _ in range(3):
            await rig.advance(record.job)
            rig.clock.now_s += 100_000.0
        assert not rig.is_gone(record.job)
        assert rig.link(record).read_bytes() == b"an overlay by its format"
        assert await backups(rig) == []
    await rig.run_to_the_end(record.job)
    [child] = await backups(rig)
    assert await standing_on(rig, child) == [CONTENT]


# ---- the way back -----------------------------------------------------------------------------------------


async def an_overlay(rig: Rig, folder: Path) -> str:
    """The backup of a qcow2 that stands on a base of 3 MiB."""
    link = rig.base(os.urandom(3 * MiB))
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", link.path, "-F", "raw", folder / "overlay", "3M")
    record = await rig.new_job({"disk": (folder / "overlay").read_bytes()}, format_name="qcow2", chain=(link,))
    await rig.run_to_the_end(record.job)
    [child] = await backups(rig)
    return child


@pytest.fixture
async def overlay(rig: Rig, tmp_path: Path) -> str:
    return await an_overlay(rig, tmp_path)


async def brought_back(
    rig: Rig, backup: str, target: Path, *places: OpenDestination, files: tuple[str, ...] = (), **how: Any
) -> Restored:
    first = places[0] if places else place_of(rig)
    sealed = await open_sealed(first.store, rig.keys["one"], AttemptId(backup))
    return await restore(
        sealed, target=str(target), wanted=Wanted(), origins=Origins(places=places or [first], files=files),
        workers=rig.workers, **{"show": lambda _what, _bytes: nullcontext(lambda _count: None), **how},
    )  # fmt: skip


def nothing_of(target: Path) -> bool:
    return not [path for path in target.parent.iterdir() if path.name.startswith(target.name)]


class _ChildsOnly:
    """The keys of somebody who may open the backup and not its base."""

    def __init__(self, rig: Rig, child: Mapping[str, str]) -> None:
        self._keys, self._child = rig.keys["one"], child

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        if header_words != self._child:
            raise KeyRefused("not for you")
        return await self._keys.fetch(header_words)


async def test_who_cannot_open_the_base_is_told_and_left_without_half_a_disk(
    rig: Rig, overlay: str, tmp_path: Path
) -> None:
    sealed = await open_sealed(rig.doors["one"].store, rig.keys["one"], AttemptId(overlay))
    with pytest.raises(Refused, match="not for you"):
        await brought_back(rig, overlay, tmp_path / "to", place_of(rig, keys=_ChildsOnly(rig, sealed.header.key)))
    assert nothing_of(tmp_path / "to")


async def test_a_target_without_room_for_the_parent_is_left_without_the_disk(
    rig: Rig, overlay: str, tmp_path: Path
) -> None:
    """The overlay fits, the base does not: the kernel refuses to let a file grow beyond the limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MiB, limits[1]))
    try:
        with pytest.raises(Refused):
            await brought_back(rig, overlay, tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert nothing_of(tmp_path / "to")


async def test_a_parent_without_end_is_refused_at_its_size(rig: Rig, overlay: str, tmp_path: Path) -> None:
    """100 TiB of zeros in 200 KiB of qcow2, and nothing else to be had."""
    endless = tmp_path / "endless"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", endless, "100T")
    for base in await bases(rig):
        await rig.doors["one"].store.delete(AttemptId(base))
    async with asyncio.timeout(10):
        with pytest.raises(Damaged, match="other bytes"):
            await brought_back(rig, overlay, tmp_path / "to", files=(str(endless),))
    assert nothing_of(tmp_path / "to")


async def test_a_stop_at_any_stage_of_a_restore_leaves_nothing(rig: Rig, overlay: str, tmp_path: Path) -> None:
    for stage in ("begin backup", "some backup", "begin parent", "some parent"):
        restoring: list[asyncio.Task[Restored]] = []

        def stop_at(moment: str, stage: str = stage, restoring: list[asyncio.Task[Restored]] = restoring) -> None:
            if moment == stage:
                restoring[0].cancel()

        @contextmanager
        def show(
            what: str, _size_bytes: int, stop_at: Callable[[str], None] = stop_at
        ) -> Iterator[Callable[[int], None]]:
            stop_at(f"begin {what.partition(' ')[0]}")
            yield lambda _count: stop_at(f"some {what.partition(' ')[0]}")

        restoring.append(asyncio.create_task(brought_back(rig, overlay, tmp_path / "to", show=show)))
        with pytest.raises(asyncio.CancelledError):
            await restoring[0]
        assert nothing_of(tmp_path / "to"), stage


async def test_a_place_that_is_down_does_not_hide_the_one_that_has_the_parent(tmp_path: Path) -> None:
    """Beside the backup the base is lost; one destination does not answer, another has it."""
    with rig_on(tmp_path / "rig", destinations=("one", "two", "three")) as rig:
        overlay = await an_overlay(rig, tmp_path)
        for base in await bases(rig):
            await rig.doors["one"].store.delete(AttemptId(base))
        rig.doors["two"].shut = StoreUnavailable("it is down")
        await brought_back(rig, overlay, tmp_path / "to", *(place_of(rig, name) for name in rig.doors))
