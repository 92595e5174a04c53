"""
What a real nova-api answers, and to whom: the policy that the agent is deployed with, and the words it decides by.
"""

import os
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.compute.nova import Nova, missing_nova
from tests.lab.openstack.identity import INSPECTOR

POLICY_FILE: Final = Path(__file__).parents[2] / "packaging/openstack/nova-policy.yaml"
POLICY: Final[dict[str, str]] = yaml.safe_load(POLICY_FILE.read_text())

LIST = "os_compute_api:servers:detail"
ALL_TENANTS = "os_compute_api:servers:detail:get_all_tenants"
FILTERS = "os_compute_api:servers:allow_all_filters"
ATTRIBUTES = "os_compute_api:os-extended-server-attributes"
EXTRA_SPECS = "os_compute_api:servers:show:flavor-extra-specs"

HOST = "OS-EXT-SRV-ATTR:host"
STATE = "OS-EXT-STS:vm_state"
TERMINATED = "OS-SRV-USG:terminated_at"


@pytest.fixture(scope="module")
def running(cloud: Cloud) -> Iterator[Nova]:
    if missing := missing_nova():
        if os.environ.get("CI") or os.environ.get("AUTOBACKUP_REQUIRE_OPENSTACK"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with Nova(cloud) as started:
        yield started


@pytest.fixture
def nova(running: Nova) -> Nova:
    """With the policy that we ship."""
    running.use_policy(POLICY_FILE.read_text())
    return running


def new_host() -> str:
    return f"host-{uuid.uuid4().hex[:8]}"


def put(nova: Nova, **fields: Any) -> str:
    server = str(uuid.uuid4())
    nova.put(server, metadata={"autobackup": "yes"}, extra_specs={"autobackup:enabled": "true"}, **fields)
    return server


def ids(servers: list[dict[str, Any]]) -> set[str]:
    return {server["id"] for server in servers}


def an_hour_ago() -> str:
    return f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"


# ---- the policy ---------------------------------------------------------------------------------------------


def test_the_inspector_sees_what_it_decides_by(nova: Nova, cloud: Cloud) -> None:
    host = new_host()
    living, terminated = put(nova, host=host), put(nova, host=host, project="tenant-b", user="bob")
    elsewhere = put(nova, host=new_host())
    nova.delete(terminated)

    (seen,) = nova.servers(f"&host={host}")
    (dead,) = nova.servers(f"&uuid={terminated}&deleted=True")

    assert (seen["id"], seen["status"], seen[HOST]) == (living, "ACTIVE", host)
    assert seen["metadata"] == {"autobackup": "yes"}
    assert seen["flavor"]["extra_specs"] == {"autobackup:enabled": "true"}
    assert (seen["tenant_id"], seen["user_id"]) == (cloud.projects["tenant-a"], cloud.users["alice"])
    assert (dead["id"], dead["status"], dead[HOST], dead[STATE]) == (terminated, "DELETED", host, "deleted")
    assert dead["tenant_id"] == cloud.projects["tenant-b"]
    assert ids(nova.servers(f"&host={host}&deleted=True")) == {terminated}
    assert ids(nova.servers(f"&host={host}&changes-since={an_hour_ago()}")) == {living, terminated}
    assert elsewhere not in ids(nova.servers(f"&host={host}"))


@pytest.mark.parametrize("rule", [LIST, ALL_TENANTS])
def test_without_either_rule_of_the_list_there_is_none(nova: Nova, rule: str) -> None:
    nova.use_policy({name: check for name, check in POLICY.items() if name != rule})

    answer = nova.ask(nova.DETAIL)

    assert answer.status == 403
    assert f"Policy doesn't allow {rule} " in answer.json()["forbidden"]["message"]


def test_without_the_rule_of_filters_they_are_dropped_silently(nova: Nova) -> None:
    """The answer looks like one: every living server of the cloud for a deleted one of this host."""
    host = new_host()
    terminated, elsewhere = put(nova, host=host), put(nova, host=new_host())
    nova.delete(terminated)
    nova.use_policy({name: check for name, check in POLICY.items() if name != FILTERS})

    seen = ids(nova.servers(f"&host={host}&uuid={terminated}&deleted=True"))

    assert elsewhere in seen
    assert terminated not in seen


@pytest.mark.parametrize("rule", [ATTRIBUTES, EXTRA_SPECS])
def test_without_either_rule_of_attributes_the_keys_are_missing(nova: Nova, rule: str) -> None:
    server = put(nova)
    nova.use_policy({name: check for name, check in POLICY.items() if name != rule})

    (seen,) = nova.servers(f"&uuid={server}")

    assert (HOST in seen) == (rule != ATTRIBUTES)
    assert ("extra_specs" in seen["flavor"]) == (rule != EXTRA_SPECS)


def test_every_rule_of_the_policy_file_was_missed_above() -> None:
    assert set(POLICY) == {LIST, ALL_TENANTS, FILTERS, ATTRIBUTES, EXTRA_SPECS}


def test_nobody_else_gains_or_loses_anything_by_the_policy_file(nova: Nova) -> None:
    defaults = nova.policy_defaults()

    assert {rule: f"{defaults[rule]} or role:{INSPECTOR}" for rule in POLICY} == POLICY


def test_the_role_passes_no_other_rule_than_those_of_the_policy_file(nova: Nova) -> None:
    """All of Nova's rules, each asked about a server of another project."""
    anybody = nova.allowed("no-role-of-Nova")

    assert nova.allowed(INSPECTOR) - anybody == set(POLICY)
    nova.use_policy({})
    assert nova.allowed(INSPECTOR) == nova.allowed("no-role-of-Nova") == anybody


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/servers/{server}", None),
        ("PUT", "/servers/{server}", {"server": {"name": "renamed"}}),
        ("GET", "/servers/{server}", None),
        ("POST", "/servers/{server}/action", {"os-stop": None}),
        ("POST", "/servers/{server}/action", {"forceDelete": None}),
        ("POST", "/servers/{server}/action", {"createImage": {"name": "stolen"}}),
        ("POST", "/servers/{server}/action", {"os-getConsoleOutput": {}}),
        ("POST", "/servers/{server}/action", {"os-resetState": {"state": "error"}}),
        ("POST", "/servers/{server}/metadata", {"metadata": {"autobackup": "no"}}),
        ("GET", "/servers/{server}/metadata", None),
        ("PUT", "/servers/{server}/tags/tagged", None),
        ("GET", "/servers/{server}/os-instance-actions", None),
        ("GET", "/servers/{server}/os-volume_attachments", None),
        ("GET", "/servers/{server}/diagnostics", None),
        ("GET", "/servers/{server}/ips", None),
        ("GET", "/servers?all_tenants=1", None),
        ("POST", "/servers", {"server": {"name": "new", "flavorRef": "1", "imageRef": "", "networks": "none"}}),
        ("POST", "/os-server-external-events", {"events": [{"name": "network-changed", "server_uuid": "{server}"}]}),
        ("GET", "/os-services", None),
        ("GET", "/os-hypervisors", None),
        ("GET", "/os-migrations", None),
        ("GET", "/os-aggregates", None),
    ],
)
def test_the_role_opens_no_other_door(nova: Nova, method: str, path: str, body: Any) -> None:
    server = put(nova)
    (before,) = nova.servers(f"&uuid={server}", user="admin", project="admin")
    if "events" in (body or {}):
        body["events"][0]["server_uuid"] = server

    answer = nova.ask("/v2.1" + path.format(server=server), method=method, json=body)

    assert answer.status in {403, 404}, answer
    assert nova.servers(f"&uuid={server}", user="admin", project="admin") == [before]


