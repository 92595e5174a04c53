"""
What a session with a project promises: it is in the right one, and what keeps it out is said, with the remedy.

Never with the password.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.contract.stores import BodyOf, new_attempt
from tests.lab.fake_glance import FakeGlance
from tests.lab.openstack.cloud import Cloud
from tests.lab.proxy import Proxy

from autobackup.cloud.session import ProjectSession
from autobackup.errors import AutobackupError, CloudUnavailable, ConfigError, NoRole
from autobackup.stores.barbican import BarbicanKeys
from autobackup.stores.glance import GlanceStore

PASSWORD: Final = "hunter2-Zq8"  # of nobody


def entry_of(cloud: Cloud, name: str = "autobackup", **auth: Any) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(cloud.clouds_file.read_text())["clouds"][name]
    entry["auth"] |= auth
    return entry


def session_of(folder: Path, entry: object, *, project: str = "vault", **how: Any) -> ProjectSession:
    """With a clouds.yaml that has *entry* as `mine`; or with that text, if it is one."""
    text = entry if isinstance(entry, str) else json.dumps({"clouds": {"mine": entry}})
    path = folder / f"clouds-{secrets.token_hex(4)}.yaml"
    path.write_text(text)
    return ProjectSession(cloud="mine", project=project, clouds_yaml=path, **{"call_timeout_s": 10.0, **how})


async def told(asked: Any, kind: type[AutobackupError], *words: str) -> str:
    with pytest.raises(AutobackupError) as raised:
        await asked
    assert type(raised.value) is kind, raised.value
    for word in ("cloud 'mine'", *words):
        assert word in str(raised.value)
    everything = "".join(traceback.format_exception(raised.value))
    assert PASSWORD not in everything
    assert len(str(raised.value)) < 1000
    return str(raised.value)


# ---- who is not let in ------------------------------------------------------------------------------------


async def test_a_wrong_password_is_told_from_a_missing_role(cloud: Cloud, tmp_path: Path) -> None:
    """Keystone's answer is the same 401."""
    wrong = session_of(tmp_path, entry_of(cloud, password=PASSWORD))
    text = await told(
        wrong.access(), CloudUnavailable, "project 'vault'", "refuses our name or password", "clouds.yaml"
    )
    assert "role add" not in text

    nobody = session_of(tmp_path, entry_of(cloud, username="nobody"))
    await told(nobody.access(), CloudUnavailable, "project 'vault'", "refuses our name or password")


@pytest.mark.parametrize("project", ["no-consent", "no-such-project", "0" * 32, "größe \U0001f4be", "'; rm -rf / #"])
async def test_a_project_that_has_not_consented_is_told_with_the_grant_to_make(
    cloud: Cloud, tmp_path: Path, project: str
) -> None:
    session = session_of(tmp_path, entry_of(cloud), project=project)

    text = await told(session.access(), NoRole, f"project {project!r}", "we have no role there", "vault")

    assert f"openstack role add --user autobackup --project {project} autobackup" in text
    # every call says so, and not only the first
    await told(session.call("image", "GET", "/v2/images"), NoRole, "openstack role add")
    await told(session.access_now(), NoRole, "openstack role add")


async def test_a_project_with_some_of_the_roles_is_told_the_others(cloud: Cloud, tmp_path: Path) -> None:
    session = session_of(tmp_path, entry_of(cloud, "vera"))

    assert (await session.access()).missing_roles == ("creator", "autobackup")
    assert (await session.access_now()).missing_roles == ("creator", "autobackup")


async def test_a_project_is_found_by_its_name_or_its_id(cloud: Cloud, tmp_path: Path) -> None:
    for project in ("vault", cloud.projects["vault"]):
        for domain in ("", "default", "Default"):
            entry = entry_of(cloud)
            if domain:
                del entry["auth"]["project_domain_id"]
            session = session_of(tmp_path, entry, project=project, project_domain=domain)
            access = await session.access()
            assert (access.project_id, access.project_name) == (cloud.projects["vault"], "vault")
            assert (access.user_name, access.missing_roles) == ("autobackup", ())


