"""
What is known of each instance, kept while it lives: after a destroy nobody can tell any more.

A look-up of a living domain is merged into its record, its backing files are linked, its firmware state is claimed
where that is possible; where it is not, the reason goes into the manifest. Records are written when they change.
"""

import asyncio
import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from autobackup import logs
from autobackup.errors import Damaged, Refused
from autobackup.flows.jobs import Jobs
from autobackup.flows.queueing import chain_by_header
from autobackup.flows.workers import Workers
from autobackup.host.claims import Claims
from autobackup.host.domain_xml import merge, merge_server, read_domain
from autobackup.host.libvirt_events import DomainAnswer
from autobackup.host.spool import Spool
from autobackup.model import ChainLink, DiskSource, InstanceId, InstanceRecord, Request, ServerRecord
from autobackup.rules.termination import Domain, Place

_log = logs.get("flows.learn")
_WHY = {
    errno.EXDEV: "it lies on another mount than the spool, so it cannot be held past the undefine",
    errno.EPERM: "its filesystem makes no hard links",
    errno.ENOENT: "it was not there",
    errno.ELOOP: "its folder is a symbolic link",
}


class Learn:
    """The instance records, in memory and in the spool."""

    def __init__(
        self,
        *,
        claims: Claims,
        spool: Spool,
        jobs: Jobs,
        workers: Workers,
        swtpm_path: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = claims
        self._spool = spool
        self._jobs = jobs
        self._workers = workers
        self._swtpm_path = swtpm_path
        self._clock = clock
        self._records: dict[InstanceId, InstanceRecord] = {}
        self._missing: dict[InstanceId, dict[str, str]] = {}
        self._unwritten: set[InstanceId] = set()
        self._changing = asyncio.Lock()  # libvirt, Nova and owners all tell of the same record

    def load(self) -> None:
        self._records = {record.instance: record for record in self._spool.load_instances()}

    async def sweep(self) -> None:
        """What a crash left behind. Not while a disk is held of which, and so of whose bases, nothing is known yet."""
        if self._claims.instances() <= self._records.keys():
            await self.release_bases()

    def instances(self) -> list[InstanceId]:
        return list(self._records)

    def known(self, instance: InstanceId) -> InstanceRecord:
        return self._records.get(instance) or InstanceRecord(instance=instance)

    def not_captured(self, instance: InstanceId) -> dict[str, str]:
        """What of the instance's firmware state could not be held, and why."""
        return dict(self._missing.get(instance, {}))

    async def from_answer(self, instance: InstanceId, answer: DomainAnswer) -> InstanceRecord:
        """
        Merge what libvirt said, and what the folders show, into the record; journal it if that changed it.

        A domain whose root disk is not held here is none of ours: nothing of it is kept.
        """
        if not self.holds(instance):
            return self.known(instance)
        async with self._changing:
            known = self._records.get(instance)
            record = known or InstanceRecord(instance=instance)
            if answer.xml:
                try:
                    record = merge(known, read_domain(answer.xml))
                except Damaged as exc:
                    _log.warning("domain.unreadable", instance=instance, error=str(exc))
                record = replace(record, migrated_away=False)  # it is here
            has_domain = answer.domain in (Domain.ACTIVE, Domain.INACTIVE)
            record = await self._workers.blocking(partial(self._from_host, record, has_domain=has_domain))
            is_news = record != known and (answer.xml or known is not None or record.resized_inodes)
            if is_news or instance in self._unwritten:
                await self._keep(record)
            return record

    async def from_server(
        self,
        instance: InstanceId,
        told: ServerRecord,
        *,
        project: str,
        amend: Callable[[InstanceRecord], InstanceRecord],
    ) -> None:
        """Merge what OpenStack told of a server; *amend* adds, in the same write, what follows from it."""
        async with self._changing:
            known = self.known(instance)
            record = replace(
                known, server=merge_server(known.server, told), owner_project=project or known.owner_project
            )
            record = amend(record)
            if record != known and self.holds(instance):
                await self._keep(record)

    def holds(self, instance: InstanceId) -> bool:
        """Whether a root disk of *instance* is held here."""
        return any(claim.is_root for claim in self._claims.of(instance))

    def migrated_away(self, instance: InstanceId) -> None:
        """libvirt says that the domain left for another host."""
        self._records[instance] = replace(self.known(instance), migrated_away=True)
        self._unwritten.add(instance)

    def request(self, instance: InstanceId) -> Request | None:
        return self.known(instance).request

    async def set_request(self, instance: InstanceId, request: Request | None) -> None:
        """Keep the owner's wish for as long as the instance lives. `Refused` if no disk of it is held here."""
        if not self.holds(instance):
            raise Refused(f"no disk of instance {instance} is held on this host")
        async with self._changing:
            await self._keep(replace(self.known(instance), request=request))

    async def change_request(self, instance: InstanceId, known: Request, new: Request) -> bool:
        """Keep *new* where *known* still is: its owner may have said something else meanwhile, or it may be gone."""
        async with self._changing:
            record = self.known(instance)
            if record.request != known or not self.holds(instance):
                return False
            await self._keep(replace(record, request=new))
            return True

    async def forget(self, instance: InstanceId) -> None:
        """The instance is gone, and with it the last reason for its record and perhaps for its bases."""
        self._missing.pop(instance, None)
        if self._records.pop(instance, None) is not None:
            await self._workers.blocking(partial(self._spool.forget_instance, instance))
        await self.release_bases()

    def bases(self) -> list[ChainLink]:
        """Every backing file that a known instance stands on."""
        return [link for record in self._records.values() for disk in record.disks for link in disk.chain]

    async def release_bases(self) -> None:
        """Let go of every backing file that no instance and no job stands on."""
        async with self._changing:  # not while one is held for a record that is not there yet
            chains = self.bases() + [link for job in self._jobs.all() for link in job.bases]
            await self._workers.blocking(partial(self._spool.bases.release_all_but, chains))

    async def _keep(self, record: InstanceRecord) -> None:
        record = replace(record, updated_at_s=self._clock())
        await self._spool.write_instance(record)
        self._records[record.instance] = record
        self._unwritten.discard(record.instance)

    # ---- in a worker ------------------------------------------------------------------------------------

    def _from_host(self, record: InstanceRecord, *, has_domain: bool) -> InstanceRecord:
        record = self._with_inodes(record, has_domain=has_domain)
        record = replace(record, disks=tuple(self._with_chain(record, disk) for disk in record.disks))
        for disk in record.disks:
            for link in disk.chain:
                if not self._spool.bases.hold(link.path):
                    _log.debug("base.not_held", instance=record.instance, base=link.path)
        self._hold_firmware(record)
        return record

    def _with_inodes(self, record: InstanceRecord, *, has_domain: bool) -> InstanceRecord:
        """Which of the files that are held are the domain's now, and what became of the others."""
        places = {claim: self._claims.place(claim) for claim in self._claims.of(record.instance)}
        roots = {claim.inode: place for claim, place in places.items() if claim.is_root}
        others = {claim.inode for claim, place in places.items() if not claim.is_root and place is Place.INSTANCE}
        resized = {*record.resized_inodes, *(inode for inode, place in roots.items() if place is Place.RESIZE)}
        named = {inode for inode, place in roots.items() if place is Place.INSTANCE}
        root, reverted = record.root_inode, set(record.reverted_inodes)
        companions, outlived = set(record.companion_inodes), set(record.outlived_inodes)
        if has_domain and len(named) == 1:
            if root not in named:
                outlived |= companions
                if named <= resized:
                    reverted.add(root)  # an older one came back: a resize was undone
                companions = set()
            [root] = named
            companions |= others
            outlived -= others
        held = {claim.inode for claim in places}
        return replace(
            record,
            root_inode=root,
            resized_inodes=tuple(sorted(resized & held - {root} if root in named else resized & held)),
            reverted_inodes=tuple(sorted(reverted & held - {root})),
            companion_inodes=tuple(sorted(companions & held)),
            outlived_inodes=tuple(sorted(outlived & held)),
        )

    def _with_chain(self, record: InstanceRecord, disk: DiskSource) -> DiskSource:
        """A stopped domain's XML has no chain: then, and only then, the overlay's header is asked."""
        if disk.chain_source != "none" or disk.format != "qcow2":
            return disk
        claim = next((c for c in self._claims.of(record.instance) if c.disk == os.path.basename(disk.path)), None)
        if claim is None:
            return disk
        try:
            fd = os.open(self._claims.path(claim), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return disk
        try:
            chain = chain_by_header(fd, disk.format, self._spool.instances_path)
        finally:
            os.close(fd)
        return replace(disk, chain=chain, chain_source="header") if chain else disk

    def _hold_firmware(self, record: InstanceRecord) -> None:
        missing: dict[str, str] = {}
        if record.nvram_path:
            self._hold_outside(record.instance, "nvram", record.nvram_path, missing)
        if record.tpm:
            folder = os.path.join(self._swtpm_path, record.instance, "tpm2")
            try:
                names = [name for name in os.listdir(folder) if not name.startswith(".")]
            except OSError as exc:
                if not any(claim.disk.startswith("swtpm.") for claim in self._claims.of(record.instance)):
                    missing["swtpm"] = f"{folder}: {_WHY.get(exc.errno or 0, exc.strerror)}"
            else:
                for name in names:
                    self._hold_outside(record.instance, f"swtpm.{name}", os.path.join(folder, name), missing)
        if missing or record.instance in self._missing:
            self._missing[record.instance] = missing

    def _hold_outside(self, instance: InstanceId, disk: str, path: str, missing: dict[str, str]) -> None:
        try:
            self._claims.claim_outside(instance, disk, path)
        except OSError as exc:
            held = any(claim.disk == disk for claim in self._claims.of(instance))
            if not held:
                missing[disk] = f"{path}: {_WHY.get(exc.errno or 0, exc.strerror)}"
