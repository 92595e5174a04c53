"""
Glance's images, as the API has them: create, upload, look, share, read, delete.

Whose image it is, and what its properties mean, is `stores.glance`'s to know. Lists are asked for raw: openstacksdk
drops a filter that it does not know, and lists everything.
"""

import asyncio
import json as jsonlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from autobackup import logs
from autobackup.cloud.failures import CHANGE, CREATE, DELETE, GONE, READ, UPLOAD, Failure, failure
from autobackup.cloud.session import Answer, ProjectSession, explanation
from autobackup.cloud.upload import Upload
from autobackup.errors import CloudRefused, CloudUnavailable
from autobackup.units import MiB

_log = logs.get("cloud.glance")
_IMAGES: Final = "/v2/images"
_PATCH: Final = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
_PAGE: Final = "200"
_READ_BYTES: Final = 1 * MiB
_TRIES_WITHOUT_PROGRESS: Final = 5
_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image by Glance's word. *properties* are all of its attributes that are strings and not None."""

    id: str
    status: str
    owner: str
    size_bytes: int | None
    checksum: str | None
    hash_algorithm: str | None
    hash_value: str | None
    tags: frozenset[str]
    protected: bool
    properties: Mapping[str, str]


class Glance:
    """The image service of one project."""

    def __init__(self, session: ProjectSession, *, stall_timeout_s: float, reply_timeout_s: float) -> None:
        self._session = session
        self._stall_timeout_s = stall_timeout_s
        self._reply_timeout_s = reply_timeout_s

    async def create(
        self,
        image_id: str | None,
        *,
        name: str,
        tags: Sequence[str],
        visibility: str,
        properties: Mapping[str, object],
        disk_format: str = "raw",
    ) -> Image | None:
        """A queued image, opaque to Glance. None if *image_id* is or was in use: an id is good for one image, ever."""
        wanted: dict[str, object] = {
            **properties,
            "name": name,
            "tags": list(tags),
            "visibility": visibility,
            "disk_format": disk_format,
            "container_format": "bare",
        }
        if image_id is not None:
            wanted["id"] = image_id
        answer = await self._session.call("image", "POST", _IMAGES, json=wanted)
        if answer.status == HTTPStatus.CONFLICT and image_id is not None:
            return None
        return _image(self._succeeded(answer, CREATE).json())

    async def upload(self, image_id: str, upload: Upload, *, size_bytes: int | None) -> None:
        """Send the data of a queued image. Raises by the table `UPLOAD`, or what ended *upload* on our side."""
        path = f"{_IMAGES}/{image_id}/file"
        headers = {"Content-Type": "application/octet-stream"}
        if size_bytes is not None:
            headers["x-openstack-image-size"] = str(size_bytes)
        try:
            async with (
                upload.watched() as watch,
                self._session.open(
                    "image", "PUT", path, headers=headers, data=upload, reply_timeout_s=self._reply_timeout_s
                ) as response,
            ):
                watch.reschedule(None)
                answer = Answer(
                    call=f"PUT image{path}", status=response.status, headers=response.headers,
                    body=await response.content.read(4096),
                )  # fmt: skip
        except CloudUnavailable:
            if upload.own_error is not None and not isinstance(
                upload.own_error, asyncio.CancelledError | GeneratorExit
            ):
                raise upload.own_error from None
            raise
        except TimeoutError as exc:
            if not upload.watched().expired():
                raise
            raise CloudUnavailable(
                f"{self._session.place}: PUT image{path}: took no byte for {self._stall_timeout_s:g} s; "
                f"make sure that Glance and its backend are well"
            ) from exc
        self._succeeded(answer, UPLOAD)

    async def get(self, image_id: str) -> Image | None:
        """None: there is no such image, or none that this project may see."""
        answer = await self._session.call("image", "GET", f"{_IMAGES}/{image_id}")
        if answer.status in GONE:
            return None
        return _image(self._succeeded(answer, READ).json())

    async def list(self, **filters: str) -> list[Image]:
        """Every image that fits, oldest first. Filters are Glance's own, custom properties among them."""
        found: list[Image] = []
        path, params = _IMAGES, {"sort": "created_at:asc", "limit": _PAGE, **filters}
        while path:
            page = self._succeeded(await self._session.call("image", "GET", path, params=params), READ).json()
            images, path = _listed(page)
            params = {}
            new = {image.id for image in images} - {image.id for image in found}
            if path and not (new and path.startswith(f"{_IMAGES}?")):
                raise CloudUnavailable(f"{self._session.place}: Glance: its list of images leads nowhere")
            found += images
        return found

    async def newest_active(self) -> Image | None:
        """Some image whose hash Glance took not long ago, of whichever project."""
        params = {"status": "active", "sort": "created_at:desc", "limit": "1"}
        page = self._succeeded(await self._session.call("image", "GET", _IMAGES, params=params), READ).json()
        return next(iter(_listed(page)[0]), None)

    async def change(self, image_id: str, changes: Sequence[Mapping[str, object]]) -> Image:
        """Apply the operations of a JSON patch, all or none. Raises by the table `CHANGE`."""
        answer = await self._session.call(
            "image", "PATCH", f"{_IMAGES}/{image_id}", data=jsonlib.dumps(list(changes)).encode(), headers=_PATCH
        )
        return _image(self._succeeded(answer, CHANGE).json())

    async def tag(self, image_id: str, tag: str) -> None:
        """Give it *tag*; one that it has is success."""
        answer = await self._session.call("image", "PUT", f"{_IMAGES}/{image_id}/tags/{quote(tag, safe='')}")
        self._succeeded(answer, CHANGE)

    async def untag(self, image_id: str, tag: str) -> None:
        """Take *tag* from it; none there is success."""
        answer = await self._session.call("image", "DELETE", f"{_IMAGES}/{image_id}/tags/{quote(tag, safe='')}")
        if answer.status not in GONE:
            self._succeeded(answer, CHANGE)

    async def delete(self, image_id: str) -> None:
        """Nothing there is success."""
        answer = await self._session.call("image", "DELETE", f"{_IMAGES}/{image_id}")
        if answer.status not in GONE:
            self._succeeded(answer, DELETE)

    async def share(self, image_id: str, project_id: str) -> None:
        """Let *project_id* read it; pending in its lists until it accepts, readable at once."""
        answer = await self._session.call(
            "image", "POST", f"{_IMAGES}/{image_id}/members", json={"member": project_id}
        )  # fmt: skip
        if answer.status != HTTPStatus.CONFLICT:  # it is a member already
            self._succeeded(answer, UPLOAD if answer.status in GONE else CREATE)

    async def read(self, image_id: str, *, offset: int, length: int) -> bytes:
        """At most *length* bytes from *offset*; fewer only at the end."""
        pieces: list[bytes] = []
        left = length
        async for piece in self.stream(image_id, offset=offset, end=offset + length):
            pieces.append(piece[:left])
            left -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def stream(self, image_id: str, *, offset: int, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """
        The data from *offset* up to *end*, 1 MiB at a time.

        A connection that breaks is taken up again where it broke, as long as each try brings something.
        """
        at, fruitless = offset, 0
        while end is None or at < end:
            before = at
            try:
                async with aclosing(self._range(image_id, at, end)) as pieces:
                    async for piece in pieces:
                        at += len(piece)
                        yield piece
                        if end is not None and at >= end:
                            return  # whoever does not know ranges sends all the rest, too
                return
            except CloudUnavailable as exc:
                fruitless = fruitless + 1 if at == before else 0
                if fruitless >= _TRIES_WITHOUT_PROGRESS:
                    raise
                _log.warning("download.cut", image=image_id, at_bytes=at, error=str(exc), consequence="taken up again")
                await asyncio.sleep(_PAUSE_S * (1 + fruitless))

    # ---- inside -----------------------------------------------------------------------------------------

    async def _range(self, image_id: str, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
        path = f"{_IMAGES}/{image_id}/file"
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        async with self._session.open("image", "GET", path, headers=headers) as response:
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return
            if response.status == HTTPStatus.UNAUTHORIZED:
                await self._session.renew_token()
            if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                answer = Answer(
                    call=f"GET image{path}", status=response.status, headers=response.headers,
                    body=await response.content.read(4096),
                )  # fmt: skip
                raise failure(answer, READ, self._session.place)
            if start and response.status == HTTPStatus.OK:
                raise CloudRefused(f"{self._session.place}: GET image{path}: a part was asked for, and the whole came")
            gathered: list[bytes] = []  # up to 1 MiB, or what had come when the connection broke
            try:
                while piece := await response.content.read(_READ_BYTES - sum(map(len, gathered))):
                    gathered.append(piece)
                    if sum(map(len, gathered)) == _READ_BYTES:
                        whole, gathered = b"".join(gathered), []
                        yield whole
            except (aiohttp.ClientError, OSError):
                if gathered:
                    yield b"".join(gathered)
                raise
            if gathered:
                yield b"".join(gathered)

    def _succeeded(self, answer: Answer, table: Mapping[int, Failure]) -> Answer:
        if not answer.is_success:
            raise failure(answer, table, self._session.place)
        return answer


def _listed(page: Any) -> tuple[list[Image], str]:
    """The images of one page, and where the next one is."""
    try:
        said, following = page["images"], page.get("next", "")
        return [_image(one) for one in said], str(following)
    except (KeyError, TypeError, AttributeError) as exc:
        raise CloudUnavailable(
            f"Glance: what it said is no list of images: {explanation(repr(page).encode())}"
        ) from exc


def _image(said: Any) -> Image:
    try:
        return Image(
            id=said["id"],
            status=said["status"],
            owner=said.get("owner") or "",
            size_bytes=said.get("size"),
            checksum=said.get("checksum"),
            hash_algorithm=said.get("os_hash_algo"),
            hash_value=said.get("os_hash_value"),
            tags=frozenset(said.get("tags") or ()),
            protected=said.get("protected") is True,
            properties={key: value for key, value in said.items() if isinstance(value, str)},
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise CloudUnavailable(f"Glance: what it said is not an image: {explanation(repr(said).encode())}") from exc
