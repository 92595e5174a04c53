"""
The sending half of a job: one read of its disks for every destination that is due, then a proof of each copy.

An attempt is journaled before its store hears of it, with nothing in it that could open it; it is made with a key,
a salt and a nonce prefix drawn for it alone, and none of them outlives it here (invariant 6). A stream that was
cut off is never resumed: its attempt becomes obsolete, is deleted from the store once that answers, and the copy is
sent anew. What a copy stands on is kept before it is sent (`flows.secure`), and looked at again when it is proven.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from autobackup import logs
from autobackup.config import RetrySection
from autobackup.container import header as container_header
from autobackup.container.header import HEADER_BYTES, Header
from autobackup.container.manifest import ParentEntry
from autobackup.container.seal import NONCE_PREFIX_BYTES, SALT_BYTES, sealed_bytes
from autobackup.errors import (
    AutobackupError,
    OverlayChanged,
    Refused,
    StoreRefused,
    StoreUnavailable,
    Transient,
)
from autobackup.flows.ancestry import Ancestry, Base
from autobackup.flows.attempt import attempt_header, attempt_properties
from autobackup.flows.copies import Copies, copy_of, obsolete
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.gather import gather
from autobackup.flows.jobs import Jobs
from autobackup.flows.pacing import Pace
from autobackup.flows.prove import Prove
from autobackup.flows.secure import Secure, Secured, parent_entries
from autobackup.flows.tap import FanoutLimits, Outlet, Tap
from autobackup.flows.workers import Workers
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import (
    AttemptId,
    AttemptRecord,
    CopyRecord,
    CopyState,
    DestinationName,
    JobRecord,
)
from autobackup.rules.lifecycle import CopyEvent
from autobackup.stores import DataKey, OpenDestination

_log = logs.get("flows.send")


class Send:
    """
    Sends and proves copies; changes their states and nothing else.

    *places* opens the destination of a copy, and raises `Refused` for one that is no longer in the configuration.
    """

    def __init__(
        self,
        *,
        jobs: Jobs,
        spool: Spool,
        places: Callable[[CopyRecord], OpenDestination],
        ancestry: Ancestry,
        secure: Secure,
        pace: Pace,
        limits: FanoutLimits,
        retry: RetrySection,
        workers: Workers,
        metrics: Metrics,
        host: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._spool = spool
        self._places = places
        self._ancestry = ancestry
        self._secure = secure
        self._pace = pace
        self._limits = limits
        self._workers = workers
        self._metrics = metrics
        self._host = host
        self._clock = clock
        self._journaling = asyncio.Lock()
        self._copies = Copies(
            jobs=jobs, places=places, retry=retry, late_after_s=limits.detach_after_s, metrics=metrics, clock=clock
        )
        self._prove = Prove(
            jobs=jobs, copies=self._copies, places=places, secure=secure, workers=workers, metrics=metrics, clock=clock
        )

    async def resume(self, record: JobRecord) -> JobRecord:
        """Copies that were being sent when the last process or step ended: cut off, to be sent anew."""
        cut = {c.destination: c for c in record.copies if c.state is CopyState.SENDING}
        if not cut:
            return record
        changes = {name: obsolete(copy) for name, copy in cut.items()}
        return await self._jobs.move_copies(record.job, dict.fromkeys(cut, CopyEvent.INTERRUPTED), changes)

    async def outdate(self, record: JobRecord) -> JobRecord:
        """The disk changed after these copies were read: none of them is the last state."""
        record = await self.resume(record)
        old = {c.destination: c for c in record.copies if c.state in (CopyState.SENT, CopyState.VERIFIED)}
        if not old:
            return record
        changes = {name: obsolete(copy) | {"verified_at_s": None} for name, copy in old.items()}
        return await self._jobs.move_copies(record.job, dict.fromkeys(old, CopyEvent.OUTDATED), changes)

    async def send(self, record: JobRecord, due: Sequence[DestinationName]) -> JobRecord:
        """
        Read the job's disks once and send them to every destination of *due* that can take them now.

        Raises what stands against reading (`DiskBusy`, `OverlayChanged`, `Refused`); what stands against one
        destination becomes that copy's own failure.
        """
        record = await self._copies.sweep(record, due)
        ready = [c.destination for c in record.copies if c.destination in due and c.not_before_s <= self._clock()]
        bases = await self._ancestry.of(record) if ready else ()
        record, secured = await self._kept(record, ready, bases)
        if not secured:
            return record
        images = {path: image for one in secured.values() for path, image in one.images.items()}
        parents = parent_entries(bases, images)
        with ExitStack() as disks:
            fixed_length = self._limits.zstd_level is None
            gathered = await self._workers.blocking(
                partial(
                    gather, record, self._spool, self._host, disks, fixed_length=fixed_length, parents=parents,
                    lost_bases={base.link.path: base.why for base in bases if base.why},
                )
            )  # fmt: skip
            if any(not now.same_content(record.first_read.get(link, now)) for link, now in gathered.first_read.items()):
                raise OverlayChanged(f"job {record.job}: its disks changed between two reads")
            record = await self._jobs.update(
                record.job, first_read=gathered.first_read, not_captured=gathered.not_captured
            )
            announced_bytes = None
            if fixed_length:
                stored_bytes = await self._workers.blocking(gathered.contents.stored_bytes)
                announced_bytes = HEADER_BYTES + sealed_bytes(stored_bytes)
            record, outlets = await self._begin(record, secured, parents, announced_bytes)
            if not outlets:
                return record
            started_s = time.monotonic()
            outcomes = await fan_out(gathered.contents, outlets, self._limits)
            self._metrics.read_bytes.inc(gathered.contents.read_bytes)
            self._metrics.stage_duration.labels(stage="send").observe(time.monotonic() - started_s)
            contents = gathered.contents
        if any(isinstance(outcome, Sent) for outcome in outcomes.values()):
            record = await self._jobs.update(
                record.job,
                unreadable=record.unreadable or bool(contents.unreadable) or any(base.is_damaged for base in bases),
                member_digests={name: digest.sha256 for name, digest in contents.digests.items()},
            )
        record = await self._settle(record, outcomes, elapsed_s=time.monotonic() - started_s)
        changed = next((o for o in outcomes.values() if isinstance(o, OverlayChanged)), None)
        if changed is not None:
            raise changed
        return record

    async def prove(self, record: JobRecord) -> JobRecord:
        """Prove every copy that was sent, and delete what proven copies left behind in their stores."""
        return await self._prove.prove(record)

    async def outdate_orphans(self, record: JobRecord) -> bool:
        """
        Whether a proven copy lost what it stands on while others were on their way; it is to be sent anew then.

        Asked before the scrub: the host still holds the base.
        """
        orphans = {}
        for copy in record.copies:
            if copy.state is CopyState.VERIFIED:
                try:
                    await self._secure.require(self._places(copy), copy)
                except StoreRefused as exc:
                    orphans[copy.destination] = obsolete(copy) | {"verified_at_s": None, "last_error": str(exc)}
        if orphans:
            await self._jobs.move_copies(record.job, dict.fromkeys(orphans, CopyEvent.OUTDATED), orphans)
        return bool(orphans)

    # ---- before the read --------------------------------------------------------------------------------

    async def _kept(
        self, record: JobRecord, ready: Sequence[DestinationName], bases: tuple[Base, ...]
    ) -> tuple[JobRecord, dict[DestinationName, Secured]]:
        """
        Keep what the copies of *ready* stand on; those for which that worked.

        Where a base must be sent first, that waits until no other copy does: they go now, and it by the next read.
        """
        questions = {name: self._secured(record, name, bases, journal=False) for name in ready}
        answers = await self._copies.at_once(questions)
        secured = {name: answer for name, answer in answers.items() if isinstance(answer, Secured)}
        if not secured:
            waiting = [name for name, answer in answers.items() if answer is None]
            sent = await asyncio.gather(
                *(self._secured(record, name, bases, journal=True) for name in waiting), return_exceptions=True
            )
            for name, one in zip(waiting, sent, strict=True):
                if isinstance(one, BaseException) and not isinstance(one, AutobackupError):
                    raise one
                answers[name] = one
        for name, answer in answers.items():
            if isinstance(answer, Secured):
                secured[name] = answer
            if isinstance(answer, AutobackupError):
                self._copies.not_begun(record, name, answer)
                record = self._jobs.get(record.job)
                event = None if isinstance(answer, Transient) else CopyEvent.GAVE_UP
                record = await self._copies.failed(record, name, answer, event=event)
        return self._jobs.get(record.job), secured

    async def _secured(
        self, record: JobRecord, name: DestinationName, bases: tuple[Base, ...], *, journal: bool
    ) -> Secured | None:
        async def note(attempt: AttemptId | None) -> None:
            async with self._journaling:  # several destinations of one job may be sending bases
                await self._jobs.move_copies(record.job, {}, {name: {"base_attempt": attempt}})

        place = self._places(copy_of(record, name))
        found = await self._secure.secure(place, record.source, bases, journal=note if journal else None)
        if copy_of(self._jobs.get(record.job), name).base_attempt is not None:
            await note(None)
        return found

    async def _begin(
        self,
        record: JobRecord,
        secured: Mapping[DestinationName, Secured],
        parents: Sequence[ParentEntry],
        announced_bytes: int | None,
    ) -> tuple[JobRecord, list[Outlet]]:
        """Journal the attempts, draw their keys, and only then make the outlets."""
        attempts = {
            name: AttemptRecord(
                attempt=AttemptId(str(uuid.uuid4())),
                started_at_s=self._clock(),
                digest_algorithm=self._places(copy_of(record, name)).store.digest_algorithm,
            )
            for name in secured
        }
        record = await self._jobs.move_copies(
            record.job,
            dict.fromkeys(attempts, CopyEvent.STARTED),
            {name: {"attempt": attempt, "anchors": secured[name].anchors} for name, attempt in attempts.items()},
        )
        drawn = await self._copies.at_once(
            {name: self._places(copy_of(record, name)).keys.draw(one.attempt) for name, one in attempts.items()}
        )
        outlets = []
        for name, key in drawn.items():
            if isinstance(key, AutobackupError):
                self._copies.not_begun(record, name, key)
                event = CopyEvent.INTERRUPTED if isinstance(key, Transient) else CopyEvent.GAVE_UP
                record = await self._copies.failed(record, name, key, event=event)
            else:
                outlets.append(self._outlet(record, name, key, parents, announced_bytes))
        return record, outlets

    def _outlet(
        self,
        record: JobRecord,
        name: DestinationName,
        key: DataKey,
        parents: Sequence[ParentEntry],
        announced_bytes: int | None,
    ) -> Outlet:
        copy = copy_of(record, name)
        place, attempt = self._places(copy), copy.attempt
        assert attempt is not None
        header = attempt_header(
            record, place.destination, attempt, key.header_words, parents=parents, anchors=copy.anchors
        )
        return Outlet(
            destination=name,
            header=_encoded(header),
            key=key.key,
            salt=secrets.token_bytes(SALT_BYTES),
            nonce_prefix=secrets.token_bytes(NONCE_PREFIX_BYTES),
            digest_algorithm=attempt.digest_algorithm,
            announced_bytes=announced_bytes,
            send=partial(
                self._put,
                place,
                copy,
                attempt_properties(
                    record, header, host=self._host, agent_id=self._spool.agent_id, anchors=copy.anchors
                ),
            ),
        )

    async def _put(self, place: OpenDestination, copy: CopyRecord, properties: Mapping[str, str], tap: Tap) -> None:
        async def begun() -> None:
            try:  # now that whoever would let go of them can see it
                await self._secure.require(place, copy)
            except StoreRefused as exc:
                raise StoreUnavailable(str(exc)) from exc

        assert copy.attempt is not None
        body = self._pace.paced(tap, place.destination)
        await place.store.put(copy.attempt.attempt, body, properties=properties, begun=begun)

    # ---- after it ---------------------------------------------------------------------------------------

    async def _settle(
        self, record: JobRecord, outcomes: Mapping[DestinationName, Sent | AutobackupError], *, elapsed_s: float
    ) -> JobRecord:
        for name, outcome in outcomes.items():
            words: dict[str, Any] = {"outcome": "sent", "error": ""}
            if isinstance(outcome, Sent):
                attempt = copy_of(record, name).attempt
                assert attempt is not None
                attempt = replace(attempt, size_bytes=outcome.size_bytes, digest=outcome.digest)
                record = await self._jobs.move_copies(record.job, {name: CopyEvent.SENT}, {name: {"attempt": attempt}})
                self._metrics.sealed_bytes.labels(destination=name).inc(outcome.size_bytes)
                words["sent_bytes"] = outcome.size_bytes
            else:
                words = {"outcome": type(outcome).__name__, "error": str(outcome)}
                event = CopyEvent.GAVE_UP if isinstance(outcome, Refused) else CopyEvent.INTERRUPTED
                record = await self._copies.failed(record, name, outcome, event=event)
            self._metrics.stage_attempts.labels(stage="send", outcome=words["outcome"]).inc()
            say = _log.info if isinstance(outcome, Sent) else _log.warning
            say("send.attempt", job=record.job, instance=record.instance, destination=name,
                      elapsed_s=round(elapsed_s, 3), **words)  # fmt: skip
        return record


def _encoded(header: Header) -> bytes:
    try:
        return container_header.encode(header)
    except ValueError as exc:
        raise Refused(
            f"{exc}: so many recipients and backing files have no room together; name fewer recipients"
        ) from exc
