"""
The `glance` store: an image for each sealed bundle, owned by the destination's project.

    id          the attempt's, which is journaled before; an id that was deleted is never free again, so a second image
                for one attempt gets an id of Glance's choice, and is found by its tag
    tags        `autobackup`, `autobackup:<attempt>`, `autobackup:parent:<id>` for each that it stands on
    properties  `autobackup_*` as they were given, others with a prefix; plus Nova's and the encryption spec's words
                for whoever looks at images without knowing us

An image is held when Glance calls it active. raw/bare is what Glance looks into least; the bundle's own header keeps
it from seeing a disk format in random bytes. What came of an upload is asked of the image, never believed of the
answer (`cloud.failures.recovery`).
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import MappingProxyType
from typing import Final, TypeGuard

from autobackup import logs
from autobackup.cloud.failures import Recovery, may_be_there, recovery
from autobackup.cloud.glance import Glance, Image
from autobackup.cloud.identity import grants
from autobackup.cloud.session import ProjectSession
from autobackup.cloud.upload import Upload
from autobackup.errors import (
    CloudRefused,
    CloudUnavailable,
    NoRole,
    NotConsented,
    RecordDamaged,
    StoreRefused,
    StoreUnavailable,
)
from autobackup.model import AttemptId
from autobackup.stores.image_words import (
    ATTEMPT,
    RETIRED,
    TAG,
    attempt_of,
    best_of_each,
    image_properties,
    plain,
    rank,
    stored_of,
    undescribed,
)
from autobackup.stores.interface import BASE, KIND, KIND_BASE, PARENTS, Begun, Body, Stored

_log = logs.get("stores.glance")
_PARENT: Final = "autobackup:parent:"
_DEFAULT_ALGORITHM: Final = "sha512"
_PUTS: Final = 3
_NEVER_WHOLE: Final = frozenset({"queued", "saving", "uploading", "importing", "killed", "deleted", "pending_delete"})
_SETTLES_S: Final = 30.0  # how long Glance may take to make up its mind after an answer was lost
_SETTLE_PAUSE_S: Final = 1.0


class GlanceStore:
    """See `stores.interface.Store`. *members* are ids of projects that may read the images."""

    def __init__(
        self,
        session: ProjectSession,
        *,
        members: Sequence[str] = (),
        stall_timeout_s: float = 120.0,
        reply_timeout_s: float = 600.0,
    ) -> None:
        self._session = session
        self._glance = Glance(session, stall_timeout_s=stall_timeout_s, reply_timeout_s=reply_timeout_s)
        self._members = tuple(members)
        self._stall_timeout_s = stall_timeout_s
        self._algorithm = _DEFAULT_ALGORITHM

    @property
    def digest_algorithm(self) -> str:
        """What Glance hashed its newest image with, if it had one at the last `check`; its own default otherwise."""
        return self._algorithm

    async def check(self) -> None:
        with _as_store_errors():
            newest = await self._glance.newest_active()
            access = await self._session.access_now()
            if access.missing_roles:
                raise NotConsented(
                    f"{self._session.place}: has not consented: without the role "
                    f"{' and '.join(access.missing_roles)} there; "
                    f"{grants(access.user_name, access.project_name, access.missing_roles)}"
                )
        if newest is not None and _is_hash(newest.hash_algorithm):
            self._algorithm = newest.hash_algorithm

    async def put(
        self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None
    ) -> None:
        _require_id(attempt)
        await self.check()
        with _as_store_errors():
            image = await self._create(attempt, properties)
            for member in self._members:  # before the data: a backup that is sent must not be lost for a name
                await self._glance.share(image.id, member)
        if begun is not None:
            await begun()
        with _as_store_errors():
            await self._send(image, body)

    async def stat(self, attempt: AttemptId) -> Stored:
        with _as_store_errors():
            image, project = await self._whole(attempt), await self._project()
        try:
            return stored_of(image, project)
        except RecordDamaged:
            if image.id != attempt:
                raise
            return undescribed(image, attempt, project)  # whatever somebody made of its words, it is this image

    async def digest(self, attempt: AttemptId) -> str:
        digest = hashlib.new(self._algorithm)
        async for piece in self.stream(attempt, offset=0):
            await asyncio.to_thread(digest.update, piece)
        return digest.hexdigest()

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        with _as_store_errors():
            image = await self._whole(attempt)
            return await self._glance.read(image.id, offset=offset, length=length) if length else b""

    async def stream(self, attempt: AttemptId, *, offset: int) -> AsyncGenerator[bytes, None]:
        with _as_store_errors():
            image = await self._whole(attempt)
            async with aclosing(self._glance.stream(image.id, offset=offset)) as pieces:
                async for piece in pieces:
                    yield piece

    async def delete(self, attempt: AttemptId) -> None:
        _require_id(attempt)
        with _as_store_errors():
            for image in await self._all_of(attempt):
                await self._glance.delete(image.id)

    async def held(self) -> list[Stored]:
        with _as_store_errors():
            project = await self._project()
            images = await self._tagged(
                TAG, filters={"status": "active"}
            )  # what was shared with us once we accepted it
        held = []
        for image in best_of_each(images, project):
            try:
                held.append(stored_of(image, project))
            except RecordDamaged as exc:
                _log.warning("properties.damaged", error=str(exc), consequence="listed without its properties")
                held.append(Stored(attempt=attempt_of(image), size_bytes=image.size_bytes or 0, properties={}))
        return held

    async def children(self, parent: str) -> list[AttemptId]:
        with _as_store_errors():
            tag, owner = _PARENT + parent, await self._project()
            images = await self._glance.list(tag=tag, owner=owner)
            images += await self._glance.list(tag=tag, owner=owner, os_hidden="true")
        return sorted({attempt_of(image) for image in images})

    async def link(self, attempt: AttemptId, parent: str) -> None:
        with _as_store_errors():
            await self._glance.tag((await self._whole(attempt)).id, _PARENT + parent)

    async def unlink(self, attempt: AttemptId, parent: str) -> None:
        with _as_store_errors():
            await self._glance.untag((await self._whole(attempt)).id, _PARENT + parent)

    async def everything(self) -> list[AttemptId]:
        with _as_store_errors():
            owner = await self._project()
            images = await self._glance.list(owner=owner)
            images += await self._glance.list(owner=owner, os_hidden="true")
        return [AttemptId(image.id) for image in images if image.status not in _NEVER_WHOLE]  # a deactivated one was

    async def bases(self, content: str | None = None) -> list[Stored]:
        with _as_store_errors():
            project = await self._project()
            wanted = {KIND: KIND_BASE} if content is None else {BASE: content}
            images = await self._tagged(TAG, filters={"status": "active", "owner": project, **wanted})
        held = []
        for image in images:
            try:
                held.append(stored_of(image, project))
            except RecordDamaged as exc:
                _log.warning("properties.damaged", error=str(exc), consequence="no longer known as a base")
        return [stored for stored in held if content is None or not stored.retired]

    async def retire(self, attempt: AttemptId) -> None:
        _require_id(attempt)
        with _as_store_errors():
            for image in await self._all_of(attempt):
                await self._glance.tag(image.id, RETIRED)

    async def unfinished(self, agent_id: str) -> list[AttemptId]:
        with _as_store_errors():
            owner = await self._project()
            images = await self._glance.list(tag=TAG, owner=owner, autobackup_agent=agent_id)
            begun = {attempt_of(image) for image in images if image.status in ("queued", "saving")}
            # an attempt that is held is not to be removed because somebody gave its tag to another image
            return [
                attempt
                for attempt in sorted(begun)
                if not any(image.status == "active" for image in await self._all_of(attempt))
            ]

    # ---- inside -----------------------------------------------------------------------------------------

    async def _create(self, attempt: AttemptId, properties: Mapping[str, str]) -> Image:
        words = image_properties(attempt, properties)
        name = properties.get("autobackup_instance_name") or properties.get("autobackup_instance") or attempt
        for image_id in (attempt, None):
            image = await self._glance.create(
                image_id,
                name=plain(f"autobackup of {name}")[:255],
                tags=(TAG, f"{TAG}:{attempt}", *(_PARENT + one for one in properties.get(PARENTS, "").split())),
                visibility="shared" if self._members else "private",
                properties=words,
            )
            if image is not None:
                return image
            if await self._all_of(attempt):
                raise StoreRefused(f"{self._session.place}: image {attempt} exists; an attempt id is used once")
        raise StoreRefused(f"{self._session.place}: Glance makes no image for {attempt}")

    async def _send(self, image: Image, body: Body) -> None:
        """Send *body* to *image*; again only if not a byte of it was taken."""
        for _ in range(_PUTS):
            upload = Upload(body, stall_timeout_s=self._stall_timeout_s)
            try:
                await self._glance.upload(image.id, upload, size_bytes=body.announced_bytes)
                return
            except (CloudUnavailable, CloudRefused) as exc:
                failed = exc
            sent = (body.size_bytes, body.digest) if upload.is_whole and may_be_there(failed) else None
            found = await self._recovery(image, is_begun=upload.is_begun, sent=sent)
            _log.info("upload.failed", image=image.id, error=str(failed), recovery=found)
            if found is Recovery.IS_THERE:
                return
            if found is not Recovery.PUT_AGAIN:
                break
            await asyncio.sleep(_SETTLE_PAUSE_S)
        raise failed

    async def _recovery(self, image: Image, *, is_begun: bool, sent: tuple[int, str] | None) -> Recovery:
        deadline_s = asyncio.get_running_loop().time() + _SETTLES_S
        while True:
            try:
                now = await self._glance.get(image.id)
                found = recovery(now, is_begun=is_begun, sent=sent)
            except CloudUnavailable:
                found = Recovery.ASK_AGAIN if sent is not None else Recovery.NEW_IMAGE
            if found is not Recovery.ASK_AGAIN:
                return found
            if asyncio.get_running_loop().time() > deadline_s:
                return Recovery.NEW_IMAGE
            await asyncio.sleep(_SETTLE_PAUSE_S)

    async def _project(self) -> str:
        return (await self._session.access()).project_id

    async def _all_of(self, attempt: AttemptId) -> list[Image]:
        """
        Every image of *attempt* in our project, whatever its state. By its id, and by its tag: see the top.

        Others may share what they like with us, under any tag.
        """
        project = await self._project()
        first = await self._glance.get(attempt)
        tagged = await self._glance.list(tag=f"{TAG}:{attempt}", owner=project)
        tagged += await self._glance.list(tag=f"{TAG}:{attempt}", owner=project, os_hidden="true")
        found = {image.id: image for image in ([first] if first else []) + tagged}
        return [image for image in found.values() if image.owner == project]

    async def _tagged(
        self, tag: str, *, with_pending: bool = False, filters: Mapping[str, str] = MappingProxyType({})
    ) -> list[Image]:
        """Every image that we may read; oldest first, as far as Glance's seconds tell."""
        images = await self._glance.list(tag=tag, **filters)
        images += await self._glance.list(tag=tag, os_hidden="true", **filters)
        if with_pending:
            images += await self._glance.list(tag=tag, visibility="shared", member_status="pending", **filters)
        return sorted(
            {image.id: image for image in images}.values(), key=lambda image: image.properties.get("created_at", "")
        )

    async def _whole(self, attempt: AttemptId) -> Image:
        _require_id(attempt)
        project = await self._project()
        image = await self._glance.get(attempt)
        if image is None or image.owner != project or image.status != "active":
            images = ([image] if image else []) + await self._tagged(f"{TAG}:{attempt}", with_pending=True)
            image = min(images, key=lambda one: rank(one, attempt, project), default=None)
        if image is None:
            raise StoreRefused(f"{self._session.place}: image {attempt}: not there, or not ours to see")
        if image.status != "active":
            raise StoreRefused(f"{self._session.place}: image {image.id} is {image.status}: not all of it was stored")
        return image


@contextmanager
def _as_store_errors() -> Iterator[None]:
    try:
        yield
    except CloudUnavailable as exc:
        kind = NotConsented if isinstance(exc, NoRole) else StoreUnavailable
        raise kind(str(exc), retry_after_s=exc.retry_after_s) from exc
    except CloudRefused as exc:
        raise StoreRefused(str(exc)) from exc


def _is_hash(algorithm: object) -> TypeGuard[str]:
    """One that hashlib takes, and that has a length of its own."""
    try:
        return isinstance(algorithm, str) and hashlib.new(algorithm).digest_size > 0
    except ValueError:
        return False


def _require_id(attempt: AttemptId) -> None:
    if ATTEMPT.fullmatch(attempt) is None:
        raise StoreRefused(f"{attempt!r} is not the id of a sealed bundle")
