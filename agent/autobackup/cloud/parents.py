"""
Parents in Glance: which image a base was made from, and that nobody deletes it while a backup stands on it.

    tag `autobackup:children:<project>`  backups in that project stand on it; while it is there, it is kept protected
    tag `autobackup:protected`           it was we who set protected=true, and so we who may unset it
    property `autobackup_has_children`   where packaging/openstack's policy is in force, nobody can delete it

Tags, and the property only where the policy heeds it: Nova copies an image's properties into its servers' snapshots.

Glance writes an image as a whole as it was read some milliseconds before, so that of two changes at once one is often
lost, with 200 for both (measured: 47 of 50). So what was written is read again, here and whenever it is relied on.

An image is changed with our role in its own project, where we have one. What stands on it is not this module's to know.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from autobackup import logs
from autobackup.cloud.glance import Glance, Image
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudRefused, CloudUnavailable, NoRole
from autobackup.model import Protection
from autobackup.rules.lineage import base_name, image_of, read_name

_log = logs.get("cloud.parents")
_CHILDREN: Final = "autobackup:children:"
_OURS: Final = "autobackup:protected"
_MARK: Final = "autobackup_has_children"
_MARKED: Final = "yes"
_CANARY: Final = "autobackup canary"
_CANARY_TAG: Final = "autobackup:canary"
_CANARY_S: Final = 600.0
_POLICY_REMEMBERED_S: Final = 3600.0
_LIST_REMEMBERED_S: Final = 300.0
_TRIES: Final = 8
_SETTLES_S: Final = 0.2  # longer than a change of somebody else's that was under way takes to lose ours
_STALL_S: Final = 120.0


class Parents:
    """The parent images of one destination's backups. *session_of* opens a session in another project of its cloud."""

    def __init__(
        self,
        session: ProjectSession,
        *,
        session_of: Callable[[str], ProjectSession],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._session_of = session_of
        self._clock = clock
        self._glance = _glance(session)
        self._known: dict[str, str] = {}  # file name -> id of the image
        self._listed_at_s = float("-inf")
        self._policy: tuple[float, bool] = (float("-inf"), False)
        self._asking = asyncio.Lock()

    @property
    def glance(self) -> Glance:
        """Images as the destination's project sees them."""
        return self._glance

    async def find(self, path: str, hints: Sequence[str]) -> Image | None:
        """The image that the base *path* was made from; *hints* are ids to try before every image is looked at."""
        wanted = read_name(path).image_sha1
        if not wanted:
            return None
        image_id = image_of(path, hints) or self._known.get(wanted)
        if image_id is None:
            async with self._asking:
                await self._list()
            image_id = self._known.get(wanted)
        return None if image_id is None else await self._glance.get(image_id)

    async def project(self) -> str:
        """The id of the destination's project."""
        return (await self._session.access()).project_id

    async def protect(self, image_id: str) -> Protection:
        """
        Keep an image from being deleted, on behalf of the destination's project. Idempotent; writes only what is amiss.

        `CloudRefused`: it is not ours to protect, or it is gone. `CloudUnavailable`: others keep writing over it.
        """
        tag = _CHILDREN + await self.project()
        is_policy_live = await self._has_policy()
        for _ in range(_TRIES):
            image = await self._glance.get(image_id)
            if image is None:
                raise CloudRefused(f"{self._session.place}: image {image_id} is gone, or not ours to see")
            is_marked = not is_policy_live or image.properties.get(_MARK) == _MARKED
            if image.protected and is_marked and tag in image.tags:
                return Protection.POLICY if is_policy_live else Protection.PROTECTED
            # one that others protected is not ours to unprotect; and what we protect must be known as ours before
            tags = {tag} if image.protected else {tag, _OURS}
            if not tags <= image.tags:
                changes = [_set("tags", sorted(image.tags | tags))]
            else:
                changes = [_set("protected", True), *((_set(_MARK, _MARKED),) if is_policy_live else ())]
            await (await self._of(image)).change(image_id, changes)
            _log.info("parent.protected", image=image_id, by_policy=is_policy_live)
            await self._settle()
        raise CloudUnavailable(f"{self._session.place}: image {image_id} does not stay protected; tried again later")

    async def is_protected(self, image_id: str, *, by_policy: bool = False) -> bool:
        """Whether it is there, active, protected, marked if *by_policy*, and known as a parent in this project."""
        image = await self._glance.get(image_id)
        return (
            image is not None
            and image.status == "active"
            and image.protected
            and (not by_policy or image.properties.get(_MARK) == _MARKED)
            and _CHILDREN + await self.project() in image.tags
        )

    async def ours(self) -> list[Image]:
        """Every image that we may see and that backups in this project are said to stand on."""
        return await self._seen(tag=_CHILDREN + await self.project())

    async def unprotect(self, image_id: str) -> bool:
        """
        Undo what `protect` did, unless other projects' backups stand on it; False then. Our tag stays: see `forget`.
        """
        for _ in range(_TRIES):
            image = await self._glance.get(image_id)
            if image is None:
                return True
            if self._others(image, await self.project()):
                return False
            changes: list[dict[str, object]] = []
            if image.properties.get(_MARK) == _MARKED:
                changes.append({"op": "remove", "path": f"/{_MARK}"})
            if image.protected and _OURS in image.tags:
                changes.append(_set("protected", False))
            if not changes:
                return True
            await (await self._of(image)).change(image_id, changes)
            _log.info("parent.unprotected", image=image_id)
            await self._settle()
        raise CloudUnavailable(f"{self._session.place}: image {image_id} does not stay unprotected; tried again later")

    async def forget(self, image_id: str) -> bool:
        """
        The last word of a release: the tags that called for protection go.

        False, and they stay: it is still protected by us and by nobody else, so somebody must unprotect it first.
        """
        project = await self.project()
        for _ in range(_TRIES):
            image = await self._glance.get(image_id)
            if image is None:
                return True
            gone = {_CHILDREN + project}
            if not self._others(image, project):
                if image.properties.get(_MARK) == _MARKED or (image.protected and _OURS in image.tags):
                    return False
                gone.add(_OURS)
            if not image.tags & gone:
                return True
            await (await self._of(image)).change(image_id, [_set("tags", sorted(image.tags - gone))])
            await self._settle()
        return False

    # ---- inside -----------------------------------------------------------------------------------------

    async def _of(self, image: Image) -> Glance:
        """Glance with our role in the image's own project; with the destination's where we have none."""
        if image.owner == await self.project():
            return self._glance
        session = self._session_of(image.owner)
        try:
            await session.access()
        except NoRole:
            return self._glance
        return _glance(session)

    def _others(self, image: Image, project: str) -> bool:
        """Whether backups of other projects stand on it, too."""
        return any(tag.startswith(_CHILDREN) for tag in image.tags - {_CHILDREN + project})

    async def _settle(self) -> None:
        """Wait for a change that was under way beside ours; not in step with another agent."""
        await asyncio.sleep(_SETTLES_S * random.uniform(1.0, 2.0))  # noqa: S311

    async def _seen(self, **filters: str) -> list[Image]:
        """Every image that we may see. Glance shows hidden ones, and communities', only where they are asked for."""
        found = [
            *await self._glance.list(**filters),
            *await self._glance.list(visibility="community", **filters),
            *await self._glance.list(os_hidden="true", **filters),
        ]
        return list({image.id: image for image in found}.values())

    async def _list(self) -> None:
        if self._clock() - self._listed_at_s > _LIST_REMEMBERED_S:
            images = await self._seen()
            self._known = {base_name(image.id): image.id for image in images}
            self._listed_at_s = self._clock()

    async def _has_policy(self) -> bool:
        """
        Whether Glance refuses to delete what is marked. Found out on an image of our own, without data.

        Who may unmark is not seen by this: property protections are the other half of packaging/openstack's files.
        """
        async with self._asking:
            asked_at_s, is_live = self._policy
            if self._clock() - asked_at_s > _POLICY_REMEMBERED_S:
                is_live = await self._ask_policy()
                self._policy = (self._clock(), is_live)
        return is_live

    async def _ask_policy(self) -> bool:
        for left in await self._glance.list(tag=_CANARY_TAG, owner=await self.project(), status="queued"):
            if _age_s(left) > _CANARY_S:  # another agent's may be being tried
                await self._end_canary(left.id)
        try:
            canary = await self._glance.create(
                str(uuid.uuid4()), name=_CANARY, tags=(_CANARY_TAG,), visibility="private", properties={_MARK: _MARKED}
            )
        except CloudRefused:
            return False  # it is not even ours to write
        except CloudUnavailable as exc:
            if exc.status != HTTPStatus.FORBIDDEN:
                raise
            return False
        assert canary is not None
        try:
            await self._glance.delete(canary.id)
        except CloudRefused as exc:
            await self._end_canary(canary.id)
            if exc.status != HTTPStatus.FORBIDDEN:
                raise CloudUnavailable(str(exc), status=exc.status) from exc
            return True
        return False

    async def _end_canary(self, image_id: str) -> None:
        image = await self._glance.get(image_id)
        if image is not None:
            if _MARK in image.properties:
                await self._glance.change(image_id, [{"op": "remove", "path": f"/{_MARK}"}])
            await self._glance.delete(image_id)


def _glance(session: ProjectSession) -> Glance:
    return Glance(session, stall_timeout_s=_STALL_S, reply_timeout_s=_STALL_S)


def _set(name: str, value: object) -> dict[str, object]:
    return {"op": "add", "path": f"/{name}", "value": value}


def _age_s(image: Image) -> float:
    try:
        created = datetime.fromisoformat(image.properties.get("created_at", ""))
    except ValueError:
        return 0.0
    return (datetime.now(UTC) - created).total_seconds()
