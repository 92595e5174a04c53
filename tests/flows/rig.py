"""
The flows as the agent wires them, on a real spool and real stores, with a clock and doors of our own.

`Rig(folder)` again on the same folder is a start after a crash.
"""

import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.flows.material import limits

from autobackup.config import RetrySection
from autobackup.errors import AutobackupError
from autobackup.flows.backup import Backup
from autobackup.flows.jobs import Jobs
from autobackup.flows.pacing import Pace
from autobackup.flows.places import Places
from autobackup.flows.queueing import new_job
from autobackup.flows.runner import Runner
from autobackup.flows.send import Send
from autobackup.flows.tap import FanoutLimits
from autobackup.flows.workers import Workers
from autobackup.host.filesystems import kind_of
from autobackup.host.scrub import ScrubMethod, load_methods
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import (
    AttemptId,
    ChainLink,
    CopyRecord,
    DestinationName,
    DiskSource,
    InstanceId,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    Occasion,
    VerdictKind,
)
from autobackup.rules.policy import Plan, PlannedCopy
from autobackup.rules.termination import Verdict
from autobackup.stores import Body, DataKey, OpenDestination, Store, Stored
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.keyfile import KeyFile, write_kek
from autobackup.terms import Destination

RETRY: Final = RetrySection(first_s=5.0, longest_s=900.0)
GONE: Final = Verdict(kind=VerdictKind.TERMINATED, reason="gone", occasion=Occasion.TERMINATE)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Door:
    """A real store behind a door: shut, every call fails as told; open, each is noted and passed on."""

    def __init__(self, store: DirectoryStore) -> None:
        self.store: Store = store
        self.root = Path(store.root)
        self.shut: Mapping[str, AutobackupError] | AutobackupError | None = None  # all calls, or some by name
        self.calls: list[tuple[str, str]] = []
        self.after_put: Callable[[AttemptId], None] = lambda _attempt: None

    @property
    def digest_algorithm(self) -> str:
        return self.store.digest_algorithm

    def held(self) -> list[str]:
        """What is really there, by the folder itself."""
        return sorted(path.name.removesuffix(".autobackup") for path in self.root.glob("*.autobackup"))

    def files(self) -> list[str]:
        return sorted(os.listdir(self.root))

    async def check(self) -> None:
        self._pass("check")
        await self.store.check()

    async def put(self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str]) -> None:
        self._pass("put", attempt)
        await self.store.put(attempt, body, properties=properties)
        self.after_put(attempt)

    async def stat(self, attempt: AttemptId) -> Stored:
        self._pass("stat", attempt)
        return await self.store.stat(attempt)

    async def digest(self, attempt: AttemptId) -> str:
        self._pass("digest", attempt)
        return await self.store.digest(attempt)

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        self._pass("read", attempt)
        return await self.store.read(attempt, offset=offset, length=length)

    async def stream(self, attempt: AttemptId, *, offset: int) -> AsyncIterator[bytes]:
        self._pass("stream", attempt)
        async for piece in self.store.stream(attempt, offset=offset):
            yield piece

    async def delete(self, attempt: AttemptId) -> None:
        self._pass("delete", attempt)
        await self.store.delete(attempt)

    async def list_held(self) -> list[Stored]:
        return await self.store.held()

    def _pass(self, call: str, attempt: str = "") -> None:
        error = self.shut.get(call) if isinstance(self.shut, Mapping) else self.shut
        if error is not None:
            raise error
        self.calls.append((call, attempt))


class NotingKeys:
    """A real key file; remembers what was drawn, so that a test can look for it where it must not be."""

    def __init__(self, path: Path) -> None:
        self._keys = KeyFile(str(path))
        self.drawn: list[DataKey] = []
        self.destroyed: list[str] = []
        self.fetched = 0

    async def check(self) -> None:
        await self._keys.check()

    async def draw(self, attempt: AttemptId) -> DataKey:
        self.drawn.append(await self._keys.draw(attempt))
        return self.drawn[-1]

    async def settle(self, attempt: AttemptId) -> None:
        await self._keys.settle(attempt)

    async def destroy(self, attempt: AttemptId) -> None:
        self.destroyed.append(attempt)
        await self._keys.destroy(attempt)

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        self.fetched += 1
        return await self._keys.fetch(header_words)


