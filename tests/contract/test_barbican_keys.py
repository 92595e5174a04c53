"""What the key source `barbican` promises: who can have a key, when, and that nothing of it is ever said."""

import asyncio
import contextlib
import logging
import secrets
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from tests.contract.stores import new_attempt
from tests.lab.fake_glance import FakeGlance
from tests.lab.openstack.cloud import Cloud

from autobackup.cloud.session import ProjectSession
from autobackup.errors import AutobackupError, KeyLost, KeyRefused, KeysUnavailable
from autobackup.model import AttemptId
from autobackup.stores.barbican import BarbicanKeys

OCTETS: Final = {"Accept": "application/octet-stream"}
GUARDED: Final = {"OpenStack-API-Version": "key-manager 1.2"}
DRAW: Final = [
    ("POST", "/v1/secrets"),
    ("PUT", "/acl"),
    ("POST", "/consumers"),
    ("PUT", "/v1/secrets/[^/]*"),
    ("GET", "/payload"),
]
"""Every call of `draw`, in its order."""


def keys_of(
    cloud: Cloud,
    *,
    user: str = "autobackup",
    project: str = "vault",
    clouds: Path | None = None,
    readers: tuple[str, ...] = (),
    project_access: bool = False,
) -> BarbicanKeys:
    entry = user if user == "autobackup" else f"{user}@{project}"
    session = ProjectSession(cloud=entry, project=project, clouds_yaml=clouds or cloud.clouds_file, call_timeout_s=10)
    return BarbicanKeys(session, readers=readers, project_access=project_access)


@pytest.fixture
async def fake(cloud: Cloud) -> AsyncIterator[FakeGlance]:
    """Before Barbican."""
    async with FakeGlance(cloud.barbican_url) as fake:
        yield fake


@pytest.fixture
def faked(cloud: Cloud, tmp_path: Path, fake: FakeGlance) -> BarbicanKeys:
    return keys_of(cloud, clouds=cloud.clouds_with(tmp_path, key_manager=fake.url))


def ask(cloud: Cloud, user: str, project: str, method: str, path: str, **what: Any) -> Any:
    return cloud.call(user, project, method, f"{cloud.barbican_url}/v1/secrets{path}", **what)


def left_of(cloud: Cloud, attempt: AttemptId) -> list[str]:
    """What Barbican itself lists under the attempt's name, to a member of its project."""
    listed = ask(cloud, "vera", "vault", "GET", f"?name=autobackup-{attempt}").json()
    return [str(one["secret_ref"]).rpartition("/")[2] for one in listed["secrets"]]


async def assert_destroyed(cloud: Cloud, attempt: AttemptId) -> None:
    await keys_of(cloud).destroy(attempt)
    assert await asyncio.to_thread(left_of, cloud, attempt) == []


# ---- who can have it --------------------------------------------------------------------------------------


async def test_the_key_travels_only_after_everybody_else_was_shut_out(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance
) -> None:
    attempt = new_attempt()

    drawn = await faked.draw(attempt)

    assert [str(call) for call in fake.calls] == [
        "POST /v1/secrets",
        "PUT /v1/secrets/ID/acl",
        "POST /v1/secrets/ID/consumers",
        "PUT /v1/secrets/ID",
        "GET /v1/secrets/ID/payload",
    ]
    assert all(200 <= call.status < 300 for call in fake.calls)
    for call in fake.calls[:3]:
        assert drawn.key not in call.body
        assert b64encode(drawn.key) not in call.body
        assert b"payload" not in call.body
    assert b'"project-access": false' in fake.calls[1].body
    assert fake.calls[3].body == b64encode(drawn.key)
    await assert_destroyed(cloud, attempt)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("status", [403, 500])
async def test_without_an_access_list_no_key_is_sent(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, at: int, status: int
) -> None:
    attempt = new_attempt()
    method, path = DRAW[at]
    fake.answer(method, path, status=status, times=2)

    with pytest.raises(KeysUnavailable):
        await faked.draw(attempt)

    assert "PUT /v1/secrets/ID" not in [str(call) for call in fake.calls]
    await assert_destroyed(cloud, attempt)


