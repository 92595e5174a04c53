"""
Before the read: open what a job holds, make sure that nobody else has it open, and write down what is there.

Everything is opened once and stays open until the read has ended. Formats and chains are the hypervisor's word; a
qcow2 header is compared with it and nothing in it is followed (invariant 5). What cannot be captured is named in
the manifest with the reason; it never stops the rest.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast

from autobackup.container.bundle import BASES, CONSOLE_LOG, DISKS, DOMAIN_XML, NVRAM, SWTPM
from autobackup.container.manifest import DiskEntry, FileEntry, Health, Manifest, NotCaptured, ParentEntry
from autobackup.errors import Refused
from autobackup.flows.contents import Contents, Member
from autobackup.host import qcow2, qemu_img
from autobackup.host.bases import short_name
from autobackup.host.disks import HeldDisk
from autobackup.host.spool import Spool
from autobackup.model import DiskIdentity, HeldFile, JobRecord

_Format = Literal["qcow2", "raw", "unknown"]
_FORMATS = frozenset({"qcow2", "raw"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What is about to be read. The disks are open for as long as the caller's stack."""

    contents: Contents
    first_read: Mapping[str, DiskIdentity]
    not_captured: Mapping[str, str]


def gather(
    job: JobRecord,
    spool: Spool,
    host: str,
    open_disks: ExitStack,
    *,
    fixed_length: bool,
    parents: Sequence[ParentEntry],
    lost_bases: Mapping[str, str],
) -> Gathered:
    """
    Open the disks of *job* and describe them; *parents*, which they stand on, lie elsewhere. Blocks: a worker's call.

    Raises `DiskBusy` if somebody has one open, `Refused` if a link is not the inode that was claimed.
    """
    missing = dict(job.not_captured) | {BASES + short_name(path): why for path, why in lost_bases.items()}
    disks: list[tuple[DiskEntry, HeldDisk]] = []
    files: list[tuple[FileEntry, HeldDisk]] = []
    health: list[Health] = []
    first_read: dict[str, DiskIdentity] = {}
    names = member_names(job.files)
    for held in job.files:
        disk = open_disks.enter_context(_open_own(os.path.join(spool.job_folder(job.job), held.link), held))
        first_read[held.link] = disk.identity
        member = names[held.link]
        if member.startswith(DISKS):
            disks.append((_entry(held, member, disk), disk))
            if held.format == "qcow2":
                health.append(_health(held, member, disk))
        else:
            files.append(
                (FileEntry(member=member, size_bytes=disk.identity.size_bytes, source_path=held.source_path), disk)
            )
    xml = job.source.domain_xml.encode()
    if not xml:
        missing[DOMAIN_XML] = "the domain was gone before its XML could be read"
    manifest = Manifest(
        format="autobackup-bundle/2" if parents else "autobackup-bundle/1",
        job=job.job,
        instance=job.instance,
        instance_name=job.source.name,
        host=host,
        captured_at_s=int(job.created_at_s),
        verdict=job.verdict,
        verdict_reason=job.verdict_reason,
        disks=tuple(entry for entry, _ in disks),
        bases=(),
        files=(
            *((FileEntry(member=DOMAIN_XML, size_bytes=len(xml), source_path=""),) if xml else ()),
            *(entry for entry, _ in files),
        ),
        not_captured=tuple(NotCaptured(what=what, why=why) for what, why in sorted(missing.items())),
        facts={
            "libvirt_name": job.source.libvirt_name,
            "owner_project": job.source.owner_project,
            "owner_user": job.source.server.user,
            "flavor": job.source.server.flavor,
            "image": job.source.server.image,
            "rule": job.rule,
            "occasion": job.occasion,
        },
        parents=tuple(parents),
    )
    members = [
        *((Member(name=DOMAIN_XML, data=xml),) if xml else ()),
        *(Member(name=entry.member, disk=disk, first=disk.identity) for entry, disk in disks),
        *(Member(name=file.member, disk=disk, first=disk.identity) for file, disk in files),
    ]
    try:
        manifest.encode()
    except ValueError as exc:
        raise Refused(f"job {job.job}: what is known of its instance does not fit into a manifest: {exc}") from exc
    contents = Contents(
        manifest=manifest, members=members, health=health, mtime_s=int(job.created_at_s), fixed_length=fixed_length
    )
    return Gathered(contents=contents, first_read=first_read, not_captured=missing)


def member_names(files: Sequence[HeldFile]) -> dict[str, str]:
    """
    Link -> member of the bundle.

    An instance can leave two inodes of one name behind (a config drive that was made anew): the one that was
    written last has the plain name, an older one carries its inode.
    """
    latest = {held.disk: held for held in sorted(files, key=lambda held: held.identity.mtime_ns)}
    return {
        held.link: _member_name(held.disk, "" if latest[held.disk] is held else f".{held.identity.inode}")
        for held in files
    }


def _member_name(disk: str, suffix: str) -> str:
    if disk == CONSOLE_LOG and not suffix:
        return CONSOLE_LOG
    if disk == "nvram":
        return f"{NVRAM}nvram{suffix}"
    if disk.startswith("swtpm."):
        return SWTPM + disk.removeprefix("swtpm.") + suffix
    return DISKS + disk + suffix


def _open_own(path: str, held: HeldFile) -> HeldDisk:
    if not os.path.lexists(path):
        raise Refused(f"{path}: the job's link is gone; somebody removed it from the spool")
    disk = HeldDisk(path)
    try:
        if not disk.identity.same_inode(held.identity):
            raise Refused(f"{path}: is not the inode that was claimed ({held.identity.inode})")
        disk.require_idle()
    except BaseException:
        disk.close()
        raise
    return disk


def _entry(held: HeldFile, member: str, disk: HeldDisk) -> DiskEntry:
    return DiskEntry(
        name=held.disk,
        member=member,
        format=_format(held.format),
        size_bytes=disk.identity.size_bytes,
        source_path=held.source_path,
        inode=disk.identity.inode,
        mtime_ns=disk.identity.mtime_ns,
        backing=None,
        backing_path=held.chain[0].path if held.chain else None,
        chain_source=cast(Literal["libvirt", "header", "none"], held.chain_source),
    )


def _health(held: HeldFile, member: str, disk: HeldDisk) -> Health:
    mistrusted = qcow2.mistrust(qcow2.read_head(disk.fd), chain=held.chain, chain_source=held.chain_source)
    return qemu_img.check(disk.path, member=member, mistrusted=mistrusted)


def _format(name: str) -> _Format:
    return cast(_Format, name) if name in _FORMATS else "unknown"
