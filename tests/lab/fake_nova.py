"""
Nova's API for readers: a table of servers that a test changes at the instants at which Nova would.

    with FakeKeystone() as keystone, FakeNova(keystone) as nova:
        nova.put(Server(uuid=instance.uuid))
        nova.change(instance.uuid, task_state="deleting")
        nova.delete(instance.uuid)

Answers as Nova 34.0.0 does (facts/nova.md): who may see what is its `policy`; a cell may be down; a service may refuse,
break off, be silent or talk nonsense. It listens on 127.0.0.1, in a thread of its own, and writes down every request.
"""

import asyncio
import re
import threading
import time
import uuid as uuid_module
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web
from tests.lab.fake_keystone import FakeKeystone
from tests.lab.http_thread import HttpThread
from tests.lab.nova_query import UNEXPECTED, Policy, Question, Refused
from tests.lab.nova_servers import SOFT_DELETED, Server, View

__all__ = ["FakeNova", "Policy", "Request", "Server"]

MAX_VERSION: Final = (2, 104)
_SERVERS: Final = re.compile(r"/v2\.1(?:/(?P<project>[0-9a-f]{32}))?/servers(?:/(?P<name>[^/]+))?/?")
_FAULTS: Final = {
    400: "badRequest", 403: "forbidden", 404: "itemNotFound", 413: "overLimit", 429: "overLimit",
    503: "serviceUnavailable",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call as it came. *status* 0: it was not answered."""

    path: str
    query: Mapping[str, str]
    version: str
    status: int = 0


@dataclass(slots=True, kw_only=True)
class _Fault:
    path: re.Pattern[str]
    left_count: float = float("inf")
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    is_silent: bool = False
    cut_after_bytes: int | None = None


class FakeNova:
    """
    Use it as a context manager. Any thread may change it, and what a call sees is one state of it.

    *own_project* is that of who asks; without a *keystone* every token is good.
    """

    def __init__(self, keystone: FakeKeystone | None = None, *, own_project: str = "", max_limit: int = 1000) -> None:
        self.policy = Policy()
        self.max_limit = max_limit
        self.down_cells: set[str] = set()
        self.skips_down_cells = True  # [api]list_records_by_skipping_down_cells
        self.neutron_is_down = False  # Nova asks it, with our token, for every answer that shows a server
        self.requests: list[Request] = []
        self._keystone = keystone
        self._own_project = own_project or (keystone.project_id if keystone else "")
        self._servers: dict[str, Server] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self._http = HttpThread(self._handle)

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        """Without the version in its path."""
        return self._http.url

    # ---- the records --------------------------------------------------------------------------------------

    def put(self, server: Server) -> Server:
        with self._lock:
            self._servers[server.uuid] = server
        return server

    def server(self, uuid: str) -> Server:
        return self._servers[uuid]

    def change(self, uuid: str, **what: Any) -> Server:
        """A save by Nova: `updated_at` moves with it."""
        with self._lock:
            return self.put(replace(self._servers[uuid], updated_at_s=time.time(), **what))

    def end(self, uuid: str) -> None:
        """Disk and ports are gone, the row is not: `DELETED` in the list of the living, for seconds to minutes."""
        self.change(uuid, vm_state="deleted", task_state=None, terminated_at_s=time.time(), queued_for_delete=True)

    def destroy(self, uuid: str) -> None:
        """The row goes, whatever its state was, and metadata and tags with it; `updated_at` does not move."""
        with self._lock:
            self.put(replace(self._servers[uuid], is_deleted=True, metadata={}, tags=()))

    def delete(self, uuid: str) -> None:
        """The end of a delete by nova-compute."""
        self.end(uuid)
        self.destroy(uuid)

    def local_delete(self, uuid: str) -> None:
        """nova-compute is down: nova-api does the same, at once, and nobody tells the host."""
        self.change(uuid, task_state="deleting")
        self.delete(uuid)

    def soft_delete(self, uuid: str) -> None:
        """Off, and to be restored until it is reclaimed."""
        self.change(uuid, vm_state=SOFT_DELETED, task_state=None, queued_for_delete=True)

    def archive(self, uuid: str) -> None:
        """`nova-manage db archive_deleted_rows`: as if it had never been."""
        with self._lock:
            del self._servers[uuid]

    # ---- faults -------------------------------------------------------------------------------------------

    def answer(
        self, status: int, *, path: str = "", times: float = float("inf"), retry_after_s: int | None = None,
        body: bytes | None = None,
    ) -> None:  # fmt: skip
        """Say this, until `heal` or *times* times, to every call whose path has the pattern *path* in it."""
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        self._fault(path, times, status=status, headers=headers, body=body)

    def cut(self, *, path: str = "", times: float = float("inf"), after_bytes: int = 0) -> None:
        """Break the connection, after so many bytes of the right answer."""
        self._fault(path, times, cut_after_bytes=after_bytes)

    def fall_silent(self, *, path: str = "", times: float = float("inf")) -> None:
        """Take the call and never answer."""
        self._fault(path, times, is_silent=True)

    def babble(self, body: bytes = b"<html>Welcome!</html>", *, path: str = "", times: float = float("inf")) -> None:
        """200, and nonsense."""
        self._fault(path, times, status=200, body=body)

    def heal(self) -> None:
        """No more faults, and it listens."""
        with self._lock:
            self._faults.clear()
            self.down_cells.clear()
            self.neutron_is_down = False
        self._http.listen()

    def refuse(self) -> None:
        """Nobody listens."""
        self._http.refuse()

    @contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """The requests of the block."""
        before, taken = len(self.requests), list[Request]()
        yield taken
        taken += self.requests[before:]

    def _fault(self, path: str, times: float, **what: Any) -> None:
        with self._lock:
            self._faults.append(_Fault(path=re.compile(path), left_count=times, **what))

    # ---- answering ----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        at = len(self.requests)
        version = request.headers.get("OpenStack-API-Version", "").removeprefix("compute").strip()
        version = version or request.headers.get("X-OpenStack-Nova-API-Version", "")
        self.requests.append(Request(path=request.path, query=dict(request.query), version=version))
        response = await self._answer(request, version or "2.1")
        self.requests[at] = replace(self.requests[at], status=response.status)
        return response

    async def _answer(self, request: web.Request, version: str) -> web.StreamResponse:
        fault = self._next_fault(request.path)
        if fault is not None and fault.is_silent:
            await asyncio.Event().wait()
        if fault is not None and fault.status:
            if fault.body is None:
                return _error(fault.status, "The service is not able to answer.", version, fault.headers)
            return web.Response(status=fault.status, body=fault.body, headers=fault.headers)
        try:
            response = self._right_answer(request, version)
        except Refused as exc:
            response = _error(exc.status, str(exc), version)
        if fault is not None and fault.cut_after_bytes is not None:
            await _cut(request, response, fault.cut_after_bytes)
        return response

    def _next_fault(self, path: str) -> _Fault | None:
        with self._lock:
            fault = next((one for one in self._faults if one.left_count > 0 and one.path.search(path)), None)
            if fault is not None:
                fault.left_count -= 1
            return fault

    def _right_answer(self, request: web.Request, version: str) -> web.Response:
        if request.path.rstrip("/") in ("", "/v2.1"):
            return web.json_response(self._versions(is_one=request.path.startswith("/v2.1")))
        token = request.headers.get("X-Auth-Token", "")
        if not token or (self._keystone is not None and not self._keystone.knows(token)):
            return _unauthorized()
        asked = _parsed(version)
        match = _SERVERS.fullmatch(request.path)
        if match is None or request.method != "GET":
            raise Refused(404, "The resource could not be found.")
        if match["project"] not in (None, self._own_project):
            raise Refused(400, f"Malformed request URL: URL's project_id '{match['project']}' doesn't match Context's")
        name = match["name"]
        with self._lock:
            question = Question(
                servers=self._servers.values(),
                view=View(
                    version=asked,
                    url=self.url,
                    has_extended_attributes=self.policy.extended_attributes,
                    has_extra_specs=self.policy.extra_specs,
                    has_host_status=self.policy.is_admin,
                    is_list=name in (None, "detail"),
                ),
                policy=self.policy,
                own_project=self._own_project,
                down_cells=self.down_cells,
                skips_down_cells=self.skips_down_cells,
                max_limit=self.max_limit,
            )
            if name in (None, "detail"):
                said = question.search(request.query, is_detail=name is not None)
            else:
                said = {"server": question.show(name)}
        if self.neutron_is_down and any(said.values()):
            raise Refused(500, UNEXPECTED)
        return web.json_response(said, headers=_headers(version))

    def _versions(self, *, is_one: bool) -> Mapping[str, Any]:
        said = {
            "id": "v2.1", "status": "CURRENT", "version": f"{MAX_VERSION[0]}.{MAX_VERSION[1]}", "min_version": "2.1",
            "updated": "2013-07-23T11:33:21Z", "links": [{"rel": "self", "href": f"{self.url}/v2.1/"}],
        }  # fmt: skip
        return {"version": said} if is_one else {"versions": [said]}


def _parsed(version: str) -> tuple[int, int]:
    if version == "latest":
        return MAX_VERSION
    match = re.fullmatch(r"([1-9][0-9]*)\.([0-9]+)", version)
    if match is None:
        raise Refused(400, f"API Version String {version} is of invalid format. Must be of format MajorNum.MinorNum.")
    asked = int(match[1]), int(match[2])
    if not (2, 1) <= asked <= MAX_VERSION:
        lowest, highest = "2.1", f"{MAX_VERSION[0]}.{MAX_VERSION[1]}"
        raise Refused(
            406, f"Version {version} is not supported by the API. Minimum is {lowest} and maximum is {highest}."
        )
    return asked


def _headers(version: str) -> dict[str, str]:
    request_id = f"req-{uuid_module.uuid4()}"
    return {
        "OpenStack-API-Version": f"compute {version}",
        "X-OpenStack-Nova-API-Version": version,
        "Vary": "OpenStack-API-Version, X-OpenStack-Nova-API-Version",
        "x-openstack-request-id": request_id,
        "x-compute-request-id": request_id,
    }


def _error(status: int, message: str, version: str, headers: Mapping[str, str] | None = None) -> web.Response:
    said = {_FAULTS.get(status, "computeFault"): {"code": status, "message": message}}
    return web.json_response(said, status=status, headers={**_headers(version), **(headers or {})})


def _unauthorized() -> web.Response:
    message = "The request you have made requires authentication."
    said = {"error": {"code": 401, "title": "Unauthorized", "message": message}}
    return web.json_response(said, status=401, headers={"WWW-Authenticate": 'Keystone uri="http://127.0.0.1/identity"'})


async def _cut(request: web.Request, response: web.Response, after_bytes: int) -> None:
    """Announce the whole, send a part, and go."""
    if after_bytes and isinstance(response.body, bytes):
        part = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(response.body))}
        )
        await part.prepare(request)
        await part.write(response.body[:after_bytes])
        await asyncio.sleep(0.05)
    if request.transport is not None:
        request.transport.abort()
