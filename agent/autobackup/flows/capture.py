"""
From claims to jobs: looks at instances when something changed, reaches a verdict, and queues what terminated.

Triggers come from the inotify thread and from libvirt's; both only name an instance. A look asks libvirt, the
inode and the folders, learns what a live domain tells (its XML is gone after the destroy), and lets
`rules.policy` and `rules.termination` decide. Policy comes first: an instance that nobody wants never waits
(invariant 8). Whatever cannot be told is looked at again, with its age in a metric, and never dropped.
"""

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from autobackup import logs
from autobackup.config import CaptureSection
from autobackup.errors import AutobackupError, Damaged, Refused, SpoolUnavailable
from autobackup.flows.evidence import Evidence
from autobackup.flows.inquiry import Inquiry
from autobackup.flows.jobs import Jobs
from autobackup.flows.learn import Learn
from autobackup.flows.queueing import kind_of, new_job
from autobackup.flows.workers import Workers
from autobackup.host.claims import Claim, Claims
from autobackup.host.libvirt_events import DomainEvent, LibvirtLink
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import InstanceId, InstanceRecord, JobState, VerdictKind
from autobackup.rules import policy
from autobackup.rules.policy import Rulebook
from autobackup.rules.termination import Domain, Facts, Place, Verdict, decide, ordered

_log = logs.get("flows.capture")
_FIRST_LOOK_AGAIN_S = 1.0


