"""
The `glance` store: an image for each sealed bundle, owned by the destination's project.

    id          the attempt's, which is journaled before; an id that was deleted is never free again, so a second image
                for one attempt gets an id of Glance's choice, and is found by its tag
    tags        `autobackup`, `autobackup:<attempt>`
    properties  `autobackup_*` as they were given, others with a prefix; plus Nova's and the encryption spec's words
                for whoever looks at images without knowing us

An image is held when Glance calls it active. raw/bare is what Glance looks into least; the bundle's own header keeps
it from seeing a disk format in random bytes. What came of an upload is asked of the image, never believed of the
answer (`cloud.failures.recovery`).
"""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
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
from autobackup.stores.interface import Body, Stored

_log = logs.get("stores.glance")
_ATTEMPT: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TAG: Final = "autobackup"
_MARK: Final = "autobackup_attempt"  # gone or another: somebody edited the properties
_OURS: Final = "autobackup_"
_OTHERS: Final = "autobackup_property_"  # a name that is not ours could be one of Glance's own
_ESCAPED: Final = "json:"
_DEFAULT_ALGORITHM: Final = "sha512"
_PUTS: Final = 3
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

    async def put(self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str]) -> None:
        _require_id(attempt)
        await self.check()
        with _as_store_errors():
            image = await self._create(attempt, properties)
            for member in self._members:  # before the data: a backup that is sent must not be lost for a name
                await self._glance.share(image.id, member)
            await self._send(image, body)

    async def stat(self, attempt: AttemptId) -> Stored:
        with _as_store_errors():
            return _stored(await self._whole(attempt), await self._project())

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
            images = await self._tagged(_TAG, status="active")  # what was shared with us once we accepted it
        held = []
        for image in _best_of_each(images, project):
            try:
                held.append(_stored(image, project))
            except RecordDamaged as exc:
                _log.warning("properties.damaged", error=str(exc), consequence="listed without its properties")
                held.append(Stored(attempt=_attempt_of(image), size_bytes=image.size_bytes or 0, properties={}))
        return held

    async def unfinished(self, agent_id: str) -> list[AttemptId]:
        with _as_store_errors():
            owner = await self._project()
            images = await self._glance.list(tag=_TAG, owner=owner, autobackup_agent=agent_id)
            begun = {_attempt_of(image) for image in images if image.status in ("queued", "saving")}
            # an attempt that is held is not to be removed because somebody gave its tag to another image
            return [
                attempt
                for attempt in sorted(begun)
                if not any(image.status == "active" for image in await self._all_of(attempt))
            ]

    # ---- inside -----------------------------------------------------------------------------------------

    async def _create(self, attempt: AttemptId, properties: Mapping[str, str]) -> Image:
        words = _image_properties(attempt, properties)
        name = properties.get("autobackup_instance_name") or properties.get("autobackup_instance") or attempt
        for image_id in (attempt, None):
            image = await self._glance.create(
                image_id,
                name=_plain(f"autobackup of {name}")[:255],
                tags=(_TAG, f"{_TAG}:{attempt}"),
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
        tagged = await self._glance.list(tag=f"{_TAG}:{attempt}", owner=project)
        tagged += await self._glance.list(tag=f"{_TAG}:{attempt}", owner=project, os_hidden="true")
        found = {image.id: image for image in ([first] if first else []) + tagged}
        return [image for image in found.values() if image.owner == project]

    async def _tagged(self, tag: str, *, with_pending: bool = False, **filters: str) -> list[Image]:
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
            images = ([image] if image else []) + await self._tagged(f"{_TAG}:{attempt}", with_pending=True)
            image = min(images, key=lambda one: _rank(one, attempt, project), default=None)
        if image is None:
            raise StoreRefused(f"{self._session.place}: image {attempt}: not there, or not ours to see")
        if image.status != "active":
            raise StoreRefused(f"{self._session.place}: image {image.id} is {image.status}: not all of it was stored")
        return image


def _best_of_each(images: Sequence[Image], project: str) -> list[Image]:
    """One image for each attempt, in the order given."""
    chosen: dict[AttemptId, Image] = {}
    for image in sorted(images, key=lambda one: _rank(one, _attempt_of(one), project)):
        chosen.setdefault(_attempt_of(image), image)
    ids = {image.id for image in chosen.values()}
    return [image for image in images if image.id in ids]


def _rank(image: Image, attempt: AttemptId, project: str) -> tuple[bool, bool, bool]:
    """
    Which image of several is *attempt*'s: the least. Ours before one that was shared with us, whoever tagged it how.

    Of others', the one with the id: nobody can choose that of an image that was there before. Then the oldest.
    """
    return image.owner != project, image.status != "active", image.id != attempt


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
    if _ATTEMPT.fullmatch(attempt) is None:
        raise StoreRefused(f"{attempt!r} is not the id of a sealed bundle")


def _image_properties(attempt: AttemptId, properties: Mapping[str, str]) -> dict[str, str]:
    words = {key if key.startswith(_OURS) else _OTHERS + key: _encoded(value) for key, value in properties.items()}
    words |= {_MARK: attempt, "image_type": "autobackup"}
    if instance := properties.get("autobackup_instance"):
        words["instance_uuid"] = instance
    if secret := properties.get("autobackup_key_ref"):
        # the words of the image encryption spec; nothing acts on them, and the key's end is ours to bring
        words |= {
            "os_encrypt_format": "AES256-GCM-HKDF",
            "os_encrypt_key_id": secret,
            "os_encrypt_key_deletion_policy": "do_not_delete",
        }
    return words


def _stored(image: Image, project: str) -> Stored:
    attempt = _attempt_of(image)
    if image.properties.get(_MARK) != attempt:
        raise RecordDamaged(f"image {image.id}: somebody edited its autobackup_* properties")
    properties = {
        key.removeprefix(_OTHERS): _decoded(value, image)
        for key, value in image.properties.items()
        if key.startswith(_OURS) and key != _MARK
    }
    return Stored(
        attempt=attempt,
        size_bytes=image.size_bytes or 0,
        properties=properties,
        digest_algorithm=image.hash_algorithm or "",
        digest=image.hash_value or "",
        shared_by="" if image.owner == project else image.owner,
    )


def _attempt_of(image: Image) -> AttemptId:
    """By its tag; by its own words or the least of them where somebody gave it several."""
    tagged = sorted(tag.removeprefix(f"{_TAG}:") for tag in image.tags if tag.startswith(f"{_TAG}:"))
    known = [text for text in tagged if _ATTEMPT.fullmatch(text)] or [image.id]
    own = [text for text in (image.properties.get(_MARK, ""), image.id) if text in known]
    return AttemptId((own or known)[0])


def _encoded(value: str) -> str:
    """Glance takes no character beyond the Basic Multilingual Plane: MySQL's utf8 would not hold it."""
    return _ESCAPED + json.dumps(value) if _plain(value) != value or value.startswith(_ESCAPED) else value


def _decoded(value: str, image: Image) -> str:
    if not value.startswith(_ESCAPED):
        return value
    try:
        return str(json.loads(value.removeprefix(_ESCAPED)))
    except ValueError:
        raise RecordDamaged(f"image {image.id}: somebody edited its autobackup_* properties") from None


def _plain(text: str) -> str:
    return re.sub("[^\x00-\ud7ff\ue000-\uffff]", "\ufffd", text)