@pytest.mark.parametrize(("user", "project"), [("autobackup", "service"), ("alice", "tenant-a"), ("carol", "tenant-a")])
def test_without_the_role_nobody_sees_the_hosts(nova: Nova, user: str, project: str) -> None:
    """`autobackup` has the role `service` there, which opens nothing either."""
    server = put(nova)

    assert nova.ask(nova.DETAIL, user=user, project=project).status == 403
    if user != "autobackup":
        own = nova.ask(f"/v2.1/servers/detail?uuid={server}", user=user, project=project).json()["servers"]
        assert server in ids(own)
        assert all(HOST not in one for one in own)


def test_the_agents_own_user_sees_with_the_role(nova: Nova, cloud: Cloud) -> None:
    server = put(nova)
    cloud.grant("autobackup", "service", INSPECTOR)
    try:
        assert ids(nova.servers(f"&uuid={server}", user="autobackup")) == {server}
    finally:
        cloud.revoke("autobackup", "service", INSPECTOR)


# ---- the words ----------------------------------------------------------------------------------------------


def test_a_destroyed_server_has_the_status_deleted_whatever_its_state_was(nova: Nova) -> None:
    """And no metadata any more, but its flavor; a soft-deleted one, which may be restored, has another status."""
    host = new_host()
    ends = {name: put(nova, host=host, name=name) for name in ("deleted", "local", "soft", "soft then destroyed")}
    nova.delete(ends["deleted"])
    nova.destroy(ends["local"])
    nova.soft_delete(ends["soft"])
    nova.soft_delete(ends["soft then destroyed"])
    nova.destroy(ends["soft then destroyed"])

    seen = {server["name"]: server for server in nova.servers(f"&host={host}&deleted=True")}

    assert {name: (one["status"], one[STATE], bool(one["metadata"])) for name, one in seen.items()} == {
        "deleted": ("DELETED", "deleted", False),
        "local": ("DELETED", "active", False),
        "soft": ("SOFT_DELETED", "soft-delete", True),
        "soft then destroyed": ("DELETED", "soft-delete", False),
    }
    assert {name for name, one in seen.items() if one[TERMINATED]} == {"deleted"}
    assert all(one["flavor"]["extra_specs"] == {"autobackup:enabled": "true"} for one in seen.values())
    assert nova.servers(f"&host={host}") == []


