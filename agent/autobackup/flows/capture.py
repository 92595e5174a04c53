"""
From claims to jobs: looks at instances when something changed, reaches a verdict, and queues what terminated.

Triggers come from the inotify thread and from libvirt's; both only name an instance. A look asks libvirt, the
inode and the folders, learns what a live domain tells (its XML is gone after the destroy), and lets
`rules.policy` and `rules.termination` decide. Policy comes first: an instance that nobody wants never waits
(invariant 8). Whatever cannot be told is looked at again, with its age in a metric, and never dropped.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from autobackup import logs
from autobackup.config import CaptureSection, Rule
from autobackup.errors import AutobackupError, Damaged, DiskBusy, SpoolUnavailable
from autobackup.flows.jobs import Jobs
from autobackup.flows.learn import Learn
from autobackup.flows.queueing import new_job
from autobackup.flows.workers import Workers
from autobackup.host.claims import Claim, Claims
from autobackup.host.disks import HeldDisk
from autobackup.host.domain_xml import is_novas
from autobackup.host.libvirt_events import DomainEvent, LibvirtLink
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import InstanceId, InstanceRecord, VerdictKind
from autobackup.rules import policy
from autobackup.rules.lifecycle import JobEvent
from autobackup.rules.termination import Domain, Facts, Lease, Place, Verdict, decide

_log = logs.get("flows.capture")
_FIRST_LOOK_AGAIN_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What this process remembers of one instance; all of it can be lost."""

    changed_at_s: float  # monotonic: the last event or change
    look_at_s: float  # monotonic: when to look
    undecided_since_s: float | None = None
    looks: int = 0
    reason: str = ""


