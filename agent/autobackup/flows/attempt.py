"""
What one attempt says of itself: in the header of its sealed bundle, and in its store.
"""

from collections.abc import Mapping
from typing import Final

from autobackup.container.header import Header
from autobackup.model import AttemptRecord, JobRecord
from autobackup.terms import Destination

_FORMAT: Final = "1"


def attempt_header(
    record: JobRecord, destination: Destination, attempt: AttemptRecord, key_words: Mapping[str, str]
) -> Header:
    """What its sealed bundle says of itself in plaintext."""
    created_at_s = int(attempt.started_at_s)
    retention_s = destination.retention_s
    return Header(
        job=record.job,
        attempt=attempt.attempt,
        instance=record.instance,
        destination=destination.name,
        created_at_s=created_at_s,
        expires_at_s=None if retention_s is None else created_at_s + int(retention_s),
        key=key_words,
        parent=None,
    )


def attempt_properties(record: JobRecord, header: Header, *, host: str, agent_id: str) -> dict[str, str]:
    """What the store shows beside the sealed bundle. For people and lists; whoever decides reads the header."""
    return {
        "autobackup_format": _FORMAT,
        "autobackup_job": record.job,
        "autobackup_instance": record.instance,
        "autobackup_instance_name": record.source.name,
        "autobackup_destination": header.destination,
        "autobackup_host": host,
        "autobackup_agent": agent_id,
        "autobackup_created_at": str(header.created_at_s),
        "autobackup_expires_at": "" if header.expires_at_s is None else str(header.expires_at_s),
        "autobackup_key_source": header.key["source"],
        "autobackup_key_ref": header.key.get("secret", ""),
    }
