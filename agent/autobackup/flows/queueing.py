"""
A new job: the record that says what is held, where it goes and why. Nothing is sent here.
"""

import os
import uuid
from collections.abc import Mapping, Sequence

from autobackup.errors import Damaged
from autobackup.host import qcow2
from autobackup.host.claims import Claim, Claims
from autobackup.host.disks import HeldDisk
from autobackup.model import (
    ROOT_DISK,
    ChainLink,
    CopyRecord,
    DiskKind,
    DiskSource,
    HeldFile,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    Occasion,
)
from autobackup.qcow2.header import parse_header
from autobackup.rules.policy import Plan
from autobackup.rules.termination import Verdict


def new_job(
    record: InstanceRecord,
    held_claims: Sequence[Claim],
    claims: Claims,
    verdict: Verdict,
    plan: Plan,
    instances_path: str,
    now_s: float,
) -> JobRecord:
    """The job for *held_claims*, the root disk first. Blocks: it opens each once. Raises `Damaged` if one is gone."""
    sources = {os.path.basename(disk.path): disk for disk in record.disks}
    files = tuple(_held_file(claim, claims, record, sources, instances_path) for claim in held_claims)
    return JobRecord(
        job=JobId(str(uuid.uuid4())),
        instance=record.instance,
        state=JobState.QUEUED,
        verdict=verdict.kind,
        verdict_reason=verdict.reason,
        occasion=verdict.occasion or Occasion.TERMINATE,
        rule=plan.rule,
        scrub_method=plan.scrub_method,
        created_at_s=now_s,
        updated_at_s=now_s,
        source=record,
        files=files,
        copies=tuple(
            CopyRecord(destination=copy.destination, request=copy.request, retention_s=copy.retention_s)
            for copy in plan.copies
        ),
        not_captured=_unknown_formats(files),
    )


def kind_of(disk: str) -> DiskKind | None:
    """What a rule calls a file of an instance; None: what comes with any of them."""
    name = disk.removeprefix("disk.")
    if name == "swap":
        return DiskKind.SWAP
    if name == "config":
        return DiskKind.CONFIG_DRIVE
    if name == "local" or name.startswith("eph"):
        return DiskKind.EPHEMERAL
    return DiskKind.ROOT if disk == ROOT_DISK else None


def chain_by_header(fd: int, format_name: str, instances_path: str) -> tuple[ChainLink, ...]:
    """
    The backing file that an overlay's own header names, taken only where the hypervisor's word is missing.

    Only for what libvirt called qcow2 (a guest cannot write such a header), and only for a file of Nova's image
    cache: anything else stays unknown.
    """
    if format_name != "qcow2":
        return ()
    try:
        header = parse_header(qcow2.read_head(fd))
    except Damaged:
        return ()
    path, cache = header.backing_path, os.path.join(instances_path, "_base")
    if path is None or header.has_data_file or os.path.dirname(path) != cache:
        return ()
    return (ChainLink(path=path, format=header.backing_format or "unknown"),)


def _held_file(
    claim: Claim, claims: Claims, record: InstanceRecord, sources: Mapping[str, DiskSource], instances_path: str
) -> HeldFile:
    source = sources.get(claim.disk) or DiskSource(
        path=_conventional_path(claim, record, instances_path), format=_conventional_format(claim)
    )
    with HeldDisk(claims.path(claim)) as disk:
        chain, chain_source = source.chain, source.chain_source
        if chain_source == "none":
            chain = chain_by_header(disk.fd, source.format, instances_path)
            chain_source = "header" if chain else "none"
        return HeldFile(
            link=claim.name,
            disk=claim.disk,
            source_path=source.path,
            format=source.format,
            chain=chain,
            chain_source=chain_source,
            identity=disk.identity,
        )


def _conventional_path(claim: Claim, record: InstanceRecord, instances_path: str) -> str:
    if claim.disk == "nvram" and record.nvram_path:
        return record.nvram_path
    return os.path.join(instances_path, claim.instance, claim.disk)


def _conventional_format(claim: Claim) -> str:
    """What Nova always writes raw; for a disk that libvirt never named, nobody's word is to be had."""
    return "unknown" if claim.disk.startswith("disk") and claim.disk != "disk.config" else "raw"


def _unknown_formats(files: Sequence[HeldFile]) -> dict[str, str]:
    return {
        f"format of {held.disk}": "the domain was gone before libvirt could be asked; the bytes are captured"
        for held in files
        if held.format == "unknown"
    }
