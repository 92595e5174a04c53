"""
After the last child: a parent image is unprotected, a sealed base deleted. Never before, and only what was ours.

Who stands on what is said by tags and properties, which tenants can edit, and by the headers of the sealed bundles,
which they cannot: before anything is let go, every object in the destination has been asked for its header. One that
does not show it counts as a child.

A new child shows itself first and then looks whether what it stands on is kept (`Store.put`, *begun*). Here it is the
other way round: a base is retired, or an image unprotected, and then looked at again. So whichever comes second sees
the other: a base that found a child stays, an image is protected again. The tag on an image goes last, so that what a
crash cut short is taken up by the next look, of this host or another.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Final

from autobackup import logs
from autobackup.container.header import HEADER_BYTES, NO_INSTANCE, decode
from autobackup.errors import CloudRefused, CloudUnavailable, Damaged, Refused, StoreUnavailable
from autobackup.model import AttemptId, DestinationName
from autobackup.rules.lineage import stood_on
from autobackup.stores import PARENTS, OpenDestination

_log = logs.get("flows.release")
_BASE_UNUSED_S: Final = 3600.0
_ASKED_AT_ONCE: Final = 8
_OURS: Final = b"autobackup"
_WIDELY_EVERY_S: Final = 86400.0
_TRIES: Final = 3


class Release:
    """Lets go of parents. Remembers headers: what is sealed does not change."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stood_on: dict[tuple[DestinationName, AttemptId], frozenset[str]] = {}
        self._widely_s: dict[DestinationName, float] = {}
        self._unused_since_s: dict[tuple[DestinationName, AttemptId], float] = {}

    async def look(self, place: OpenDestination) -> Mapping[str, int]:
        """
        Let go of all in *place* that nothing stands on, and protect again what lost its protection.

        How many `image`s and `base`s are left.
        """
        left = {"image": 0, "base": 0}
        tagged = await self._tagged(place)
        for image_id in tagged:
            left["image"] += not await self.image(place, image_id)
        for image_id in await self._named(place):
            if image_id not in tagged and await self._is_named_by_header(place, image_id):
                left["image"] += not await self._keep(place, image_id)
        for stored in await place.store.bases():
            left["base"] += not await self._unused(place, stored.attempt) or not await self.base(place, stored.attempt)
        return left

    async def image(self, place: OpenDestination, image_id: str) -> bool:
        """Whether nothing in *place* stands on the image *image_id* any more, and it is not protected for it."""
        assert place.parents is not None
        try:
            if await self.children(place, image_id):
                return await self._keep(place, image_id)
            for _ in range(_TRIES):
                await place.parents.unprotect(image_id)
                if await self.children(place, image_id):
                    return await self._keep(place, image_id)
                if await place.parents.forget(image_id):
                    break
            else:  # another project lets go at the same time, too: the tag stays, and with it the next look
                return False
            if await self.children(place, image_id):
                return await self._keep(place, image_id)
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
        return True

    async def base(self, place: OpenDestination, attempt: AttemptId) -> bool:
        """
        Whether the sealed base *attempt* has nothing on it any more, and is deleted.

        That it is one, its header must say: by its properties anybody could have us delete a backup, and its key.
        """
        if not await self._is_base(place, attempt) or await self.children(place, attempt):
            return False
        await place.store.retire(attempt)
        if await self.children(place, attempt):
            return False
        await place.keys.destroy(attempt)
        await place.store.delete(attempt)
        _log.info("base.released", destination=place.destination.name, attempt=attempt)
        return True

    async def children(self, place: OpenDestination, parent: str) -> list[AttemptId]:
        """What stands on *parent* in *place*: said to, or by its own header."""
        said = await place.store.children(parent)
        if said:
            return said
        everything = await place.store.everything()
        found: list[AttemptId] = []
        for at in range(0, len(everything), _ASKED_AT_ONCE):
            some = everything[at : at + _ASKED_AT_ONCE]
            answers = await asyncio.gather(*(self._stands_on(place, one, parent) for one in some))
            found += [one for one, stands in zip(some, answers, strict=True) if stands]
        return found

    # ---- inside -----------------------------------------------------------------------------------------

    async def _unused(self, place: OpenDestination, attempt: AttemptId) -> bool:
        """Whether nothing was seen to stand on the base for a while: it is sent before the backup that it is for."""
        key = (DestinationName(place.destination.name), attempt)
        if await place.store.children(attempt):
            self._unused_since_s.pop(key, None)
            return False
        return self._clock() - self._unused_since_s.setdefault(key, self._clock()) >= _BASE_UNUSED_S

    async def _tagged(self, place: OpenDestination) -> list[str]:
        """The images that are tagged as parents."""
        try:
            return [] if place.parents is None else [image.id for image in await place.parents.ours()]
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc

    async def _named(self, place: OpenDestination) -> list[str]:
        """
        Once a day: what backups say that they stand on, whatever became of its tags. Glance and its users lose them.

        Every agent would have to list every backup: each does so at another time.
        """
        if place.parents is None:
            return []
        name = DestinationName(place.destination.name)
        due_s = self._widely_s.setdefault(name, self._clock() + random.uniform(0, _WIDELY_EVERY_S))  # noqa: S311
        if self._clock() < due_s:
            return []
        self._widely_s[name] = self._clock() + _WIDELY_EVERY_S
        bases = {stored.attempt for stored in await place.store.bases()}
        held = [stored.properties.get(PARENTS, "").split() for stored in await place.store.held()]
        return list(dict.fromkeys(one for ids in held for one in ids if AttemptId(one) not in bases))

    async def _is_named_by_header(self, place: OpenDestination, image_id: str) -> bool:
        """By its properties anybody could have us protect any image that we may."""
        return any([await self._stands_on(place, one, image_id) for one in await place.store.children(image_id)])

    async def _keep(self, place: OpenDestination, image_id: str) -> bool:
        assert place.parents is not None
        try:
            await place.parents.protect(image_id)
        except CloudRefused as exc:
            _log.error("parent.lost", image=image_id, destination=place.destination.name, error=str(exc),
                       consequence="backups stand on it that can be restored only with a copy of it")  # fmt: skip
        return False

    async def _is_base(self, place: OpenDestination, attempt: AttemptId) -> bool:
        try:
            header = decode(await place.store.read(attempt, offset=0, length=HEADER_BYTES))
        except (Damaged, Refused):
            return False
        if (header.instance, header.attempt) == (NO_INSTANCE, attempt):
            return True
        _log.warning("base.is_none", destination=place.destination.name, attempt=attempt,
                     consequence="left alone; somebody gave a backup the properties of a base")  # fmt: skip
        return False

    async def _stands_on(self, place: OpenDestination, attempt: AttemptId, parent: str) -> bool:
        key = (DestinationName(place.destination.name), attempt)
        if key not in self._stood_on:
            try:
                head = await place.store.read(attempt, offset=0, length=HEADER_BYTES)
                self._stood_on[key] = stood_on(decode(head).parent)
            except Damaged:
                if not head.startswith(_OURS):  # an image, but no sealed bundle
                    self._stood_on[key] = frozenset()
            except Refused as exc:  # deactivated, or not ours to read; or it has just gone: the next look will tell
                _log.info("header.not_shown", attempt=attempt, error=str(exc), consequence="its parents are kept")
                return True
        return parent in self._stood_on.get(key, (parent,))