async def test_no_other_member_can_read_a_key_at_any_time_of_its_life(cloud: Cloud) -> None:
    """Somebody in the project reads whatever there is, as fast as they can, while 20 keys are drawn."""
    keys, attempts = keys_of(cloud), [new_attempt() for _ in range(20)]
    seen: dict[str, set[int]] = {}
    drawing = asyncio.gather(*(keys.draw(attempt) for attempt in attempts))

    def pry() -> None:
        listed = ask(cloud, "vera", "vault", "GET", "?limit=100&sort=created:desc").json()["secrets"]
        for one in listed:
            secret = str(one["secret_ref"]).rpartition("/")[2]
            if one["name"].removeprefix("autobackup-") in attempts:
                status = ask(cloud, "vera", "vault", "GET", f"/{secret}/payload", headers=OCTETS).status
                seen.setdefault(secret, set()).add(status)

    while not drawing.done():
        await asyncio.to_thread(pry)
        await asyncio.sleep(0.02)
    drawn = await drawing
    await asyncio.to_thread(pry)

    assert len({one.key for one in drawn}) == len({one.header_words["secret"] for one in drawn}) == 20
    assert set(seen) == {one.header_words["secret"] for one in drawn}
    assert set().union(*seen.values()) <= {403, 404}, "404: it has no payload yet"
    await asyncio.gather(*(assert_destroyed(cloud, attempt) for attempt in attempts))


async def test_a_key_is_for_its_maker_and_the_readers_it_names(cloud: Cloud) -> None:
    """Wherever they are, and with no more than `reader` there. Nobody else: no member, no administrator."""
    attempt = new_attempt()
    keys = keys_of(cloud, readers=(cloud.users["rita"],))
    drawn = await keys.draw(attempt)

    assert await keys.fetch(drawn.header_words) == drawn.key
    assert await keys_of(cloud, user="rita", project="tenant-a").fetch(drawn.header_words) == drawn.key
    for user, project in (("vera", "vault"), ("carol", "tenant-a"), ("alice", "tenant-a"), ("mallory", "elsewhere")):
        with pytest.raises((KeyRefused, KeysUnavailable)) as told:
            await keys_of(cloud, user=user, project=project).fetch(drawn.header_words)
        assert "403" in str(told.value)
    with pytest.raises((KeyRefused, KeysUnavailable), match="403"):
        await keys_of(cloud, user="admin", project="admin").fetch(drawn.header_words)
    secret = drawn.header_words["secret"]
    for user, project in (("rita", "tenant-a"), ("vera", "vault")):
        acl = {"read": {"project-access": True}}
        assert ask(cloud, user, project, "PUT", f"/{secret}/acl", json=acl).status == 403
        assert ask(cloud, user, project, "DELETE", f"/{secret}", headers=GUARDED).status == 403
    assert await keys.fetch(drawn.header_words) == drawn.key
    await assert_destroyed(cloud, attempt)


async def test_project_access_lets_the_members_of_the_project_and_nobody_else(cloud: Cloud) -> None:
    attempt = new_attempt()
    drawn = await keys_of(cloud, project_access=True).draw(attempt)

    assert await keys_of(cloud, user="vera").fetch(drawn.header_words) == drawn.key
    with pytest.raises((KeyRefused, KeysUnavailable), match="403"):
        await keys_of(cloud, user="alice", project="tenant-a").fetch(drawn.header_words)
    await assert_destroyed(cloud, attempt)


async def test_a_key_names_the_image_that_needs_it_and_is_not_deleted_in_passing(cloud: Cloud) -> None:
    attempt = new_attempt()
    drawn = await keys_of(cloud).draw(attempt)
    secret = drawn.header_words["secret"]

    consumers = ask(cloud, "autobackup", "vault", "GET", f"/{secret}/consumers", headers=GUARDED).json()["consumers"]
    assert [(one["service"], one["resource_type"], one["resource_id"]) for one in consumers] == [
        ("image", "image", attempt)
    ]
    deleted = ask(cloud, "autobackup", "vault", "DELETE", f"/{secret}", headers=GUARDED)
    assert (deleted.status, b"consumers" in deleted.body) == (400, True)
    assert await keys_of(cloud).fetch(drawn.header_words) == drawn.key
    kept = await keys_of(cloud).draw(other := new_attempt())
    await assert_destroyed(cloud, attempt)
    await keys_of(cloud).destroy(attempt)
    assert await keys_of(cloud).fetch(kept.header_words) == kept.key
    await assert_destroyed(cloud, other)
    with pytest.raises(KeyLost, match=f"has no secret {secret}"):
        await keys_of(cloud).fetch(drawn.header_words)


