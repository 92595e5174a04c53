"""A job from its verdict to its receipt: what is journaled when, what a failure does, and what a stop leaves."""

import asyncio
import contextlib
import errno
import json
import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import pytest
from tests.flows.material import MiB, limits, open_bundle, our_threads
from tests.flows.rig import Rig, copy_of, rig_on
from tests.lab.filesystem import loop_filesystem

from autobackup.container.header import decode
from autobackup.errors import (
    AutobackupError,
    KeysUnavailable,
    Refused,
    SpoolUnavailable,
    StoreRefused,
    StoreUnavailable,
)
from autobackup.flows.runner import Runner
from autobackup.flows.unpack import Unpacked
from autobackup.host.scrub import load_methods
from autobackup.model import ChainLink, CopyState, JobRecord, JobState
from autobackup.rules.lifecycle import JobEvent
from autobackup.stores import DataKey

DISK = os.urandom(300_000)
DOWN = StoreUnavailable("the store is down")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path) as one:
        yield one


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path, destinations=("one", "two")) as both:
        yield both


def states(records: Iterable[JobRecord]) -> list[JobState]:
    seen: list[JobState] = []
    for record in records:
        if not seen or seen[-1] is not record.state:
            seen.append(record.state)
    return seen


def receipt(rig: Rig, record: JobRecord) -> dict[str, object]:
    words: dict[str, object] = json.loads((Path(rig.spool.path) / "receipts" / f"{record.job}.json").read_bytes())
    return words


def sealed(rig: Rig, name: str, attempt: str) -> bytes:
    return (rig.doors[name].root / f"{attempt}.autobackup").read_bytes()


def bundle(rig: Rig, name: str, attempt: str) -> tuple[dict[str, bytes], Unpacked]:
    """What the store holds, opened with whichever drawn key does."""
    data = sealed(rig, name, attempt)
    [key] = [key for key in rig.keys[name].drawn if key.header_words["wrapped"].encode() in data[:4096]]
    return open_bundle(data, key.key)


def opened(rig: Rig, name: str, attempt: str) -> bytes:
    """The root disk out of what the store holds."""
    return bundle(rig, name, attempt)[0]["disks/disk"]


# ---- the way through --------------------------------------------------------------------------------------


async def test_a_job_goes_through_every_state_to_its_receipt(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK, "console.log": b"login:"})
    await rig.run_to_the_end(record.job)

    assert states(rig.journal) == [
        JobState.QUEUED, JobState.SENDING, JobState.VERIFIED, JobState.SCRUBBING, JobState.SCRUBBED, JobState.DONE,
    ]  # fmt: skip
    (attempt,) = rig.doors["one"].held()
    assert opened(rig, "one", attempt) == DISK
    assert "scrubbed (zero)" in str(receipt(rig, record)["outcome"])
    assert os.listdir(Path(rig.spool.path) / "jobs") == []
    assert rig.spool.claims.count() == 0


async def test_every_step_is_journaled_before_its_effect(pair: Rig) -> None:
    """Seen right after each journal write: the record is on disk, and what it announces has not happened yet."""
    record = await pair.new_job({"disk": DISK})
    seen: set[str] = set()
    begun: set[str] = set()

    def look(now: JobRecord) -> None:
        assert json.loads(pair.journaled(now.job))["state"] == now.state
        for copy in now.copies:
            door = pair.doors[copy.destination]
            asked = [call for call, attempt in door.calls if copy.attempt and attempt == copy.attempt.attempt]
            seen.add(copy.state)
            match copy.state:
                case CopyState.SENDING:
                    assert copy.attempt is not None
                    assert copy.attempt.attempt in begun or asked == [], "the store heard of it before the journal"
                    begun.add(copy.attempt.attempt)
                case CopyState.SENT:
                    assert copy.attempt is not None
                    assert copy.attempt.attempt in door.held()
                    assert copy.verified_at_s is None
                case CopyState.VERIFIED:
                    assert {"stat", "read", "digest"} <= set(asked)
        seen.add(now.state)
        match now.state:
            case JobState.QUEUED | JobState.SENDING | JobState.VERIFIED | JobState.SCRUBBING:
                assert pair.link(now).read_bytes() == DISK
            case JobState.SCRUBBED:
                assert not pair.link(now).exists()
                assert os.listdir(Path(pair.spool.path) / "receipts") == []
            case JobState.DONE:
                assert receipt(pair, now)["job"] == now.job
        if now.state is JobState.SCRUBBING:
            assert {copy.state for copy in now.copies} == {CopyState.VERIFIED}

    pair.on_record = look
    await pair.run_to_the_end(record.job)
    assert seen >= {"sending", "sent", "verified", "scrubbing", "scrubbed", "done"}


