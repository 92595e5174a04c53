"""
What Nova's records say, read from a fake that answers as Nova 34.0.0 was measured to.

What keeps us from reading them is in `test_nova_policy_faults.py`.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract.novas import OTHER_HOST, PIN, Reader, WatchedNova, reader
from tests.contract.test_project_session import entry_of, session_of
from tests.lab.fake_nova import Policy, Server
from tests.lab.nova_servers import HOST
from tests.lab.openstack.cloud import Cloud

from autobackup.cloud import nova as reading
from autobackup.cloud.nova import Nova
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudUnavailable
from autobackup.model import InstanceId

STATES = [
    *("active", "building", "stopped", "resized", "paused", "suspended", "rescued", "error"),
    *("soft-delete", "deleted", "shelved", "shelved_offloaded"),
    "a state of tomorrow's",
]
IMAGE = "5f2c1a9e-3f1b-4e58-9d0e-1c1f6f0a7b11"


@pytest.fixture(params=["the role", "an admin"])
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reader]:
    """Once with no more rights than the policy file gives, once with all of them."""
    with reader(tmp_path) as one:
        one.fake.policy = Policy.least() if request.param == "the role" else Policy()
        yield one


async def since_ever(asked: Reader) -> dict[InstanceId, reading.Server]:
    return await asked.nova.deleted(since_s=0.0)


# ---- what a record says -----------------------------------------------------------------------------------


async def test_a_living_server_is_told_whole(asked: Reader) -> None:
    server = asked.fake.put(
        Server(
            name="web \U0001f4be", metadata={"autobackup": "true", "x": ""}, flavor="m1.big",
            extra_specs={"autobackup:want": "true"}, image=IMAGE, vm_state="stopped", task_state="deleting",
        )
    )  # fmt: skip

    whole = reading.Server(
        instance=InstanceId(server.uuid),
        is_deleted=False,
        host=HOST,
        vm_state="stopped",
        task_state="deleting",
        launched=True,
        name="web \U0001f4be",
        project=server.project_id,
        user=server.user_id,
        flavor="m1.big",
        extra_specs={"autobackup:want": "true"},
        image=IMAGE,
        properties={"autobackup": "true", "x": ""},
    )
    assert await asked.nova.living() == {server.uuid: whole}
    assert await asked.nova.find(InstanceId(server.uuid)) == whole


async def test_a_deleted_server_keeps_its_host_flavor_and_launch_but_not_its_properties(asked: Reader) -> None:
    gone = asked.put(metadata={"autobackup": "true"}, extra_specs={"autobackup:want": "true"}, image=IMAGE)
    unborn = asked.put(vm_state="building", launched_at_s=None)
    for one in (gone, unborn):
        asked.fake.delete(one)

    for servers in (await since_ever(asked), {one: await asked.nova.find(one) for one in (gone, unborn)}):
        found, early = servers[gone], servers[unborn]
        assert found is not None
        assert early is not None
        assert (found.is_deleted, found.host, found.launched, found.image) == (True, HOST, True, IMAGE)
        assert (dict(found.properties), found.extra_specs) == ({}, {"autobackup:want": "true"})
        assert (early.is_deleted, early.launched) == (True, False)


async def test_what_may_be_null_or_missing_is_no_trouble(asked: Reader) -> None:
    """Booted from a volume; without a name; a flavor that Nova has lost."""
    plain = asked.put(task_state=None, image="")
    asked.fake.edit_rows(name=None, tenant_id="", user_id="", flavor={}, progress=..., **{"OS-EXT-STS:vm_state": None})

    for server in ((await asked.nova.living())[plain], await asked.nova.find(plain)):
        assert server is not None
        assert (server.image, server.name, server.task_state, server.vm_state) == ("", "", "", "")
        assert (server.project, server.user, server.flavor) == ("", "", "")
        assert server.extra_specs is None  # not known, which is not: none


@pytest.mark.parametrize("vm_state", STATES)
async def test_its_status_alone_says_that_a_server_is_deleted(asked: Reader, vm_state: str) -> None:
    """A row may be destroyed in any state, and its vm_state stays as it was: also a soft-deleted one's."""
    destroyed, kept = asked.put(vm_state=vm_state, task_state="deleting"), asked.put(vm_state=vm_state)
    asked.fake.destroy(destroyed)

    for found in (await asked.nova.find(destroyed), (await since_ever(asked))[destroyed]):
        assert found is not None
        assert (found.is_deleted, found.vm_state, found.task_state) == (True, vm_state, "deleting")
    found = await asked.nova.find(kept)
    assert found is not None
    assert found.is_deleted is (vm_state == "deleted")  # terminated; its row goes in a moment
    assert (kept in await asked.nova.living()) is (vm_state != "soft-delete")
    assert (kept in await since_ever(asked)) is (vm_state == "soft-delete")


