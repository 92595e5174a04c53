"""The spool: what a crash may leave in it, who may open it, and what it does on a full filesystem."""

import asyncio
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.rig import Rig, rig_on
from tests.unit.host.material import INSTANCE

from autobackup.errors import ConfigError, SpoolUnavailable
from autobackup.host.filesystems import kind_of
from autobackup.host.spool import Spool
from autobackup.model import InstanceId, InstanceRecord, JobId, JobRecord, JobState

DISK = os.urandom(10_000)


def spool_at(folder: Path, *, host_id: str = "host", path: Path | None = None) -> Spool:
    return Spool(
        instances_path=str(folder),
        path=str(path or folder / ".autobackup"),
        filesystems=(kind_of(str(folder)),),
        host_id=host_id,
        reserve_bytes=65_536,
    )


def reopened(rig: Rig) -> list[JobRecord]:
    """What the next process finds."""
    rig.spool.close()
    spool = spool_at(rig.instances)
    spool.open()
    try:
        spool.claims.load()
        return list(spool.load_jobs())
    finally:
        spool.close()


# ---- who may open it --------------------------------------------------------------------------------------


def test_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    before = os.umask(0)
    try:
        spool.open()
    finally:
        os.umask(before)
        spool.close()
    root = tmp_path / ".autobackup"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in root.iterdir() if path.is_dir()} == {0}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first, second = spool_at(tmp_path), spool_at(tmp_path)
    first.open()
    with pytest.raises(ConfigError, match="another agent"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_process_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.host.test_spool import spool_at\n"
        "spool_at(Path(sys.argv[1])).open()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -9
    spool = spool_at(tmp_path)
    spool.open()
    spool.close()


def test_another_hosts_spool_is_not_taken_over(tmp_path: Path) -> None:
    first, second = spool_at(tmp_path, host_id="a"), spool_at(tmp_path, host_id="b")
    first.open()
    first.close()
    with pytest.raises(ConfigError, match="belongs to host a"):
        second.open()
    first.open()  # and a refusal leaves no lock behind
    first.close()


def test_a_spool_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "instances").mkdir()
    (tmp_path / "instances" / ".autobackup").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        spool_at(tmp_path / "instances").open()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_no_instances_folder_is_no_place_for_a_spool(tmp_path: Path) -> None:
    spool = Spool(
        instances_path=str(tmp_path / "absent"), path=str(tmp_path / "absent/.autobackup"), filesystems=("ext4",),
        host_id="h", reserve_bytes=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="instances_path"):
        spool.open()
    assert not (tmp_path / "absent").exists()


# ---- what a crash may leave -------------------------------------------------------------------------------


async def test_a_job_that_was_being_made_is_claims_again(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        folder = Path(rig.spool.job_folder(record.job))
        folder.rename(folder.with_name(f".new-{record.job}"))

        assert reopened(rig) == []
        assert not folder.with_name(f".new-{record.job}").exists()
        assert (Path(rig.spool.path) / "claims" / record.files[0].link).read_bytes() == DISK


async def test_a_record_cut_off_in_writing_is_the_one_before_it(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        folder = Path(rig.spool.job_folder(record.job))
        (folder / ".job.json.new").write_bytes(b'{"job": "cut')
        instances = Path(rig.spool.path) / "instances"
        await rig.spool.write_instance(InstanceRecord(instance=InstanceId(INSTANCE), libvirt_name="x"))
        (instances / f".{INSTANCE}.json.new").write_bytes(b"{")

        assert [one.libvirt_name for one in rig.spool.load_instances()] == ["x"]
        assert [one.job for one in reopened(rig)] == [record.job]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"job": 1}', b"\xff\xfe", b"[" * 100_000])
async def test_a_record_that_cannot_be_read_stands_in_no_other_jobs_way(tmp_path: Path, content: bytes) -> None:
    """And is left alone: its links may be the last state of an instance."""
    with rig_on(tmp_path) as rig:
        bad, good = [await rig.new_job({"disk": DISK}) for _ in range(2)]
        rig.spool.take_over(bad)
        path = Path(rig.spool.job_folder(bad.job)) / "job.json"
        path.write_bytes(content)

        assert [one.job for one in reopened(rig)] == [good.job]
        assert path.read_bytes() == content
        assert rig.link(bad).read_bytes() == DISK


@pytest.mark.parametrize("what", ["file", "folder for a record", "empty folder", "link to nowhere"])
async def test_strangers_among_the_jobs_stand_in_nobodys_way(tmp_path: Path, what: str) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        stranger = Path(rig.spool.path) / "jobs" / "stranger"
        match what:
            case "file":
                stranger.write_bytes(b"x")
            case "folder for a record":
                (stranger / "job.json").mkdir(parents=True)
            case "empty folder":
                stranger.mkdir()
            case _:
                stranger.symlink_to("/nonexistent")
        assert [one.job for one in reopened(rig)] == [record.job]


async def test_a_job_found_again_is_the_one_that_was_written(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK, "console.log": b"\xff\x00 login"})
        changed = await rig.jobs.update(record.job, last_error='größe \U0001f4be "quoted"\n', failure_count=3)
        assert reopened(rig) == [changed]


