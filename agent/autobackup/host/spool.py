"""
The spool: the folder that is the truth. A start is a walk over it.

    <instances_path>/.autobackup/        0700
      lock        flock: one agent per spool
      host        which host it belongs to: a spool on shared storage is not taken over by another
      agent       a random id: what it began in a store is known by it, though hosts may share a name
      reserve     given up when the filesystem is full, so that the records which free space can be written
      claims/     host.claims' own
      bases/      host.bases' own
      instances/  <uuid>.json, what is known of an instance
      jobs/<id>/  job.json and the links that the job owns
      receipts/   <id>.json

Every record is written to a temporary name, synced, renamed over, and its folder synced: a reader sees the old or
the new one. A job comes into being as `jobs/.new-<id>` and takes its links over after the rename, so a crash
leaves them either claims or the job's. State belongs to the folder, never to a name or inode that can come again.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import aiofiles
import aiofiles.os

from autobackup import logs
from autobackup.errors import ConfigError, OverlayChanged, RecordDamaged, Refused, SpoolUnavailable
from autobackup.host.bases import Bases
from autobackup.host.claims import Claims
from autobackup.host.disks import HeldDisk
from autobackup.host.filesystems import check_spool, sync_folder
from autobackup.model import (
    DiskIdentity,
    HeldFile,
    InstanceId,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    decode,
    encode,
)

_log = logs.get("host.spool")
_FOLDERS: Final = ("claims", "bases", "instances", "jobs", "receipts")
_NEW: Final = ".new-"
_NOT_TAKEN_OVER: Final = (JobState.QUEUED, JobState.PARKED, JobState.DISCARDED)  # its links may still be claims


class Spool:
    """Opens, checks and locks the spool; raises `ConfigError` where it must not be used."""

    def __init__(
        self, *, instances_path: str, path: str, filesystems: tuple[str, ...], host_id: str, reserve_bytes: int
    ) -> None:
        self.instances_path = instances_path
        self.path = path
        self._filesystems = filesystems
        self._host_id = host_id
        self._reserve_bytes = reserve_bytes
        self._lock_fd = -1
        self.agent_id = ""  # known once it is open
        self.unreadable_jobs: list[str] = []  # what stands in the way of a job that nobody can take up
        self._held: dict[JobId, Mapping[int, Sequence[str]]] = {}  # inodes of jobs, and where their link may be
        self._kept: dict[JobId, frozenset[DiskIdentity]] = {}  # what kept jobs left under Nova's names
        self.bases = Bases(self._at("bases"))
        self.claims = Claims(instances_path=instances_path, folder=self._at("claims"), is_owned=self.owns)

    # ---- opening ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make, check, lock. Blocks only for the filesystem; called once, before the loop has work."""
        if not os.path.isdir(self.instances_path):
            raise ConfigError(f"{self.instances_path}: not a folder; set instances_path to Nova's")
        if os.path.islink(self.path):
            raise ConfigError(f"{self.path}: is a symbolic link; remove it, the spool must be a real folder there")
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            os.chmod(self.path, 0o700)
        except OSError as exc:
            raise ConfigError(f"{self.path}: {exc.strerror}; the spool cannot be made here") from exc
        self._lock()
        try:
            check_spool(instances_path=self.instances_path, spool_path=self.path, allowed=self._filesystems)
            for folder in _FOLDERS:
                os.makedirs(self._at(folder), mode=0o700, exist_ok=True)
            self._check_host()
            self.agent_id = self._kept_word("agent") or self._keep_word("agent", str(uuid.uuid4()))
            self.keep_reserve()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def keep_reserve(self) -> None:
        """Have the reserve file again once there is room; called from time to time."""
        reserve = self._at("reserve")
        if os.path.exists(reserve):
            return
        try:
            fd = os.open(reserve, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._reserve_bytes)
            finally:
                os.close(fd)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(reserve)

    # ---- jobs -------------------------------------------------------------------------------------------

    def job_folder(self, job: JobId) -> str:
        return self._at("jobs", job)

    def owns(self, inode: int, identify_it: Callable[[], DiskIdentity | None]) -> bool:
        """
        True for an inode that a job holds, or that a kept job left behind under Nova's name.

        A kept job holds no link, so its inode number may have come again: only then is *identify_it* asked.
        """
        if self.is_held_by_job(inode):
            return True
        kept = [identity for left in self._kept.values() for identity in left if identity.inode == inode]
        found = identify_it() if kept else None
        return found is not None and any(found.same_content(identity) for identity in kept)

    async def create_job(self, record: JobRecord) -> None:
        """Durably: the record, which from now on owns its claims; `take_over` moves them."""
        new = self._at("jobs", _NEW + record.job)
        try:
            await self._with_reserve(partial(aiofiles.os.makedirs, new, mode=0o700, exist_ok=True), new)
            await self._write(os.path.join(new, "job.json"), encode(record))
            await aiofiles.os.rename(new, self.job_folder(record.job))
            self._note_owned(record)
            await asyncio.to_thread(sync_folder, self._at("jobs"))
        except OSError as exc:
            raise SpoolUnavailable(f"{new}: {exc.strerror}") from exc
        finally:
            await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)  # there only if this failed

    def take_over(self, record: JobRecord) -> None:
        """
        Rename the job's claims into its folder; those that are there already stay. Blocks; idempotent.

        A claim of the same name on another inode (the number came again) is a newer disk's, and stays where it is.
        """
        folder = self.job_folder(record.job)
        try:
            moved = [self.claims.hand_over(held.link, folder) for held in record.files if self._is_claimed(held)]
            if any(moved):
                sync_folder(folder)
                self.claims.sync()
        except OSError as exc:
            raise SpoolUnavailable(f"{folder}: {exc.strerror}") from exc

    def is_held_by_job(self, inode: int) -> bool:
        """
        True for an inode that belongs to a job, whether its link has been moved yet or not.

        Once the link is gone (scrubbed, or removed by hand) the number may have come again: then it is not the job's.
        """
        paths = [path for links in list(self._held.values()) for path in links.get(inode, ())]
        return any(os.path.lexists(path) for path in paths)

    async def write_job(self, record: JobRecord) -> None:
        """Journal one step of a job. Raises `SpoolUnavailable`; then the step has not been taken."""
        await self._write(os.path.join(self.job_folder(record.job), "job.json"), encode(record))
        self._note_owned(record)

    def load_jobs(self) -> Iterator[JobRecord]:
        """Every job in the spool, its links in its folder. A record that cannot be read is reported and left alone."""
        for name in sorted(os.listdir(self._at("jobs"))):
            folder = self._at("jobs", name)
            if name.startswith(_NEW):
                shutil.rmtree(folder)  # never had a link: they are claims still
                continue
            path = os.path.join(folder, "job.json")
            try:
                with open(path, "rb") as file:
                    record = decode(JobRecord, file.read(), where=path)
            except (OSError, RecordDamaged) as exc:
                if self._was_finished(folder):
                    continue
                _log.error("job.unreadable", job=name, error=str(exc), consequence="its folder is left untouched")
                self._held[JobId(name)] = _links_in(folder)
                self.unreadable_jobs.append(str(exc))
                continue
            self._note_owned(record)
            yield record

    async def remove_job(self, job: JobId) -> None:
        """The last step: a folder whose links are gone."""
        folder = self.job_folder(job)
        try:
            with contextlib.suppress(FileNotFoundError):
                strangers = ", ".join(name for name in await aiofiles.os.listdir(folder) if name != "job.json")
                if strangers:
                    raise SpoolUnavailable(f"{folder}: holds {strangers}, which the agent did not put there; remove it")
                await aiofiles.os.unlink(os.path.join(folder, "job.json"))
                await aiofiles.os.rmdir(folder)
            await asyncio.to_thread(sync_folder, self._at("jobs"))
        except OSError as exc:
            raise SpoolUnavailable(f"{folder}: {exc.strerror}") from exc
        self._held.pop(job, None)
        self._kept.pop(job, None)

    def _note_owned(self, record: JobRecord) -> None:
        if record.still_named:
            # as they were when last read: they may have changed since they were claimed
            self._kept[record.job] = frozenset(record.first_read.get(held.link, held.identity) for held in record.files)
        if record.state is JobState.KEPT:
            self._held.pop(record.job, None)
            return
        folder, may_be_claims = self.job_folder(record.job), record.state in _NOT_TAKEN_OVER
        self._held[record.job] = {
            held.identity.inode: (
                os.path.join(folder, held.link),
                *((self._at("claims", held.link),) if may_be_claims and self._is_claimed(held) else ()),
            )
            for held in record.files
        }

    def _is_claimed(self, held: HeldFile) -> bool:
        try:
            with HeldDisk(self._at("claims", held.link)) as disk:
                return disk.identity.same_inode(held.identity)
        except (OverlayChanged, Refused):
            return False

    def _was_finished(self, folder: str) -> bool:
        """Whether *folder* is what a crash in `remove_job` left: nothing is in it."""
        try:
            os.rmdir(folder)
        except OSError:
            return False
        return True

    # ---- instances, receipts ----------------------------------------------------------------------------

    async def write_instance(self, record: InstanceRecord) -> None:
        await self._write(self._at("instances", f"{record.instance}.json"), encode(record))

    def load_instances(self) -> Iterator[InstanceRecord]:
        for name in sorted(os.listdir(self._at("instances"))):
            path = self._at("instances", name)
            if name.startswith("."):
                os.unlink(path)  # a write that a crash cut off; the one before it still stands
                continue
            try:
                with open(path, "rb") as file:
                    yield decode(InstanceRecord, file.read(), where=path)
            except RecordDamaged as exc:
                _log.error("instance.unreadable", error=str(exc), consequence="learnt anew if it still lives")

    def forget_instance(self, instance: InstanceId) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._at("instances", f"{instance}.json"))

    def has_receipt(self, job: JobId) -> bool:
        return os.path.exists(self._at("receipts", f"{job}.json"))

    async def write_receipt(self, job: JobId, receipt: bytes) -> None:
        await self._write(self._at("receipts", f"{job}.json"), receipt)

    # ---- inside -----------------------------------------------------------------------------------------

    async def _write(self, path: str, data: bytes) -> None:
        # to its end even when cancelled: else a thread goes on writing where the next record of this name goes
        writing = asyncio.ensure_future(self._with_reserve(partial(self._write_once, path, data), path))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            while not writing.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({writing})
            raise

    async def _with_reserve(self, work: Callable[[], Awaitable[None]], path: str) -> None:
        """Do *work*; where the filesystem is full, do it again with the reserve given up."""
        try:
            await work()
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._give_up_reserve():
                raise SpoolUnavailable(f"{path}: {exc.strerror}") from exc
            try:
                await work()
            except OSError as again:
                raise SpoolUnavailable(f"{path}: {again.strerror}, the reserve is used up") from again

    async def _write_once(self, path: str, data: bytes) -> None:
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.new")
        async with aiofiles.open(temporary, "wb") as file:
            await file.write(data)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        await aiofiles.os.replace(temporary, path)
        await asyncio.to_thread(sync_folder, folder)

    def _give_up_reserve(self) -> bool:
        try:
            os.unlink(self._at("reserve"))
        except FileNotFoundError:
            return False
        _log.warning("spool.full", spool=self.path, consequence="the reserve was given up to keep the journal")
        return True

    def _lock(self) -> None:
        self._lock_fd = os.open(self._at("lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self.close()
            raise ConfigError(f"{self.path}: another agent is using this spool; stop it first") from exc

    def _check_host(self) -> None:
        owner = self._kept_word("host") or self._keep_word("host", self._host_id)
        if owner != self._host_id:
            raise ConfigError(
                f"{self.path}: belongs to host {owner}, this is {self._host_id}; on shared storage give each host its "
                f"own instances_path, or remove {self._at('host')} if that host is gone for good"
            )

    def _kept_word(self, name: str) -> str:
        try:
            with open(self._at(name), encoding="ascii") as file:
                return file.read().strip()  # nothing: a power cut came before its content
        except FileNotFoundError:
            return ""

    def _keep_word(self, name: str, word: str) -> str:
        with open(self._at(name), "w", encoding="ascii") as file:
            file.write(word + "\n")
            file.flush()
            os.fsync(file.fileno())
        return word

    def _at(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)


def _links_in(folder: str) -> dict[int, tuple[str]]:
    try:
        with os.scandir(folder) as entries:
            return {entry.inode(): (entry.path,) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):  # a stranger among the jobs holds no links
        return {}
