"""
What keeps us from Nova's records: its policy, a cell that is down, a service in trouble, or one that is not Nova.

Each is an outage with a reason, and none is a word on any server: not "deleted", and not "no record".
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.contract.novas import OTHER_HOST, PIN, REMEDY, Reader, WatchedNova, reader
from tests.lab.fake_nova import Policy
from tests.lab.nova_servers import HOST

from autobackup.cloud.nova import Server
from autobackup.errors import CloudUnavailable
from autobackup.model import InstanceId

Ask = Callable[[Reader, InstanceId], Awaitable[object]]
NOBODY = InstanceId("0d2ab1ee-0000-4000-8000-000000000000")


async def living(asked: Reader, _one: InstanceId) -> object:
    return await asked.nova.living()


async def deleted(asked: Reader, _one: InstanceId) -> object:
    return await asked.nova.deleted(since_s=0.0)


async def find(asked: Reader, one: InstanceId) -> object:
    return await asked.nova.find(one)


async def find_nobody(asked: Reader, _one: InstanceId) -> object:
    return await asked.nova.find(NOBODY)


EVERY_WAY = [living, deleted, find, find_nobody]


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Reader]:
    with reader(tmp_path) as one:
        one.fake.policy = Policy.least()
        yield one


def populate(asked: Reader) -> InstanceId:
    """One living server here, which is returned; one deleted here; two elsewhere."""
    mine, dead, dead_elsewhere = asked.put(), asked.put(), asked.put(host=OTHER_HOST)
    asked.put(host=OTHER_HOST)
    asked.fake.delete(dead)
    asked.fake.delete(dead_elsewhere)
    return mine


async def refused(asked: Reader, ask: Ask, one: InstanceId, *words: str) -> CloudUnavailable:
    with pytest.raises(CloudUnavailable) as raised:
        await ask(asked, one)
    for word in ("cloud 'nova', project 'service'", *words):
        assert word in str(raised.value), raised.value
    assert len(str(raised.value)) < 1000
    return raised.value


# ---- policy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["detail", "all_tenants"])
@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_list_that_the_policy_forbids_is_told_with_the_remedy(asked: Reader, line: str, ask: Ask) -> None:
    one = populate(asked)
    asked.fake.policy = replace(Policy.least(), **{line: False})

    error = await refused(asked, ask, one, "403", REMEDY)
    assert error.status == 403


async def test_the_rule_that_is_missing_is_named(asked: Reader) -> None:
    """In Nova's own words, which come in a wrapping that is named by the status."""
    asked.fake.policy = replace(Policy.least(), all_tenants=False)
    await refused(asked, living, NOBODY, "os_compute_api:servers:detail:get_all_tenants")
    asked.fake.answer(503)
    await refused(asked, living, NOBODY, "The service is not able to answer.")


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_filters_that_are_dropped_are_noticed(asked: Reader, ask: Ask) -> None:
    """Nova answers 200, and lists every living server of the cloud: not ours, and not the one that was asked for."""
    one = populate(asked)
    asked.fake.policy = replace(Policy.least(), all_filters=False)

    await refused(asked, ask, one, "filter", REMEDY)


@pytest.mark.parametrize("all_filters", [True, False])
async def test_a_host_that_is_alone_in_its_cloud_is_told_the_truth(asked: Reader, all_filters: bool) -> None:
    """Where every server is of this host, dropped filters need not show; no living server is deleted for that."""
    one = asked.put()
    asked.fake.policy = replace(Policy.least(), all_filters=all_filters)

    for found in ((await asked.nova.living())[one], await asked.nova.find(one)):
        assert found is not None
        assert (found.is_deleted, found.host) == (False, HOST)


async def test_living_servers_among_the_deleted_show_that_the_filter_was_dropped(asked: Reader) -> None:
    asked.put()
    asked.fake.policy = replace(Policy.least(), all_filters=False)

    await refused(asked, deleted, NOBODY, "filter", REMEDY)


@pytest.mark.parametrize("ask", [living, deleted, find])
async def test_dropped_filters_do_not_read_the_whole_cloud(tmp_path: Path, ask: Ask) -> None:
    """Tens of thousands of servers, for each host, each minute."""
    with reader(tmp_path, max_limit=2) as asked:
        one = asked.put()
        for _ in range(20):
            asked.put(host=OTHER_HOST)
        asked.fake.policy = replace(Policy.least(), all_filters=False)
        await refused(asked, ask, one, "filter", REMEDY)
        assert len(asked.fake.requests) == 1


@pytest.mark.parametrize("ask", [living, deleted, find])
async def test_hosts_that_are_hidden_are_noticed(asked: Reader, ask: Ask) -> None:
    """A server without a host is on none, which is something else."""
    one = populate(asked)
    asked.fake.policy = replace(Policy.least(), extended_attributes=False)

    await refused(asked, ask, one, "hosts of servers", REMEDY)


