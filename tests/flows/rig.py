"""
The flows as the agent wires them, on a real spool and real stores, with a clock and doors of our own.

`Rig(folder)` again on the same folder is a start after a crash.
"""

import os
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.flows.material import limits

from autobackup.config import RetrySection
from autobackup.errors import AutobackupError
from autobackup.flows.ancestry import Ancestry
from autobackup.flows.backup import Backup
from autobackup.flows.jobs import Jobs
from autobackup.flows.pacing import Pace
from autobackup.flows.places import Places
from autobackup.flows.queueing import new_job
from autobackup.flows.runner import Runner
from autobackup.flows.seal_base import SealBase
from autobackup.flows.secure import Secure
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
from autobackup.stores import Begun, Body, DataKey, OpenDestination, Store, Stored
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.keyfile import KeyFile, write_kek
from autobackup.stores.keys import KeySource
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
        self.before_put: Callable[[], Awaitable[None]] = _nothing
        self.in_put: Callable[[], None] = lambda: None  # it is begun, and has no byte yet
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

    async def put(
        self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None
    ) -> None:
        async def on_begun() -> None:
            if begun is not None:
                await begun()
            self.in_put()

        self._pass("put", attempt)
        await self.before_put()
        await self.store.put(attempt, body, properties=properties, begun=on_begun)
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

    async def children(self, parent: str) -> list[AttemptId]:
        self._pass("children", parent)
        return await self.store.children(parent)

    async def bases(self, content: str | None = None) -> list[Stored]:
        self._pass("bases", content or "")
        return await self.store.bases(content)

    async def retire(self, attempt: AttemptId) -> None:
        self._pass("retire", attempt)
        await self.store.retire(attempt)

    async def everything(self) -> list[AttemptId]:
        return await self.store.everything()

    async def list_held(self) -> list[Stored]:
        return await self.store.held()

    def _pass(self, call: str, attempt: str = "") -> None:
        error = self.shut.get(call) if isinstance(self.shut, Mapping) else self.shut
        if error is not None:
            raise error
        self.calls.append((call, attempt))


class NotingKeys:
    """A real source of keys; remembers what was drawn, so that a test can look for it where it must not be."""

    def __init__(self, keys: KeySource) -> None:
        self._keys = keys
        self.drawn: list[DataKey] = []
        self.destroyed: list[str] = []
        self.fetched = 0
        self.after_draw: Callable[[], None] = lambda: None

    async def check(self) -> None:
        await self._keys.check()

    async def draw(self, attempt: AttemptId) -> DataKey:
        self.drawn.append(await self._keys.draw(attempt))
        self.after_draw()
        return self.drawn[-1]

    async def circle(self) -> str:
        return await self._keys.circle()

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
        stores: Path | None = None,
        key_source: Callable[[Path], KeySource] = lambda path: KeyFile(str(path)),
    ) -> None:
        """*stores* has the destinations' folders and key files: two rigs on one are two hosts."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.instances = instances or folder / "instances"
        self.instances.mkdir(exist_ok=True)
        stores = stores or folder
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
            (stores / name).mkdir(mode=0o700, exist_ok=True)
            if not (stores / f"{name}.kek").exists():
                write_kek(str(stores / f"{name}.kek"))
            self.doors[name] = Door(DirectoryStore(str(stores / name)))
            self.keys[name] = NotingKeys(key_source(stores / f"{name}.kek"))
        self.places = Places(
            [
                Destination(
                    name=name, store="directory", path=stores / name, key="keyfile", keyfile=stores / f"{name}.kek",
                    verify=verify,  # type: ignore[arg-type]
                )
                for name in destinations
            ],
            lambda one: OpenDestination(
                destination=one, store=_as_store(self.doors[one.name]), keys=self.keys[one.name]
            ),
        )  # fmt: skip
        self.jobs = Jobs(spool=self.spool, metrics=self.metrics, clock=self.clock, observe=self._observe)
        self.ancestry = Ancestry(spool=self.spool, workers=self.workers, in_use=lambda: ())
        pace, sending = Pace(), fanout_limits or limits()
        self.bases = SealBase(
            ancestry=self.ancestry, pace=pace, limits=sending, workers=self.workers, host="host",
            agent_id=lambda: self.spool.agent_id, clock=self.clock,
        )  # fmt: skip
        self.secure = Secure(ancestry=self.ancestry, bases=self.bases, workers=self.workers)
        self.send = Send(
            jobs=self.jobs,
            spool=self.spool,
            places=lambda copy: self.places.of(copy),  # a test may put others in their place
            ancestry=self.ancestry,
            secure=self.secure,
            pace=pace,
            limits=sending,
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

    def base(self, content: bytes, *, name: str = "da39a3ee5e6b4b0d3255bfef95601890afd80709") -> ChainLink:
        """A backing file as Nova has it, held."""
        path = self.instances / "_base" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert self.spool.bases.hold(str(path))
        return ChainLink(path=str(path), format="raw")

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


async def _nothing() -> None:
    pass


def _as_store(door: Door) -> Store:
    """`Store.held` is the one call that flows do not make; the door has a better use for the name."""
    return door  # type: ignore[return-value]