class Rig:
    """Everything between a verdict and a receipt."""

    def __init__(
        self,
        folder: Path,
        *,
        destinations: tuple[str, ...] = ("one",),
        verify: str = "fast",
        fanout_limits: FanoutLimits | None = None,
        scrub_methods: Mapping[str, ScrubMethod] | None = None,
        reserve_bytes: int = 1 << 20,
        instances: Path | None = None,
    ) -> None:
        self.folder = folder
        self.instances = instances or folder / "instances"
        self.instances.mkdir(exist_ok=True)
        self.clock = Clock()
        self.finished_count = 0
        self.journal: list[JobRecord] = []
        self.on_record: Callable[[JobRecord], None] = lambda _record: None
        self.metrics = Metrics()
        self.workers = Workers(cpu_tokens=2, threads=4)
        self.spool = Spool(
            instances_path=str(self.instances),
            path=str(self.instances / ".autobackup"),
            filesystems=(kind_of(str(self.instances)),),
            host_id="host",
            reserve_bytes=reserve_bytes,
        )
        self.spool.open()
        self.spool.claims.load()
        self.doors: dict[str, Door] = {}
        self.keys: dict[str, NotingKeys] = {}
        for name in destinations:
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            if not (folder / f"{name}.kek").exists():
                write_kek(str(folder / f"{name}.kek"))
            self.doors[name] = Door(DirectoryStore(str(folder / name)))
            self.keys[name] = NotingKeys(folder / f"{name}.kek")
        self.places = Places(
            [
                Destination(
                    name=name, store="directory", path=folder / name, key="keyfile", keyfile=folder / f"{name}.kek",
                    verify=verify,  # type: ignore[arg-type]
                )
                for name in destinations
            ],
            lambda one: OpenDestination(
                destination=one, store=_as_store(self.doors[one.name]), keys=self.keys[one.name]
            ),
        )  # fmt: skip
        self.jobs = Jobs(spool=self.spool, metrics=self.metrics, clock=self.clock, observe=self._observe)
        self.send = Send(
            jobs=self.jobs,
            spool=self.spool,
            places=self.places.of,
            pace=Pace(),
            limits=fanout_limits or limits(),
            retry=RETRY,
            workers=self.workers,
            metrics=self.metrics,
            host="host",
            clock=self.clock,
        )  # fmt: skip
        self.backup = Backup(
            jobs=self.jobs,
            spool=self.spool,
            send=self.send,
            scrub_methods=scrub_methods or load_methods(),
            retry=RETRY,
            workers=self.workers,
            metrics=self.metrics,
            clock=self.clock,
            on_finished=self._finished,
        )
        self.runner = Runner(jobs=self.jobs, backup=self.backup, parallel_jobs=2, clock=self.clock)
        self.jobs.load()

    def close(self) -> None:
        self.workers.close()
        self.spool.close()

    def _observe(self, record: JobRecord) -> None:
        self.journal.append(record)
        self.on_record(record)

    async def _finished(self) -> None:
        self.finished_count += 1

    # ---- making jobs ------------------------------------------------------------------------------------

    async def new_job(
        self,
        disks: Mapping[str, bytes],
        *,
        terminated: bool = True,
        verdict: Verdict = GONE,
        scrub_method: str = "zero",
        retention_s: float | None = None,
        format_name: str = "raw",
        chain: tuple[ChainLink, ...] = (),
    ) -> JobRecord:
        """An instance that ran with *disks*, was claimed, and whose folder Nova then removed."""
        instance = InstanceId(str(uuid.uuid4()))
        folder = self.instances / instance
        folder.mkdir()
        for name, content in disks.items():
            (folder / name).write_bytes(content)
        claims = self.spool.claims.claim_folder(instance)
        claims.sort(key=lambda claim: not claim.is_root)
        if terminated:
            shutil.rmtree(folder)
        record = InstanceRecord(
            instance=instance,
            libvirt_name="instance-1",
            display_name="web",
            disks=tuple(
                DiskSource(
                    path=str(folder / name),
                    format=format_name,
                    chain=chain,
                    chain_source="libvirt" if chain else "none",
                )
                for name in disks
                if name != "console.log"
            ),
            domain_xml="<domain/>",
        )
        job = new_job(
            record,
            claims,
            self.spool.claims,
            verdict,
            Plan(
                rule="all",
                copies=tuple(
                    PlannedCopy(destination=DestinationName(name), retention_s=retention_s) for name in self.doors
                ),
                scrub_method=scrub_method,
            ),
            str(self.instances),
            self.clock(),
        )
        await self.jobs.create(job)
        return self.jobs.get(job.job)

    # ---- looking at them --------------------------------------------------------------------------------

    def link(self, record: JobRecord, index: int = 0) -> Path:
        """The job's link, wherever it is: a claim until the job first moves, then in the job's folder."""
        name = record.files[index].link
        claim = Path(self.spool.path) / "claims" / name
        return claim if claim.exists() else Path(self.spool.job_folder(record.job)) / name

    def journaled(self, job: JobId) -> bytes:
        return (Path(self.spool.job_folder(job)) / "job.json").read_bytes()

    def is_gone(self, job: JobId) -> bool:
        return job not in [record.job for record in self.jobs.all()]

    async def advance(self, job: JobId) -> JobRecord | None:
        await self.backup.advance(job)
        return None if self.is_gone(job) else self.jobs.get(job)

    async def run_to_the_end(self, job: JobId, *, most: int = 40) -> None:
        """Advance, waiting on our own clock, until the job is gone or waits for an operator."""
        for _ in range(most):
            record = await self.advance(job)
            if record is None or record.state is JobState.PARKED:
                return
            self.clock.now_s = max(self.clock.now_s, record.not_before_s) + 0.001
        raise AssertionError(f"job is {self.jobs.get(job).state} after {most} rounds: {self.jobs.get(job).last_error}")


def copy_of(record: JobRecord, name: str) -> CopyRecord:
    return next(copy for copy in record.copies if copy.destination == name)


@contextmanager
def rig_on(folder: Path, **how: object) -> Iterator[Rig]:
    rig = Rig(folder, **how)  # type: ignore[arg-type]
    try:
        yield rig
    finally:
        rig.close()


def _as_store(door: Door) -> Store:
    """`Store.held` is the one call that flows do not make; the door has a better use for the name."""
    return door  # type: ignore[return-value]
