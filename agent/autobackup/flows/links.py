"""
Links between parents and children, as an operator asks for them: shown, made, undone.

A backup that is sealed on a parent is linked to it for as long as it is there: its header says so, and no order undoes
that. What may be undone is a link to a backup that is gone, or one that somebody made by hand.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autobackup.container.header import HEADER_BYTES, Header, decode
from autobackup.errors import CloudRefused, CloudUnavailable, Damaged, Refused, StoreRefused, StoreUnavailable
from autobackup.flows.release import Release
from autobackup.model import AttemptId
from autobackup.rules.lineage import stood_on
from autobackup.stores import OpenDestination


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """
    One parent and one child. *linked* by the child's `header`, by a `tag` that anybody may have given it, or not ("").

    *parent_kept*: it is there, and protected if it is an image.
    """

    parent: str
    child: str
    destination: str
    linked: str
    parent_kept: bool


class Links:
    """*places* are the destinations that are looked into."""

    def __init__(self, *, places: Callable[[], Iterable[OpenDestination]], release: Release) -> None:
        self._places = places
        self._release = release

    async def show(self, parent: str, child: str) -> Link:
        """`Refused` if *child* is in no destination of this host."""
        place, header = await self._child(child)
        return await self._link(place, header, parent, child)

    async def add(self, parent: str, child: str) -> Link:
        """Link *child* to *parent*, which is an image to be protected, or a sealed base beside the child."""
        place, header = await self._child(child)
        try:
            if not await self._is_base(place, parent):
                if place.parents is None or await place.parents.glance.get(parent) is None:
                    raise Refused(f"{parent}: no image that {place.destination.name!r} may see, nor a base there")
                await place.store.link(AttemptId(child), parent)
                await place.parents.protect(parent)
            else:
                await place.store.link(AttemptId(child), parent)
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
        except CloudRefused as exc:
            raise StoreRefused(str(exc)) from exc
        return await self._link(place, header, parent, child)

    async def remove(self, parent: str, child: str) -> bool:
        """Undo the link; whether *parent* was released by that, because nothing stands on it any more."""
        try:
            place, header = await self._child(child)
        except StoreRefused:
            places = list(self._places())
        else:
            if parent in stood_on(header.parent):
                raise Refused(f"backup {child} stands on {parent}; delete the backup first")
            await place.store.unlink(AttemptId(child), parent)
            places = [place]
        return any([await self._released(place, parent) for place in places])

    # ---- inside -----------------------------------------------------------------------------------------

    async def _child(self, child: str) -> tuple[OpenDestination, Header]:
        for place in self._places():
            try:
                header = decode(await place.store.read(AttemptId(child), offset=0, length=HEADER_BYTES))
            except StoreRefused:
                continue
            except Damaged as exc:
                raise Refused(f"{child}: is no backup: {exc}") from exc
            return place, header
        raise StoreRefused(f"{child}: in no destination of this host")

    async def _link(self, place: OpenDestination, header: Header, parent: str, child: str) -> Link:
        by_tag = AttemptId(child) in await place.store.children(parent)
        kept = await self._is_base(place, parent) or await self._is_protected(place, parent)
        return Link(
            parent=parent,
            child=child,
            destination=place.destination.name,
            linked="header" if parent in stood_on(header.parent) else "tag" if by_tag else "",
            parent_kept=kept,
        )

    async def _is_base(self, place: OpenDestination, parent: str) -> bool:
        return any(stored.attempt == parent for stored in await place.store.bases())

    async def _is_protected(self, place: OpenDestination, parent: str) -> bool:
        try:
            return place.parents is not None and await place.parents.is_protected(parent)
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc

    async def _released(self, place: OpenDestination, parent: str) -> bool:
        if await self._is_base(place, parent):
            return await self._release.base(place, AttemptId(parent))
        return parent in await self._parents_of(place) and await self._release.image(place, parent)

    async def _parents_of(self, place: OpenDestination) -> set[str]:
        try:
            return set() if place.parents is None else {image.id for image in await place.parents.ours()}
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