# ---- what a crash or an outage leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(DRAW)), ids=["made", "access", "consumer", "payload", "read back"])
@pytest.mark.parametrize("how", ["cancelled before", "answer lost"])
async def test_what_is_left_of_a_draw_that_ended_between_any_two_calls_is_destroyed(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, at: int, how: str
) -> None:
    attempt = new_attempt()
    method, path = DRAW[at]
    if how == "answer lost":
        fake.answer(method, path, status=502, passed_on=True, headers={"Retry-After": "7"})
        with pytest.raises(KeysUnavailable) as told:
            await faked.draw(attempt)
        assert told.value.retry_after_s == 7.0
    else:
        fake.hold(method, path)
        drawing = asyncio.create_task(faked.draw(attempt))
        while len(fake.calls) <= at:
            await asyncio.sleep(0.01)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing

    assert len(await asyncio.to_thread(left_of, cloud, attempt)) == (0 if (at, how) == (0, "cancelled before") else 1)
    await assert_destroyed(cloud, attempt)


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 409, 413, 429, 500, 502, 503, 504])
async def test_a_draw_that_is_refused_waits_and_says_why(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, status: int
) -> None:
    """Nothing is sealed yet, so that nothing is lost by waiting until somebody has mended it."""
    headers = {"X-Openstack-Request-Id": "req-1", "Retry-After": "7"}
    fake.answer("POST", "/v1/secrets", status=status, body=b'{"title": "No", "code": 1}', headers=headers, times=2)

    with pytest.raises(KeysUnavailable) as told:
        await faked.draw(new_attempt())

    assert f"cloud 'autobackup', project 'vault': POST key-manager/v1/secrets: {status} (req-1): No" in str(told.value)
    assert told.value.retry_after_s == (7.0 if status in (401, 403, 413, 429, 500, 502, 503, 504) else None)
    remedies = {401: "agree on the time", 403: "a role is missing", 413: "quota of secrets"}
    assert remedies.get(status, "") in str(told.value)


async def test_an_outage_of_barbican_is_never_taken_for_a_lost_key(cloud: Cloud, tmp_path: Path) -> None:
    drawn = await keys_of(cloud).draw(attempt := new_attempt())
    async with FakeGlance(cloud.barbican_url) as gone:
        clouds = cloud.clouds_with(tmp_path, key_manager=gone.url)
    keys = keys_of(cloud, clouds=clouds)
    for asked in (keys.fetch(drawn.header_words), keys.destroy(attempt), keys.draw(attempt), keys.check()):
        with pytest.raises(KeysUnavailable, match="make sure that it runs"):
            await asked
    assert await keys_of(cloud).fetch(drawn.header_words) == drawn.key
    await assert_destroyed(cloud, attempt)


# ---- what is never taken for a key ------------------------------------------------------------------------

ERROR_BODY: Final = b'{"code": 403, "title": "Forbid"}'
assert len(ERROR_BODY) == 32


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 406, 429, 500, 502, 503, 504])
async def test_an_error_is_never_taken_for_a_key_even_if_it_is_as_long_as_one(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, status: int
) -> None:
    """As openstacksdk does."""
    words = {"source": "barbican", "secret": new_attempt(), "project": cloud.projects["vault"]}
    fake.answer("GET", "/payload", status=status, body=ERROR_BODY, times=2)

    with pytest.raises((KeyRefused, KeysUnavailable, KeyLost)) as told:
        await faked.fetch(words)

    assert isinstance(told.value, KeyLost) == (status == 404)
    assert isinstance(told.value, KeyRefused) == (status in (301, 400, 403, 406))


@pytest.mark.parametrize(
    "body", [b"", b"k" * 31, b"k" * 33, b"\0" * 64, b"<html>Welcome to the hotel's network</html>", b"{}"]
)
async def test_what_is_not_32_bytes_is_no_key_and_is_not_shown(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, body: bytes
) -> None:
    words = {"source": "barbican", "secret": new_attempt(), "project": cloud.projects["vault"]}
    fake.answer("GET", "/payload", status=200, body=body)

    with pytest.raises(KeyRefused, match=f"holds {len(body)} bytes") as told:
        await faked.fetch(words)

    if len(body) > 2:
        assert body.decode() not in str(told.value)


