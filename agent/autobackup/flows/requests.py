"""
The owner's request for one instance: taken while it lives, refused where it could not be kept.

A request names a project, and a project receives nothing that it has not consented to. That is asked of the cloud
before the request is accepted: an owner who hears yes can count on it.
"""

import re
from typing import Final

from autobackup import logs
from autobackup.cloud.identity import REQUIRED_ROLES
from autobackup.config import RequestSection
from autobackup.errors import Refused, Transient
from autobackup.flows.learn import Learn
from autobackup.flows.places import Places
from autobackup.model import DestinationName, InstanceId, Request

_log = logs.get("flows.requests")
_ID: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


class Requests:
    """Takes, shows and drops requests."""

    def __init__(self, *, settings: RequestSection, learn: Learn, places: Places) -> None:
        self._settings = settings
        self._learn = learn
        self._places = places

    def of(self, instance: InstanceId) -> Request | None:
        return self._learn.request(instance)

    async def accept(self, instance: InstanceId, request: Request) -> None:
        """Keep *request*. `Refused` with the reason, which the owner reads."""
        if not self._settings.destination:
            raise Refused("this host takes no requests: its operator has set no request.destination")
        for name, value in (("store_project", request.project), ("store_user", request.reader)):
            if value and _ID.fullmatch(value) is None:
                raise Refused(f"{name} must be an id of 32 hex digits, not {value!r}")
        template = DestinationName(self._settings.destination)
        place = self._places.requested(template, request)
        if request.reader and place.destination.key != "barbican":
            raise Refused(f"store_user: the keys of destination {template!r} are not in Barbican; nobody can be named")
        try:
            await place.store.check()
            await place.keys.check()
        except Transient as exc:
            _log.warning("request.refused", instance=instance, project=request.project, error=str(exc))
            raise Refused(  # which other projects have consented is not the owner's to read
                f"not accepted: project {request.project} has not consented, or its cloud cannot be asked now: whoever "
                f"administers it can grant our user {', '.join(REQUIRED_ROLES)}; the agent's log has the answer"
            ) from exc
        await self._learn.set_request(instance, request)
        _log.info("request.accepted", instance=instance, project=request.project, reader=request.reader,
                  retention_s=request.retention_s)  # fmt: skip

    async def drop(self, instance: InstanceId) -> None:
        await self._learn.set_request(instance, None)
        _log.info("request.dropped", instance=instance)
