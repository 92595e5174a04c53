"""Which servers of a fake Nova one question gets to see: policy, filters, pages, cells that are down."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self
from urllib.parse import urlencode

from multidict import MultiMapping
from tests.lab.nova_servers import SOFT_DELETED, Server, View

_EXACT: Final = ("project_id", "user_id", "uuid", "host", "vm_state", "task_state")
_FREE_FILTERS: Final = frozenset({
    "name", "status", "image", "flavor", "ip", "changes-since", "changes-before", "all_tenants",
})  # fmt: skip
_PAGING: Final = frozenset({"limit", "marker", "page_size", "offset", "sort_key", "sort_dir"})
_POLICY: Final = "Policy doesn't allow os_compute_api:servers:{} to be performed."
UNEXPECTED: Final = (
    "Unexpected API Error. Please report this at http://bugs.launchpad.net/nova/ and attach the Nova API log if "
    "possible.\n<class 'nova.exception.NovaException'>"
)


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What Nova's policy file, or the admin role, gives us."""

    detail: bool = True  # servers:detail
    all_tenants: bool = True  # servers:detail:get_all_tenants
    all_filters: bool = True  # servers:allow_all_filters; without it, filters are dropped without a word
    extended_attributes: bool = True  # os-extended-server-attributes: OS-EXT-SRV-ATTR:*
    extra_specs: bool = True  # servers:show:flavor-extra-specs
    is_admin: bool = True  # without it, GET of another project's server is a 404, whatever the policy

    @classmethod
    def least(cls) -> Self:
        """A custom role on these five, and no other right."""
        return cls(is_admin=False)

    @classmethod
    def none(cls) -> Self:
        """A member of some project."""
        return cls(all_tenants=False, all_filters=False, extended_attributes=False, is_admin=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request for servers, and all that its answer depends on."""

    servers: Collection[Server]
    view: View
    policy: Policy
    own_project: str
    down_cells: Collection[str]
    skips_down_cells: bool  # [api]list_records_by_skipping_down_cells
    max_limit: int

    def show(self, uuid: str) -> Mapping[str, Any]:
        server = next((one for one in self.servers if one.uuid == uuid), None)
        not_found = Refused(404, f"Instance {uuid} could not be found.")
        if server is None:
            raise not_found
        if server.cell in self.down_cells:
            if self.view.version < (2, 69):
                raise Refused(500, UNEXPECTED)
            if server.queued_for_delete:
                raise not_found
            return self.view.from_down_cell(server)
        if server.is_deleted or not (self.policy.is_admin or server.project_id == self.own_project):
            raise not_found
        return self.view.detailed(server)

    def search(self, query: MultiMapping[str], *, is_detail: bool) -> Mapping[str, Any]:
        asked = _last_of_each(query)
        wanted = {key: value for key, value in asked.items() if key not in _PAGING}
        if not self.policy.all_filters:
            wanted = {key: value for key, value in wanted.items() if key in _FREE_FILTERS}
        everywhere = _is_true(wanted.pop("all_tenants", "0"), lone_means=True)
        if is_detail and not self.policy.detail:
            raise Refused(403, _POLICY.format("detail"))
        if everywhere and not self.policy.all_tenants:
            raise Refused(403, _POLICY.format("detail:get_all_tenants"))
        if "deleted" in (wanted.get("status", "").lower(), wanted.get("vm_state")) and not self.policy.is_admin:
            raise Refused(403, "Only administrators may list deleted instances")
        found = [one for one in self._ordered() if everywhere or one.project_id == self.own_project]
        found = [one for one in found if _fits(one, wanted)]
        down = [one for one in found if one.cell in self.down_cells]
        if down and not self.skips_down_cells:
            raise Refused(500, UNEXPECTED)
        shows_down = self.view.version >= (2, 69) and not wanted and not _PAGING & asked.keys()
        found = [one for one in found if one not in down or (shows_down and not one.queued_for_delete)]
        page, link = self._page(asked, found, path="servers/detail" if is_detail else "servers")
        show = self.view.detailed if is_detail else self.view.basic
        return {"servers": [self.view.from_down_cell(one) if one in down else show(one) for one in page], **link}

    def _ordered(self) -> list[Server]:
        """Newest first."""
        return sorted(self.servers, key=lambda one: (one.created_at_s, one.uuid), reverse=True)

    def _page(
        self, asked: Mapping[str, str], found: list[Server], *, path: str
    ) -> tuple[list[Server], Mapping[str, Any]]:
        limit, marker = self.max_limit, asked.get("marker")
        if "limit" in asked:
            if not asked["limit"].isdigit():
                raise Refused(400, f"Invalid input for query parameters limit. Value: {asked['limit']}.")
            limit = min(int(asked["limit"]), limit)
        if marker is not None:
            order = [one.uuid for one in self._ordered()]
            if marker not in order:
                raise Refused(400, f"marker [{marker}] not found")
            found = [one for one in found if order.index(one.uuid) > order.index(marker)]
        page = found[:limit]
        if not limit or len(page) != limit:
            return page, {}
        following = urlencode(sorted({**asked, "marker": page[-1].uuid}.items()))
        return page, {"servers_links": [{"rel": "next", "href": f"{self.view.url}/v2.1/{path}?{following}"}]}


def _fits(server: Server, wanted: Mapping[str, str]) -> bool:
    for key in _EXACT:
        value = wanted.get(key, wanted.get("tenant_id") if key == "project_id" else None)
        if value is not None and getattr(server, key) != value:
            return False
    if "status" in wanted and server.status != wanted["status"].upper():
        return False
    if "name" in wanted and not re.search(wanted["name"], server.name):
        return False
    if "changes-since" in wanted:
        since = datetime.fromisoformat(wanted["changes-since"].replace("Z", "+00:00"))
        since_s = (since if since.tzinfo else since.replace(tzinfo=UTC)).timestamp()
        if server.updated_at_s is None or int(server.updated_at_s) < since_s:  # MySQL keeps whole seconds
            return False
    is_gone = server.is_deleted or server.vm_state == SOFT_DELETED
    if "deleted" in wanted:
        return is_gone is _is_true(wanted["deleted"])
    return "changes-since" in wanted or not is_gone


def _is_true(value: str, *, lone_means: bool = False) -> bool:
    """As oslo's bool_from_string; `?all_tenants` alone is a yes."""
    return lone_means if not value else value.strip().lower() in ("1", "t", "true", "on", "y", "yes")


def _last_of_each(query: MultiMapping[str]) -> dict[str, str]:
    """Of a key that is given twice, Nova takes the last: `uuid=A&uuid=B` is a question for B."""
    return {key: query.getall(key)[-1] for key in query}
