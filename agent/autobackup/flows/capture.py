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
from autobackup.config import CaptureSection, RequestSection, Rule
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
        requests: RequestSection,
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
        self._requests = requests
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

    def note_change(self, instance: InstanceId) -> None:
        """Something about *instance* has changed: look at once, and its quiet period begins anew."""
        self._in_loop(partial(self._note, instance, is_change=True))

    def note_scan(self, instance: InstanceId) -> None:
        """A scan came by: look, but nothing has changed."""
        self._in_loop(partial(self._note, instance, is_change=False))

    def on_domain_event(self, event: DomainEvent) -> None:
        """In libvirt's thread: link first, by the conventional path; no call back into libvirt."""
        if event.disk_is_near:
            self._claim_now(event.instance, "libvirt")
        if event.migrated_away:
            self._in_loop(lambda: self._learn.migrated_away(event.instance))
        self.note_change(event.instance)

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
            {
                "instance": instance,
                "name": self._learn.known(instance).name,
                "age_s": round(now_s - seen.undecided_since_s, 1),
                "reason": seen.reason,
            }
            for instance, seen in self._seen.items()
            if seen.undecided_since_s is not None
        ]

    def _in_loop(self, call: Callable[[], None]) -> None:
        """The one place where other threads enter the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended; the spool knows all that matters
            self._loop.call_soon_threadsafe(call)

    def _note(self, instance: InstanceId, *, is_change: bool) -> None:
        now_s = time.monotonic()
        seen = self._seen.setdefault(instance, _Seen(changed_at_s=now_s, look_at_s=now_s))
        seen.look_at_s = now_s
        if is_change:
            seen.changed_at_s = now_s
        self._wake.set()

    async def _look_safely(self, instance: InstanceId) -> None:
        seen = self._seen[instance]
        seen.look_at_s = float("inf")
        try:
            await self._look(instance, seen)
        except AutobackupError as exc:
            _log.warning("look.failed", instance=instance, kind=type(exc).__name__, error=str(exc))
            self._look_again(instance, seen, f"the look failed: {exc}", None)
        self._metrics.undecided_oldest.set(
            max((time.monotonic() - s.undecided_since_s for s in self._seen.values() if s.undecided_since_s), default=0)
        )

    async def _look(self, instance: InstanceId, seen: _Seen) -> None:
        claims = await self._held(instance)
        answer = await self._link.look_up(instance)
        record = await self._learn.from_answer(instance, answer)
        roots = [claim for claim in claims if claim.is_root]
        if not roots and answer.domain is Domain.ABSENT:
            # files still named belong to an instance that is being built, or whose root disk cannot be linked
            gone = [claim for claim in claims if self._claims.link_count(claim) == 1]
            await self._let_go(gone, "no root disk was held, and it is gone")
        waiting: list[Verdict] = []
        for root in roots:
            facts = await self._workers.blocking(partial(self._facts, root, roots, record, answer.domain, seen))
            plan = policy.plan(record, self._rules, self._requests)
            verdict = decide(facts)
            if verdict.kind is VerdictKind.ALIVE:
                await self._release_replaced(facts, claims)
            elif plan is None:
                if facts.link_count == 1 and facts.domain is not Domain.UNKNOWN:
                    await self._release(root, claims, "no rule wants it")
            elif verdict.kind is VerdictKind.UNDECIDED:
                waiting.append(verdict)
            else:
                await self._settle(root, claims, record, verdict, plan)
        if waiting:
            self._look_again(instance, seen, waiting[0].reason, waiting[0].look_again_s)
        else:
            seen.undecided_since_s, seen.looks, seen.reason = None, 0, ""
        if not await self._held(instance):
            self._seen.pop(instance, None)
            await self._learn.forget(instance)

    async def _held(self, instance: InstanceId) -> list[Claim]:
        """The claims of *instance* that no job owns; one that somebody removed from the spool is forgotten."""
        claims = self._claims.of(instance)
        for claim in claims:
            if self._claims.link_count(claim) == 0:
                _log.error(
                    "claim.lost", instance=instance, disk=claim.disk, consequence="removed from the spool by hand"
                )
                await self._workers.blocking(partial(self._claims.release, claim))
        return [claim for claim in self._claims.of(instance) if not self._spool.is_held_by_job(claim.inode)]

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

    def _look_again(self, instance: InstanceId, seen: _Seen, reason: str, soon_s: float | None) -> None:
        now_s = time.monotonic()
        if reason != seen.reason:
            _log.info("verdict.waits", instance=instance, reason=reason)
        if seen.undecided_since_s is None:
            seen.undecided_since_s = now_s
        seen.looks += 1
        seen.reason = reason
        back_off_s = min(self._settings.undecided_longest_s, _FIRST_LOOK_AGAIN_S * 2.0 ** min(seen.looks, 16))
        seen.look_at_s = min(seen.look_at_s, now_s + (soon_s if soon_s is not None else back_off_s))

    # ---- consequences -----------------------------------------------------------------------------------

    async def _settle(
        self, root: Claim, claims: Sequence[Claim], record: InstanceRecord, verdict: Verdict, plan: policy.Plan
    ) -> None:
        """A verdict that ends the waiting: a job, or our link goes because the disk was replaced or lives elsewhere."""
        self._metrics.verdicts.labels(verdict=verdict.kind.value).inc()
        _log.info(
            "verdict.reached", instance=root.instance, inode=root.inode, verdict=verdict.kind, reason=verdict.reason
        )
        if verdict.kind is VerdictKind.TERMINATED:
            await self._queue(record, root, claims, verdict, plan)
        else:
            await self._release(root, claims, verdict.reason)

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
        await self._let_go(await self._workers.blocking(partial(self._same_fate, root, claims)), reason)

    async def _release_replaced(self, facts: Facts, claims: Sequence[Claim]) -> None:
        """
        The instance lives, and one of its smaller files was removed or made anew: disk.rescue, TPM state.

        Only after the quiet period: a delete under way unlinks them one by one before it is seen to be one.
        """
        if facts.named_at is Place.INSTANCE and facts.quiet_s >= facts.quiet_required_s:
            gone = [c for c in claims if not c.is_root and self._claims.link_count(c) == 1]
            await self._let_go(gone, "it was removed or replaced while the instance lives")

    async def _let_go(self, claims: Sequence[Claim], reason: str) -> None:
        for claim in claims:
            await self._workers.blocking(partial(self._claims.release, claim))  # frees the blocks of a large disk
            _log.info("claim.released", instance=claim.instance, disk=claim.disk, inode=claim.inode, reason=reason)
        self._metrics.claims.set(self._claims.count())

    def _same_fate(self, root: Claim, claims: Sequence[Claim]) -> list[Claim]:
        """*root* first, and the other files of the instance that are named where it is, or nowhere any more."""
        here = self._claims.place(root)
        others = [claim for claim in claims if not claim.is_root]
        return [root, *(c for c in others if self._claims.place(c) in (here, Place.NOWHERE))]