class Order(enum.StrEnum):
    """What an operator may say of a candidate that nobody else can decide."""

    TAKE = "take"  # sealed and proven as if terminated, but never overwritten: nobody has said that it was
    LET_GO = "let-go"


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What this process remembers of one instance; all of it can be lost."""

    changed_at_s: float  # monotonic: the last event or change
    look_at_s: float  # monotonic: when to look
    undecided_since_s: float | None = None
    looks: int = 0
    reason: str = ""
    word_since_s: float = 0.0  # monotonic: an older word of Nova's is none
    asked_for_owner_s: float = 0.0  # monotonic: when its owner's words were last asked for
    order: Order | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fate:
    """What becomes of one root disk, before anything is done about it."""

    root: Claim
    files: tuple[Claim, ...]  # *root*, and what goes with it
    record: InstanceRecord
    facts: Facts
    verdict: Verdict
    plan: policy.Plan | None
    is_wanted: bool
    waits: bool


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
        book: Rulebook,
        inquiry: Inquiry | None,
        settings: CaptureSection,
        evidence: Evidence,
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
        self._book = book
        self._inquiry = inquiry
        self._settings = settings
        self._evidence = evidence
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

    def order(self, instance: InstanceId, order: Order) -> None:
        """Decide what waits undecided, at the next look. `Refused` if it does not."""
        seen = self._seen.get(instance)
        if seen is None or seen.undecided_since_s is None:
            raise Refused(f"instance {instance} does not wait undecided; autobackup queue shows what does")
        _log.warning("verdict.ordered", instance=instance, order=order, was=seen.reason)
        seen.order = order
        self._note(instance, is_change=False)

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
        # what is done with one disk changes what the others look like: all are judged first
        fates = [await self._fate(root, claims, record, answer.domain, seen) for root in roots]
        waiting = [fate.verdict for fate in fates if await self._waits(fate)]
        if roots and answer.domain is Domain.ACTIVE:
            self._ask_for_owner(record, seen)
        if waiting:
            first = waiting[0]
            self._look_again(instance, seen, first.reason, first.look_again_s, asks_nova=first.asks_nova)
        else:
            seen.undecided_since_s, seen.looks, seen.reason, seen.order = None, 0, "", None
        if not await self._held(instance):
            self._seen.pop(instance, None)
            if self._inquiry is not None:
                self._inquiry.forget(instance)
            await self._learn.forget(instance)

    async def _fate(
        self, root: Claim, claims: Sequence[Claim], record: InstanceRecord, domain: Domain, seen: _Seen
    ) -> _Fate:
        """What becomes of one root disk. Does nothing yet, but for a question to Nova."""
        quiet_s, roots = time.monotonic() - seen.changed_at_s, [claim for claim in claims if claim.is_root]
        files = await self._workers.blocking(partial(self._evidence.of_one_fate, root, claims, record))
        facts = await self._workers.blocking(
            partial(self._evidence.facts, root, roots, record, domain, quiet_s=quiet_s)
        )
        disk_bytes = self._claims.occupied_bytes(root)
        is_wanted = policy.may_be_wanted(record, self._book, disk_bytes=disk_bytes)
        verdict, plan = decide(facts), None
        if verdict.asks_nova and is_wanted and self._inquiry is not None:
            word = self._inquiry.word(root.instance, since_s=max(seen.changed_at_s, seen.word_since_s))
            verdict = decide(replace(facts, nova=word))
        if verdict.kind is VerdictKind.UNDECIDED and seen.order is not None:
            verdict = ordered(facts, verdict, take=seen.order is Order.TAKE)
        if verdict.occasion is not None:
            plan = policy.plan(record, self._book, occasion=verdict.occasion, disk_bytes=disk_bytes)
        waits = verdict.kind is VerdictKind.UNDECIDED and plan is None and seen.order is not Order.LET_GO
        if plan is not None and not plan.settled:
            waits, reason = True, f"{verdict.reason}; the project that its owner names has not been asked yet"
            verdict = Verdict(kind=VerdictKind.UNDECIDED, reason=reason)
            if self._inquiry is not None:
                self._inquiry.refresh_soon()
        return _Fate(
            root=root, files=files, record=record, facts=facts, is_wanted=is_wanted, verdict=verdict, plan=plan,
            waits=waits,
        )  # fmt: skip

    async def _waits(self, fate: _Fate) -> bool:
        """Do what follows from a verdict; True where it is to be waited for."""
        held = await self._held(fate.root.instance)  # as they are after what was done with another root disk
        files = [claim for claim in fate.files if claim in held]
        if fate.root not in files:
            return False  # somebody removed it from the spool meanwhile
        if fate.verdict.kind is VerdictKind.ALIVE:
            await self._release_replaced(fate.facts, held)
        elif not fate.is_wanted:
            if fate.facts.link_count == 1 and fate.facts.domain is not Domain.UNKNOWN:
                await self._let_go(files, "no rule wants it")
        elif fate.waits:
            return True
        else:
            await self._settle(fate, files)
        return False

    def _ask_for_owner(self, record: InstanceRecord, seen: _Seen) -> None:
        """What its owner says of it must be known before it dies."""
        is_unheard = record.server.properties is None and seen.asked_for_owner_s < seen.changed_at_s
        if self._inquiry is not None and is_unheard:
            seen.asked_for_owner_s = time.monotonic()
            self._inquiry.refresh_soon()

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

    def _look_again(
        self, instance: InstanceId, seen: _Seen, reason: str, soon_s: float | None, *, asks_nova: bool = False
    ) -> None:
        now_s = time.monotonic()
        if asks_nova and seen.reason:
            reason = seen.reason  # until the newer word is there, the older one's
        if reason != seen.reason:
            _log.info("verdict.waits", instance=instance, reason=reason)
        if seen.undecided_since_s is None:
            seen.undecided_since_s = now_s
        seen.looks += 1
        seen.reason = reason
        if soon_s is None and not asks_nova:
            seen.word_since_s = now_s  # what Nova said is used up: the next look asks anew
        back_off_s = min(self._settings.undecided_longest_s, _FIRST_LOOK_AGAIN_S * 2.0 ** min(seen.looks, 16))
        seen.look_at_s = min(seen.look_at_s, now_s + (soon_s if soon_s is not None else back_off_s))

    # ---- consequences -----------------------------------------------------------------------------------

    async def _settle(self, fate: _Fate, files: Sequence[Claim]) -> None:
        """A verdict that ends the waiting: a job, or our links go, since no rule wants the disk on this occasion."""
        root, verdict = fate.root, fate.verdict
        self._metrics.verdicts.labels(verdict=verdict.kind.value).inc()
        _log.info(
            "verdict.reached", instance=root.instance, inode=root.inode, verdict=verdict.kind, reason=verdict.reason
        )
        if fate.plan is not None:
            await self._queue(fate.record, files, verdict, fate.plan)
        else:
            await self._let_go(files, verdict.reason)

    async def _queue(self, record: InstanceRecord, files: Sequence[Claim], verdict: Verdict, plan: policy.Plan) -> None:
        # until an operator has decided, nothing is let go
        wanted = [one for one in files if not plan.certain or kind_of(one.disk) in (None, *plan.disks)]
        try:
            job = await self._workers.blocking(
                partial(new_job, record, wanted, self._claims, verdict, plan, self._spool.instances_path, self._clock())
            )
        except Damaged as exc:
            raise SpoolUnavailable(f"{files[0].name}: {exc}; looked at again") from exc
        job = replace(job, not_captured={**job.not_captured, **self._learn.not_captured(record.instance)})
        if not plan.certain:
            reason = f"it cannot be told whether it is wanted: {plan.missing}"
            job = replace(job, state=JobState.PARKED, last_error=reason)
        await self._jobs.create(job)
        _log.info("job.queued", job=job.job, instance=job.instance, rule=plan.rule, files=[f.link for f in job.files])
        await self._let_go([claim for claim in files if claim not in wanted], f"rule {plan.rule!r} leaves it out")
        if not plan.certain:
            _log.error("job.parked", job=job.job, instance=job.instance, error=job.last_error)
        self._on_queued()

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
            if self._spool.is_held_by_job(claim.inode):
                continue  # it is the job's, whatever an older list says
            await self._workers.blocking(partial(self._claims.release, claim))  # frees the blocks of a large disk
            _log.info("claim.released", instance=claim.instance, disk=claim.disk, inode=claim.inode, reason=reason)
        self._metrics.claims.set(self._claims.count())
