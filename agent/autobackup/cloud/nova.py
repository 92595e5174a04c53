"""
Nova's records of servers: those of this host that live, those of it that were deleted, and one wherever it is.

Read-only, and by lists: their filters go by policy, so that a role of its own is enough
(packaging/openstack/nova-policy.yaml). `GET /servers/{id}` cannot be had so: Nova's database answers 404 for a living
server of another project to everybody but an admin.

Nova drops a filter that the policy forbids and says nothing, and leaves out the servers of a cell that is down and says
nothing. So every answer is checked against its question, and what is not in an answer is not known to be gone: that
takes a second thought (`flows.inquiry`). Measured on a real nova-api; tests/e2e/test_nova_lab.py repeats it.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from autobackup.cloud.session import Answer, ProjectSession
from autobackup.errors import CloudUnavailable
from autobackup.model import InstanceId

_HOST: Final = "OS-EXT-SRV-ATTR:host"
_VM_STATE: Final = "OS-EXT-STS:vm_state"
_TASK_STATE: Final = "OS-EXT-STS:task_state"
_LAUNCHED: Final = "OS-SRV-USG:launched_at"
_MICROVERSION: Final = {"X-OpenStack-Nova-API-Version": "2.68"}
"""Flavors with their extra specs (2.47), and the last one for which a `GET` into a cell that is down is an error."""
_ANY_TIME: Final = "1970-01-01T00:00:00Z"
_PAGE: Final = "100"  # a row may have over 100 KiB: user_data, metadata
_MOST_PAGES: Final = 100
_POLICY: Final = "give our role the rules of packaging/openstack/nova-policy.yaml, or an admin's role"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """
    Nova's record of one server. *host* is None while it is on none. A deleted one has no *properties* left.

    *is_deleted* is its status, which alone says so: the `vm_state` of a deleted row may be any.
    """

    instance: InstanceId
    is_deleted: bool
    host: str | None
    vm_state: str
    task_state: str
    launched: bool
    name: str
    project: str
    user: str
    flavor: str
    extra_specs: Mapping[str, str] | None
    image: str
    properties: Mapping[str, str]


class Nova:
    """One cloud's Nova, as *host* of it sees it."""

    def __init__(self, session: ProjectSession, *, host: str) -> None:
        self._session = session
        self.host = host

    @property
    def place(self) -> str:
        return self._session.place

    async def living(self) -> dict[InstanceId, Server]:
        """
        The servers of this host, without soft-deleted ones. Raises `CloudUnavailable`, with a remedy.

        One that Nova has terminated, and whose record it is about to end, is still among them, as deleted.
        """
        return {one.instance: one async for one in self._list({"host": self.host}, self._is_here)}

    async def deleted(self, *, since_s: float) -> dict[InstanceId, Server]:
        """
        The servers of this host that are deleted, or soft-deleted, and were last changed since *since_s* (Unix time).

        The end of a record is no change of it: one that was changed before, and deleted since, is left out.
        """
        since = datetime.fromtimestamp(since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        query = {"host": self.host, "deleted": "True", "changes-since": since}

        def fits(server: Server) -> bool:
            return self._is_here(server) and (server.is_deleted or server.vm_state == "soft-delete")

        return {one.instance: one async for one in self._list(query, fits)}

    async def find(self, instance: InstanceId) -> Server | None:
        """Its record, on whatever host, living or not. None: Nova shows us none, which may have many reasons."""
        for query in ({"uuid": instance, "changes-since": _ANY_TIME}, {"uuid": instance}):  # one may never have changed
            servers = [one async for one in self._list(query, lambda one: one.instance == instance)]
            if servers:
                return servers[0]
        answer = await self._get(f"/v2.1/servers/{instance}")  # an admin gets an error here when its cell is down
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        shown = self._server(_checked(answer, self.place).get("server"), answer)
        if shown.instance != instance:
            raise CloudUnavailable(f"{self.place}: {answer.call}: it shows {shown.instance}")
        return shown

    async def is_admins(self) -> bool:
        """Whether we are an admin there, which is more than it takes."""
        return "admin" in (await self._session.access()).roles

    # ---- inside -------------------------------------------------------------------------------------------

    async def _list(self, query: Mapping[str, str], fits: Callable[[Server], bool]) -> AsyncIterator[Server]:
        """Every server of the answer, page by page; one that was not asked for is the end of it."""
        page: dict[str, str] | None = {"all_tenants": "1", "limit": _PAGE, **query}
        for _ in range(_MOST_PAGES):
            answer = await self._get("/v2.1/servers/detail", page)
            said = _checked(answer, self.place)
            servers, links = said.get("servers"), said.get("servers_links", [])
            if not isinstance(servers, list) or not isinstance(links, list):
                raise CloudUnavailable(f"{self.place}: {answer.call}: not a list of servers")
            for one in servers:
                server = self._server(one, answer)
                if not fits(server):
                    raise CloudUnavailable(f"{self.place}: Nova does not heed our filters; {_POLICY}")
                yield server
            page = _next_page(links, page or {})
            if page is None:
                return
        raise CloudUnavailable(f"{self.place}: Nova lists over {_MOST_PAGES} pages of servers for host {self.host!r}")

    async def _get(self, path: str, query: Mapping[str, str] | None = None) -> Answer:
        return await self._session.call("compute", "GET", path, params=query, headers=_MICROVERSION)

    def _server(self, said: Any, answer: Answer) -> Server:
        if not isinstance(said, dict) or not isinstance(said.get("id"), str):
            raise CloudUnavailable(f"{self.place}: {answer.call}: not a server")
        if _VM_STATE not in said:
            raise CloudUnavailable(f"{self.place}: Nova knows of {said['id']} only that it exists: a cell is down")
        if _HOST not in said:
            raise CloudUnavailable(f"{self.place}: Nova does not show us the hosts of servers; {_POLICY}")
        missing = [key for key in (_TASK_STATE, _LAUNCHED, "metadata", "status") if key not in said]
        if missing or not isinstance(said[_HOST], str | None):
            raise CloudUnavailable(f"{self.place}: {answer.call}: a server without {', '.join(missing) or 'a host'}")
        flavor, image = said.get("flavor"), said.get("image")
        flavor = flavor if isinstance(flavor, dict) else {}
        return Server(
            instance=InstanceId(said["id"]),
            is_deleted=said.get("status") == "DELETED",
            host=said[_HOST] or None,
            vm_state=str(said[_VM_STATE] or ""),
            task_state=str(said[_TASK_STATE] or ""),
            launched=said[_LAUNCHED] is not None,
            name=str(said.get("name") or ""),
            project=str(said.get("tenant_id") or ""),
            user=str(said.get("user_id") or ""),
            flavor=str(flavor.get("original_name") or ""),
            extra_specs=_texts(flavor.get("extra_specs")),
            image=str(image.get("id") or "") if isinstance(image, dict) else "",
            properties=_texts(said.get("metadata")) or {},
        )

    def _is_here(self, server: Server) -> bool:
        return server.host == self.host


def _checked(answer: Answer, place: str) -> dict[str, Any]:
    """The body of a success. Whatever else was said is no word on any server."""
    if answer.status == HTTPStatus.FORBIDDEN:
        raise CloudUnavailable(f"{place}: {answer.words}; {_POLICY}", status=answer.status)
    if not answer.is_success:
        raise CloudUnavailable(f"{place}: {answer.words}", status=answer.status, retry_after_s=answer.retry_after_s)
    said = answer.json()
    if not isinstance(said, dict):
        raise CloudUnavailable(f"{place}: {answer.call}: not what Nova says")
    return said


def _next_page(links: list[Any], page: Mapping[str, str]) -> dict[str, str] | None:
    """Nova names the next page by a URL, which may be one that this host cannot reach: only its marker is taken."""
    for link in links:
        if isinstance(link, dict) and link.get("rel") == "next":
            marker = _marker(str(link.get("href")))
            if marker and marker != page.get("marker"):
                return {**page, "marker": marker}
    return None


def _marker(url: str) -> str:
    try:
        return parse_qs(urlsplit(url).query).get("marker", [""])[0]
    except ValueError:
        return ""


def _texts(said: Any) -> dict[str, str] | None:
    return {str(key): str(value) for key, value in said.items()} if isinstance(said, dict) else None