# ---- clouds.yaml ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """PASSWORD is in no line of any log of this process."""
    with caplog.at_level(logging.DEBUG):
        yield
    assert not [record for record in caplog.records if PASSWORD in record.getMessage()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "clouds:",
        "clouds: 7",
        "clouds: [mine]",
        "clouds: {other: {auth: {}}}",
        "clouds: {mine: 7}",
        "clouds: {mine: [1]}",
        f"clouds: {{mine: {{auth: {PASSWORD}}}}}",
        "clouds: {mine: {auth: [1]}}",
        "clouds: {mine: {auth: {password: " + PASSWORD + "}}}",
        "clouds: {mine: {auth_type: nonesuch, auth: {auth_url: 'http://x', password: " + PASSWORD + "}}}",
        f"clouds:\n  mine:\n    auth:\n      password: !{PASSWORD}\n",
        f"clouds:\n  mine:\n    auth:\n      password: *{PASSWORD}\n",
        f"clouds:\n  mine:\n    auth:\n      password: @{PASSWORD}\n",
        f'clouds:\n  mine:\n    auth:\n      password: "{PASSWORD}\n',
        f"clouds:\n\tmine: {PASSWORD}\n",
        f"clouds: {{mine: {PASSWORD}\n",
    ],
)
async def test_a_clouds_yaml_that_is_wrong_is_the_operators_to_mend_and_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    session = session_of(tmp_path, text)
    with logged(caplog):
        with pytest.raises(AutobackupError) as raised:
            await session.access()
        assert type(raised.value) is ConfigError
        assert "mine" in str(raised.value) or "clouds" in str(raised.value)
        assert PASSWORD not in "".join(traceback.format_exception(raised.value))
        if "auth: {" not in text:  # what is wrong with a login shows when it is tried
            with pytest.raises(ConfigError):
                await session_of(tmp_path, text).check_entry()


async def test_a_clouds_yaml_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    session = ProjectSession(cloud="mine", project="vault", clouds_yaml=path)

    for asked in (session.check_entry(), session.access(), session.call("image", "GET", "/")):
        with pytest.raises(ConfigError, match=f"{path}: no such file"):
            await asked


async def test_a_cloud_that_is_not_in_it_is_named(cloud: Cloud) -> None:
    session = ProjectSession(cloud="nonesuch", project="vault", clouds_yaml=cloud.clouds_file)

    with pytest.raises(ConfigError, match=f"cloud 'nonesuch', project 'vault': {cloud.clouds_file}"):
        await session.check_entry()


