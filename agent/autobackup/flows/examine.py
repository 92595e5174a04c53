"""
Would a destination take a backup now, and would Nova say what became of a server? Asked of them, with everything that
a backup will ask, but for the upload.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from autobackup.cloud.nova import Nova
from autobackup.errors import AutobackupError
from autobackup.model import AttemptId
from autobackup.stores import OpenDestination


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found out about one destination, or about Nova. *result*: ok, weak or unusable."""

    destination: str
    where: str
    result: str
    remedy: str


async def examine(places: Sequence[OpenDestination]) -> list[Finding]:
    """One finding for each of *places*. Leaves nothing behind where it could write."""
    return [await _examine(place) for place in places]


async def _examine(place: OpenDestination) -> Finding:
    where, attempt = _where(place), AttemptId(str(uuid.uuid4()))
    try:
        await place.store.check()
        await place.keys.check()
        try:
            key = await place.keys.draw(attempt)
            await place.keys.fetch(key.header_words)
        finally:
            await place.keys.destroy(attempt)
    except AutobackupError as exc:
        words = str(exc).removeprefix(f"{where}: ")
        return Finding(destination=place.destination.name, where=where, result="unusable", remedy=words)
    weak = _weakness(place)
    return Finding(destination=place.destination.name, where=where, result="weak" if weak else "ok", remedy=weak)


async def examine_nova(nova: Nova) -> Finding:
    """Would Nova tell us what became of a server of this host?"""
    result, remedy = "ok", ""
    try:
        servers = await nova.living()
        if await nova.is_admins():
            result, remedy = (
                "weak",
                "asked as an admin; a role of its own is enough: packaging/openstack/nova-policy.yaml",
            )
        elif not servers:
            remedy = f"it knows no server on host {nova.host!r}; if some run here, nova.host is not what Nova calls it"
    except AutobackupError as exc:
        result, remedy = "unusable", str(exc).removeprefix(f"{nova.place}: ")
    return Finding(destination="(verdicts)", where=f"{nova.place}, host {nova.host!r}", result=result, remedy=remedy)


def _where(place: OpenDestination) -> str:
    return place.session.place if place.session is not None else str(place.destination.path)


def _weakness(place: OpenDestination) -> str:
    if place.destination.key == "none":
        return 'key = "none": whoever can read the store can read the disks; choose barbican, recipient or keyfile'
    if place.destination.key == "barbican" and not place.destination.readers and not place.destination.project_access:
        return "no reader is named: only the agents' own user could have the keys; set readers, or project_access"
    return ""