async def test_a_server_that_was_terminated_is_deleted_before_its_record_ends(asked: Reader) -> None:
    """For seconds to minutes it is among the living, with its properties, and not in the list of the deleted."""
    one = asked.put(metadata={"autobackup": "true"})
    asked.fake.end(one)

    assert one not in await since_ever(asked)
    for found in ((await asked.nova.living())[one], await asked.nova.find(one)):
        assert found is not None
        assert (found.is_deleted, found.host, dict(found.properties)) == (True, HOST, {"autobackup": "true"})


async def test_a_soft_deleted_server_is_not_deleted(asked: Reader) -> None:
    one = asked.put(metadata={"autobackup": "true"})
    asked.fake.soft_delete(one)

    for found in ((await since_ever(asked))[one], await asked.nova.find(one)):
        assert found is not None
        assert (found.is_deleted, found.vm_state, found.host) == (False, "soft-delete", HOST)
        assert found.properties == {"autobackup": "true"}


# ---- which records ----------------------------------------------------------------------------------------


async def test_only_servers_of_this_host_are_listed(asked: Reader) -> None:
    mine, dead = asked.put(), asked.put()
    for host in (OTHER_HOST, None, HOST.upper(), f"{HOST}.example.org"):
        asked.put(host=host)
        asked.fake.delete(asked.put(host=host))
    asked.fake.delete(dead)

    assert set(await asked.nova.living()) == {mine}
    assert set(await since_ever(asked)) == {dead}


async def test_deleted_ones_are_listed_by_their_last_change(asked: Reader) -> None:
    """From the second on that is named; the end of a record is no change of it, so that `find` has the rest."""
    now_s = int(time.time())
    old, at_once, new = (asked.put(updated_at_s=float(now_s - ago_s)) for ago_s in (101, 100, 99))
    for one in (old, at_once, new):
        asked.fake.destroy(one)

    assert set(await asked.nova.deleted(since_s=now_s - 100)) == {at_once, new}
    assert set(await asked.nova.deleted(since_s=now_s - 100 + 0.9)) == {at_once, new}
    found = await asked.nova.find(old)
    assert found is not None
    assert found.is_deleted


@pytest.mark.parametrize("host", [HOST, OTHER_HOST, None])
async def test_one_server_is_found_wherever_and_whatever_it_is(asked: Reader, host: str | None) -> None:
    living, dead, soft, reclaimed, unsaved = (asked.put(host=host, updated_at_s=at_s) for at_s in (9e8,) * 4 + (None,))
    asked.put(host=host)
    asked.fake.destroy(dead)
    asked.fake.soft_delete(soft)
    asked.fake.soft_delete(reclaimed)
    asked.fake.destroy(reclaimed)

    for one, is_deleted in ((living, False), (dead, True), (soft, False), (reclaimed, True), (unsaved, False)):
        found = await asked.nova.find(one)
        assert found is not None
        assert (found.instance, found.is_deleted, found.host) == (one, is_deleted, host)


