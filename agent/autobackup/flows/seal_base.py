"""
A base as a sealed bundle of its own: one for each destination, content and circle of readers, for all who stand on it.

It is found by what it holds, not by who sent it; what is found is read whole and compared once on each host before
anything stands on it, since whoever can write to the project could have put it there. Where it cannot be opened here
(recipients), only what this host sent itself counts.

Two hosts may send the same one at the same time. Both ask who was first afterwards, and the other takes its own back.
"""

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Final

from autobackup import logs
from autobackup.container import header as container_header
from autobackup.container.bundle import BASES
from autobackup.container.header import HEADER_BYTES
from autobackup.container.manifest import DiskEntry, Manifest
from autobackup.container.seal import NONCE_PREFIX_BYTES, SALT_BYTES, sealed_bytes
from autobackup.errors import AutobackupError, Damaged, KeyLost, OverlayChanged, Refused, StoreRefused, StoreUnavailable
from autobackup.flows.ancestry import Ancestry, Base
from autobackup.flows.attempt import base_header, base_properties
from autobackup.flows.contents import Contents, Member
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.pacing import Pace
from autobackup.flows.tap import FanoutLimits, Outlet
from autobackup.flows.verify import open_sealed, prove_copy, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId, AttemptRecord, DestinationName, JobId
from autobackup.stores import OpenDestination, Stored

_log = logs.get("flows.seal_base")
_CIRCLE_CHARS: Final = 16
Journal = Callable[[AttemptId], Awaitable[None]]


