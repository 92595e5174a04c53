"""
One project of one cloud: who we are there, where its services are, and one call to any of them.

openstacksdk and keystoneauth read clouds.yaml, get tokens and renew them, in threads of their own; every call to a
service is made here, in the loop, with a deadline, a request id that is logged on both sides, and a new token after a
401. No status is an error here, but for Keystone's: what one means is the caller's to know.

A project-scoped session puts images and keys where they belong. What is asked of the project is its consent: the
roles in `REQUIRED_ROLES`, or a trust or an application credential that somebody gave us.
"""

import asyncio
import functools
import json as jsonlib
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp

from autobackup import logs
from autobackup.cloud.identity import Access, Credentials
from autobackup.errors import CloudUnavailable

_log = logs.get("cloud.session")
_CONNECT_S: Final = 10.0
_REMEDY: Final = "make sure that it runs and can be reached from this host"
_MAX_ANSWER_BYTES: Final = 16 << 20  # a page of 1,000 images has 2 MiB
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a service said, whole. *call* names it for logs and errors."""

    call: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def retry_after_s(self) -> float | None:
        """Seconds, where the service names a time. The other form of the header, a date, is not used by OpenStack."""
        text = self.headers.get("Retry-After", "")
        return float(text) if text.isascii() and text.isdigit() else None

    @property
    def words(self) -> str:
        """`PUT image/v2/images/…: 413 (req-…): the explanation`, for the text of an error."""
        request_id = self.headers.get("X-Openstack-Request-Id", "")
        said = explanation(self.body)
        return f"{self.call}: {self.status}{f' ({request_id})' if request_id else ''}{f': {said}' if said else ''}"

    def json(self) -> Any:
        """The body. `CloudUnavailable` where a proxy answered in a service's place."""
        try:
            return jsonlib.loads(self.body)
        except (ValueError, RecursionError):
            raise CloudUnavailable(f"{self.call}: {self.status}, but the answer is not JSON") from None