class Capture:
    """
    Owns the verdicts.

    *claim_now(folder, source)* links what is in an instance's folder, from any thread; *on_queued* is called after
    a job was made.
    """

    def __init__(
        self,
        *,
        claims: Claims,
        spool: Spool,
        link: LibvirtLink,
        jobs: Jobs,
        learn: Learn,
        rules: Sequence[Rule],
        settings: CaptureSection,
        verdict_despite_nova: bool,
        workers: Workers,
        metrics: Metrics,
        claim_now: Callable[[str, str], None],
        on_queued: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = claims
        self._spool = spool
        self._link = link
        self._jobs = jobs
        self._learn = learn
        self._rules = rules
        self._settings = settings
        self._verdict_despite_nova = verdict_despite_nova
        self._workers = workers
        self._metrics = metrics
        self._claim_now = claim_now
        self._on_queued = on_queued
        self._clock = clock
        self._seen: dict[InstanceId, _Seen] = {}
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    # ---- triggers: any thread ---------------------------------------------------------------------------

    def note(self, instance: InstanceId) -> None:
        """Something about *instance* may have changed."""
        self._in_loop(partial(self._changed, instance))

    def on_domain_event(self, event: DomainEvent) -> None:
        """In libvirt's thread: link first, by the conventional path; no call back into libvirt."""
        if event.disk_is_near:
            self._claim_now(event.instance, "libvirt")
        if event.migrated_away:
            self._in_loop(lambda: self._learn.migrated_away(event.instance))
        self.note(event.instance)

    # ---- the loop's side --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at what is due; for ever."""
        while True:
            now_s = time.monotonic()
            due = [instance for instance, seen in self._seen.items() if seen.look_at_s <= now_s]
            for instance in due:
                await self._look_safely(instance)
            waits_s = [seen.look_at_s - time.monotonic() for seen in self._seen.values()]
            self._wake.clear()
            try:
                async with asyncio.timeout(max(0.0, min(waits_s, default=60.0))):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def undecided(self) -> list[dict[str, object]]:
        """The candidates that wait, for operators."""
        now_s = time.monotonic()
        return [
            {"instance": instance, "age_s": round(now_s - seen.undecided_since_s, 1), "reason": seen.reason}
            for instance, seen in self._seen.items()
            if seen.undecided_since_s is not None
        ]

    def _in_loop(self, call: Callable[[], None]) -> None:
        """The one place where other threads enter the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended; the spool knows all that matters
            self._loop.call_soon_threadsafe(call)

    def _changed(self, instance: InstanceId) -> None:
        now_s = time.monotonic()
        seen = self._seen.setdefault(instance, _Seen(changed_at_s=now_s, look_at_s=now_s))
        seen.changed_at_s = seen.look_at_s = now_s
        self._wake.set()

    async def _look_safely(self, instance: InstanceId) -> None:
        seen = self._seen[instance]
        seen.look_at_s = float("inf")
        try:
            await self._look(instance, seen)
        except AutobackupError as exc:
            _log.warning("look.failed", instance=instance, kind=type(exc).__name__, error=str(exc))
            self._look_again(seen, f"the look failed: {exc}", None)
        self._metrics.undecided_oldest.set(
            max((time.monotonic() - s.undecided_since_s for s in self._seen.values() if s.undecided_since_s), default=0)
        )

    async def _look(self, instance: InstanceId, seen: _Seen) -> None:
        claims = self._claims.of(instance)
        answer = await self._link.look_up(instance)
        record = await self._learn.from_answer(instance, answer)
        roots = [claim for claim in claims if claim.is_root]
        if not roots:
            if answer.domain is Domain.ABSENT:
                await self._drop(instance, claims, "no root disk is held and the domain is gone")
            return
        waiting: list[Verdict] = []
        for root in roots:
            facts = await self._workers.blocking(partial(self._facts, root, roots, record, answer.domain, seen))
            plan = policy.plan(record, self._rules)
            if plan is None and facts.link_count == 1 and facts.domain is not Domain.UNKNOWN:
                await self._release(root, claims, "no rule wants it")
                continue
            verdict = decide(facts)
            if verdict.kind is VerdictKind.UNDECIDED:
                waiting.append(verdict)
                continue
            if verdict.kind is VerdictKind.ALIVE:
                continue
            self._metrics.verdicts.labels(verdict=verdict.kind.value).inc()
            _log.info(
                "verdict.reached", instance=instance, inode=root.inode, verdict=verdict.kind, reason=verdict.reason
            )
            if verdict.kind is VerdictKind.TERMINATED and plan is not None:
                await self._queue(record, root, claims, verdict, plan)
            else:
                await self._release(root, claims, verdict.reason)
        if waiting:
            self._look_again(seen, waiting[0].reason, waiting[0].look_again_s)
        else:
            seen.undecided_since_s, seen.looks = None, 0
        if not self._claims.of(instance):
            await self._drop(instance, [], "")

    def _facts(self, root: Claim, roots: Sequence[Claim], record: InstanceRecord, domain: Domain, seen: _Seen) -> Facts:
        places = {claim.inode: self._claims.place(claim) for claim in roots}
        here = places[root.inode]
        was_resized = root.inode in record.resized_inodes
        return Facts(
            domain=domain,
            link_count=self._claims.link_count(root),
            named_at=here,
            last_named_at=here if here is not Place.NOWHERE else Place.RESIZE if was_resized else Place.INSTANCE,
            other_root_disk=any(place is Place.INSTANCE for inode, place in places.items() if inode != root.inode),
            migrated_away=record.migrated_away,
            lease=self._lease(root),
            quiet_s=time.monotonic() - seen.changed_at_s,
            quiet_required_s=self._settings.quiet_period_s,
            leaked_after_s=self._settings.leaked_after_s,
            undefined_is_released=self._settings.undefined_is_released,
            cloud_is_silent=is_novas(record.domain_xml) and not self._verdict_despite_nova,
        )

    def _lease(self, root: Claim) -> Lease:
        try:
            with HeldDisk(self._claims.path(root)) as disk:
                disk.require_idle()
        except DiskBusy:
            return Lease.BUSY
        except (OSError, AutobackupError):
            return Lease.NOT_TRIED
        return Lease.GRANTED

    def _look_again(self, seen: _Seen, reason: str, soon_s: float | None) -> None:
        now_s = time.monotonic()
        if seen.undecided_since_s is None:
            seen.undecided_since_s = now_s
        seen.looks += 1
        seen.reason = reason
        back_off_s = min(self._settings.undecided_longest_s, _FIRST_LOOK_AGAIN_S * 2.0 ** min(seen.looks, 16))
        seen.look_at_s = min(seen.look_at_s, now_s + (soon_s if soon_s is not None else back_off_s))

    # ---- consequences -----------------------------------------------------------------------------------

    async def _queue(
        self, record: InstanceRecord, root: Claim, claims: Sequence[Claim], verdict: Verdict, plan: policy.Plan
    ) -> None:
        with_root = await self._workers.blocking(partial(self._same_fate, root, claims))
        try:
            job = await self._workers.blocking(
                partial(
                    new_job, record, with_root, self._claims, verdict, plan, self._spool.instances_path, self._clock()
                )
            )
        except Damaged as exc:
            raise SpoolUnavailable(f"{root.name}: {exc}; looked at again") from exc
        job = replace(job, not_captured={**job.not_captured, **self._learn.not_captured(record.instance)})
        await self._jobs.create(job)
        _log.info("job.queued", job=job.job, instance=job.instance, rule=plan.rule, files=[f.link for f in job.files])
        if not plan.certain:
            reason = f"nothing is known of this instance, so it cannot be told whether rule {plan.rule!r} wants it"
            await self._jobs.move(job.job, JobEvent.GAVE_UP, last_error=reason)
            _log.error("job.parked", job=job.job, instance=job.instance, error=reason)
        self._on_queued()

    async def _release(self, root: Claim, claims: Sequence[Claim], reason: str) -> None:
        for claim in await self._workers.blocking(partial(self._same_fate, root, claims)):
            self._claims.release(claim)
            _log.info("claim.released", instance=claim.instance, disk=claim.disk, inode=claim.inode, reason=reason)
        self._metrics.claims.set(self._claims.count())

    async def _drop(self, instance: InstanceId, claims: Sequence[Claim], reason: str) -> None:
        """Nothing of this instance is left to hold."""
        for claim in claims:
            self._claims.release(claim)
            _log.info("claim.released", instance=instance, disk=claim.disk, inode=claim.inode, reason=reason)
        self._seen.pop(instance, None)
        self._learn.forget(instance)

    def _same_fate(self, root: Claim, claims: Sequence[Claim]) -> list[Claim]:
        """*root* first, and the other files of the instance that are named where it is, or nowhere any more."""
        here = self._claims.place(root)
        others = [claim for claim in claims if not claim.is_root]
        return [root, *(c for c in others if self._claims.place(c) in (here, Place.NOWHERE))]
