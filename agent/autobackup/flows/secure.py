"""
Before a copy is sent: what it stands on is kept for it, by the image in Glance or by a sealed base beside it.

An image is relied on only once its data was found to be the base's bytes; then it is protected as strongly as the cloud
allows, and who says what of it is asked again when the copy is proven. `rules.lineage` decides, this module does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from autobackup import logs
from autobackup.cloud.glance import Image
from autobackup.container.manifest import ParentEntry
from autobackup.errors import CloudRefused, CloudUnavailable, Refused, StoreRefused, StoreUnavailable
from autobackup.flows.ancestry import Ancestry, Base
from autobackup.flows.compare import yields
from autobackup.flows.seal_base import Journal, SealBase
from autobackup.flows.workers import Workers
from autobackup.model import Anchor, AttemptId, CopyRecord, InstanceRecord, Protection
from autobackup.rules import lineage
from autobackup.rules.lineage import ImageFacts, Way
from autobackup.stores import OpenDestination

_log = logs.get("flows.secure")
_FOR_EVERYBODY: Final = frozenset({"public", "community"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """What keeps a copy's bases, and the images that they were found to be made from, by the base's path."""

    anchors: tuple[Anchor, ...] = ()
    images: Mapping[str, Image] = field(default_factory=dict)


class Secure:
    """Keeps what copies stand on."""

    def __init__(self, *, ancestry: Ancestry, bases: SealBase, workers: Workers) -> None:
        self._ancestry = ancestry
        self._bases = bases
        self._workers = workers
        self._different: set[tuple[str, str]] = set()  # image, base: read once, and other bytes

    async def secure(
        self, place: OpenDestination, source: InstanceRecord, bases: tuple[Base, ...], *, journal: Journal | None
    ) -> Secured | None:
        """
        Keep every one of *bases* for a copy in *place*.

        None: a base must be sent first, which takes its time; given a *journal*, it is. Raises `Refused` where the
        terms of the destination cannot be met.
        """
        if len(bases) > lineage.MOST_PARENTS:
            raise Refused(f"stands on {len(bases)} backing files; a backup can name {lineage.MOST_PARENTS}")
        anchors, images = [], {}
        for base in bases:
            try:
                image = await self._image(place, source, base)
                if image is not None:
                    images[base.link.path] = image
                chosen, why = await self._way(place, base, image)
                if chosen is Way.PROTECT and image is not None:
                    protected = await self._protected(place, base, image)
                    if protected is not None:
                        anchors.append(protected)
                        continue
                    chosen, why = await self._way(place, base, image, is_ours=False)
            except CloudUnavailable as exc:
                raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
            match chosen:
                case Way.REFUSE:
                    raise Refused(
                        f'{base.link.path}: parents = "protect", and {why}; grant it, or write parents = "auto"'
                    )
                case Way.NONE:
                    _log.warning("base.lost", base=base.link.path, reason=why, consequence="sealed without it")
                case _:
                    found = await self._bases.find(place, base)
                    if found is None and journal is None:
                        return None
                    if found is None:
                        assert journal is not None
                        found = await self._bases.send(place, base, journal=journal)
                    anchors.append(Anchor(path=base.link.path, parent=found, protection=Protection.COPY))
        return Secured(anchors=tuple(anchors), images=images)

    async def require(self, place: OpenDestination, copy: CopyRecord) -> None:
        """Raise `StoreRefused` if something that *copy* stands on is not kept any more."""
        for anchor in copy.anchors:
            if anchor.protection is Protection.COPY:
                if (await place.store.stat(AttemptId(anchor.parent))).retired:
                    raise StoreRefused(f"base {anchor.parent} was retired; sent anew")
            elif not await self._is_protected(place, anchor):
                raise StoreRefused(f"parent image {anchor.parent} is gone or no longer protected; sent anew")

    # ---- inside -----------------------------------------------------------------------------------------

    async def _image(self, place: OpenDestination, source: InstanceRecord, base: Base) -> Image | None:
        return None if place.parents is None else await place.parents.find(base.link.path, [source.server.image])

    async def _way(
        self, place: OpenDestination, base: Base, image: Image | None, *, is_ours: bool = True
    ) -> tuple[Way, str]:
        terms = place.destination.parents
        facts = None
        if image is not None and (terms != "copy" or base.record is None):
            facts = ImageFacts(
                is_active=image.status == "active",
                is_visible_to_all=not place.destination.members or image.properties.get("visibility") in _FOR_EVERYBODY,
                is_ours_to_protect=is_ours,
                yields=await self._yields(place, base, image),
            )
        origin = lineage.read_name(base.link.path).origin
        return lineage.way(terms, origin, facts, is_readable=base.record is not None)

    async def _yields(self, place: OpenDestination, base: Base, image: Image) -> bool | None:
        if base.record is None or image.status != "active":
            return None
        assert place.parents is not None
        word = f"{image.id}:{image.size_bytes}:{image.hash_value}"
        if word in base.record.same_as:
            return True
        if (word, base.record.sha256) in self._different:
            return False
        try:
            same = await yields(place.parents.glance, image, base.record, self._workers)
        except CloudRefused as exc:
            _log.info("parent.unreadable", image=image.id, error=str(exc), consequence="its base is copied")
            return False
        if same:
            await self._ancestry.remember(base, same_as=word)
        else:
            self._different.add((word, base.record.sha256))
            _log.warning("parent.differs", image=image.id, base=base.link.path, consequence="its base is copied")
        return same

    async def _protected(self, place: OpenDestination, base: Base, image: Image) -> Anchor | None:
        assert place.parents is not None
        try:
            protection = await place.parents.protect(image.id)
        except CloudRefused as exc:
            _log.info("parent.not_protected", image=image.id, error=str(exc), consequence="its base is copied")
            return None
        return Anchor(path=base.link.path, parent=image.id, protection=protection)

    async def _is_protected(self, place: OpenDestination, anchor: Anchor) -> bool:
        by_policy = anchor.protection is Protection.POLICY
        try:
            return place.parents is not None and await place.parents.is_protected(anchor.parent, by_policy=by_policy)
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc


def parent_entries(bases: tuple[Base, ...], images: Mapping[str, Image]) -> tuple[ParentEntry, ...]:
    """What the manifest says of *bases*."""
    entry = partial(_entry, images)
    return tuple(entry(base) for base in bases)


def _entry(images: Mapping[str, Image], base: Base) -> ParentEntry:
    image = images.get(base.link.path)
    said = f"{image.hash_algorithm}:{image.hash_value}" if image is not None and image.hash_value else ""
    return base.entry(image="" if image is None else image.id, image_hash=said)