async def test_no_record_in_the_spool_can_open_anything(pair: Rig) -> None:
    """Keys, the keys that wrap them, salts: none is in any file of the spool, at any step."""
    record = await pair.new_job({"disk": DISK})

    def look(_now: JobRecord) -> None:
        texts = [path.read_bytes() for path in Path(pair.spool.path).rglob("*.json")]
        for keys in pair.keys.values():
            for drawn in keys.drawn:
                for text in texts:
                    assert drawn.key not in text
                    assert drawn.key.hex().encode() not in text
                    assert drawn.header_words["wrapped"].encode() not in text

    pair.on_record = look
    await pair.run_to_the_end(record.job)
    assert all(keys.drawn for keys in pair.keys.values())


async def test_no_two_attempts_share_anything_that_seals(tmp_path: Path) -> None:
    """Of one content, to two destinations, twice each: no key, wrapped key, salt, nonce prefix or segment recurs."""
    with rig_on(tmp_path, destinations=("one", "two"), fanout_limits=limits(level=None)) as rig:
        disk = bytes(range(256)) * 4096 * 3
        sent: list[bytes] = []
        for door in rig.doors.values():
            door.after_put = lambda attempt, door=door: sent.append(  # type: ignore[misc]
                (door.root / f"{attempt}.autobackup").read_bytes()
            )
            door.shut = {"stat": StoreRefused("it is not there")}
        record = await rig.new_job({"disk": disk})
        await rig.advance(record.job)
        for door in rig.doors.values():
            door.shut = None
        await rig.run_to_the_end(record.job)

        assert len(sent) == 4
        drawn = [key for keys in rig.keys.values() for key in keys.drawn]
        assert len({key.key for key in drawn}) == len(drawn) == 4
        assert len({data[:4096] for data in sent}) == 4
        assert len({data[4097 : 4097 + 32] for data in sent}) == 4
        assert len({data[4097 + 32 : 4097 + 39] for data in sent}) == 4
        blocks = [data[at : at + 16] for data in sent for at in range(4096 + 40, len(data) - 16, 16)]
        assert len(set(blocks)) == len(blocks)


# ---- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["check", "put", "stat", "read", "digest"])
async def test_what_passes_is_waited_for_without_end(rig: Rig, call: str) -> None:
    """22 failures in a row: pauses grow to the longest, are spread, and then it is sent, proven and scrubbed."""
    record = await rig.new_job({"disk": DISK})
    rig.doors["one"].shut = {call: DOWN}
    delays: list[float] = []
    for _ in range(22):
        now = await rig.advance(record.job)
        assert now is not None
        assert now.state is JobState.QUEUED
        assert rig.link(now).read_bytes() == DISK
        delays.append(now.not_before_s - rig.clock())
        rig.clock.now_s = now.not_before_s + 0.001

    for failures, delay_s in enumerate(delays):
        nominal_s = min(900.0, 5.0 * 2**failures)
        assert nominal_s / 2 <= delay_s + 1e-3 <= nominal_s + 1e-3, failures
    assert len({round(delay_s, 3) for delay_s in delays[8:]}) > 8, "the pauses are not spread"
    rig.doors["one"].shut = None
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert len(rig.doors["one"].held()) == 1


async def test_keys_that_cannot_be_had_now_are_waited_for(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    kek = rig.folder / "one.kek"
    kek.rename(rig.folder / "aside")
    now = await rig.advance(record.job)
    assert now is not None
    assert now.state is JobState.QUEUED
    assert "one.kek" in copy_of(now, "one").last_error
    assert rig.doors["one"].files() == []

    (rig.folder / "aside").rename(kek)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)


@pytest.mark.parametrize("error", [StoreRefused("not here"), KeysUnavailable("later")])
async def test_a_put_that_is_refused_parks_and_a_retry_brings_it_back(rig: Rig, error: AutobackupError) -> None:
    record = await rig.new_job({"disk": DISK})
    rig.doors["one"].shut = {"put": error}
    now = await rig.advance(record.job)
    assert now is not None
    assert now.state is (JobState.PARKED if isinstance(error, Refused) else JobState.QUEUED)
    assert "one: " in now.last_error
    assert rig.link(now).read_bytes() == DISK

    rig.doors["one"].shut = None
    await rig.jobs.order_retry(record.job)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)


