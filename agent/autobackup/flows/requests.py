"""
The owner's request for one instance: heard while it lives, refused where it could not be kept.

It comes by the local socket, or OpenStack carries it: as properties of the server, of its image, of its flavor. The
socket's is answered at once; the others are looked at with every list of servers, and a refusal stays on the
instance, where its owner, `autobackup explain` and a metric show it.

A request names a project, and a project receives nothing that it has not consented to. That is asked of the cloud
before the request is granted: an owner who hears yes can count on it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from autobackup import logs
from autobackup.cloud.identity import REQUIRED_ROLES
from autobackup.cloud.nova import Server
from autobackup.cloud.owners import Owners
from autobackup.errors import AutobackupError, NotConsented, Refused, Transient
from autobackup.flows.learn import Learn
from autobackup.flows.places import Places
from autobackup.metrics import Metrics
from autobackup.model import DestinationName, InstanceId, InstanceRecord, Request, RequestSource, ServerRecord
from autobackup.rules.policy import Rulebook
from autobackup.rules.wishes import described, wish_of, within_caps
from autobackup.terms import Match, RequestSection

_log = logs.get("flows.requests")
_YES_HOLDS_S: Final = 600.0  # for the next server that names the same project
_NO_HOLDS_S: Final = 60.0
_SILENCE_HOLDS_S: Final = 10.0
_MOST_ASKED: Final = 10  # projects in one hearing, whatever owners write: verdicts wait for its end


class Requests:
    """Takes, shows and drops requests. *owners* is None where no cloud can be asked of servers."""

    def __init__(
        self,
        *,
        book: Rulebook,
        learn: Learn,
        places: Places,
        owners: Owners | None,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings: RequestSection = book.requests
        self._learn = learn
        self._places = places
        self._owners = owners
        self._metrics = metrics
        self._clock = clock
        self._asked: dict[tuple[str, str], tuple[float, str | None]] = {}
        self._asked_count = 0
        self._trouble = ""
        matches = [rule.match for rule in book.rules]
        self._needs_domain = any(match.domain != Match().domain for match in matches)
        hears_images = bool(book.requests.destination) and RequestSource.IMAGE in book.requests.sources
        self._needs_image = hears_images or any(match.image_properties for match in matches)

    def of(self, instance: InstanceId) -> Request | None:
        return self._learn.request(instance)

    def refused(self) -> dict[InstanceId, str]:
        """The wishes that are not granted, and why."""
        known = {instance: self._learn.request(instance) for instance in self._learn.instances()}
        return {instance: one.refused for instance, one in known.items() if one is not None and one.refused}

    # ---- by the socket ----------------------------------------------------------------------------------------

    async def accept(self, instance: InstanceId, request: Request) -> Request:
        """Keep *request*, as far as the operator lets it be. `Refused` with the reason, which the owner reads."""
        request = within_caps(request, self._settings)
        if not request.enabled:
            await self._learn.set_request(instance, request)
            _log.info("request.declined", instance=instance)
            return request
        if not request.refused:
            try:
                request = replace(request, refused=await self._ask(request))
            except Transient as exc:
                request = replace(request, refused=f"its project cannot be asked now: {type(exc).__name__}; try again")
        if request.refused:
            _log.warning("request.refused", instance=instance, project=request.project, reason=request.refused)
            raise Refused(f"not accepted: {request.refused}")
        await self._learn.set_request(instance, request)
        _log.info("request.accepted", instance=instance, project=request.project, reader=request.reader,
                  retention_s=request.retention_s)  # fmt: skip
        return request

    async def drop(self, instance: InstanceId) -> None:
        """What the socket was told; what OpenStack carries is heard again."""
        await self._learn.set_request(instance, None)
        _log.info("request.dropped", instance=instance)
        await self._learn.from_server(instance, ServerRecord(), project="", amend=self._with_wish)

    # ---- by OpenStack -----------------------------------------------------------------------------------------

    async def heard(self, servers: Mapping[InstanceId, Server]) -> None:
        """The servers of this host, as Nova has them now: one that is being deleted has its owner's words still."""
        self._asked_count = 0
        is_reachable = True
        for instance, server in servers.items():
            if self._learn.holds(instance):
                told = _told(server)
                if is_reachable:
                    told, is_reachable = await self._with_others_words(told, server)
                await self._learn.from_server(instance, told, project=server.project, amend=self._with_wish)
        for instance in sorted(self._learn.instances(), key=self._was_asked_for):
            await self._ask_for(instance)
        self._forget_old_answers()
        self._metrics.requests_refused.set(len(self.refused()))

    async def _with_others_words(self, told: ServerRecord, server: Server) -> tuple[ServerRecord, bool]:
        """What Keystone and Glance add; False if one cannot be asked now: not once more for each server."""
        try:
            if self._owners is not None and self._needs_domain and server.project:
                told = replace(told, domain=await self._owners.domain_of(server.project))
            if not server.image or not self._needs_image:
                told = replace(told, image_heard=True)  # it has none, or nobody cares
            elif self._owners is not None:
                properties = await self._owners.image_properties(server.image)
                told = replace(told, image_properties=properties, image_heard=True)
        except AutobackupError as exc:
            if str(exc) != self._trouble:
                _log.warning("owners.unknown", error=str(exc), consequence="asked again with the next list of servers")
            self._trouble = str(exc)
            return told, False
        self._trouble = ""
        return told, True

    def _with_wish(self, record: InstanceRecord) -> InstanceRecord:
        """*record* with what OpenStack carries of its owner's wish, unless the socket has been told another."""
        known = record.request
        if known is not None and known.source is RequestSource.SOCKET:
            return record
        wish = wish_of(record, self._settings.sources)
        if wish is not None:
            wish = within_caps(wish, self._settings)
            needs_asking = wish.enabled and not wish.refused
            if known is not None and needs_asking and replace(known, refused="", asked=True) == wish:
                return record  # what its project said is kept until it is asked again
            wish = replace(wish, asked=not needs_asking)
        if wish != known:
            words = "none" if wish is None else described(wish)
            _log.info("request.heard", instance=record.instance, request=words)
        return replace(record, request=wish)

    def _was_asked_for(self, instance: InstanceId) -> bool:
        """Whoever waits for a first answer comes first: the refused must not take their turn again and again."""
        known = self._learn.request(instance)
        return known is None or known.asked

    async def _ask_for(self, instance: InstanceId) -> None:
        """Ask the project that its owner names, whether the instance lives or waits for that."""
        known = self._learn.request(instance)
        if (
            known is None
            or known.source is RequestSource.SOCKET
            or not known.enabled
            or not self._learn.holds(instance)
        ):
            return
        wish = wish_of(self._learn.known(instance), self._settings.sources)
        if wish is None:
            return
        wish = within_caps(wish, self._settings)
        if wish.refused or not wish.enabled:
            return  # by its words alone
        said = await self._consent(wish)
        if said is None:
            return  # it keeps its place, and what was said before
        wish = replace(wish, refused=said)
        if wish != known and await self._learn.change_request(instance, known, wish) and said:
            _log.warning("request.refused", instance=instance, project=wish.project, reason=said)

    async def _consent(self, request: Request) -> str | None:
        """Why the project takes nothing from us, or ""; by a recent answer, if there is one. None: it did not say."""
        which = (request.project, request.reader)
        asked_at_s, said = self._asked.get(which, (None, ""))
        holds_s = _SILENCE_HOLDS_S if said is None else _NO_HOLDS_S if said else _YES_HOLDS_S
        if asked_at_s is not None and self._clock() - asked_at_s < holds_s:
            return said
        if self._asked_count >= _MOST_ASKED:
            return None
        self._asked_count += 1
        try:
            said = await self._ask(request)
        except AutobackupError as exc:
            _log.warning("request.unasked", project=request.project, error=str(exc), consequence="asked again later")
            said = None
        self._asked[which] = (self._clock(), said)
        return said

    def _forget_old_answers(self) -> None:
        now_s = self._clock()
        self._asked = {which: one for which, one in self._asked.items() if now_s - one[0] < _YES_HOLDS_S}

    async def _ask(self, request: Request) -> str:
        template = DestinationName(self._settings.destination)
        place = self._places.requested(template, request)
        if request.reader and place.destination.key != "barbican":
            return f"the keys of destination {template!r} are not in Barbican, so no user can be named"
        try:
            await place.store.check()
            await place.keys.check()
        except NotConsented as exc:
            _log.warning("consent.missing", project=request.project, error=str(exc))
            return (  # which other projects have consented is not the owner's to read
                f"project {request.project} has not consented; whoever administers it can grant our user "
                f"{', '.join(REQUIRED_ROLES)}"
            )
        return ""


def _told(server: Server) -> ServerRecord:
    return ServerRecord(
        name=server.name,
        user=server.user,
        flavor=server.flavor,
        extra_specs=server.extra_specs,
        image=server.image,
        properties=server.properties,
    )
