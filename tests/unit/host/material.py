"""A job in `scrubbing` over real files, and a spool's folder of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from autobackup.host.disks import HeldDisk
from autobackup.model import (
    AttemptId,
    AttemptRecord,
    CopyRecord,
    CopyState,
    DestinationName,
    HeldFile,
    InstanceId,
    InstanceRecord,
    JobId,
    JobRecord,
    JobState,
    VerdictKind,
)

INSTANCE = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
OTHER = InstanceId("00000000-3c5f-4d62-9a57-0f8f0f0c1d2e")


def held_file(path: Path, disk: str = "disk") -> HeldFile:
    with HeldDisk(str(path)) as opened:
        return HeldFile(link=path.name, disk=disk, source_path=f"/nova/{disk}", format="raw", identity=opened.identity)


def job_of(files: Mapping[str, Path], *, state: JobState = JobState.SCRUBBING) -> JobRecord:
    """A job whose copies are proven, with every gate open that needs no machine."""
    return JobRecord(
        job=JobId("job-1"),
        instance=INSTANCE,
        state=state,
        verdict=VerdictKind.TERMINATED,
        verdict_reason="gone",
        rule="all",
        scrub_method="zero",
        created_at_s=1.0,
        updated_at_s=1.0,
        source=InstanceRecord(instance=INSTANCE),
        files=tuple(held_file(path, disk) for disk, path in files.items()),
        copies=(copy("one"), copy("two")),
    )


def copy(name: str, state: CopyState = CopyState.VERIFIED) -> CopyRecord:
    attempt = AttemptRecord(attempt=AttemptId(name), started_at_s=1.0, size_bytes=1, digest="00")
    return CopyRecord(destination=DestinationName(name), state=state, attempt=attempt, verified_at_s=1.0)


def with_copy_state(job: JobRecord, state: CopyState) -> JobRecord:
    return replace(job, copies=(job.copies[0], replace(job.copies[1], state=state)))
