"""`Capture` as the agent wires it, on a real spool, where a test says what libvirt and Nova answer."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.flows.rig import Rig, rig_on

from autobackup.config import CaptureSection
from autobackup.flows.capture import Capture
from autobackup.flows.evidence import Evidence
from autobackup.flows.learn import Learn
from autobackup.host.libvirt_events import DomainAnswer
from autobackup.metrics import Metrics
from autobackup.model import InstanceId, JobRecord
from autobackup.rules.policy import Rulebook
from autobackup.rules.termination import NOT_ASKED, Domain, Word

_SETTINGS = CaptureSection(quiet_period_s=0.0, leaked_after_s=0.0)


class _Link:
    """libvirt, as far as a look asks it."""

    def __init__(self) -> None:
        self.domains: dict[InstanceId, DomainAnswer] = {}

    async def look_up(self, instance: InstanceId) -> DomainAnswer:
        return self.domains.get(instance, DomainAnswer(domain=Domain.ABSENT))


class _Inquiry:
    """Nova's word, as far as a look asks for it."""

    def __init__(self) -> None:
        self.words: dict[InstanceId, Word] = {}
        self.asked: list[InstanceId] = []
        self.refreshed_count = 0

    def word(self, instance: InstanceId, *, since_s: float) -> Word:
        self.asked.append(instance)
        return self.words.get(instance, NOT_ASKED)

    def forget(self, instance: InstanceId) -> None:
        self.words.pop(instance, None)

    def refresh_soon(self) -> None:
        self.refreshed_count += 1


class Capturing:
    """A host. Without Nova, unless *asks_nova*."""

    def __init__(self, rig: Rig, book: Rulebook, *, asks_nova: bool) -> None:
        self.rig = rig
        self.link, self.inquiry = _Link(), _Inquiry()
        self.metrics = Metrics()
        self.learn = Learn(
            claims=rig.spool.claims, spool=rig.spool, jobs=rig.jobs, workers=rig.workers, swtpm_path="/nowhere",
            clock=rig.clock,
        )  # fmt: skip
        self.capture = Capture(
            claims=rig.spool.claims,
            spool=rig.spool,
            link=self.link,  # type: ignore[arg-type]
            jobs=rig.jobs,
            learn=self.learn,
            book=book,
            inquiry=self.inquiry if asks_nova else None,  # type: ignore[arg-type]
            settings=_SETTINGS,
            evidence=Evidence(
                claims=rig.spool.claims, settings=_SETTINGS, verdict_despite_nova=True, asks_nova=asks_nova
            ),
            workers=rig.workers,
            metrics=self.metrics,
            claim_now=lambda _folder, _source: None,
            on_queued=lambda: None,
            clock=rig.clock,
        )

    async def lived(self, disks: Mapping[str, bytes], *, name: str = "web", metadata: str = "") -> InstanceId:
        """An instance that was seen running; its disks are held."""
        instance = InstanceId(str(uuid.uuid4()))
        folder = self.rig.instances / instance
        folder.mkdir()
        for disk, content in disks.items():
            (folder / disk).write_bytes(content)
        self.rig.spool.claims.claim_folder(instance)
        xml = f"<domain><uuid>{instance}</uuid><name>{name}</name><metadata>{metadata}</metadata></domain>"
        self.link.domains[instance] = DomainAnswer(domain=Domain.ACTIVE, xml=xml)
        await self.look(instance)
        return instance

    async def died(self, instance: InstanceId) -> None:
        """Its domain is gone, and Nova removed its folder."""
        self.link.domains.pop(instance, None)
        shutil.rmtree(self.rig.instances / instance)
        await self.look(instance)

    async def look(self, instance: InstanceId) -> None:
        """One look, as the loop takes it; awaited to its end, which the loop does not tell."""
        self.capture._note(instance, is_change=True)
        await self.capture._look_safely(instance)

    def held(self, instance: InstanceId) -> set[str]:
        """The disks that are claimed, and no job's."""
        claims = self.rig.spool.claims.of(instance)
        return {claim.disk for claim in claims if not self.rig.spool.is_held_by_job(claim.inode)}

    def job(self) -> JobRecord:
        (record,) = self.rig.jobs.all()
        return record

    def captured(self) -> set[str]:
        return {held.disk for held in self.job().files}


@contextmanager
def capturing(folder: Path, book: Rulebook, *, asks_nova: bool = False) -> Iterator[Capturing]:
    with rig_on(folder) as rig:
        yield Capturing(rig, book, asks_nova=asks_nova)