class ProjectSession:
    """Calls to the services of one project. Cheap to build; asks nobody before its first call."""

    def __init__(
        self,
        *,
        cloud: str,
        project: str = "",
        project_domain: str = "",
        clouds_yaml: Path | None = None,
        call_timeout_s: float = 30.0,
    ) -> None:
        self.place = f"cloud {cloud!r}" + (f", project {project!r}" if project else "")
        self._call_timeout_s = call_timeout_s
        self._credentials = Credentials(
            cloud=cloud, project=project, project_domain=project_domain, clouds_yaml=clouds_yaml,
            timeout_s=call_timeout_s, place=self.place,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(1, "keystone")

    async def check_entry(self) -> None:
        """
        Raise `ConfigError` if clouds.yaml or our entry in it is wrong. Asks nobody on the network.

        Without a deadline: a busy machine may take seconds to import openstacksdk, which is nothing to mend.
        """
        await asyncio.get_running_loop().run_in_executor(self._threads, self._credentials.ready)

    async def access(self) -> Access:
        """Who we are in the project, by a token that is good now. `CloudUnavailable` says what is to be done."""
        return await self._in_thread(self._credentials.access)

    async def access_now(self) -> Access:
        """As `access`, asked of Keystone again: a role that was taken from us does not end a token."""
        return await self._in_thread(self._credentials.access_now)

    async def call(
        self,
        service: str,
        method: str,
        path: str,
        *,
        json: object = None,
        data: bytes | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One call, answered whole. Raises `CloudUnavailable` if nobody answered in time."""
        if json is not None:
            data = jsonlib.dumps(json).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        for is_last in (False, True):
            words = f"{method} {service}{path}"
            async with (
                deadline(self._call_timeout_s * 3, words, self.place),  # a token, TLS, the call: each has its own
                self.open(service, method, path, params=params, headers=headers, data=data) as response,
            ):
                body = await _limited(response, f"{self.place}: {words}")
                answer = Answer(call=words, status=response.status, headers=response.headers, body=body)
            if answer.status != HTTPStatus.UNAUTHORIZED or is_last:
                break
            await self.renew_token()
        return answer

    async def renew_token(self) -> None:
        """Forget the token: a service refused it, whatever Keystone had promised."""
        await self._in_thread(self._credentials.forget)

    @asynccontextmanager
    async def open(
        self,
        service: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | AsyncIterable[Any] | None = None,
        reply_timeout_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """
        One call whose answer is read by the caller, while this is entered.

        *reply_timeout_s* bounds each wait for bytes of the answer, once all of *data* was sent. Each call has a
        connection of its own: uWSGI closes them anyway, and nothing is left open between two calls.
        """
        token, endpoint = await self._in_thread(functools.partial(self._credentials.token_and_endpoint, service))
        request_id = f"req-{uuid.uuid4()}"
        sent_headers = {"X-Auth-Token": token, "X-Openstack-Request-Id": request_id, **(headers or {})}
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_S, sock_read=reply_timeout_s or self._call_timeout_s
        )
        words, started_s, status = f"{method} {service}{path}", time.monotonic(), 0
        connector = aiohttp.TCPConnector(ssl=await self._in_thread(self._tls), force_close=True)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=True) as http,
                http.request(
                    method, endpoint + path, params=params, headers=sent_headers, data=data, allow_redirects=False
                ) as response,
            ):
                status = response.status
                yield response
        except (aiohttp.ClientResponseError, aiohttp.ClientPayloadError) as exc:
            # their texts, and those of their causes, show bytes of the answer, which may be those of a key
            said = f"the answer is broken ({type(exc).__name__})"
            raise CloudUnavailable(f"{self.place}: {words} at {endpoint}: {said}; {_REMEDY}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            said = str(exc) or type(exc).__name__
            raise CloudUnavailable(f"{self.place}: {words} at {endpoint}: {said}; {_REMEDY}") from exc
        finally:
            await asyncio.sleep(0)  # the socket is closed by the loop's next turn, and not left to a later one
            say = (
                _log.debug if method == "GET" else _log.info
            )  # what changed something is found again by its request id
            say(
                "cloud.call", call=words, status=status, request_id=request_id,
                elapsed_s=round(time.monotonic() - started_s, 3),
            )  # fmt: skip

    def _tls(self) -> ssl.SSLContext | bool:
        return self._credentials.tls()

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """The one way to keystoneauth, which blocks; its own timeouts end the thread soon after the deadline."""
        async with deadline(self._call_timeout_s, "Keystone", self.place):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)


@asynccontextmanager
async def deadline(longest_s: float, what: str, place: str) -> AsyncIterator[None]:
    """End what takes longer, as `CloudUnavailable`."""
    try:
        async with asyncio.timeout(longest_s) as timer:
            yield
    except TimeoutError as exc:
        if not timer.expired():
            raise
        raise CloudUnavailable(f"{place}: {what}: no answer in {longest_s:g} s; {_REMEDY}") from exc


def explanation(body: bytes, *, longest: int = 200) -> str:
    """What a service says of its refusal, whether it says so in JSON or in HTML, in one line."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        said: Any = jsonlib.loads(text)
    except (ValueError, RecursionError):
        said = re.sub(r"(?s)<title>.*?</title>|<h1>.*?</h1>|<[^>]*>", " ", text)
    while isinstance(said, dict) and said:
        inner = (value for value in said.values() if isinstance(value, dict))  # Nova's are under a name of their own
        said = next((said[key] for key in ("message", "description", "title", "error") if key in said), next(inner, ""))
    return " ".join(str(said).split())[:longest]


async def _limited(response: aiohttp.ClientResponse, call: str) -> bytes:
    pieces, total_bytes = [], 0
    async for piece in response.content.iter_chunked(1 << 16):
        pieces.append(piece)
        total_bytes += len(piece)
        if total_bytes > _MAX_ANSWER_BYTES:
            raise CloudUnavailable(f"{call}: an answer of over {_MAX_ANSWER_BYTES} bytes")
    return b"".join(pieces)