async def test_a_key_that_comes_back_as_another_is_never_sealed_under(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance
) -> None:
    attempt = new_attempt()
    fake.answer("GET", "/payload", status=200, body=bytes(32))

    with pytest.raises(KeyRefused, match="gives back another key"):
        await faked.draw(attempt)

    await assert_destroyed(cloud, attempt)


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"null", b"[]", b"{}", b'{"secrets": 7}', b"[" * 100_000])
async def test_a_garbled_answer_is_an_outage(
    cloud: Cloud, faked: BarbicanKeys, fake: FakeGlance, garbage: bytes
) -> None:
    attempt = new_attempt()
    for method, asked in (
        ("GET", lambda: faked.destroy(attempt)),
        ("GET", faked.check),
        ("POST", lambda: faked.draw(attempt)),
    ):
        fake.edit(method, "/v1/secrets", lambda _body: garbage)
        with pytest.raises(KeysUnavailable):
            await asked()  # type: ignore[operator]
        fake.heal()
    await assert_destroyed(cloud, attempt)


@pytest.mark.parametrize(
    "secret", ["", ".", "../containers", "x/../..", "http://elsewhere/", "@elsewhere", "x?y", "%2e"]
)
async def test_what_a_header_names_is_a_secret_and_never_a_place(
    faked: BarbicanKeys, fake: FakeGlance, secret: str
) -> None:
    """A header is believed only after the key that it leads to has opened something."""
    for words in ({"source": "barbican", "secret": secret, "project": "x"}, {"source": "barbican"}):
        with pytest.raises(KeyRefused):
            await faked.fetch(words)
    assert fake.calls == []


# ---- what is never said -----------------------------------------------------------------------------------


@contextlib.contextmanager
def everything_said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Every log line of this process, ours and of the libraries, at DEBUG."""
    lines: list[str] = []

    def note(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        lines.append(repr(event))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[note], wrapper_class=structlog.make_filtering_bound_logger(0))
    try:
        with caplog.at_level(logging.DEBUG):
            yield lines
    finally:
        structlog.configure(**before)
        lines += [record.getMessage() for record in caplog.records]


def forms_of(key: bytes) -> list[str]:
    return [key.hex(), b64encode(key).decode(), repr(key), repr(key)[2:-1], repr(key[:16])[2:-1], str(list(key))]


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(error) + repr(error)


async def test_neither_a_log_nor_an_error_says_a_key_a_password_or_a_token(
    cloud: Cloud, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever call of a draw fails, and even if the answer repeats what was sent."""
    said, known = [], []
    with everything_said(caplog) as lines:
        async with FakeGlance(cloud.barbican_url) as fake:
            keys = keys_of(cloud, clouds=cloud.clouds_with(tmp_path, key_manager=fake.url))
            drawn = await keys.draw(whole := new_attempt())
            said += [repr(drawn), str(drawn.header_words)]
            for method, path in DRAW:
                for status in (400, 403, 500):
                    fake.answer(method, path, status=status, echoes=True)
                    with pytest.raises(AutobackupError) as told:
                        await keys.draw(attempt := new_attempt())
                    said.append(text_of(told.value))
                    fake.heal()
                    await keys.destroy(attempt)
            await keys.destroy(whole)
            known += [bytes(call.body) for call in fake.calls if str(call) == "PUT /v1/secrets/ID"]
            tokens = {call.headers["X-Auth-Token"] for call in fake.calls}
    assert len(known) > 5
    assert b64encode(drawn.key) in known
    said += lines
    assert any("cloud.call" in line for line in said)
    passwords = [entry["auth"]["password"] for entry in cloud_entries(cloud)]
    for secret in (*(form for body in known for form in (body.decode(), repr(body))), *tokens, *passwords):
        assert not [line for line in said if secret in line]


def cloud_entries(cloud: Cloud) -> list[dict[str, Any]]:
    import json

    return list(json.loads(cloud.clouds_file.read_text())["clouds"].values())


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-",
        b"",
    ],
    ids=["more than said", "less than said", "no chunks", "not packed", "in the head", "no http"],
)
async def test_an_answer_that_is_broken_shows_nothing_of_the_key_that_is_in_it(
    cloud: Cloud, tmp_path: Path, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    """aiohttp's errors quote what they could not read."""
    key = secrets.token_bytes(16).hex().encode()  # 32 bytes, and readable in whichever form

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + key + b"\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        keys = keys_of(cloud, clouds=cloud.clouds_with(tmp_path, key_manager=url))
        with everything_said(caplog) as lines, pytest.raises((KeyRefused, KeysUnavailable)) as told:
            await keys.fetch({"source": "barbican", "secret": new_attempt(), "project": "x"})
    assert isinstance(told.value, KeysUnavailable)
    assert not [line for line in (*lines, text_of(told.value)) if key.decode() in line]
