"""
What an owner has asked for: words on a server, its image or its flavor in, a request within the operator's caps out.

    on a server   autobackup=true             autobackup_project=ID   autobackup_user=ID   autobackup_retention=30d
    elsewhere     autobackup:enabled=true     autobackup:project=ID   autobackup:user=ID   autobackup:retention=30d

A word that cannot be understood makes a request that is refused, with the reason for its owner to read: silence would
be taken for a yes. Whether a project has consented is not known here (`flows.requests`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from autobackup.model import InstanceRecord, Request, RequestSource
from autobackup.terms import RequestSection
from autobackup.units import format_duration, parse_duration_s

_PROJECT: Final = re.compile(r"[0-9a-f]{32}")
_USER: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # those of LDAP and federation have 64
_LONGEST_RETENTION_S: Final = 36525 * 86400.0  # as in the configuration
_TRUTHS: Final = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def wish_of(record: InstanceRecord, sources: Sequence[RequestSource]) -> Request | None:
    """The wish that OpenStack carries for the instance of *record*; None: there is none."""
    server = record.server
    spoken = (
        (RequestSource.SERVER, server.properties, "autobackup", "autobackup_"),
        (RequestSource.IMAGE, server.image_properties, "autobackup:enabled", "autobackup:"),
        (RequestSource.FLAVOR, server.extra_specs, "autobackup:enabled", "autobackup:"),
    )
    for source, words, switch, prefix in spoken:
        if source in sources and words is not None and switch in words:
            return _read(words, source, switch, prefix, record.owner_project)
    return None


def within_caps(request: Request, caps: RequestSection) -> Request:
    """*request* as the operator lets it be: a shorter retention, or refused."""
    if request.refused or not request.enabled:
        return request
    if not caps.destination:
        return replace(request, refused="this host takes no requests: its operator has set no request.destination")
    if request.source not in caps.sources:
        return replace(request, refused=f"this host takes no requests by {request.source}")
    for name, value, form in (("project", request.project, _PROJECT), ("user", request.reader, _USER)):
        if value and form.fullmatch(value) is None:
            return replace(request, refused=f"the {name} must be an id of hex digits, not {value[:80]!r}")
    if not request.project:
        return replace(request, refused="no project is named, and the instance's own is not known")
    if caps.projects and request.project not in caps.projects:
        return replace(request, refused=f"the operator of this host lets nobody name project {request.project}")
    if caps.retention_longest_s is not None:
        wanted_s = caps.retention_longest_s if request.retention_s is None else request.retention_s
        return replace(request, retention_s=min(wanted_s, caps.retention_longest_s))
    return request


def retention_of(text: str) -> float:
    """Seconds. Raises `ValueError` with what to write."""
    retention_s = parse_duration_s(text)
    if not 1 <= retention_s <= _LONGEST_RETENTION_S:
        raise ValueError("must be 1s to 36525d")
    return retention_s


def described(request: Request) -> str:
    """In words, for an operator."""
    if not request.enabled:
        return f"asked by {request.source}: no backup"
    kept = "" if request.retention_s is None else f", for {format_duration(request.retention_s)}"
    reader = f", readable by user {request.reader}" if request.reader else ""
    words = f"asked by {request.source}: into project {request.project or '?'}{reader}{kept}"
    if not request.asked:
        return f"{words}; the project has not been asked yet"
    return f"{words}; refused: {request.refused}" if request.refused else words


def _read(words: Mapping[str, str], source: RequestSource, switch: str, prefix: str, own_project: str) -> Request:
    enabled = _TRUTHS.get(words[switch].strip().lower())
    if enabled is None:
        return Request(source=source, refused=f"{switch} must be true or false, not {words[switch][:80]!r}")
    if not enabled:
        return Request(source=source, enabled=False)
    request = Request(
        source=source,
        project=words.get(f"{prefix}project", "").strip() or own_project,
        reader=words.get(f"{prefix}user", "").strip(),
    )
    text = words.get(f"{prefix}retention", "").strip()
    try:
        return replace(request, retention_s=retention_of(text) if text else None)
    except ValueError as exc:
        return replace(request, refused=f"{prefix}retention: {exc}")
