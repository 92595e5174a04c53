"""An owner's request at the agent's socket: what may be said, what is answered, and what a wrong word is told."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.flows.explaining import Explaining, explaining

from autobackup.errors import Refused
from autobackup.model import InstanceId, Request, RequestSource
from autobackup.service.cli.queue import ask

# sdnotify leaves its socket open where there is no systemd to talk to
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

OWN, USER = "5e" * 16, "4d" * 16


async def call(host: Explaining, instance: str, method: str, body: object = None) -> Any:
    path = host.agent._config.api.socket
    return await asyncio.to_thread(ask, path, method, f"/v1/instances/{instance}/terminate_backup", body)


async def test_an_instance_without_a_request_has_none(tmp_path: Path) -> None:
    async with explaining(tmp_path, "") as host:
        instance = await host.lives("web-1")
        assert await call(host, instance, "GET") == {"enabled": False}


async def test_a_no_is_taken_shown_and_dropped(tmp_path: Path) -> None:
    async with explaining(tmp_path, "") as host:
        instance = await host.lives("web-1")
        for said in (await call(host, instance, "POST", {"enabled": False}), await call(host, instance, "GET")):
            assert (said["enabled"], said["source"], said["refused"]) == (False, "socket", "")
        assert host.agent.learn.request(instance) == Request(enabled=False)
        assert await call(host, instance, "DELETE") == {"enabled": False}
        assert host.agent.learn.request(instance) is None


async def test_what_openstack_carries_is_shown_with_what_became_of_it(tmp_path: Path) -> None:
    async with explaining(tmp_path, "") as host:
        instance = await host.lives("web-1")
        wish = Request(
            project=OWN, reader=USER, retention_s=86400.0, source=RequestSource.SERVER, refused="it has not consented"
        )
        await host.agent.learn.set_request(instance, wish)
        said = await call(host, instance, "GET")
        assert (said["enabled"], said["source"], said["refused"]) == (True, "server", "it has not consented")
        assert (said["store_project"], said["store_user"], said["retention_s"]) == (OWN, USER, 86400.0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "not JSON"),
        ([], '"enabled"'),
        ({}, '"enabled"'),
        ({"enabled": "true", "store_project": OWN}, '"enabled"'),
        ({"enabled": 1, "store_project": OWN}, '"enabled"'),
        ({"enabled": True}, "store_project is missing"),
        ({"enabled": True, "store_project": ""}, "store_project is missing"),
        ({"enabled": True, "project": OWN}, "unknown keys: ['project']"),
        ({"enabled": False, "reason": "no"}, "unknown keys: ['reason']"),
        ({"enabled": True, "store_project": 5}, "must be strings: ['store_project']"),
        ({"enabled": True, "store_project": OWN, "retention": 30}, "must be strings: ['retention']"),
        ({"enabled": True, "store_project": OWN, "retention": "30"}, "retention: '30' is not a duration"),
        ({"enabled": True, "store_project": OWN, "retention": "0s"}, "must be 1s to 36525d"),
        ({"enabled": True, "store_project": "demo"}, "must be an id"),
        ({"enabled": True, "store_project": OWN, "store_user": "alice"}, "must be an id"),
    ],
)
async def test_a_wrong_word_is_named_and_changes_nothing(tmp_path: Path, body: object, words: str) -> None:
    async with explaining(tmp_path, "") as host:
        instance = await host.lives("web-1")
        before = Request(enabled=False)
        await host.agent.learn.set_request(instance, before)
        with pytest.raises(Refused) as told:
            await call(host, instance, "POST", body)
        assert words in str(told.value)
        assert host.agent.learn.request(instance) == before


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_an_instance_that_is_not_here_is_refused(tmp_path: Path, method: str) -> None:
    async with explaining(tmp_path, "") as host:
        stranger = InstanceId("6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e")
        with pytest.raises(Refused, match="is held on this host"):
            await call(host, stranger, method, {"enabled": False})
