"""
The destinations of this host, opened once each; and a look at them from time to time.

A copy says by name where it goes. What is looked at: whether the destination would take a copy now, which is told
before one is needed, what this host began there and never ended, and which parents nothing stands on any more.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from autobackup import logs
from autobackup.errors import AutobackupError, Refused
from autobackup.flows.jobs import Jobs
from autobackup.flows.release import Release
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import AttemptId, CopyRecord, DestinationName, Request
from autobackup.rules.policy import requested_destination, terms_of
from autobackup.stores import OpenDestination
from autobackup.terms import Destination

_log = logs.get("flows.places")
_LOOK_EVERY_S: Final = 600.0
_MOST_REQUESTED: Final = 64  # sessions that are kept open for owners' requests: which there are is theirs to say


class Places:
    """Opens destinations. *opened* is how; asks nobody on the outside."""

    def __init__(self, destinations: Sequence[Destination], opened: Callable[[Destination], OpenDestination]) -> None:
        self._opened = opened
        self._open = {DestinationName(one.name): opened(one) for one in destinations}
        self._requested: OrderedDict[Destination, OpenDestination] = OrderedDict()

    def of(self, copy: CopyRecord) -> OpenDestination:
        """Where *copy* goes; `Refused` if that is no longer in the configuration."""
        if copy.request is not None:
            return self.requested(DestinationName(copy.destination.rpartition(".")[0]), copy.request)
        place = self._named(copy.destination)
        return replace(place, destination=terms_of(place.destination, copy.retention_s))

    def requested(self, template: DestinationName, request: Request) -> OpenDestination:
        """Where *request* wants it, on the terms of the destination *template*."""
        destination = requested_destination(self._named(template).destination, request)
        opened = replace(destination, retention_s=None)  # how long it is kept is no matter of its store's
        if opened not in self._requested:
            self._requested[opened] = self._opened(opened)
        self._requested.move_to_end(opened)
        while len(self._requested) > _MOST_REQUESTED:
            self._requested.popitem(last=False)
        return replace(self._requested[opened], destination=destination)

    def _named(self, name: DestinationName) -> OpenDestination:
        try:
            return self._open[name]
        except KeyError:
            raise Refused(
                f"destination {name!r} is no longer in the configuration; put it back, or discard it"
            ) from None

    def all(self) -> Mapping[DestinationName, OpenDestination]:
        return self._open

    def with_requested(self) -> list[OpenDestination]:
        """Those of the configuration, and those that owners have asked for since the start."""
        return [*self._open.values(), *self._requested.values()]


class Watchman:
    """Looks at every destination, at the start and then every ten minutes."""

    def __init__(
        self, *, places: Places, only_asked_for: str, jobs: Jobs, spool: Spool, release: Release, metrics: Metrics
    ) -> None:
        self._places = places
        self._release = release
        self._only_asked_for = only_asked_for
        self._jobs = jobs
        self._metrics = metrics
        self._spool = spool
        self._unwell: dict[DestinationName, str] = {}

    def unwell(self) -> list[str]:
        """What keeps destinations from taking a copy, as of the last look."""
        return [f"destination {name!r}: {words}" for name, words in self._unwell.items()]

    async def run(self) -> None:
        """For ever."""
        while True:
            for name, place in self._places.all().items():
                if name != self._only_asked_for:
                    await self._look(name, place)
            for place in self._places.with_requested()[len(self._places.all()) :]:
                try:
                    await self._release.look(place)
                except AutobackupError as exc:
                    _log.info("parents.not_looked_at", destination=place.destination.name, error=str(exc))
            # not in step with 1,000 other hosts
            await asyncio.sleep(_LOOK_EVERY_S * random.uniform(0.75, 1.25))  # noqa: S311

    async def _look(self, name: DestinationName, place: OpenDestination) -> None:
        try:
            await place.store.check()
            await place.keys.check()
            await self._tidy(name, place)
            for kind, count in (await self._release.look(place)).items():
                self._metrics.parents_kept.labels(destination=name, kind=kind).set(count)
        except AutobackupError as exc:
            if self._unwell.get(name) != str(exc):
                _log.warning("destination.unwell", destination=name, error=str(exc), consequence="jobs wait")
            self._unwell[name] = str(exc)
        else:
            if self._unwell.pop(name, None) is not None:
                _log.info("destination.well", destination=name)
        self._metrics.destination_reachable.labels(destination=name).set(name not in self._unwell)

    async def _tidy(self, name: DestinationName, place: OpenDestination) -> None:
        """
        Delete what a discarded job, or a journal that was lost, left half sent.

        The store is asked first: what is under way was journaled before the store heard of it.
        """
        for attempt in await place.store.unfinished(self._spool.agent_id):
            if attempt not in self._known():
                await place.keys.destroy(attempt)
                await place.store.delete(attempt)
                _log.info("attempt.removed", destination=name, attempt=attempt, reason="no job knows it")

    def _known(self) -> set[AttemptId]:
        copies = [copy for record in self._jobs.all() for copy in record.copies]
        obsolete = {attempt for copy in copies for attempt in (*copy.obsolete, copy.base_attempt) if attempt}
        return obsolete | {copy.attempt.attempt for copy in copies if copy.attempt is not None}