async def test_hidden_extra_specs_are_not_known_and_no_trouble(asked: Reader) -> None:
    one = asked.put(extra_specs={"a": "b"})
    asked.fake.policy = replace(Policy.least(), extra_specs=False)

    assert (await asked.nova.living())[one].extra_specs is None
    asked.fake.policy = Policy.least()
    assert (await asked.nova.living())[one].extra_specs == {"a": "b"}


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_member_of_some_project_is_told_what_is_missing(asked: Reader, ask: Ask) -> None:
    one = populate(asked)
    asked.fake.policy = Policy.none()

    await refused(asked, ask, one, "403", REMEDY)


# ---- a cell that is down ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy.least(), Policy()])
async def test_a_cell_that_is_down_is_not_a_word_on_its_servers(asked: Reader, policy: Policy) -> None:
    """Lists omit them, and say 200; the GET of one of them does not."""
    one, dead = asked.put(), asked.put()
    other = asked.put(cell="cell2", host=OTHER_HOST)
    asked.fake.delete(dead)
    asked.fake.policy = policy
    asked.fake.down_cells = {"cell1"}

    assert await asked.nova.living() == {}
    assert await asked.nova.deleted(since_s=0.0) == {}
    for sought in (one, dead):
        assert (await refused(asked, find, sought, "500")).status == 500
    found = await asked.nova.find(other)
    assert found is not None
    assert not found.is_deleted


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_nova_that_does_not_skip_cells_that_are_down_says_so(asked: Reader, ask: Ask) -> None:
    one = populate(asked)
    asked.fake.skips_down_cells = False
    asked.fake.down_cells = {"cell1"}
    if ask is find_nobody:  # whoever is asked for may be there
        assert await asked.nova.find(NOBODY) is None
        return

    assert (await refused(asked, ask, one, "500")).status == 500


BARE = {"id": NOBODY, "status": "UNKNOWN", "tenant_id": "f" * 32, "created": "2026-11-22T16:35:06Z", "links": []}


@pytest.mark.parametrize("ask", EVERY_WAY)
@pytest.mark.parametrize("extra", [{}, {"user_id": "u", "image": "", "flavor": {}, "OS-EXT-STS:power_state": 0}])
async def test_a_row_of_a_cell_that_is_down_is_an_outage(asked: Reader, ask: Ask, extra: dict[str, Any]) -> None:
    """As Nova shows them to later microversions: it exists, and no more is known."""
    populate(asked)
    asked.fake.edit = lambda said: {"servers": [{**BARE, **extra}]} if "servers" in said else said

    await refused(asked, ask, NOBODY, "a cell is down")


async def test_one_server_of_a_cell_that_is_down_is_an_outage(tmp_path: Path) -> None:
    with reader(tmp_path) as asked:
        one = asked.put(host=OTHER_HOST, cell="cell2")

        def edit(said: Any) -> Any:
            return {"servers": []} if "servers" in said else {"server": {**BARE, "id": one}}

        asked.fake.edit = edit
        await refused(asked, find, one, "a cell is down")


@pytest.mark.parametrize("ask", [living, deleted, find])
async def test_nova_without_neutron_is_an_outage(asked: Reader, ask: Ask) -> None:
    """It asks for the ports of every server that it shows."""
    one = populate(asked)
    asked.fake.neutron_is_down = True

    await refused(asked, ask, one, "500")


# ---- a service in trouble ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 406, 409, 413, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_whatever_else_is_answered_is_an_outage(asked: Reader, status: int, ask: Ask) -> None:
    """A 404 too, where a list should be: a proxy's, for an address that is wrong."""
    one = populate(asked)
    asked.fake.answer(status, retry_after_s=17)

    error = await refused(asked, ask, one, f" {status}", "compute/v2.1/servers")
    assert error.status == status
    assert error.retry_after_s == 17.0
    asked.fake.heal()
    await ask(asked, one)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_only_a_404_for_the_one_server_means_that_there_is_none(asked: Reader, status: int) -> None:
    asked.fake.answer(status, path=f"{NOBODY}$")

    await refused(asked, find, NOBODY, str(status))
    asked.fake.heal()
    assert await asked.nova.find(NOBODY) is None


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_nova_too_old_for_the_microversion_is_an_outage(asked: Reader, ask: Ask) -> None:
    words = f"Version {PIN} is not supported by the API. Minimum is 2.1 and maximum is 2.60."
    asked.fake.answer(406, body=json.dumps({"computeFault": {"code": 406, "message": words}}).encode())

    assert (await refused(asked, ask, NOBODY, "406")).status == 406


@pytest.mark.parametrize("after_bytes", [0, 1, 50, 400])
@pytest.mark.parametrize("ask", [living, deleted, find])
async def test_an_answer_that_is_cut_is_an_outage(asked: Reader, after_bytes: int, ask: Ask) -> None:
    one = populate(asked)
    asked.fake.cut(after_bytes=after_bytes)

    await refused(asked, ask, one, "compute")
    asked.fake.heal()
    assert await ask(asked, one)


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_nova_that_is_not_running_is_an_outage(asked: Reader, ask: Ask) -> None:
    one = populate(asked)
    asked.fake.refuse()

    await refused(asked, ask, one, "make sure that it runs")


