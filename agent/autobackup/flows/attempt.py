"""
What one attempt says of itself: in the header of its sealed bundle, and in its store.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from autobackup.container.header import NO_INSTANCE, Header
from autobackup.container.manifest import ParentEntry
from autobackup.flows.ancestry import Base
from autobackup.model import Anchor, AttemptRecord, JobRecord
from autobackup.rules.lineage import header_words
from autobackup.stores import BASE, KIND, KIND_BASE, PARENTS
from autobackup.terms import Destination

_FORMAT: Final = "1"


def attempt_header(
    record: JobRecord,
    destination: Destination,
    attempt: AttemptRecord,
    key_words: Mapping[str, str],
    *,
    parents: Sequence[ParentEntry],
    anchors: Sequence[Anchor],
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
        parent=header_words([one.path for one in parents], parents[0].image if parents else "", anchors),
    )


def base_header(destination: Destination, attempt: AttemptRecord, key_words: Mapping[str, str]) -> Header:
    """As `attempt_header`, for a sealed base: no instance's, and kept for as long as something stands on it."""
    return Header(
        job=attempt.attempt,
        attempt=attempt.attempt,
        instance=NO_INSTANCE,
        destination=destination.name,
        created_at_s=int(attempt.started_at_s),
        expires_at_s=None,
        key=key_words,
        parent=None,
    )


def attempt_properties(
    record: JobRecord, header: Header, *, host: str, agent_id: str, anchors: Sequence[Anchor]
) -> dict[str, str]:
    """What the store shows beside the sealed bundle. For people and lists; whoever decides reads the header."""
    words = {
        "autobackup_format": _FORMAT,
        "autobackup_job": record.job,
        "autobackup_instance": record.instance,
        "autobackup_instance_name": record.source.name,
        **_of_header(header, host=host, agent_id=agent_id),
    }
    if anchors:
        words |= {
            "autobackup_parent": anchors[0].parent,
            PARENTS: " ".join(dict.fromkeys(anchor.parent for anchor in anchors)),
        }
    return words


def base_properties(base: Base, header: Header, *, host: str, agent_id: str, content: str) -> dict[str, str]:
    """As `attempt_properties`, for a sealed base; *content* is what it is found by."""
    return {
        "autobackup_format": _FORMAT,
        KIND: KIND_BASE,
        BASE: content,
        "autobackup_instance_name": f"base {base.link.path.rpartition('/')[2]}",
        **_of_header(header, host=host, agent_id=agent_id),
    }


def _of_header(header: Header, *, host: str, agent_id: str) -> dict[str, str]:
    return {
        "autobackup_destination": header.destination,
        "autobackup_host": host,
        "autobackup_agent": agent_id,
        "autobackup_created_at": str(header.created_at_s),
        "autobackup_expires_at": "" if header.expires_at_s is None else str(header.expires_at_s),
        "autobackup_key_source": header.key["source"],
        "autobackup_key_ref": header.key.get("secret", ""),
    }
