"""
An owner's request by the local socket, and by OpenStack: granted, refused for its owner to read, and asked for again.

A project is asked before a request for it is granted; a project that could not be asked has refused nothing.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.requesting import NOT_CONSENTED, OTHER, OWN, TAKEN, USER, Requesting, requesting, server

from autobackup.errors import AutobackupError, CloudUnavailable, ConfigError, NotConsented, Refused, StoreRefused
from autobackup.model import InstanceId, Occasion, Request, RequestSource
from autobackup.rules.policy import Plan, Rulebook, plan

YES = {"autobackup": "true"}
DOWN = CloudUnavailable("Keystone: no answer")
UNASKED = Request(project=OWN, source=RequestSource.SERVER, asked=False)
A_NO_HOLDS_S, A_YES_HOLDS_S = 61.0, 601.0


def planned(host: Requesting, instance: InstanceId) -> Plan:
    wanted = plan(host.learn.known(instance), Rulebook(requests=TAKEN), occasion=Occasion.TERMINATE)
    assert wanted is not None
    return wanted


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Requesting]:
    with requesting(tmp_path) as one:
        yield one


# ---- by OpenStack ---------------------------------------------------------------------------------------------------


async def test_a_wish_is_granted_when_its_project_consents_and_is_kept_over_a_start(host: Requesting) -> None:
    instance = host.living()
    words = {**YES, "autobackup_project": OTHER, "autobackup_user": USER, "autobackup_retention": "30d"}
    granted = Request(project=OTHER, reader=USER, retention_s=30 * 86400.0, source=RequestSource.SERVER)
    assert await host.hear(instance, words) == granted
    assert host.asked == [OTHER]
    assert host.restarted().request(instance) == granted
    assert (host.requests.refused(), host.refused_count) == ({}, 0)


async def test_without_a_project_it_is_the_servers_own(host: Requesting) -> None:
    request = await host.hear(host.living(), YES)
    assert request == Request(project=OWN, source=RequestSource.SERVER)
    assert host.asked == [OWN]


async def test_a_project_that_has_not_consented_refuses_and_its_owner_can_read_why(host: Requesting) -> None:
    instance = host.living()
    host.refusing[OTHER] = NOT_CONSENTED
    request = await host.hear(instance, {**YES, "autobackup_project": OTHER})
    assert request is not None
    assert (request.enabled, request.project) == (True, OTHER)
    assert f"project {OTHER} has not consented" in request.refused
    assert "ddd" not in request.refused, "which other projects there are is not the owner's to read"
    assert host.requests.refused() == {instance: request.refused}
    assert host.refused_count == 1
    assert host.restarted().request(instance) == request


async def test_what_was_refused_is_granted_when_consent_comes(host: Requesting) -> None:
    instance = host.living()
    host.refusing[OWN] = NOT_CONSENTED
    refused = await host.hear(instance, YES)
    assert refused is not None
    assert refused.refused
    host.refusing.clear()
    host.clock.now_s += A_NO_HOLDS_S
    assert await host.hear(instance, YES) == Request(project=OWN, source=RequestSource.SERVER)
    assert (host.requests.refused(), host.refused_count) == ({}, 0)


async def test_what_was_granted_is_refused_when_consent_is_taken_back(host: Requesting) -> None:
    instance = host.living()
    assert await host.hear(instance, YES) is not None
    host.refusing[OWN] = NOT_CONSENTED
    host.clock.now_s += A_YES_HOLDS_S
    request = await host.hear(instance, YES)
    assert request is not None
    assert request.refused


@pytest.mark.parametrize("answer", [None, NOT_CONSENTED])
async def test_a_cloud_that_is_down_at_the_first_asking_has_refused_nothing(
    host: Requesting, answer: NotConsented | None
) -> None:
    """Nor granted: a disk let go for an outage would be lost, and one sent might go where nobody wants it."""
    instance = host.living()
    host.refusing[OWN] = DOWN
    for _ in range(2):
        assert await host.hear(instance, YES) == UNASKED
        assert host.restarted().request(instance) == UNASKED
        assert host.requests.refused() == {}
        assert not planned(host, instance).settled
        host.clock.now_s += A_NO_HOLDS_S
    host.refusing = {} if answer is None else {OWN: answer}
    request = await host.hear(instance, YES)
    assert request is not None
    assert request.asked
    assert bool(request.refused) is (answer is not None)


async def test_a_cloud_that_goes_down_later_takes_no_grant_back(host: Requesting) -> None:
    instance = host.living()
    granted = await host.hear(instance, YES)
    host.refusing[OWN] = DOWN
    for _ in range(3):
        host.clock.now_s += A_YES_HOLDS_S
        assert await host.hear(instance, YES) == granted
        assert planned(host, instance).settled


async def test_what_a_project_refused_stays_refused_while_it_cannot_be_asked_again(host: Requesting) -> None:
    instance = host.living()
    host.refusing[OWN] = NOT_CONSENTED
    refused = await host.hear(instance, YES)
    host.refusing[OWN] = DOWN
    host.clock.now_s += A_NO_HOLDS_S
    assert await host.hear(instance, YES) == refused


async def test_words_that_cannot_be_understood_are_refused_without_asking_anybody(host: Requesting) -> None:
    instance = host.living()
    for words in ({"autobackup": "ture"}, {**YES, "autobackup_retention": "30"}, {**YES, "autobackup_project": "demo"}):
        request = await host.hear(instance, words)
        assert request is not None
        assert request.refused, words
        assert await host.hear(instance, words) == request, "it is another at the second hearing"
    assert host.asked == []
    assert (await host.hear(instance, YES)) == Request(project=OWN, source=RequestSource.SERVER)


async def test_an_owner_who_takes_the_word_back_has_no_request(host: Requesting) -> None:
    instance = host.living()
    assert await host.hear(instance, YES) is not None
    assert await host.hear(instance, {}) is None
    assert host.restarted().request(instance) is None


async def test_an_owner_who_says_no_is_heard_and_no_project_is_asked(host: Requesting) -> None:
    instance = host.living()
    assert await host.hear(instance, {"autobackup": "false"}) == Request(enabled=False, source=RequestSource.SERVER)
    assert host.asked == []


async def test_a_flavor_may_ask_for_its_servers(host: Requesting) -> None:
    specs = {"autobackup:enabled": "true", "autobackup:project": OTHER}
    request = await host.hear(host.living(), extra_specs=specs)
    assert request == Request(project=OTHER, source=RequestSource.FLAVOR)


async def test_a_server_whose_disk_is_not_held_here_is_none_of_ours(host: Requesting) -> None:
    stranger = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
    assert await host.hear(stranger, YES) is None
    assert host.asked == []


async def test_the_words_of_a_server_that_is_being_deleted_count(host: Requesting) -> None:
    """They are gone from Nova a moment later."""
    request = await host.hear(host.living(), YES, is_deleted=True)
    assert request == Request(project=OWN, source=RequestSource.SERVER)


async def test_what_openstack_says_of_a_server_is_known_of_its_instance(host: Requesting) -> None:
    instance = host.living()
    await host.hear(instance, {"a": "b"}, extra_specs={"class": "gold"}, image="1" * 36)
    for learn in (host.learn, host.restarted()):
        record = learn.known(instance)
        assert (record.name, record.owner_project) == ("web", OWN)
        assert (record.server.user, record.server.flavor, record.server.image) == (USER, "m1.small", "1" * 36)
        assert (record.server.properties, record.server.extra_specs) == ({"a": "b"}, {"class": "gold"})


# ---- how often anybody is asked -------------------------------------------------------------------------------------


async def test_a_project_is_asked_once_for_all_servers_that_name_it(host: Requesting) -> None:
    instances = [host.living() for _ in range(30)]
    for refusing in ({}, {OWN: NOT_CONSENTED}, {OWN: DOWN}):
        host.refusing = dict(refusing)
        host.clock.now_s += A_YES_HOLDS_S
        before = len(host.asked)
        for instance in instances:
            await host.hear(instance, YES)
        assert len(host.asked) == before + 1


async def test_whatever_owners_write_one_hearing_asks_few_projects_and_the_next_go_on(host: Requesting) -> None:
    """Verdicts wait for the end of a hearing."""
    named = {host.living(): f"{n:032x}" for n in range(25)}
    servers = {one: server(one, {**YES, "autobackup_project": project}) for one, project in named.items()}
    before = 0
    for _ in range(3):
        await host.requests.heard(servers)
        assert 0 < len(host.asked) - before <= 10
        before = len(host.asked)
    assert {host.requests.of(one) for one in named} == {
        Request(project=project, source=RequestSource.SERVER) for project in named.values()
    }


async def test_the_refused_do_not_take_the_turn_of_who_waits_for_a_first_answer(host: Requesting) -> None:
    """Somebody names ten projects that never consent; the next owner is heard all the same."""
    named = {host.living(): f"{n:032x}" for n in range(10)}
    host.refusing = dict.fromkeys(named.values(), NOT_CONSENTED)
    servers = {one: server(one, {**YES, "autobackup_project": project}) for one, project in named.items()}
    await host.requests.heard(servers)
    late = host.living()
    for _ in range(2):
        host.clock.now_s += A_YES_HOLDS_S  # every no is to be asked again
        await host.requests.heard({**servers, late: server(late, YES)})
    granted = host.requests.of(late)
    assert granted is not None
    assert granted.asked
    assert granted.refused == ""


async def test_one_whose_turn_has_not_come_is_neither_granted_nor_refused(host: Requesting) -> None:
    named = {host.living(): f"{n:032x}" for n in range(11)}
    await host.requests.heard(
        {one: server(one, {**YES, "autobackup_project": project}) for one, project in named.items()}
    )
    assert host.requests.refused() == {}
    unasked = [one for one in map(host.requests.of, named) if one is not None and not one.asked]
    assert len(unasked) == 1


async def test_a_time_that_an_owner_changes_opens_nothing_anew(host: Requesting) -> None:
    instance = host.living()
    for days in range(1, 20):
        await host.hear(instance, {**YES, "autobackup_retention": f"{days}d"})
        host.clock.now_s += A_YES_HOLDS_S
    assert (len(host.asked), len(host.opened)) == (19, 1)


async def test_projects_that_owners_change_are_not_kept_open_for_ever(host: Requesting) -> None:
    instance = host.living()
    for n in range(300):
        await host.hear(instance, {**YES, "autobackup_project": f"{n:032x}"})
    assert len(host.places._requested) < 300


# ---- by the socket --------------------------------------------------------------------------------------------------

BY_SOCKET = Request(project=OTHER)


async def test_the_socket_stands_before_what_openstack_carries(host: Requesting) -> None:
    instance = host.living()
    await host.hear(instance, YES)
    assert await host.requests.accept(instance, BY_SOCKET) == BY_SOCKET
    assert await host.hear(instance, YES) == BY_SOCKET
    assert await host.hear(instance, {"autobackup": "false"}) == BY_SOCKET
    no = Request(enabled=False)
    await host.requests.accept(instance, no)
    assert await host.hear(instance, YES) == no


async def test_what_the_socket_drops_lets_openstacks_words_speak_again_at_once(host: Requesting) -> None:
    instance = host.living()
    await host.hear(instance, YES)
    await host.requests.accept(instance, BY_SOCKET)
    await host.requests.drop(instance)
    assert host.requests.of(instance) == UNASKED
    assert await host.hear(instance, YES) == Request(project=OWN, source=RequestSource.SERVER)
    await host.hear(instance, {})
    await host.requests.accept(instance, BY_SOCKET)
    await host.requests.drop(instance)
    assert host.requests.of(instance) is None


async def test_the_socket_is_answered_at_once_and_a_refusal_changes_nothing(host: Requesting) -> None:
    instance = host.living()
    granted = await host.hear(instance, YES)
    for error, words in ((NOT_CONSENTED, "has not consented"), (DOWN, "cannot be asked now")):
        host.refusing[OTHER] = error
        with pytest.raises(Refused, match=words):
            await host.requests.accept(instance, BY_SOCKET)
        assert host.requests.of(instance) == granted


async def test_the_socket_asks_anew_each_time(host: Requesting) -> None:
    """Its owner may just have been told what to grant."""
    instance = host.living()
    host.refusing[OTHER] = NOT_CONSENTED
    with pytest.raises(Refused):
        await host.requests.accept(instance, BY_SOCKET)
    host.refusing.clear()
    assert await host.requests.accept(instance, BY_SOCKET) == BY_SOCKET


async def test_the_socket_cannot_ask_for_what_is_not_held_here(host: Requesting) -> None:
    stranger = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
    for request in (BY_SOCKET, Request(enabled=False)):
        with pytest.raises(Refused, match="is held on this host"):
            await host.requests.accept(stranger, request)
    with pytest.raises(Refused, match="is held on this host"):
        await host.requests.drop(stranger)


@pytest.mark.parametrize("said", [BY_SOCKET, Request(enabled=False)], ids=["yes", "no"])
async def test_what_the_socket_is_told_while_a_project_is_asked_is_not_overwritten(
    host: Requesting, said: Request
) -> None:
    instance = host.living()
    host.gates[OWN] = asyncio.Event()
    hearing = asyncio.create_task(host.hear(instance, YES))
    async with asyncio.timeout(10):
        while OWN not in host.asked:
            await asyncio.sleep(0.01)
    await host.requests.accept(instance, said)
    host.gates[OWN].set()
    await hearing
    assert host.requests.of(instance) == said


async def test_no_reader_can_be_named_where_keys_are_not_in_barbican(tmp_path: Path) -> None:
    with requesting(tmp_path, key="recipient") as host:
        instance = host.living()
        with pytest.raises(Refused, match="no user can be named"):
            await host.requests.accept(instance, replace(BY_SOCKET, reader=USER))
        assert await host.requests.accept(instance, BY_SOCKET) == BY_SOCKET


# ---- within what the operator lets it be ----------------------------------------------------------------------------


async def test_caps_hold_for_the_socket_and_for_openstack(tmp_path: Path) -> None:
    caps = replace(TAKEN, projects=(OWN,), retention_longest_s=86400.0)
    with requesting(tmp_path, caps=caps) as host:
        instance = host.living()
        request = await host.hear(instance, {**YES, "autobackup_retention": "30d"})
        assert request == Request(project=OWN, retention_s=86400.0, source=RequestSource.SERVER)
        assert await host.requests.accept(instance, Request(project=OWN)) == Request(project=OWN, retention_s=86400.0)
        with pytest.raises(Refused, match="lets nobody name"):
            await host.requests.accept(instance, BY_SOCKET)
        assert host.asked == [OWN, OWN]


async def test_who_is_not_listened_to_is_not_heard_and_the_socket_is_told_so(tmp_path: Path) -> None:
    with requesting(tmp_path, caps=replace(TAKEN, sources=(RequestSource.FLAVOR,))) as host:
        instance = host.living()
        assert await host.hear(instance, YES) is None
        with pytest.raises(Refused, match="no requests by socket"):
            await host.requests.accept(instance, BY_SOCKET)


@pytest.mark.parametrize("error", [StoreRefused("it takes nothing from us"), ConfigError("clouds.yaml: no such file")])
async def test_a_project_that_cannot_be_asked_for_good_keeps_no_other_server_from_being_heard(
    host: Requesting, error: AutobackupError
) -> None:
    """Nor does it end the agent: whoever awaits the hearing expects no more of it than an outage."""
    first, second = host.living(), host.living()
    host.refusing[OTHER] = error
    for _ in range(2):
        await host.requests.heard(
            {first: server(first, {**YES, "autobackup_project": OTHER}), second: server(second, YES)}
        )
    assert host.requests.of(second) == Request(project=OWN, source=RequestSource.SERVER)
    request = host.requests.of(first)
    assert request is not None
    assert request.refused or not request.asked


async def test_a_wish_that_came_while_its_instance_dies_is_asked_for_all_the_same(host: Requesting) -> None:
    """Nova lists it no more, but its disk waits for the answer."""
    instance = host.living()
    host.refusing[OWN] = DOWN
    assert await host.hear(instance, YES) == UNASKED
    host.refusing.clear()
    host.clock.now_s += A_NO_HOLDS_S
    await host.requests.heard({})
    assert host.requests.of(instance) == Request(project=OWN, source=RequestSource.SERVER)
