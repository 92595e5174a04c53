"""
The owner's request for one instance: taken while it lives, refused where it could not be kept.

A request names a project, and a project receives nothing that it has not consented to. That is asked of the cloud
before the request is accepted: an owner who hears yes can count on it.
"""

import re
from typing import Final

from autobackup.config import RequestSection
from autobackup.errors import Refused, Transient
from autobackup.flows.learn import Learn
from autobackup.flows.places import Places
from autobackup.model import DestinationName, InstanceId, Request

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
            raise Refused(f"not accepted: {exc}") from exc
        await self._learn.set_request(instance, request)

    async def drop(self, instance: InstanceId) -> None:
        await self._learn.set_request(instance, None)