async def test_a_store_that_keeps_other_bytes_parks_and_never_scrubs(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    door = rig.doors["one"]

    def rot(attempt: str) -> None:
        path = door.root / f"{attempt}.autobackup"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")

    door.after_put = rot
    await rig.run_to_the_end(record.job)
    now = rig.jobs.get(record.job)
    assert now.state is JobState.PARKED
    assert rig.link(now).read_bytes() == DISK
    assert len([call for call, _ in door.calls if call == "put"]) == 3
    assert JobState.SCRUBBING not in states(rig.journal)

    door.after_put = lambda _attempt: None
    await rig.jobs.order_retry(record.job)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert len(door.held()) == 1, "attempts that were not proven are left in the store"


async def test_a_disk_that_was_not_read_whole_is_parked_and_kept(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    await rig.jobs.update(record.job, unreadable=True)
    await rig.run_to_the_end(record.job)

    now = rig.jobs.get(record.job)
    assert now.state is JobState.PARKED
    assert copy_of(now, "one").state is CopyState.VERIFIED
    assert rig.link(now).read_bytes() == DISK
    assert "could not be read" in now.last_error


async def test_a_busy_disk_is_waited_for(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    with rig.link(record).open("r+b"):
        now = await rig.advance(record.job)
        assert now is not None
        assert now.state is JobState.QUEUED
        assert rig.doors["one"].held() == []
    rig.clock.now_s = now.not_before_s
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)


async def test_a_disk_that_is_opened_after_the_proof_is_not_scrubbed_meanwhile(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    holding: list[int] = []

    def hold(now: JobRecord) -> None:
        if now.state is JobState.SCRUBBING and not holding:
            holding.append(os.open(rig.link(now), os.O_RDONLY))

    rig.on_record = hold
    now = await rig.advance(record.job)
    assert now is not None
    assert now.state is JobState.SCRUBBING
    assert rig.link(now).read_bytes() == DISK
    os.close(holding[0])
    rig.clock.now_s = now.not_before_s
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)


@pytest.mark.parametrize("failing", [errno.EIO, errno.EROFS, errno.ENOSPC])
async def test_a_scrub_that_fails_is_tried_again_and_ends_nothing_else(tmp_path: Path, failing: int) -> None:
    """The medium's error is this job's, not the process's: every other job of the host goes on."""
    fails = [True]

    def method(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        if fails[0]:
            raise OSError(failing, os.strerror(failing))
        load_methods()["zero"](fd, ranges, size_bytes)

    with rig_on(tmp_path, scrub_methods={**load_methods(), "fragile": method}) as rig:
        record = await rig.new_job({"disk": DISK}, scrub_method="fragile")
        now = await rig.advance(record.job)
        assert now is not None
        assert (now.state, now.failure_count) == (JobState.SCRUBBING, 1)
        assert os.strerror(failing) in now.last_error
        fails[0] = False
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)


async def test_a_disk_that_changed_between_two_reads_is_captured_again_everywhere(pair: Rig) -> None:
    """Else one destination would hold another last state than the other, and one of them not the last."""
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = DOWN
    now = await pair.advance(record.job)
    assert now is not None
    assert copy_of(now, "one").state is CopyState.VERIFIED
    old = pair.doors["one"].held()

    changed = os.urandom(len(DISK))
    pair.link(now).write_bytes(changed)
    pair.doors["two"].shut = None
    await pair.run_to_the_end(record.job)

    assert pair.is_gone(record.job)
    for name, door in pair.doors.items():
        (attempt,) = door.held()
        assert [attempt] != old
        assert opened(pair, name, attempt) == changed


async def test_a_change_after_the_proof_is_seen_before_the_scrub(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    changed = os.urandom(len(DISK))
    disturbed: list[JobState] = []

    def disturb(now: JobRecord) -> None:
        if now.state is JobState.VERIFIED and not disturbed:
            rig.link(now).write_bytes(changed)
            disturbed.append(now.state)

    rig.on_record = disturb
    await rig.run_to_the_end(record.job)
    (attempt,) = rig.doors["one"].held()
    assert opened(rig, "one", attempt) == changed


# ---- two destinations -------------------------------------------------------------------------------------


async def test_one_destination_that_is_down_holds_back_the_scrub_and_nothing_else(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["two"].shut = DOWN
    for _ in range(12):
        now = await pair.advance(record.job)
        assert now is not None
        assert (copy_of(now, "one").state, copy_of(now, "two").state) == (CopyState.VERIFIED, CopyState.QUEUED)
        assert copy_of(now, "one").failure_count == 0
        assert pair.link(now).read_bytes() == DISK
        pair.clock.now_s = now.not_before_s + 0.001
    assert copy_of(pair.jobs.get(record.job), "two").failure_count == 12
    assert [call for call, _ in pair.doors["one"].calls].count("put") == 1, "what is proven is not sent again"
    assert {JobState.VERIFIED, JobState.SCRUBBING}.isdisjoint(states(pair.journal))

    pair.doors["two"].shut = None
    await pair.run_to_the_end(record.job)
    assert pair.is_gone(record.job)
    for name, door in pair.doors.items():
        assert opened(pair, name, door.held()[0]) == DISK


async def test_each_destination_backs_off_by_itself(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["one"].shut = pair.doors["two"].shut = DOWN
    for _ in range(6):
        now = await pair.advance(record.job)
        assert now is not None
        pair.clock.now_s = copy_of(now, "one").not_before_s
        await pair.jobs.update(
            record.job, copies=tuple(c for c in now.copies), not_before_s=copy_of(now, "one").not_before_s
        )
    now = pair.jobs.get(record.job)
    one, two = copy_of(now, "one"), copy_of(now, "two")
    assert one.not_before_s != two.not_before_s
    assert one.failure_count == 6
    assert 1 <= two.failure_count <= 6


async def test_one_that_refuses_parks_only_after_the_other_is_proven(pair: Rig) -> None:
    record = await pair.new_job({"disk": DISK})
    pair.doors["one"].shut = {"put": StoreRefused("no")}
    await pair.run_to_the_end(record.job)
    now = pair.jobs.get(record.job)
    assert now.state is JobState.PARKED
    assert (copy_of(now, "one").state, copy_of(now, "two").state) == (CopyState.PARKED, CopyState.VERIFIED)
    assert pair.link(now).read_bytes() == DISK


# ---- orders -----------------------------------------------------------------------------------------------


async def test_a_discarded_job_goes_with_its_disk_and_on_the_record(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    rig.doors["one"].shut = DOWN
    await rig.advance(record.job)
    await rig.jobs.order_discard(record.job)
    await rig.run_to_the_end(record.job)

    assert rig.is_gone(record.job)
    assert "discarded by an operator" in str(receipt(rig, record)["outcome"])
    assert os.listdir(Path(rig.spool.path) / "jobs") == []


@pytest.mark.parametrize("state", [s for s in JobState if s not in (JobState.QUEUED, JobState.PARKED)])
async def test_only_what_waits_can_be_discarded(rig: Rig, state: JobState) -> None:
    """From `verified` on the disk is no longer all there is, or no longer there: there is nothing to let go of."""
    record = await rig.new_job({"disk": DISK})
    await rig.jobs.update(record.job, state=state)
    with pytest.raises(Refused):
        await rig.jobs.order_discard(record.job)
    assert rig.jobs.get(record.job).state is state


async def test_no_order_comes_between_the_steps_of_a_job(rig: Rig) -> None:
    """An order decided on the state of before a step would be journaled over it: `scrubbing` back to `verified`."""
    record = await rig.new_job({"disk": DISK})
    refused: list[JobState] = []
    orders: list[asyncio.Task[object]] = []

    async def order(state: JobState) -> None:
        for act in (rig.jobs.order_retry, rig.jobs.order_discard):
            with pytest.raises(Refused):
                await rig.runner.order(record.job, act)
        refused.append(state)

    rig.on_record = lambda now: orders.append(asyncio.get_running_loop().create_task(order(now.state)))
    running = asyncio.create_task(rig.runner.run())
    async with asyncio.timeout(60):
        while not rig.is_gone(record.job):
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    await asyncio.gather(*orders)

    assert JobState.SCRUBBING in refused
    assert "scrubbed" in str(receipt(rig, record)["outcome"])


async def test_two_orders_at_once_are_one_and_a_refusal(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    results = await asyncio.gather(
        rig.runner.order(record.job, rig.jobs.order_discard),
        rig.runner.order(record.job, rig.jobs.order_retry),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [JobRecord, Refused]
    assert rig.jobs.get(record.job).state is JobState.DISCARDED
    assert json.loads(rig.journaled(record.job))["state"] == "discarded"


async def test_what_was_kept_is_not_overwritten_and_ends_when_the_name_is_gone(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK}, terminated=False)
    name = rig.instances / record.instance / "disk"
    now = await rig.advance(record.job)

    assert now is not None
    assert now.state is JobState.KEPT
    assert name.read_bytes() == DISK
    assert name.stat().st_nlink == 1, "our name goes, Nova's stays"
    assert now.still_named == (str(name),)
    assert f"verified, not scrubbed: still named {name}" in str(receipt(rig, record)["outcome"])
    assert rig.spool.claims.claim_folder(record.instance) == [], "what was kept is not claimed again"

    rig.clock.now_s = now.not_before_s + 1
    assert await rig.advance(record.job) is not None
    name.unlink()
    rig.clock.now_s += 3600
    assert await rig.advance(record.job) is None


# ---- the journal cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unwritable", "full"])
async def test_a_step_that_cannot_be_journaled_has_not_been_taken(tmp_path: Path, how: str) -> None:
    with loop_filesystem("ext4", 32 * MiB) as filesystem:
        instances = filesystem.mount_point / "instances"
        with rig_on(tmp_path, instances=instances, reserve_bytes=64 * 1024) as rig:
            record = await rig.new_job({"disk": DISK})
            journaled, known = rig.journaled(record.job), rig.jobs.get(record.job)
            filler = filesystem.mount_point / "filler"
            if how == "unwritable":
                subprocess.run(["chattr", "+i", rig.spool.job_folder(record.job)], check=True)
            else:
                _fill(filler)
                (Path(rig.spool.path) / "reserve").unlink()
                _fill(filler)
            try:
                rig.on_record = lambda now: pytest.fail(f"{now.state} is true though it was not journaled")
                steps: tuple[Callable[[], Awaitable[JobRecord]], ...] = (
                    lambda: rig.jobs.move(record.job, JobEvent.STARTED),
                    lambda: rig.jobs.update(record.job, last_error="x" * 100_000),
                    lambda: rig.jobs.order_retry(record.job),
                    lambda: rig.jobs.order_discard(record.job),
                )
                for step in steps:
                    with pytest.raises(SpoolUnavailable):
                        await step()
                    assert rig.jobs.get(record.job) == known
                    assert rig.journaled(record.job) == journaled
                assert rig.doors["one"].files() == []
            finally:
                if how == "unwritable":
                    subprocess.run(["chattr", "-i", rig.spool.job_folder(record.job)], check=True)
                else:
                    filler.unlink()
            rig.on_record = lambda _now: None
            await rig.run_to_the_end(record.job)
            assert rig.is_gone(record.job)


async def test_on_a_full_disk_the_reserve_carries_the_journal(tmp_path: Path) -> None:
    """Only a job that can be finished makes room again."""
    with loop_filesystem("ext4", 32 * MiB) as filesystem:
        instances = filesystem.mount_point / "instances"
        with rig_on(tmp_path, instances=instances, reserve_bytes=MiB) as rig:
            record = await rig.new_job({"disk": DISK})
            _fill(filesystem.mount_point / "filler")
            await rig.run_to_the_end(record.job)
            assert rig.is_gone(record.job)


def _fill(path: Path) -> None:
    """Until not one byte more goes in."""
    with path.open("ab", buffering=0) as file:
        for size_bytes in (MiB, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size_bytes)):
                    pass
        os.fsync(file.fileno())


# ---- stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_a_job_that_is_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path: Path, seed: int) -> None:
    """Cancelled at random moments, started anew each time: the last state is in both stores, once, and whole."""
    draw = random.Random(seed)
    disk = os.urandom(4 * MiB)
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        record = await rig.new_job({"disk": disk})
    stops = 0
    while stops < 60:
        with rig_on(tmp_path, destinations=("one", "two")) as rig:
            if rig.is_gone(record.job):
                break  # it was stopped when nothing was left to do
            running = asyncio.create_task(rig.run_to_the_end(record.job))
            await asyncio.wait({running}, timeout=draw.random() * 0.12)
            running.cancel()
            await asyncio.wait({running})
            assert our_threads() == []
            stops += 1
            if not running.cancelled():
                running.result()
                break
            if not rig.is_gone(record.job) and rig.jobs.get(record.job).state in (JobState.QUEUED, JobState.SENDING):
                assert rig.link(record).read_bytes() == disk
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        if not rig.is_gone(record.job):
            await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        for name, door in rig.doors.items():
            (attempt,) = door.held()
            assert door.files() == [f"{attempt}.autobackup", f"{attempt}.json"]
            rig.keys[name].drawn[:] = [await _key_of(rig, name, attempt)]
            assert opened(rig, name, attempt) == disk


async def _key_of(rig: Rig, name: str, attempt: str) -> DataKey:
    words = decode(sealed(rig, name, attempt)[:4096]).key
    return DataKey(key=await rig.keys[name].fetch(words), header_words=words)


async def test_a_stopped_proof_has_proven_nothing(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    reached, never = asyncio.Event(), asyncio.Event()

    class Waiting:
        def __init__(self, store: object) -> None:
            self._store = store

        def __getattr__(self, name: str) -> object:
            return getattr(self._store, name)

        async def digest(self, _attempt: str) -> str:
            reached.set()
            await never.wait()
            return ""

    rig.doors["one"].store = Waiting(rig.doors["one"].store)  # type: ignore[assignment]
    running = asyncio.create_task(rig.backup.advance(record.job))
    await reached.wait()
    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    now = rig.jobs.get(record.job)
    assert (now.state, copy_of(now, "one").state) == (JobState.SENDING, CopyState.SENT)
    assert json.loads(rig.journaled(record.job))["copies"][0]["state"] == "sent"
    assert rig.link(now).read_bytes() == DISK


async def test_the_runner_takes_all_that_is_due_and_stops_when_told(rig: Rig) -> None:
    records = [await rig.new_job({"disk": DISK}) for _ in range(5)]
    parked = await rig.new_job({"disk": DISK})
    await rig.jobs.move(parked.job, JobEvent.GAVE_UP)
    running = asyncio.create_task(rig.runner.run())
    async with asyncio.timeout(60):
        while len(rig.jobs.all()) > 1:
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    assert all(rig.is_gone(record.job) for record in records)
    assert [r.job for r in rig.jobs.all()] == [parked.job]
    assert len(rig.doors["one"].held()) == 5


async def test_the_runner_stopped_in_the_middle_leaves_no_thread(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        for _ in range(3):
            await rig.new_job({"disk": os.urandom(8 * MiB)})
        for pause_s in (0.0, 0.01, 0.05, 0.1):
            runner = Runner(jobs=rig.jobs, backup=rig.backup, parallel_jobs=3, clock=rig.clock)
            running = asyncio.create_task(runner.run())
            await asyncio.sleep(pause_s)
            running.cancel()
            await asyncio.wait({running})
            assert running.cancelled()
            assert our_threads() == []


# ---- what hosts really have -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("Debian 12 (cloud).img",),
        ("größe.raw",),
        ("-n.raw",),
        ("x" * 200,),
        ("a/base.img", "b/base.img"),
        ("a/über.img", "b/über.img"),
    ],
)
async def test_a_backing_file_may_have_any_name(rig: Rig, names: tuple[str, ...]) -> None:
    """Plain libvirt hosts name their base images as people do; a bundle's members have narrower names."""
    contents: dict[str, bytes] = {}
    for name in names:
        path = rig.instances / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.setdefault(str(path), os.urandom(5000)))
    chain = tuple(ChainLink(path=path, format="raw") for path in contents)
    for link in chain:
        assert rig.spool.bases.hold(link.path)
    record = await rig.new_job({"disk": DISK}, format_name="qcow2", chain=chain)
    await rig.run_to_the_end(record.job)

    assert rig.is_gone(record.job)
    stored = [bundle(rig, "one", attempt) for attempt in rig.doors["one"].held()]
    [backup] = [unpacked.manifest for _, unpacked in stored if unpacked.manifest.disks]
    members = {name: data for held, _ in stored for name, data in held.items()}
    assert [parent.path for parent in backup.parents] == list(contents)
    assert {parent.path: members[f"bases/{parent.sha256}"] for parent in backup.parents} == contents


async def test_a_job_whose_link_was_taken_away_is_parked(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISK})
    rig.link(record).unlink()
    await rig.run_to_the_end(record.job)
    assert rig.jobs.get(record.job).state is JobState.PARKED
