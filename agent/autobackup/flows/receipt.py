"""
The receipt: what was captured, sent, proven and scrubbed, for whoever asks a year later.

One JSON document per job, written before the job's folder goes. It holds no key and no cleartext; the member
digests in it are those sealed inside the bundle, so a restored disk can be compared with it by `sha256sum`.
"""

import json
from dataclasses import asdict

from autobackup.model import CopyState, JobRecord, JobState


def receipt(job: JobRecord) -> bytes:
    """The receipt of *job* as it stands."""
    return (
        json.dumps(
            {
                "receipt": 1,
                "job": job.job,
                "instance": job.instance,
                "instance_name": job.source.name,
                "outcome": _outcome(job),
                "verdict": job.verdict,
                "verdict_reason": job.verdict_reason,
                "occasion": job.occasion,
                "rule": job.rule,
                "terminated_at_s": job.created_at_s,
                "finished_at_s": job.updated_at_s,
                "captured": [
                    {
                        "disk": held.disk,
                        "source_path": held.source_path,
                        "format": held.format,
                        "inode": held.identity.inode,
                        "size_bytes": held.identity.size_bytes,
                        "mtime_ns": held.identity.mtime_ns,
                    }
                    for held in job.files
                ],
                "member_sha256": dict(job.member_digests),
                "not_captured": dict(job.not_captured),
                "copies": [
                    {
                        "destination": copy.destination,
                        "state": copy.state,
                        "verified_at_s": copy.verified_at_s,
                        "attempt": asdict(copy.attempt) if copy.attempt else None,
                        "request": asdict(copy.request) if copy.request else None,
                        "parents": [asdict(anchor) for anchor in copy.anchors],
                        "left_in_store": copy.obsolete,
                    }
                    for copy in job.copies
                ],
                "scrub": {
                    "method": job.scrub_method,
                    "scrubbed": job.state is JobState.SCRUBBED,
                    "still_named": job.still_named,
                },
            },
            indent=1,
        ).encode()
        + b"\n"
    )


def why_not_scrubbed(job: JobRecord) -> str:
    """Why the disks of a job that is kept are not overwritten: only a terminated instance's are (invariant 2)."""
    if job.still_named:
        return f"still named {', '.join(job.still_named)}"
    return f"its verdict is {job.verdict}; unlinked, as Nova had done"


def _outcome(job: JobRecord) -> str:
    match job.state:
        case JobState.SCRUBBED:
            return f"verified in {_where(job)}, then scrubbed ({job.scrub_method})"
        case JobState.KEPT:
            return f"verified, not scrubbed: {why_not_scrubbed(job)}"
        case JobState.DISCARDED:
            return f"discarded by an operator; {job.last_error or 'it was never verified'}"
        case _:
            return job.state


def _where(job: JobRecord) -> str:
    without = [copy.destination for copy in job.copies if copy.state is CopyState.DISCARDED]
    return f"every destination but {', '.join(without)} (discarded by an operator)" if without else "every destination"