async def test_what_was_archived_or_never_was_has_no_record(asked: Reader) -> None:
    archived, beside = asked.put(), asked.put()
    asked.fake.delete(archived)
    asked.fake.archive(archived)

    for one in (archived, InstanceId("0d2ab1ee-0000-4000-8000-000000000000")):
        assert await asked.nova.find(one) is None
        assert one not in await asked.nova.living()
        assert one not in await since_ever(asked)
    assert await asked.nova.find(beside) is not None


async def test_every_project_is_read(asked: Reader) -> None:
    """Though to `GET /servers/{id}` the role is a stranger, and gets a 404 for a server that lives."""
    foreign, own = asked.put(project_id="f" * 32), asked.put(project_id=asked.keystone.project_id)

    assert set(await asked.nova.living()) == {foreign, own}
    for one in (foreign, own):
        found = await asked.nova.find(one)
        assert found is not None
        assert not found.is_deleted


# ---- pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7, 10])
async def test_a_list_is_read_to_its_end_however_short_its_pages_are(tmp_path: Path, count: int) -> None:
    with reader(tmp_path, max_limit=3) as asked:
        living = {asked.put(created_at_s=float(n)) for n in range(count)}
        dead = {asked.put(created_at_s=float(n)) for n in range(count)}
        for one in dead:
            asked.fake.delete(one)
        with asked.fake.counted() as requests:
            assert set(await asked.nova.living()) == living
            assert set(await since_ever(asked)) == dead
        assert len(requests) == 2 * (count // 3 + 1)
        for request in requests:  # none of the filters is lost on the way
            assert (request.query["host"], request.query["all_tenants"]) == (HOST, "1")
        assert sum("deleted" in request.query for request in requests) == count // 3 + 1


async def test_the_next_page_is_asked_of_the_same_service(tmp_path: Path) -> None:
    """Nova builds the link from what it believes to be its own name; our token is for nobody else."""
    with reader(tmp_path, max_limit=2) as asked, WatchedNova() as stranger:
        living = {asked.put(created_at_s=float(n)) for n in range(5)}

        def edit(said: Any) -> Any:
            for link in said.get("servers_links", []):
                link["href"] = link["href"].replace(asked.fake.url, stranger.url)
            return said

        asked.fake.edit = edit
        assert set(await asked.nova.living()) == living
        assert stranger.requests == []
        assert len(asked.fake.requests) == 3


def link_to(href: object, rel: str = "next") -> dict[str, object]:
    return {"rel": rel, "href": href}


@pytest.mark.parametrize(
    "links",
    [
        [],
        [7, None, "next", []],
        [{}],
        [link_to(None)],
        [link_to("")],
        [link_to("http://127.0.0.1/v2.1/servers/detail?limit=2")],
        [link_to("http://127.0.0.1/v2.1/servers/detail?marker=")],
        [link_to("?marker=x", rel="previous")],
    ],
)
async def test_a_link_that_leads_nowhere_ends_the_list(asked: Reader, links: list[object]) -> None:
    mine = asked.put()
    asked.fake.edit = lambda said: {**said, "servers_links": links}

    assert set(await asked.nova.living()) == {mine}
    assert len(asked.fake.requests) == 1


async def test_a_link_that_is_no_url_is_an_outage_at_worst(asked: Reader) -> None:
    mine = asked.put()
    asked.fake.edit = lambda said: {**said, "servers_links": [link_to("http://[x")]}

    with contextlib.suppress(CloudUnavailable):
        assert set(await asked.nova.living()) == {mine}


async def test_a_marker_that_does_not_move_ends_the_list(asked: Reader) -> None:
    mine = asked.put()
    asked.fake.edit = lambda said: {**said, "servers_links": [link_to(f"?marker={mine}")]}

    assert set(await asked.nova.living()) == {mine}
    assert len(asked.fake.requests) == 2


async def test_pages_without_end_are_an_outage(asked: Reader) -> None:
    marks = [asked.put(), asked.put()]
    calls = 0

    def edit(said: Any) -> Any:
        nonlocal calls
        calls += 1
        return {**said, "servers_links": [link_to(f"?marker={marks[calls % 2]}")]}

    asked.fake.edit = edit
    with pytest.raises(CloudUnavailable, match="pages"):
        await asked.nova.living()
    assert calls <= 100


@pytest.mark.parametrize("count", [300])
async def test_servers_with_as_much_user_data_as_nova_takes_are_read(tmp_path: Path, count: int) -> None:
    """64 KiB each, in the same answer as the host; a tenant must not be able to end all verdicts with it."""
    with reader(tmp_path) as asked:
        living = {asked.put() for _ in range(count)}
        asked.fake.edit_rows(**{"OS-EXT-SRV-ATTR:user_data": "A" * 65535})
        assert set(await asked.nova.living()) == living


# ---- how it is asked --------------------------------------------------------------------------------------


async def test_nova_is_only_ever_read_and_always_by_the_same_words(asked: Reader) -> None:
    """2.68: for what comes later, a cell that is down makes a GET of a living server a 404."""
    one, gone = asked.put(), asked.put()
    asked.fake.delete(gone)
    asked.fake.archive(gone)

    await asked.nova.living()
    await since_ever(asked)
    for sought in (one, gone):
        await asked.nova.find(sought)
    await asked.nova.is_admins()

    assert set(asked.fake.methods) == {"GET"}
    assert {request.version for request in asked.fake.requests} == {PIN}
    assert {request.path for request in asked.fake.requests} == {"/v2.1/servers/detail", f"/v2.1/servers/{gone}"}


@pytest.mark.parametrize("ending", ["", "/", "/v2.1", "/v2.1/", "/v2.1/{project}", "/v2.1/{project}/", "/v2"])
async def test_an_endpoint_may_end_in_a_version_and_a_project(asked: Reader, tmp_path: Path, ending: str) -> None:
    mine = asked.put()
    asked.keystone.catalogue["compute"] = asked.fake.url + ending.format(project=asked.keystone.project_id)
    clouds = asked.keystone.write_clouds(tmp_path / "by-catalogue.yaml")
    session = ProjectSession(cloud="nova", project="service", clouds_yaml=clouds)

    assert set(await Nova(session, host=HOST).living()) == {mine}


async def test_a_token_that_was_revoked_is_replaced(asked: Reader) -> None:
    mine = asked.put()
    await asked.nova.living()
    asked.keystone.revoke()

    assert set(await asked.nova.living()) == {mine}
    assert asked.keystone.issued_count == 2


@pytest.mark.parametrize(
    ("roles", "is_admins"),
    [(("reader",), False), (("member",), False), (("member", "admin"), True), (("administrator",), False)],
)
async def test_an_admin_is_known_by_the_role(tmp_path: Path, roles: tuple[str, ...], is_admins: bool) -> None:
    with reader(tmp_path, roles=roles) as asked:
        assert await asked.nova.is_admins() is is_admins
        assert asked.fake.requests == []


async def test_it_is_asked_with_a_token_of_a_real_keystone(cloud: Cloud, tmp_path: Path) -> None:
    with WatchedNova() as fake:
        fake.policy = Policy.least()
        living, dead = (InstanceId(fake.put(Server()).uuid) for _ in range(2))
        fake.delete(dead)
        entry = entry_of(cloud) | {"compute_endpoint_override": f"{fake.url}/v2.1/{cloud.projects['service']}"}
        nova = Nova(session_of(tmp_path, entry, project="service"), host=HOST)

        assert set(await nova.living()) == {living}
        assert set(await nova.deleted(since_s=time.time() - 60)) == {dead}
        assert await nova.is_admins() is False
        assert nova.place == "cloud 'mine', project 'service'"