def test_a_server_that_is_deleted_but_not_yet_destroyed_is_among_the_living(nova: Nova) -> None:
    """nova-compute saves the state, tells placement and others, and only then destroys the row."""
    server = put(nova)
    nova.mark_deleted(server)

    (seen,) = nova.servers(f"&uuid={server}")

    assert (seen["status"], bool(seen[TERMINATED]), seen["metadata"]) == ("DELETED", True, {"autobackup": "yes"})
    assert nova.servers(f"&uuid={server}&deleted=True") == []
    assert ids(nova.servers(f"&uuid={server}&changes-since={an_hour_ago()}")) == {server}


def test_changes_since_misses_a_destroy_that_comes_late(nova: Nova) -> None:
    """The end of a row does not count as a change of it: ask about what was seen going, one by one."""
    server = put(nova)
    nova.mark_deleted(server)
    time.sleep(1.1)  # whole seconds are asked for
    since = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    nova.destroy(server)

    assert nova.servers(f"&uuid={server}&changes-since={since}") == []
    assert ids(nova.servers(f"&uuid={server}&deleted=True")) == {server}


def test_an_offloaded_server_has_no_host_and_no_filter_by_host_finds_it(nova: Nova) -> None:
    host = new_host()
    server = put(nova, host=host)
    nova.offload(server)

    (seen,) = nova.servers(f"&uuid={server}")

    assert (seen["status"], seen[HOST]) == ("SHELVED_OFFLOADED", None)
    assert nova.servers(f"&host={host}") == nova.servers(f"&host={host}&deleted=True") == []


def test_an_archived_server_is_as_if_it_had_never_been(nova: Nova) -> None:
    server = put(nova)
    nova.delete(server)
    nova.archive()

    assert nova.servers(f"&uuid={server}&deleted=True") == []
    assert nova.servers(f"&uuid={server}&changes-since={an_hour_ago()}") == []


def test_a_cell_that_is_down_is_missing_from_a_good_answer(nova: Nova) -> None:
    """Not in a list is no proof of anything; a living server that is asked for alone is a 500 then."""
    down, up = put(nova, host=new_host(), cell="cell1"), put(nova, host=new_host(), cell="cell2")

    with nova.cell_down("cell1"):
        assert nova.servers(f"&uuid={down}") == nova.servers(f"&uuid={down}&deleted=True") == []
        assert up in ids(nova.servers())
        assert down not in ids(nova.servers())
        assert nova.ask(f"/v2.1/servers/{down}", user="admin", project="admin").status == 500
        newer = nova.ask(f"/v2.1/servers/{down}", user="admin", project="admin", microversion="2.69")
        assert newer.status == 404

    assert ids(nova.servers(f"&uuid={down}")) == {down}


def test_a_server_is_shown_to_its_own_project_and_to_admins_alone(nova: Nova) -> None:
    """Opening the rule does not help: below it the database is asked for the token's own project."""
    server = put(nova)
    nova.use_policy({**POLICY, "os_compute_api:servers:show": "@"})

    def status(user: str, project: str) -> int:
        return nova.ask(f"/v2.1/servers/{server}", user=user, project=project).status

    assert (status("admin", "admin"), status("alice", "tenant-a")) == (200, 200)
    assert (status(INSPECTOR, "service"), status("mallory", "elsewhere")) == (404, 404)
    nova.delete(server)
    assert status("admin", "admin") == 404


def test_a_page_names_the_next_one(nova: Nova) -> None:
    host = new_host()
    servers = {put(nova, host=host) for _ in range(4)}
    query, seen, pages = f"{nova.DETAIL}&host={host}&limit=2", list[str](), 0

    while query:
        page = nova.ask(query).json()
        seen += [server["id"] for server in page["servers"]]
        pages += 1
        query = "".join(link["href"].removeprefix(nova.url) for link in page.get("servers_links", []))

    assert (sorted(seen), pages) == (sorted(servers), 3), "the last full page is followed by an empty one"


def test_the_catalogue_knows_nova_while_it_runs(nova: Nova, cloud: Cloud) -> None:
    catalogue = cloud.authenticate(INSPECTOR, "service").json()["token"]["catalog"]

    (compute,) = [service for service in catalogue if service["type"] == "compute"]
    assert {endpoint["url"] for endpoint in compute["endpoints"]} == {f"{nova.url}/v2.1"}
    foreign = nova.ask(f"/v2.1/{cloud.projects['tenant-b']}/servers/detail?all_tenants=1")
    assert foreign.status == 400, "the other form of the URL has to name the token's project"