async def test_silence_ends_in_time(tmp_path: Path) -> None:
    with reader(tmp_path, call_timeout_s=2.0) as asked:
        one = populate(asked)
        await asked.nova.living()  # the token, and openstacksdk's import
        asked.fake.fall_silent()
        began_s = time.monotonic()
        await asyncio.gather(*(refused(asked, ask, one, "make sure that it runs") for ask in EVERY_WAY))
        assert time.monotonic() - began_s < 15
        asked.fake.heal()
        assert set(await asked.nova.living()) == {one}


async def test_a_page_that_fails_is_not_the_end_of_the_list(tmp_path: Path) -> None:
    with reader(tmp_path, max_limit=2) as asked:
        ones = {asked.put(created_at_s=float(n)) for n in range(5)}
        asked.fake.before = lambda number: asked.fake.answer(503, times=1) if number == 3 else None
        await refused(asked, living, NOBODY, "503")
        asked.fake.before = None
        assert set(await asked.nova.living()) == ones


@pytest.mark.parametrize("ask", EVERY_WAY)
async def test_a_redirect_is_not_followed(asked: Reader, ask: Ask) -> None:
    """Our token is for nobody else; and who redirects is no Nova."""
    with WatchedNova() as stranger:
        asked.fake.redirect_to = stranger.url
        assert (await refused(asked, ask, NOBODY, "307")).status == 307
        assert stranger.requests == []


# ---- nonsense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"", b"<html>Welcome to the hotel's network</html>", b"null", b"[]", b"7", b'"servers"', b"{}", b"\xff\xfe",
        b'{"servers": null}', b'{"servers": {}}', b'{"servers": 7}', b'{"servers": [', b"[" * 9999, b"NaN",
        b'{"servers": [null]}', b'{"servers": [[]]}', b'{"servers": [{}]}', b'{"servers": [{"id": 7}]}',
        b'{"servers": [{"id": "x"}]}', b'{"servers": [], "servers_links": {}}', b'{"servers": [], "servers_links": 7}',
        b'{"servers": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
async def test_nonsense_is_an_outage(asked: Reader, said: bytes) -> None:
    """And never an empty list."""
    one = populate(asked)
    asked.fake.babble(said)

    for ask in EVERY_WAY:
        with pytest.raises(CloudUnavailable):
            await ask(asked, one)


@pytest.mark.parametrize(
    "said", [b"", b"<html>", b"null", b"[]", b"{}", b'{"server": null}', b'{"server": {"id": 7}}', b'{"server": {}}']
)
async def test_nonsense_on_one_server_is_an_outage(asked: Reader, said: bytes) -> None:
    asked.fake.babble(said, path=f"{NOBODY}$")

    with pytest.raises(CloudUnavailable):
        await asked.nova.find(NOBODY)


async def test_another_server_than_that_asked_for_is_an_outage(tmp_path: Path) -> None:
    """Of the list, and of the GET."""
    with reader(tmp_path) as asked:
        one = asked.put(project_id=asked.keystone.project_id)

        def edit(said: Any) -> Any:
            if "servers" in said:
                return {"servers": []}
            return {"server": {**said["server"], "id": NOBODY}}

        asked.fake.edit = edit
        with pytest.raises(CloudUnavailable):
            await asked.nova.find(one)


@pytest.mark.parametrize(
    "key",
    [
        "OS-EXT-STS:vm_state",
        "OS-EXT-SRV-ATTR:host",
        *("OS-SRV-USG:launched_at", "OS-EXT-STS:task_state", "status", "metadata"),
    ],
)
async def test_a_row_that_says_too_little_is_an_outage(asked: Reader, key: str) -> None:
    """Not a server that was never launched, that nothing is being done to, or whose owner asks for nothing."""
    asked.put()
    asked.fake.edit_rows(**{key: ...})

    with pytest.raises(CloudUnavailable):
        await asked.nova.living()


@pytest.mark.parametrize("host", [7, [HOST], {"name": HOST}, False])
async def test_a_host_that_is_no_name_is_not_another_host(asked: Reader, host: object) -> None:
    one = asked.put()
    asked.fake.edit_rows(**{"OS-EXT-SRV-ATTR:host": host})

    with pytest.raises(CloudUnavailable):
        await asked.nova.find(one)


async def test_the_rest_of_a_row_may_be_of_any_shape(asked: Reader) -> None:
    one = asked.put()
    asked.fake.edit_rows(
        flavor=[], image={"links": []}, name=7, addresses=None, links=7, tags=None, created=None,
        **{"OS-SRV-USG:launched_at": 0},
    )  # fmt: skip

    found = (await asked.nova.living())[one]
    assert isinstance(found, Server)
    assert (found.image, found.flavor, found.extra_specs, found.name) == ("", "", None, "7")