@pytest.mark.parametrize(
    "tls",
    [
        {"cacert": "/nonexistent/ca.pem"},
        {"cacert": "/etc/hostname"},
        {"cert": "/nonexistent/cert.pem"},
        {"cert": "/nonexistent/cert.pem", "key": "/nonexistent/key.pem"},
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_certificates_that_cannot_be_read_are_the_operators_to_mend(
    cloud: Cloud, tmp_path: Path, tls: dict[str, str], scheme: str
) -> None:
    entry = entry_of(cloud) | tls
    entry["auth"]["auth_url"] = entry["auth"]["auth_url"].replace("http", scheme)
    path = next(iter(tls.values()))

    for ask in (ProjectSession.check_entry, ProjectSession.access):
        await told(ask(session_of(tmp_path, entry)), ConfigError, path)
    session = session_of(tmp_path, entry)
    await told(session.call("image", "GET", "/v2/images"), ConfigError, path)


@pytest.mark.filterwarnings("ignore::openstack.warnings.ConfigurationWarning")
async def test_a_cloud_whose_certificates_are_not_verified_is_reached(cloud: Cloud, tmp_path: Path) -> None:
    for tls in ({"verify": False}, {"insecure": True}, {"verify": False, "cacert": "/nonexistent/ca.pem"}):
        session = session_of(tmp_path, entry_of(cloud) | tls)
        assert (await session.call("image", "GET", "/v2/images")).status == 200


# ---- where services are -----------------------------------------------------------------------------------


async def test_a_region_or_a_service_that_the_catalogue_has_not_is_named(cloud: Cloud, tmp_path: Path) -> None:
    for change, words in (
        ({"region_name": "Nowhere"}, "'Nowhere'"),
        ({"interface": "nonesuch"}, "'nonesuch'"),
        ({"image_interface": "nonesuch"}, "'nonesuch'"),
    ):
        session = session_of(tmp_path, entry_of(cloud) | change)
        await told(session.call("image", "GET", "/v2/images"), CloudUnavailable, "no image service", words, "vault")
    async with FakeGlance(cloud.keystone_url) as keystone:
        keystone.edit("POST", "/auth/tokens", lambda body: body.replace(b'"image"', b'"picture"'), times=9)
        session = session_of(tmp_path, entry_of(cloud, auth_url=f"{keystone.url}/v3"))
        await told(session.call("image", "GET", "/v2/images"), CloudUnavailable, "no image service", "vault")
        assert (await session.call("key-manager", "GET", "/v1/secrets")).status == 200


async def test_an_endpoint_may_end_in_a_version_or_not(cloud: Cloud, tmp_path: Path) -> None:
    for ending in ("", "/", "/v2", "/v2/", "/v2.9"):
        entry = entry_of(cloud) | {"image_endpoint_override": cloud.glance_url + ending}
        assert (await session_of(tmp_path, entry).call("image", "GET", "/v2/images")).status == 200


# ---- Keystone in trouble ----------------------------------------------------------------------------------


async def test_a_keystone_that_is_gone_is_said(cloud: Cloud, tmp_path: Path) -> None:
    with Proxy.to(cloud.keystone_url) as proxy:
        session = session_of(tmp_path, entry_of(cloud, auth_url=f"{proxy.url}/v3"))
        proxy.refuse()
        await told(session.access(), CloudUnavailable, "Keystone", "make sure that it runs", "vault")
        proxy.heal()
        assert (await session.access()).project_name == "vault"


@pytest.mark.parametrize("status", [302, 400, 403, 404, 429, 500, 502, 503, 504])
async def test_a_keystone_that_refuses_is_said_and_says_when(cloud: Cloud, tmp_path: Path, status: int) -> None:
    async with FakeGlance(cloud.keystone_url) as keystone:
        session = session_of(tmp_path, entry_of(cloud, auth_url=f"{keystone.url}/v3"))
        body = b"<html><h1>No</h1></html>" if status % 2 else b'{"error": {"message": "No"}}'
        headers = {"Retry-After": "7", "Content-Type": "text/html" if status % 2 else "application/json"}
        keystone.answer("POST", "/auth/tokens", status=status, body=body, headers=headers, times=9)
        with pytest.raises(CloudUnavailable) as raised:
            await session.access()
        assert "cloud 'mine', project 'vault': Keystone" in str(raised.value)
        if status in (429, 503):
            assert raised.value.retry_after_s == 7.0
        keystone.heal()
        assert (await session.access()).project_name == "vault"


@pytest.mark.parametrize(
    "garbage",
    [b"", b"<html>Welcome to the hotel's network</html>", b"null", b"[]", b"{}", b'{"token": 7}', b"[" * 9999],
)
async def test_a_keystone_that_talks_nonsense_is_an_outage(cloud: Cloud, tmp_path: Path, garbage: bytes) -> None:
    async with FakeGlance(cloud.keystone_url) as keystone:
        entry = entry_of(cloud, auth_url=f"{keystone.url}/v3")
        keystone.edit("POST", "/auth/tokens", lambda _body: garbage, times=9)
        session = session_of(tmp_path, entry)
        for ask in (session.access, session.access_now, lambda: session.call("image", "GET", "/v2/images")):
            with pytest.raises(CloudUnavailable, match="cloud 'mine', project 'vault'"):
                await ask()  # type: ignore[no-untyped-call]
        keystone.heal()
        keystone.edit("GET", "/auth/tokens", lambda _body: garbage, times=9)
        with pytest.raises(CloudUnavailable, match="cloud 'mine', project 'vault'"):
            await session.access_now()
        keystone.heal()
        keystone.edit("GET", "/auth/projects", lambda _body: garbage, times=9)
        lost = session_of(tmp_path, entry, project="no-consent")
        with pytest.raises(CloudUnavailable, match="cloud 'mine', project 'no-consent'"):
            await lost.access()


async def test_every_call_ends_in_time_whoever_is_silent(cloud: Cloud, tmp_path: Path) -> None:
    with Proxy.to(cloud.keystone_url) as keystone, Proxy.to(cloud.glance_url) as glance:
        entry = entry_of(cloud, auth_url=f"{keystone.url}/v3") | {"image_endpoint_override": glance.url}
        warm = session_of(tmp_path, entry, call_timeout_s=1.0)
        await warm.access()
        keystone.stall()
        glance.stall()
        await asyncio.sleep(0.1)

        async def timed(asked: Any) -> None:
            began_s = time.monotonic()
            await told(asked, CloudUnavailable, "make sure that it runs")
            assert time.monotonic() - began_s < 5

        cold = session_of(tmp_path, entry, call_timeout_s=1.0)
        await asyncio.gather(
            timed(cold.access()),
            timed(cold.access_now()),
            timed(cold.call("image", "GET", "/v2/images")),
            timed(cold.call("image", "GET", "/v2/images")),
            timed(warm.access_now()),
            timed(warm.call("image", "GET", "/v2/images")),
            timed(warm.call("image", "POST", "/v2/images", json={"name": "x" * 100_000})),
        )
        keystone.heal()
        glance.heal()
        for session in (warm, cold):
            assert (await session.call("image", "GET", "/v2/images")).status == 200


async def test_a_keystone_that_never_finishes_its_answer_ends_in_time_too(cloud: Cloud, tmp_path: Path) -> None:
    """A timeout for each byte is none for all of them."""

    over, open_ones = asyncio.Event(), set[asyncio.Task[None]]()

    async def trickle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not over.is_set():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.1)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v3"
        session = session_of(tmp_path, entry_of(cloud, auth_url=url), call_timeout_s=1.0)
        began_s = time.monotonic()
        await told(session.access(), CloudUnavailable, "Keystone: no answer in 1 s")
        assert time.monotonic() - began_s < 4
        over.set()
        await asyncio.sleep(0.5)  # its thread hears of the end, and may ask once more
        await asyncio.gather(*open_ones, return_exceptions=True)


async def test_first_calls_at_once_ask_keystone_once(cloud: Cloud, tmp_path: Path) -> None:
    async with FakeGlance(cloud.keystone_url) as keystone:
        session = session_of(tmp_path, entry_of(cloud, auth_url=f"{keystone.url}/v3"))

        answers = await asyncio.gather(*(session.call("image", "GET", "/v2/images") for _ in range(12)))

        assert {answer.status for answer in answers} == {200}
        assert len([call for call in keystone.calls if call.method == "POST"]) == 1


async def test_a_token_that_ended_early_does_not_show(cloud: Cloud, tmp_path: Path) -> None:
    """Whichever call is the first to meet it."""
    session = session_of(tmp_path, entry_of(cloud))

    async def revoked() -> str:
        async with session.open("image", "GET", "/v2/images?limit=1") as response:
            token = str(response.request_info.headers["X-Auth-Token"])
        headers = {"X-Auth-Token": cloud.token("admin", "admin"), "X-Subject-Token": token}
        url = f"{cloud.keystone_url}/v3/auth/tokens"
        assert cloud.call("admin", "admin", "DELETE", url, headers=headers).status == 204
        return token

    first = await revoked()
    assert (await session.access_now()).missing_roles == ()
    assert await revoked() != first
    assert (await session.call("image", "GET", "/v2/images")).status == 200
    await revoked()
    answers = await asyncio.gather(*(session.call("image", "GET", "/v2/images") for _ in range(6)))
    assert {answer.status for answer in answers} == {200}


async def test_a_401_for_good_is_answered_after_one_more_try(cloud: Cloud, tmp_path: Path) -> None:
    async with FakeGlance(cloud.glance_url) as glance:
        session = session_of(tmp_path, entry_of(cloud) | {"image_endpoint_override": glance.url})
        glance.answer("GET", "/v2/images", status=401, times=9)

        assert (await session.call("image", "GET", "/v2/images")).status == 401

        assert len(glance.calls) == 2
        assert len({call.headers["X-Auth-Token"] for call in glance.calls}) == 2
        assert all(call.headers["X-Openstack-Request-Id"].startswith("req-") for call in glance.calls)


# ---- what somebody gave us --------------------------------------------------------------------------------


def keystone(cloud: Cloud, user: str, project: str, method: str, path: str, **what: Any) -> Any:
    answer = cloud.call(user, project, method, f"{cloud.keystone_url}/v3{path}", **what)
    assert answer.status < 300, answer
    return answer.json() if answer.body else None


async def assert_at_home(cloud: Cloud, session: ProjectSession, project: str) -> None:
    """Images and keys land in *project*, and can be had again."""
    access = await session.access()
    assert (access.project_id, access.project_name) == (cloud.projects[project], project)
    assert access.delegated
    assert access.missing_roles == (await session.access_now()).missing_roles == ()
    store, keys, attempt = GlanceStore(session), BarbicanKeys(session, readers=(), project_access=False), new_attempt()
    await store.put(attempt, BodyOf(b"sealed", "sha512"), properties={})
    drawn = await keys.draw(attempt)
    owner = cloud.call("admin", "admin", "GET", f"{cloud.glance_url}/v2/images/{attempt}").json()["owner"]
    assert owner == drawn.header_words["project"] == cloud.projects[project]
    assert await keys.fetch(drawn.header_words) == drawn.key
    assert await store.read(attempt, offset=0, length=9) == b"sealed"
    await store.delete(attempt)
    await keys.destroy(attempt)


async def test_an_application_credential_is_consent_and_ends_with_it(cloud: Cloud, tmp_path: Path) -> None:
    user = cloud.users["alice"]
    path = f"/users/{user}/application_credentials"
    made = keystone(
        cloud, "alice", "tenant-a", "POST", path, json={"application_credential": {"name": secrets.token_hex(8)}}
    )["application_credential"]
    auth = {
        "auth_url": f"{cloud.keystone_url}/v3",
        "application_credential_id": made["id"],
        "application_credential_secret": made["secret"],
    }
    entry = {"auth_type": "v3applicationcredential", "auth": auth, "region_name": "RegionOne"}
    session = session_of(tmp_path, entry, project="")

    await assert_at_home(cloud, session, "tenant-a")

    wrong = entry | {"auth": auth | {"application_credential_secret": PASSWORD}}
    await told(session_of(tmp_path, wrong, project="").access(), CloudUnavailable, "a wrong password or secret")
    keystone(cloud, "alice", "tenant-a", "DELETE", f"{path}/{made['id']}")
    text = await told(session.call("image", "GET", "/v2/images"), CloudUnavailable, "clouds.yaml", "Could not find")
    assert made["secret"] not in text


@pytest.mark.parametrize("impersonation", [False, True])
async def test_a_trust_is_consent_and_ends_with_it(cloud: Cloud, tmp_path: Path, impersonation: bool) -> None:
    trust = {
        "trustor_user_id": cloud.users["mallory"],
        "trustee_user_id": cloud.users["autobackup"],
        "project_id": cloud.projects["elsewhere"],
        "impersonation": impersonation,
        "roles": [{"name": "member"}],
    }
    made = keystone(cloud, "mallory", "elsewhere", "POST", "/OS-TRUST/trusts", json={"trust": trust})["trust"]
    entry = entry_of(cloud)
    entry["auth"]["trust_id"] = made["id"]
    del entry["auth"]["project_domain_id"]
    session = session_of(tmp_path, entry, project="")

    await assert_at_home(cloud, session, "elsewhere")

    keystone(cloud, "mallory", "elsewhere", "DELETE", f"/OS-TRUST/trusts/{made['id']}")
    with pytest.raises(CloudUnavailable, match="cloud 'mine': "):
        await session.call("image", "GET", "/v2/images")