async def test_every_write_is_the_old_record_or_the_new_one(tmp_path: Path) -> None:
    """A reader beside a writer never sees half of one, nor none."""
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        done = asyncio.Event()

        async def write() -> None:
            for n in range(150):
                await rig.spool.write_job(replace(record, last_error="x" * (n * 100)))
            done.set()

        writing = asyncio.create_task(write())
        seen = set()
        while not done.is_set():
            data = rig.journaled(record.job)
            assert data.startswith(b"{")
            assert data.endswith(b"}\n")
            seen.add(len(data))
            await asyncio.sleep(0)
        await writing
        assert len(seen) > 3


async def test_a_write_that_is_cancelled_is_finished_and_stays_alone(tmp_path: Path) -> None:
    """Else its thread would go on, and meet the next write of the same record in the same temporary file."""
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        for n in range(60):
            writing = asyncio.create_task(rig.spool.write_job(replace(record, last_error="cancelled")))
            for _ in range(n % 12):
                await asyncio.sleep(0.0003)
            writing.cancel()
            await asyncio.wait({writing})
            assert not (Path(rig.spool.job_folder(record.job)) / ".job.json.new").exists()
            await rig.spool.write_job(replace(record, last_error=str(n)))
            assert f'"last_error": "{n}"'.encode() in rig.journaled(record.job)


async def test_removing_a_job_twice_is_removing_it(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        rig.spool.take_over(record)
        rig.link(record).unlink()
        await rig.spool.remove_job(record.job)
        await rig.spool.remove_job(record.job)
        assert os.listdir(Path(rig.spool.path) / "jobs") == []


async def test_a_job_that_still_holds_something_is_not_removed(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        rig.spool.take_over(record)
        with pytest.raises(SpoolUnavailable):
            await rig.spool.remove_job(record.job)
        assert rig.link(record).read_bytes() == DISK
        assert [one.job for one in reopened(rig)] == [record.job]


# ---- whose an inode is ------------------------------------------------------------------------------------


async def test_what_a_job_holds_is_its_own_until_its_link_is_gone(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK})
        inode = record.files[0].identity.inode
        identity = record.files[0].identity
        assert rig.spool.owns(inode, lambda: identity)
        rig.spool.take_over(record)
        assert rig.spool.owns(inode, lambda: identity)
        assert not rig.spool.owns(inode + 1, lambda: None)


async def test_what_was_kept_is_known_by_more_than_its_number(tmp_path: Path) -> None:
    """An inode number that comes again under a new disk is a new disk, and is claimed."""
    with rig_on(tmp_path) as rig:
        record = await rig.new_job({"disk": DISK}, terminated=False)
        identity = record.files[0].identity
        rig.spool.take_over(record)
        await rig.jobs.update(record.job, state=JobState.KEPT, still_named=("/nova/disk",))
        rig.link(record).unlink()

        assert rig.spool.owns(identity.inode, lambda: identity)
        assert not rig.spool.owns(identity.inode, lambda: replace(identity, generation=7))
        assert not rig.spool.owns(identity.inode, lambda: replace(identity, mtime_ns=7))
        assert not rig.spool.owns(identity.inode, lambda: None)


def test_a_job_nobody_made_is_not_there(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    spool.open()
    assert list(spool.load_jobs()) == []
    assert not Path(spool.job_folder(JobId("x"))).exists()
    spool.close()
