"""
The disk that a rebuild replaced, that a shelve left, or that an operator had taken: sealed, proven, and let go whole.

Nova unlinked it, and an unlink is all that it gets: an open file keeps an inode readable after its last name is gone,
so what was done to its content can be looked at.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.material import open_bundle
from tests.flows.rig import GONE, Rig, rig_on

from autobackup.errors import StoreUnavailable
from autobackup.host.scrub_methods import zero
from autobackup.model import JobRecord, JobState, Occasion, VerdictKind
from autobackup.rules.lifecycle import JobEvent
from autobackup.rules.termination import Verdict

DISKS = {"disk": os.urandom(300_000), "disk.eph0": os.urandom(70_000), "console.log": b"login: \n" * 200}
NOT_TERMINATED = {
    VerdictKind.REPLACED: Occasion.REBUILD,
    VerdictKind.MOVED: Occasion.SHELVE_OFFLOAD,
    VerdictKind.UNDECIDED: Occasion.TERMINATE,  # an operator's order
}


def verdict(kind: VerdictKind) -> Verdict:
    return Verdict(kind=kind, reason="as the test has it", occasion=NOT_TERMINATED[kind])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path) as one:
        yield one


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def receipt(rig: Rig, record: JobRecord) -> dict[str, object]:
    words: dict[str, object] = json.loads((Path(rig.spool.path) / "receipts" / f"{record.job}.json").read_bytes())
    return words


@pytest.mark.parametrize("method", ["zero", "random", "unlink"])
@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_it_is_sent_proven_and_unlinked_and_no_byte_of_it_is_overwritten(
    rig: Rig, kind: VerdictKind, method: str
) -> None:
    """Whatever method its rule names: that is for terminations."""
    record = await rig.new_job(DISKS, verdict=verdict(kind), scrub_method=method)
    lookers: dict[str, int] = {}

    def look(now: JobRecord) -> None:
        """Not sooner: while somebody has them open, nothing is done with them at all."""
        if now.state is JobState.KEPT and not lookers:
            lookers.update({held.disk: os.open(rig.link(now, n), os.O_RDONLY) for n, held in enumerate(now.files)})

    rig.on_record = look
    try:
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        assert lookers.keys() == DISKS.keys()
        for disk, fd in lookers.items():
            assert content(fd) == DISKS[disk], f"{disk} is not what Nova left"
            assert os.fstat(fd).st_nlink == 0, f"{disk} still has a name"
    finally:
        for fd in lookers.values():
            os.close(fd)
    states = [now.state for now in rig.journal]
    assert JobState.KEPT in states
    assert {JobState.SCRUBBING, JobState.SCRUBBED}.isdisjoint(states)
    assert list((Path(rig.spool.path) / "claims").iterdir()) == []


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_its_bundle_holds_all_of_it(rig: Rig, kind: VerdictKind) -> None:
    record = await rig.new_job(DISKS, verdict=verdict(kind))
    await rig.run_to_the_end(record.job)
    (attempt,) = rig.doors["one"].held()
    sealed = (rig.doors["one"].root / f"{attempt}.autobackup").read_bytes()
    members, _ = open_bundle(sealed, rig.keys["one"].drawn[0].key)
    assert {name: data for name, data in members.items() if name.startswith("disks/")} == {
        f"disks/{disk}": data for disk, data in DISKS.items() if disk.startswith("disk")
    }
    assert DISKS["console.log"] in members.values()


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_its_receipt_says_what_it_was_and_that_it_was_not_scrubbed(rig: Rig, kind: VerdictKind) -> None:
    record = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(kind))
    await rig.run_to_the_end(record.job)
    words = receipt(rig, record)
    assert str(words["outcome"]).startswith("verified, not scrubbed: ")
    assert str(kind) in str(words["outcome"])
    assert (words["verdict"], words["occasion"]) == (kind, NOT_TERMINATED[kind])
    assert words["scrub"] == {"method": "zero", "scrubbed": False, "still_named": []}
    assert b'autobackup_scrubs_total{outcome="kept"} 1.0' in rig.metrics.render()
    assert b'outcome="zero"' not in rig.metrics.render()


@pytest.mark.parametrize("kind", [VerdictKind.TERMINATED, *NOT_TERMINATED])
async def test_no_method_is_so_much_as_called_but_for_a_termination(tmp_path: Path, kind: VerdictKind) -> None:
    called: list[int] = []

    def noting(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
        called.append(size_bytes)
        zero(fd, ranges, size_bytes)

    with rig_on(tmp_path, scrub_methods={"zero": noting}) as rig:
        is_terminated = kind is VerdictKind.TERMINATED
        record = await rig.new_job({"disk": DISKS["disk"]}, verdict=GONE if is_terminated else verdict(kind))
        await rig.run_to_the_end(record.job)
        assert rig.is_gone(record.job)
        assert bool(called) is is_terminated


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_it_waits_for_its_proof_as_any_other(rig: Rig, kind: VerdictKind) -> None:
    """Until then its link keeps the last copy."""
    record = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(kind))
    rig.doors["one"].shut = StoreUnavailable("the store is down")
    for _ in range(3):
        now = await rig.advance(record.job)
        assert now is not None
        assert now.state in (JobState.QUEUED, JobState.SENDING)
        assert rig.link(record).read_bytes() == DISKS["disk"]
        rig.clock.now_s = now.not_before_s + 1
    rig.doors["one"].shut = None
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert len(rig.doors["one"].held()) == 1


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_one_that_is_written_to_after_it_was_read_is_read_again(rig: Rig, kind: VerdictKind) -> None:
    record = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(kind))

    def write(now: JobRecord) -> None:
        if now.state is JobState.VERIFIED:
            rig.on_record = lambda _now: None
            with (Path(rig.spool.job_folder(now.job)) / now.files[0].link).open("r+b") as file:
                file.write(b"one more byte than was read")
                file.flush()
                os.fsync(file.fileno())

    rig.on_record = write
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert len(rig.keys["one"].drawn) == 2
    (attempt,) = rig.doors["one"].held()
    sealed = (rig.doors["one"].root / f"{attempt}.autobackup").read_bytes()
    members, _ = open_bundle(sealed, rig.keys["one"].drawn[-1].key)
    assert members["disks/disk"].startswith(b"one more byte than was read")


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_one_that_somebody_still_names_keeps_that_name_and_waits_for_it(rig: Rig, kind: VerdictKind) -> None:
    record = await rig.new_job({"disk": DISKS["disk"]}, terminated=False, verdict=verdict(kind))
    name = rig.instances / record.instance / "disk"
    now = await rig.advance(record.job)
    assert now is not None
    assert (now.state, now.still_named) == (JobState.KEPT, (str(name),))
    assert (name.read_bytes(), name.stat().st_nlink) == (DISKS["disk"], 1)
    assert f"verified, not scrubbed: still named {name}" in str(receipt(rig, record)["outcome"])
    name.unlink()
    rig.clock.now_s += 3600
    assert await rig.advance(record.job) is None


@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_a_journal_that_says_it_is_being_scrubbed_is_not_believed(rig: Rig, kind: VerdictKind) -> None:
    """The last gate is in front of the first byte, whatever the steps before it did."""
    record = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(kind))

    def forge(now: JobRecord) -> None:
        if now.state is JobState.VERIFIED:
            rig.on_record = lambda _now: None
            rig.jobs._records[now.job] = replace(now, state=JobState.SCRUBBING)

    rig.on_record = forge
    await rig.advance(record.job)
    now = rig.jobs.get(record.job)
    assert now.state is JobState.SCRUBBING
    assert str(kind) in now.last_error
    assert rig.link(record).read_bytes() == DISKS["disk"]


@pytest.mark.parametrize(
    "stop_at", [JobState.QUEUED, JobState.SENDING, JobState.VERIFIED, JobState.KEPT, JobState.DONE]
)
@pytest.mark.parametrize("kind", NOT_TERMINATED)
async def test_a_crash_at_any_state_ends_as_it_would_have(tmp_path: Path, kind: VerdictKind, stop_at: JobState) -> None:
    class Crash(BaseException):
        pass

    def crash(now: JobRecord) -> None:
        if now.state is stop_at and now.job == job.job:
            raise Crash

    with rig_on(tmp_path) as rig:
        job = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(kind))
        rig.on_record = crash
        if stop_at is not JobState.QUEUED:
            with pytest.raises(Crash):
                await rig.run_to_the_end(job.job)
    with rig_on(tmp_path) as again:
        await again.run_to_the_end(job.job)
        assert again.is_gone(job.job)
        assert receipt(again, job)["scrub"] == {"method": "zero", "scrubbed": False, "still_named": []}
        assert len(again.doors["one"].held()) == 1
        assert list((Path(again.spool.path) / "claims").iterdir()) == []


async def test_one_that_an_operator_discards_is_let_go_without_a_copy_and_not_overwritten(rig: Rig) -> None:
    record = await rig.new_job({"disk": DISKS["disk"]}, verdict=verdict(VerdictKind.REPLACED))
    await rig.jobs.move(record.job, JobEvent.DISCARD_ORDERED)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert "discarded by an operator" in str(receipt(rig, record)["outcome"])
    assert rig.doors["one"].held() == []