class SealBase:
    """Finds and sends sealed bases."""

    def __init__(
        self,
        *,
        ancestry: Ancestry,
        pace: Pace,
        limits: FanoutLimits,
        workers: Workers,
        host: str,
        agent_id: Callable[[], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ancestry = ancestry
        self._pace = pace
        self._limits = limits
        self._workers = workers
        self._host = host
        self._agent_id = agent_id
        self._clock = clock
        self._sending: dict[tuple[str, str], asyncio.Lock] = {}  # two jobs on one base: the second finds the first's

    async def find(self, place: OpenDestination, base: Base) -> AttemptId | None:
        """The sealed base that a backup in *place* may stand on."""
        for stored in await place.store.bases(await _content(place, base)):
            if await self._holds(place, stored, base):
                return stored.attempt
        return None

    async def send(self, place: OpenDestination, base: Base, *, journal: Journal) -> AttemptId:
        """Send *base* unless it is there by now. *journal* is told the attempt before the store hears of it."""
        key = (place.destination.name, await _content(place, base))
        async with self._sending.setdefault(key, asyncio.Lock()):
            found = await self.find(place, base)
            if found is None:
                ours = (await self._send(place, base, journal)).attempt
                found = await self._first(place, base, ours)
                if found != ours:
                    await take_back(place, ours)
        return found

    # ---- inside -----------------------------------------------------------------------------------------

    async def _first(self, place: OpenDestination, base: Base, ours: AttemptId) -> AttemptId:
        """Who was first, of *ours*, which was just proven, and what others sent at the same time."""
        for stored in await place.store.bases(await _content(place, base)):
            if stored.attempt == ours or await self._holds(place, stored, base):
                return stored.attempt
        return ours

    async def _holds(self, place: OpenDestination, stored: Stored, base: Base) -> bool:
        """Whether *stored* is *base*: remembered of an earlier look, or read whole now."""
        assert base.record is not None
        word = f"{stored.attempt}:{stored.size_bytes}:{stored.version}"
        if word in base.record.copies:
            return True
        try:
            sealed = await open_sealed(place.store, place.keys, stored.attempt, stored=stored)
            if sealed.header.attempt != stored.attempt:  # its key is the other's, and goes with that one
                raise Refused(f"is a copy of {sealed.header.attempt}")
            if sealed.header.key["source"] != place.destination.key:  # not for whom the destination's keys are
                raise Refused(f"is sealed by {sealed.header.key['source']}, not by {place.destination.key}")
            unpacked = await read_back(sealed, self._workers)
        except KeyLost:
            return False
        except (Damaged, Refused) as exc:
            _log.warning("base.mistrusted", destination=place.destination.name, base=stored.attempt, error=str(exc),
                         consequence="not used; another is sent")  # fmt: skip
            return False
        is_it = [unpacked.digests.members[entry.member].sha256 for entry in unpacked.manifest.bases] == [
            base.record.sha256
        ]
        if is_it:
            await self._ancestry.remember(base, copy=word)
        return is_it

    async def _send(self, place: OpenDestination, base: Base, journal: Journal) -> Stored:
        attempt = AttemptRecord(
            attempt=AttemptId(str(uuid.uuid4())),
            started_at_s=self._clock(),
            digest_algorithm=place.store.digest_algorithm,
        )
        await journal(attempt.attempt)
        key = await place.keys.draw(attempt.attempt)
        header = base_header(place.destination, attempt, key.header_words)
        properties = base_properties(
            base, header, host=self._host, agent_id=self._agent_id(), content=await _content(place, base)
        )
        assert base.record is not None
        member = BASES + base.record.sha256  # its path differs from host to host
        with ExitStack() as open_disks:
            disk = open_disks.enter_context(await self._workers.blocking(partial(self._ancestry.open, base)))
            contents = await self._workers.blocking(
                lambda: Contents(
                    manifest=_manifest(base, member, header, self._host),
                    members=[Member(name=member, disk=disk, first=disk.identity)],
                    health=(),
                    mtime_s=header.created_at_s,
                    fixed_length=self._limits.zstd_level is None,
                )
            )
            announced_bytes = None
            if self._limits.zstd_level is None:
                announced_bytes = HEADER_BYTES + sealed_bytes(await self._workers.blocking(contents.stored_bytes))
            outlet = Outlet(
                destination=DestinationName(place.destination.name),
                header=container_header.encode(header),
                key=key.key,
                salt=secrets.token_bytes(SALT_BYTES),
                nonce_prefix=secrets.token_bytes(NONCE_PREFIX_BYTES),
                digest_algorithm=attempt.digest_algorithm,
                announced_bytes=announced_bytes,
                send=lambda tap: place.store.put(
                    attempt.attempt, self._pace.paced(tap, place.destination), properties=properties
                ),
            )
            started_s = time.monotonic()
            [outcome] = (await fan_out(contents, [outlet], self._limits)).values()
        if isinstance(outcome, AutobackupError):
            raise outcome
        if contents.digests[member].sha256 != base.record.sha256:
            raise OverlayChanged(f"{base.link.path}: is not what it was when it was first read")
        try:
            stored = await self._proven(place, attempt, outcome, header.job)
        except (Damaged, StoreRefused, KeyLost) as exc:
            await take_back(place, attempt.attempt)
            raise StoreUnavailable(f"a base was sent and not proven; sent anew: {exc}") from exc
        await self._ancestry.remember(base, copy=f"{stored.attempt}:{stored.size_bytes}:{stored.version}")
        _log.info("base.sent", destination=place.destination.name, base=base.link.path, attempt=attempt.attempt,
                  sent_bytes=outcome.size_bytes, elapsed_s=round(time.monotonic() - started_s, 3))  # fmt: skip
        return stored

    async def _proven(self, place: OpenDestination, attempt: AttemptRecord, outcome: Sent, job: str) -> Stored:
        sent = AttemptRecord(
            attempt=attempt.attempt, started_at_s=attempt.started_at_s, size_bytes=outcome.size_bytes,
            digest=outcome.digest, digest_algorithm=attempt.digest_algorithm,
        )  # fmt: skip
        await prove_copy(
            store=place.store, keys=place.keys, job=JobId(job), sent=sent,
            readback=place.destination.verify == "readback", workers=self._workers,
        )  # fmt: skip
        await place.keys.settle(attempt.attempt)
        return await place.store.stat(attempt.attempt)


async def take_back(place: OpenDestination, attempt: AttemptId) -> None:
    """A base of ours that is not wanted, or not proven. Who has come to stand on it meanwhile keeps it."""
    await place.store.retire(attempt)
    if not await place.store.children(attempt):
        await place.keys.destroy(attempt)
        await place.store.delete(attempt)


async def _content(place: OpenDestination, base: Base) -> str:
    """What a sealed base holds, and who can read it: where both are the same, one is enough."""
    if base.record is None:
        raise StoreRefused(f"{base.link.path}: {base.why}")
    circle = f"{await place.keys.circle()}|{' '.join(sorted(place.destination.members))}"
    return f"{base.record.sha256}.{hashlib.sha256(circle.encode()).hexdigest()[:_CIRCLE_CHARS]}"


def _manifest(base: Base, member: str, header: container_header.Header, host: str) -> Manifest:
    assert base.record is not None
    identity, entry = base.record.identity, base.entry(image="", image_hash="")
    return Manifest(
        job=header.job,
        instance=header.instance,
        instance_name="",
        host=host,
        captured_at_s=header.created_at_s,
        verdict="",
        verdict_reason="a base that backups in this destination stand on; it was no instance's",
        disks=(),
        bases=(
            DiskEntry(
                name=entry.name, member=member, format=entry.format, size_bytes=identity.size_bytes,
                source_path=base.link.path, inode=identity.inode, mtime_ns=identity.mtime_ns, backing=None,
                backing_path=entry.backing_path, chain_source="libvirt",
            ),
        ),
        files=(),
        not_captured=(),
        facts={},
    )  # fmt: skip
