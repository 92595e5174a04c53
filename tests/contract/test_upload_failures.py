"""
What an upload may meet, and what comes of it: `cloud.failures`, row by row, against a real Glance.

Where Glance itself can be made to fail, it is. For the rest (`FakeGlance`) something stands before it and answers in
its place. The promise of every test: the error says what must happen next, `delete` then leaves nothing, and a new
attempt succeeds.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import structlog
from tests.contract.stores import BodyOf, MiB, new_attempt, pattern
from tests.lab.agent import wait_until
from tests.lab.fake_glance import FakeGlance
from tests.lab.openstack.cloud import Cloud
from tests.lab.proxy import Proxy

from autobackup.cloud.failures import CREATE, DELETE, READ, UPLOAD, Next, Recovery, recovery
from autobackup.cloud.glance import Image
from autobackup.cloud.session import ProjectSession
from autobackup.cloud.upload import Upload
from autobackup.errors import AutobackupError, CloudUnavailable, StoreRefused, StoreUnavailable
from autobackup.model import AttemptId
from autobackup.stores.glance import GlanceStore

KiB: Final = 1 << 10
REQUEST_ID: Final = "req-0f0f0f0f-1111-2222-3333-444444444444"
OCTETS: Final = {"Content-Type": "application/octet-stream"}


class Announced(BodyOf):
    """A body that says beforehand how much it will be; the truth, if not told otherwise."""

    def __init__(self, data: bytes, *, announced_bytes: int | None = None, **how: object) -> None:
        super().__init__(data, "sha512", **how)  # type: ignore[arg-type]
        self._announced_bytes = len(data) if announced_bytes is None else announced_bytes

    @property
    def announced_bytes(self) -> int:
        return self._announced_bytes


class Scene:
    """The agent's store in the project `vault` of a cloud, with somebody at *url* before its Glance."""

    def __init__(self, cloud: Cloud, folder: Path, url: str, **how: float) -> None:
        folder.mkdir(exist_ok=True)
        self.cloud = cloud
        self.session = ProjectSession(
            cloud="autobackup", project="vault", clouds_yaml=cloud.clouds_with(folder, image=url), call_timeout_s=10.0
        )
        self.store = GlanceStore(self.session, **how)  # type: ignore[arg-type]

    def as_vera(self, method: str, attempt: str, path: str = "", **what: object) -> int:
        """As a member of the project who is not the agent."""
        url = f"{self.cloud.glance_url}/v2/images/{attempt}{path}"
        return self.cloud.call("vera", "vault", method, url, **what).status  # type: ignore[arg-type]

    def status(self, attempt: str) -> str:
        answer = self.cloud.call("vera", "vault", "GET", f"{self.cloud.glance_url}/v2/images/{attempt}")
        return str(answer.json()["status"]) if answer.status == 200 else "gone"

    async def refused(self, attempt: AttemptId, body: BodyOf) -> AutobackupError:
        with pytest.raises(AutobackupError) as told:
            await self.store.put(attempt, body, properties={"autobackup_agent": "an agent"})
        assert "cloud 'autobackup', project 'vault'" in str(told.value)
        return told.value

    async def assert_gone(self, attempt: AttemptId, *, blob_stays: bool = False) -> None:
        """*blob_stays*: Glance loses sight of the file of an image whose worker was killed; see the facts."""
        await self.store.delete(attempt)
        assert await asyncio.to_thread(self.status, attempt) == "gone"
        blob = self.cloud.image_file(attempt)
        if blob_stays:
            blob.unlink(missing_ok=True)
        await until(lambda: not blob.exists())

    async def assert_gone_and_a_new_attempt_succeeds(self, attempt: AttemptId, *, blob_stays: bool = False) -> None:
        await self.assert_gone(attempt, blob_stays=blob_stays)
        again, data = new_attempt(), pattern(300 * KiB, seed=attempt.encode())
        await self.store.put(again, BodyOf(data, "sha512"), properties={})
        assert await asyncio.to_thread(self.cloud.image_file(again).read_bytes) == data
        assert await asyncio.to_thread(self.as_vera, "DELETE", again) == 204

    async def assert_whole(self, attempt: AttemptId, data: bytes) -> None:
        stored = await self.store.stat(attempt)
        assert (stored.size_bytes, stored.digest) == (len(data), hashlib.sha512(data).hexdigest())
        assert await asyncio.to_thread(self.cloud.image_file(attempt).read_bytes) == data


async def until(is_so: Callable[[], bool], *, within_s: float = 10.0) -> None:
    await asyncio.to_thread(wait_until, is_so, within_s=within_s)


def at_chunk(wanted: int, do: Callable[[], object]) -> Callable[[int], Awaitable[object] | None]:
    """For `BodyOf`: before this chunk, and in a thread. Before chunk 0 Glance has heard nothing of the upload."""
    return lambda index: asyncio.to_thread(do) if index == wanted else None


@pytest.fixture
async def fake(cloud: Cloud) -> AsyncIterator[FakeGlance]:
    async with FakeGlance(cloud.glance_url) as glance:
        yield glance


@pytest.fixture
def faked(cloud: Cloud, tmp_path: Path, fake: FakeGlance) -> Scene:
    return Scene(cloud, tmp_path, fake.url)


@pytest.fixture
def proxy(cloud: Cloud) -> Iterator[Proxy]:
    with Proxy.to(cloud.glance_url) as proxy:
        yield proxy


@pytest.fixture
def scene(cloud: Cloud, tmp_path: Path, proxy: Proxy) -> Scene:
    return Scene(cloud, tmp_path, proxy.url, stall_timeout_s=30.0, reply_timeout_s=30.0)


# ---- the table --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a row of the table must come to. *remedy*: words that the operator must see."""

    next: Next
    remedy: str


NO_ROLE: Final = Row(next=Next.WAIT, remedy="autobackup doctor")
ANY: Final[Mapping[int, Row]] = {
    401: Row(next=Next.WAIT, remedy="agree on the time"),
    403: NO_ROLE,
    429: Row(next=Next.WAIT, remedy="too many requests"),
    500: Row(next=Next.WAIT, remedy="its log has the request id"),
    502: Row(next=Next.WAIT, remedy="behind its proxy"),
    503: Row(next=Next.WAIT, remedy="overloaded or under maintenance"),
    504: Row(next=Next.WAIT, remedy="answers its proxy in time"),
}
FULL: Final = "delete images there, or make it larger"
ROWS: Final[Mapping[str, Mapping[int, Row]]] = {
    "CREATE": {
        **ANY,
        400: Row(next=Next.PARK, remedy="one of the image's properties"),
        413: Row(next=Next.WAIT, remedy=FULL),
    },
    "UPLOAD": {
        **ANY,
        400: Row(next=Next.SEND_ANEW, remedy="than were announced"),
        404: Row(next=Next.SEND_ANEW, remedy="somebody deleted the image"),
        409: Row(next=Next.SEND_ANEW, remedy="somebody else changed the image's state"),
        410: Row(next=Next.SEND_ANEW, remedy="somebody deleted the image"),
        413: Row(next=Next.SEND_ANEW, remedy=FULL),
        415: Row(next=Next.PARK, remedy="[image_format] in glance-api.conf"),
    },
    "DELETE": {
        **ANY,
        403: Row(next=Next.PARK, remedy="unprotect it"),
        409: Row(next=Next.WAIT, remedy="the image is in use"),
    },
    "READ": {**ANY, 403: Row(next=Next.PARK, remedy="not ours to read")},
}


def test_every_row_of_the_failure_table_has_a_test() -> None:
    """A new row, or one that means something else now, must come with its own."""
    tables = {"CREATE": CREATE, "UPLOAD": UPLOAD, "DELETE": DELETE, "READ": READ}

    assert {name: {status: row.next for status, row in table.items()} for name, table in tables.items()} == {
        name: {status: row.next for status, row in rows.items()} for name, rows in ROWS.items()
    }


def rows_of(table: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("status", "row"), sorted(ROWS[table].items()))


def said(status: int) -> dict[str, object]:
    """As Glance says it."""
    return {
        "status": status,
        "body": f"<html><head><title>{status}</title></head><body><h1>{status}</h1>The words.</body></html>".encode(),
        "headers": {"X-Openstack-Request-Id": REQUEST_ID, "Retry-After": "7", "Content-Type": "text/html"},
    }


def assert_tells(error: AutobackupError, status: int, row: Row) -> None:
    assert type(error) is (StoreRefused if row.next is Next.PARK else StoreUnavailable)
    if isinstance(error, StoreUnavailable):
        assert error.retry_after_s == 7.0
    for words in (f": {status} ({REQUEST_ID}): The words.", row.remedy, "project 'vault'"):
        assert words in str(error)


@rows_of("CREATE")
async def test_an_image_that_is_not_made(faked: Scene, fake: FakeGlance, status: int, row: Row) -> None:
    attempt, body = new_attempt(), BodyOf(pattern(MiB), "sha512")
    fake.answer("POST", "/v2/images", times=2, **said(status))  # type: ignore[arg-type]

    assert_tells(await faked.refused(attempt, body), status, row)

    assert body.iterations == 0
    assert len([call for call in fake.calls if call.method == "POST"]) == (2 if status == 401 else 1)
    fake.heal()
    await faked.assert_gone_and_a_new_attempt_succeeds(attempt)


@pytest.mark.parametrize("is_at_the_end", [False, True], ids=["at once", "at the end"])
@rows_of("UPLOAD")
async def test_an_upload_that_is_refused(
    faked: Scene, fake: FakeGlance, status: int, row: Row, is_at_the_end: bool
) -> None:
    attempt, body = new_attempt(), BodyOf(pattern(3 * MiB), "sha512")
    fake.answer("PUT", "/file", reads_body=is_at_the_end, **said(status))  # type: ignore[arg-type]

    assert_tells(await faked.refused(attempt, body), status, row)

    assert [call.body_bytes for call in fake.calls if call.method == "PUT"][1:] == [], "nothing is sent twice"
    if is_at_the_end:
        await faked.assert_gone(attempt)
    else:
        await faked.assert_gone_and_a_new_attempt_succeeds(attempt)


@rows_of("DELETE")
async def test_an_image_that_does_not_go(faked: Scene, fake: FakeGlance, status: int, row: Row) -> None:
    attempt, data = new_attempt(), pattern(5)
    await faked.store.put(attempt, BodyOf(data, "sha512"), properties={})
    fake.answer("DELETE", f"/{attempt}", times=2, **said(status))  # type: ignore[arg-type]

    with pytest.raises(AutobackupError) as told:
        await faked.store.delete(attempt)

    assert_tells(told.value, status, row)
    await faked.assert_whole(attempt, data)
    fake.heal()
    await faked.assert_gone(attempt)


@rows_of("READ")
async def test_an_image_that_cannot_be_read(faked: Scene, fake: FakeGlance, status: int, row: Row) -> None:
    """Neither is it taken for absent."""
    attempt, data = new_attempt(), pattern(5)
    await faked.store.put(attempt, BodyOf(data, "sha512"), properties={})
    for path, asked in (
        (f"/{attempt}", lambda: faked.store.stat(attempt)),
        (f"/{attempt}", lambda: faked.store.read(attempt, offset=0, length=1)),
        (f"/{attempt}", lambda: faked.store.delete(attempt)),
        ("/v2/images", faked.store.held),
        ("/v2/images", lambda: faked.store.unfinished("an agent")),
        ("/v2/images", faked.store.check),
    ):
        fake.answer("GET", path, times=2, **said(status))  # type: ignore[arg-type]
        with pytest.raises(AutobackupError) as told:
            await asked()  # type: ignore[operator]
        assert_tells(told.value, status, row)
        fake.heal()
    await faked.assert_gone(attempt)


async def test_a_download_that_is_refused_goes_on_when_it_may_again(cloud: Cloud, tmp_path: Path) -> None:
    async def read(status: int, row: Row) -> None:
        async with FakeGlance(cloud.glance_url) as fake:
            scene, attempt, data = Scene(cloud, tmp_path / str(status), fake.url), new_attempt(), pattern(2 * MiB + 7)
            await scene.store.put(attempt, BodyOf(data, "sha512"), properties={})
            fake.answer("GET", "/file", **said(status))  # type: ignore[arg-type]
            reading = scene.store.read(attempt, offset=5, length=MiB)
            if row.next is Next.PARK:
                with pytest.raises(StoreRefused, match=row.remedy):
                    await reading
            else:
                assert await reading == data[5 : 5 + MiB]
            await scene.store.delete(attempt)

    await asyncio.gather(*(read(status, row) for status, row in ROWS["READ"].items()))


@pytest.mark.parametrize("status", [307, 418])
async def test_an_answer_that_nobody_understands_parks_and_is_never_followed(
    faked: Scene, fake: FakeGlance, cloud: Cloud, status: int
) -> None:
    """A token goes nowhere but to what the catalogue or clouds.yaml names."""
    kept, data = new_attempt(), pattern(MiB)
    await faked.store.put(kept, BodyOf(data, "sha512"), properties={})
    async with FakeGlance(cloud.glance_url) as elsewhere:
        for method, path, asked in (
            ("POST", "/v2/images", lambda: faked.store.put(new_attempt(), BodyOf(data, "sha512"), properties={})),
            ("PUT", "/file", lambda: faked.store.put(new_attempt(), BodyOf(data, "sha512"), properties={})),
            ("GET", "/v2/images", faked.store.held),
            ("GET", f"/{kept}", lambda: faked.store.stat(kept)),
            ("GET", "/file", lambda: faked.store.read(kept, offset=0, length=1)),
            ("DELETE", f"/{kept}", lambda: faked.store.delete(kept)),
        ):
            fake.answer(method, path, status=status, headers={"Location": f"{elsewhere.url}/v2/images"})
            with pytest.raises(StoreRefused, match=f": {status}"):
                await asked()  # type: ignore[operator]
            fake.heal()
        assert elsewhere.calls == []
    await faked.assert_whole(kept, data)
    await faked.assert_gone(kept)


# ---- what only a proxy or a broken service says ------------------------------------------------------------

GARBAGE: Final = {
    "nothing": b"",
    "a page": b"<html><body>Welcome to the hotel's network. Please log in.</body></html>",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "wrong kinds": b'{"images": 5, "id": [], "status": {}, "tags": 7, "size": "x"}',
    "wrong items": b'{"images": [5, null, {"id": 1}], "first": "/v2/images"}',
    "no utf-8": b"\xff\xfe\x00{",
    "deep": b"[" * 200_000,
    "deep objects": b'{"message":' * 100_000,
    "a long number": b'{"images": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_a_garbled_answer_is_an_outage_whichever_call_gets_it(
    faked: Scene, fake: FakeGlance, garbage: bytes
) -> None:
    """And never the end of the agent: only an `AutobackupError` stops at the job runner."""
    attempt, data = new_attempt(), pattern(5)
    await faked.store.put(attempt, BodyOf(data, "sha512"), properties={})
    other = new_attempt()
    for method, path, asked in (
        ("GET", f"/{attempt}", lambda: faked.store.stat(attempt)),
        ("GET", f"/{attempt}", lambda: faked.store.delete(attempt)),
        ("GET", "/v2/images", faked.store.held),
        ("GET", "/v2/images", faked.store.check),
        ("POST", "/v2/images", lambda: faked.store.put(other, BodyOf(b"", "sha512"), properties={})),
    ):
        fake.edit(method, path, lambda _body: garbage)
        with pytest.raises(StoreUnavailable) as told:
            await asked()  # type: ignore[operator]
        assert len(str(told.value)) < 600
        fake.heal()
        if path == f"/{attempt}":
            continue
        fake.answer(method, path, status=500, body=garbage)
        with pytest.raises(StoreUnavailable, match="500") as told:
            await asked()  # type: ignore[operator]
        assert len(str(told.value)) < 800
        assert "<" not in str(told.value)
        fake.heal()
    await faked.assert_gone(attempt)


async def test_a_huge_answer_is_not_held_in_memory(faked: Scene, fake: FakeGlance) -> None:
    huge = b'{"images": ["' + b"x" * (40 * MiB) + b'"]}'
    fake.edit("GET", "/v2/images", lambda _body: huge)
    with pytest.raises(StoreUnavailable, match="an answer of over") as told:
        await faked.store.held()
    assert "project 'vault'" in str(told.value)
    fake.heal()

    attempt, body = new_attempt(), BodyOf(pattern(MiB), "sha512")
    fake.answer("PUT", "/file", status=500, body=huge)
    assert isinstance(await faked.refused(attempt, body), StoreUnavailable)
    await faked.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_a_list_whose_next_page_leads_elsewhere_or_in_a_circle_ends(
    faked: Scene, fake: FakeGlance, cloud: Cloud
) -> None:
    async with FakeGlance(cloud.glance_url) as elsewhere:
        port = elsewhere.url.rpartition(":")[2]
        for there in (f"@127.0.0.1:{port}/v2/images", elsewhere.url, "/v2/images?limit=1", 7, f".127.0.0.1:{port}"):
            page = json.dumps({"images": [], "next": there}).encode()
            fake.edit("GET", "/v2/images", lambda _body, page=page: page, times=1000)  # type: ignore[misc]
            with pytest.raises(StoreUnavailable):
                await asyncio.wait_for(faked.store.held(), 20)
            fake.heal()
        assert elsewhere.calls == []


# ---- by what the image is, and never by what was answered --------------------------------------------------


def image(status: str = "queued", **more: object) -> Image:
    made = Image(
        id="i", status=status, owner="p", size_bytes=5, checksum=None, hash_algorithm="sha512", hash_value="aa",
        tags=frozenset(), protected=False, properties={},
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", ["queued", "saving", "importing", "uploading", "active", "killed", "deactivated"])
@pytest.mark.parametrize("checksum", [None, "md5"])
@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("sent", [None, (5, "aa"), (5, "bb"), (6, "aa")])
def test_an_upload_is_there_only_if_size_and_hash_are_those_that_were_sent(
    status: str, checksum: str | None, is_begun: bool, sent: tuple[int, str] | None
) -> None:
    """And no body is sent twice to one image; all cases."""
    found = recovery(image(status, checksum=checksum), is_begun=is_begun, sent=sent)

    assert (found is Recovery.IS_THERE) == (status == "active" and sent == (5, "aa"))
    assert (found is Recovery.PUT_AGAIN) == (status == "queued" and checksum is None and not is_begun)
    assert (found is Recovery.ASK_AGAIN) == (status in ("saving", "importing") and sent is not None)
    assert recovery(None, is_begun=is_begun, sent=sent) is Recovery.NEW_IMAGE


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_gateway_that_lost_patience_with_a_whole_upload_costs_nothing(
    faked: Scene, fake: FakeGlance, status: int
) -> None:
    attempt, data = new_attempt(), pattern(2 * MiB)
    fake.answer("PUT", "/file", passed_on=True, **said(status))  # type: ignore[arg-type]

    await faked.store.put(attempt, BodyOf(data, "sha512"), properties={})

    assert len([call for call in fake.calls if call.method == "PUT"]) == 1
    await faked.assert_whole(attempt, data)
    await faked.store.delete(attempt)


@pytest.mark.parametrize("status", [401, 403, 413, 429])
async def test_a_whole_upload_that_was_refused_all_the_same_is_not_counted_on(
    faked: Scene, fake: FakeGlance, status: int
) -> None:
    """Who says no may take it away yet."""
    attempt = new_attempt()
    fake.answer("PUT", "/file", passed_on=True, **said(status))  # type: ignore[arg-type]

    assert isinstance(await faked.refused(attempt, BodyOf(pattern(MiB), "sha512")), StoreUnavailable)

    await faked.assert_gone_and_a_new_attempt_succeeds(attempt)


@pytest.mark.parametrize(
    "edited", [{"os_hash_value": "ab" * 64}, {"os_hash_algo": "sha256", "os_hash_value": "ab" * 32}, {"size": 7}]
)
async def test_an_active_image_that_is_not_what_was_sent_is_not_ours(
    faked: Scene, fake: FakeGlance, edited: dict[str, object]
) -> None:
    """The answer was lost, the image is active, and its hash is another's."""
    attempt = new_attempt()
    fake.answer("PUT", "/file", passed_on=True, status=502)
    fake.edit("GET", f"/{attempt}", lambda body: json.dumps(json.loads(body) | edited).encode())

    error = await faked.refused(attempt, BodyOf(pattern(MiB), "sha512"))

    assert isinstance(error, StoreUnavailable)
    await faked.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_an_answer_that_was_lost_is_found_out_although_the_next_one_is_too(
    faked: Scene, fake: FakeGlance
) -> None:
    """Glance is behind a proxy that fails twice more before the image can be asked for."""
    attempt, data = new_attempt(), pattern(MiB)
    fake.answer("PUT", "/file", passed_on=True, status=502)
    fake.answer("GET", f"/{attempt}", status=503, times=2)

    await faked.store.put(attempt, BodyOf(data, "sha512"), properties={})

    await faked.assert_whole(attempt, data)
    await faked.store.delete(attempt)


# ---- the real one: refusals --------------------------------------------------------------------------------


async def token_of(session: ProjectSession) -> str:
    async with session.open("image", "GET", "/v2/images?limit=1") as response:
        return str(response.request_info.headers["X-Auth-Token"])


def revoke_token(cloud: Cloud, token: str) -> None:
    answer = cloud.call("admin", "admin", "DELETE", f"{cloud.keystone_url}/v3/auth/tokens", headers={
        "X-Auth-Token": cloud.token("admin", "admin"), "X-Subject-Token": token,
    })  # fmt: skip
    assert answer.status in (204, 404), answer  # it may have been revoked before, and nobody noticed yet


async def test_a_token_that_was_revoked_is_renewed_and_nobody_notices(scene: Scene, cloud: Cloud) -> None:
    """Before the upload, in its middle, before each call after it."""
    attempt, data = new_attempt(), pattern(3 * MiB)
    token = await token_of(scene.session)
    await asyncio.to_thread(revoke_token, cloud, token)

    body = BodyOf(data, "sha512", before_chunk=lambda index: revoked() if index == 2 else None)

    async def revoked() -> None:
        await asyncio.to_thread(revoke_token, cloud, await token_of(scene.session))

    await scene.store.put(attempt, body, properties={})
    assert await token_of(scene.session) != token
    for asked in (
        lambda: scene.store.stat(attempt),
        lambda: scene.store.read(attempt, offset=MiB, length=9),
        lambda: scene.store.digest(attempt),
        scene.store.held,
        scene.store.check,
    ):
        await revoked()
        await asked()
    await scene.assert_whole(attempt, data)
    await revoked()
    await scene.store.delete(attempt)
    assert scene.status(attempt) == "gone"


async def test_a_token_that_ends_between_create_and_upload_costs_one_attempt(scene: Scene, cloud: Cloud) -> None:
    """401 to the PUT itself: a body cannot be sent twice, so the next attempt has it, with a new token."""
    attempt = new_attempt()

    async def revoked() -> None:
        await asyncio.to_thread(revoke_token, cloud, await token_of(scene.session))

    error = await scene.refused(
        attempt,
        BodyOf(pattern(MiB), "sha512", before_chunk=lambda index: revoked() if index == 0 else None),
    )

    assert isinstance(error, StoreUnavailable)
    assert "/file: 401: " in str(error)
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


@contextlib.contextmanager
def without_roles(cloud: Cloud, *roles: str) -> Iterator[None]:
    for role in roles:
        cloud.revoke("autobackup", "vault", role)
    try:
        yield
    finally:
        for role in roles:
            cloud.grant("autobackup", "vault", role)


@pytest.mark.parametrize("roles", [("autobackup",), ("member", "creator", "autobackup")], ids=["one", "all"])
@pytest.mark.parametrize("when", ["before the put", "before the upload", "during the upload"])
async def test_a_role_that_is_taken_away_ends_in_words_that_name_it(
    scene: Scene, cloud: Cloud, roles: tuple[str, ...], when: str
) -> None:
    attempt = new_attempt()
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(without_roles(cloud, *roles))

        if when == "before the put":
            await asyncio.to_thread(take)
            error = await scene.refused(attempt, BodyOf(pattern(MiB), "sha512"))
        else:
            chunk = 0 if when == "before the upload" else 2
            body = BodyOf(pattern(3 * MiB), "sha512", before_chunk=at_chunk(chunk, take))
            if when == "during the upload" or len(roles) == 1:
                # Glance asks at its start only; and a token lives on without a role that nobody there asks for
                await scene.store.put(attempt, body, properties={})
            else:
                assert "/file: 401: " in str(await scene.refused(attempt, body))
            with pytest.raises(StoreUnavailable) as told:
                await scene.store.check()
            error = told.value
        assert isinstance(error, StoreUnavailable)
        for role in roles:
            assert f"openstack role add --user autobackup --project vault {role}" in str(error)
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_a_policy_that_forbids_is_said(openstack_services: None, tmp_path: Path) -> None:
    """On a cloud of its own: Glance does not forget a rule that its file no longer has."""
    with Cloud(tmp_path / "cloud", glance_worker_count=1) as cloud:
        scene = Scene(cloud, tmp_path / "scene", cloud.glance_url)
        attempt, unsent = new_attempt(), new_attempt()
        await scene.store.put(attempt, BodyOf(b"kept", "sha512"), properties={})

        def forbid(rule: str) -> None:
            cloud.policy_file("glance").write_text(json.dumps({rule: "!"}))

        forbid("download_image")
        with pytest.raises(StoreRefused, match=r"403 \(req-.*not ours to read"):
            await scene.store.read(attempt, offset=0, length=4)
        forbid("delete_image")
        with pytest.raises(StoreRefused, match=r"403 \(req-.*unprotect it"):
            await scene.store.delete(attempt)
        forbid("upload_image")
        error = await scene.refused(unsent, BodyOf(pattern(MiB), "sha512"))
        assert isinstance(error, StoreUnavailable)
        assert "403 (req-" in str(error)
        forbid("add_image")
        error = await scene.refused(new_attempt(), BodyOf(b"x", "sha512"))
        assert isinstance(error, StoreUnavailable)
        assert "403 (req-" in str(error)
        assert "doctor" in str(error)
        await scene.assert_whole(attempt, b"kept")


async def test_a_protected_image_is_said_and_stays(scene: Scene) -> None:
    attempt = new_attempt()
    await scene.store.put(attempt, BodyOf(b"kept", "sha512"), properties={})

    def protect(word: str) -> None:
        patch = f'[{{"op": "replace", "path": "/protected", "value": {word}}}]'.encode()
        headers = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
        assert scene.as_vera("PATCH", attempt, data=patch, headers=headers) == 200

    protect("true")
    with pytest.raises(StoreRefused, match=r"403 \(req-.*unprotect it"):
        await scene.store.delete(attempt)
    await scene.assert_whole(attempt, b"kept")
    protect("false")
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


@pytest.mark.parametrize(("chunk", "status"), [(0, 404), (3, 410)], ids=["before", "during"])
async def test_an_image_that_a_tenant_deletes_under_our_hands(scene: Scene, chunk: int, status: int) -> None:
    attempt = new_attempt()

    def delete() -> None:
        assert scene.as_vera("DELETE", attempt) == 204

    error = await scene.refused(attempt, BodyOf(pattern(6 * MiB), "sha512", before_chunk=at_chunk(chunk, delete)))

    assert isinstance(error, StoreUnavailable)
    if not _was_reset(error):
        assert any(f"{one} (req-" in str(error) for one in (status, 404)), error  # 404: it had not begun to read
        assert "somebody deleted the image while it was sent" in str(error)
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


def _was_reset(error: Exception) -> bool:
    """uWSGI closes on what is still coming, and on a busy machine its answer is lost with it."""
    return "reset by peer" in str(error) or "Broken pipe" in str(error)


async def test_an_image_that_somebody_else_fills_first_is_not_taken_for_ours(scene: Scene) -> None:
    """409 to us, and active: with their bytes."""
    attempt, data = new_attempt(), pattern(2 * MiB)

    def fill() -> None:
        assert scene.as_vera("PUT", attempt, "/file", data=b"theirs", headers=OCTETS) == 204

    error = await scene.refused(attempt, BodyOf(data, "sha512", before_chunk=at_chunk(0, fill)))

    assert isinstance(error, StoreUnavailable)
    if not _was_reset(error):
        assert "409 (req-" in str(error)
        assert "somebody else changed the image's state" in str(error)
    assert (await scene.store.stat(attempt)).digest != hashlib.sha512(data).hexdigest()
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_who_uploads_into_our_image_meanwhile_is_refused_and_ours_arrives(scene: Scene) -> None:
    attempt, data = new_attempt(), pattern(4 * MiB)

    def fill() -> None:
        wait_until(lambda: scene.status(attempt) == "saving")
        assert scene.as_vera("PUT", attempt, "/file", data=b"theirs", headers=OCTETS) == 409

    await scene.store.put(attempt, BodyOf(data, "sha512", before_chunk=at_chunk(3, fill)), properties={})

    await scene.assert_whole(attempt, data)
    await scene.store.delete(attempt)


@pytest.mark.parametrize("announced_bytes", [MiB - 1, MiB + 1, 5 * MiB])
async def test_a_body_of_another_length_than_announced_is_refused_and_not_kept(
    scene: Scene, announced_bytes: int
) -> None:
    attempt = new_attempt()

    error = await scene.refused(attempt, Announced(pattern(MiB), announced_bytes=announced_bytes))

    assert isinstance(error, StoreUnavailable)
    assert "fewer or more bytes came than were announced" in str(error)
    assert scene.status(attempt) == "queued"
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_an_announced_length_that_is_true_arrives(scene: Scene) -> None:
    attempt, data = new_attempt(), pattern(MiB + 5)
    await scene.store.put(attempt, Announced(data), properties={})
    await scene.assert_whole(attempt, data)
    await scene.store.delete(attempt)


@pytest.mark.parametrize(
    "head",
    [b"QFI\xfb\0\0\0\3", bytes(510) + b"\x55\xaa"],
    ids=["qcow2", "mbr"],
)
async def test_what_glance_takes_for_a_disk_image_parks_and_can_be_deleted(scene: Scene, head: bytes) -> None:
    """Glance keeps the file of an image that it refused until the image is deleted."""
    attempt = new_attempt()

    error = await scene.refused(attempt, BodyOf(head + pattern(MiB), "sha512"))

    assert isinstance(error, StoreRefused)
    assert "415 (req-" in str(error)
    assert "[image_format] in glance-api.conf" in str(error)
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def test_a_full_project_refuses_at_once_what_is_announced_and_in_the_end_what_is_not(
    cloud: Cloud, tmp_path: Path
) -> None:
    images = cloud.call("vera", "vault", "GET", f"{cloud.glance_url}/v2/images?limit=1000").json()["images"]
    used_bytes = sum(one["size"] or 0 for one in images if one["owner"] == cloud.projects["vault"])
    with cloud.glance_with(user_storage_quota=str(used_bytes + 4 * MiB)) as url, Proxy.to(url) as proxy:
        scene = Scene(cloud, tmp_path, proxy.url)
        data = pattern(24 * MiB)
        kinds = ((partial(Announced, data), "queued"), (partial(BodyOf, data, "sha512"), "saving"))
        for body, status in kinds:
            for _ in range(5):
                attempt, before = new_attempt(), proxy.client_bytes
                error = await scene.refused(attempt, body())
                assert isinstance(error, StoreUnavailable)
                if "413 (req-" in str(error):
                    break
                # the connection was closed over what we were still sending: on a busy machine that is seen first
                assert "Broken pipe" in str(error) or "reset" in str(error), error
                await scene.assert_gone_and_a_new_attempt_succeeds(attempt)
            assert "413 (req-" in str(error)
            assert FULL in str(error)
            assert scene.status(attempt) == status
            if status == "queued":
                assert proxy.client_bytes - before < 12 * MiB, "what the sockets took until the answer came"
            await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


# ---- the real one: breaks ----------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_leaves_an_image_that_delete_removes(scene: Scene, cloud: Cloud) -> None:
    """It is `saving` for ever. Its file is lost to Glance, too: an operator's `glance-manage` is for that."""
    attempt = new_attempt()

    def kill() -> None:
        wait_until(lambda: scene.status(attempt) == "saving")
        for worker in cloud.glance_workers():
            os.kill(worker, signal.SIGKILL)

    body = BodyOf(pattern(16 * MiB), "sha512", before_chunk=at_chunk(8, kill))
    error = await scene.refused(attempt, body)

    assert isinstance(error, StoreUnavailable)
    assert "make sure that it runs" in str(error)
    await until(lambda: len(cloud.glance_workers()) == 2)
    assert scene.status(attempt) == "saving"
    assert await scene.store.unfinished("an agent") == [attempt]
    await scene.assert_gone_and_a_new_attempt_succeeds(attempt, blob_stays=True)


async def test_a_connection_cut_anywhere_leaves_nothing_or_the_whole(cloud: Cloud, tmp_path: Path) -> None:
    """In the head, in the first chunk, in the last, in the mark of the end, and right after it."""
    data = pattern(3 * MiB + 11)
    with Proxy.to(cloud.glance_url) as proxy:
        body = BodyOf(data, "sha512", before_chunk=lambda index: starts.append(proxy.client_bytes) if not index else 0)
        starts: list[int] = []
        attempt = new_attempt()
        scene = Scene(cloud, tmp_path / "whole", proxy.url)
        await scene.store.put(attempt, body, properties={})
        whole_bytes = proxy.client_bytes - starts[0]
        await scene.store.delete(attempt)
    assert whole_bytes > len(data)

    async def cut(index: int, after_bytes: int) -> str:
        with Proxy.to(cloud.glance_url) as proxy:
            scene, attempt = Scene(cloud, tmp_path / str(index), proxy.url), new_attempt()
            body = BodyOf(data, "sha512", before_chunk=lambda chunk: None if chunk else proxy.cut_after(after_bytes))
            try:
                await scene.store.put(attempt, body, properties={})
                outcome = "whole"
                await scene.assert_whole(attempt, data)
            except StoreUnavailable:
                outcome = "broken"
                await until(lambda: scene.status(attempt) == "queued")
                with pytest.raises(StoreRefused):
                    await scene.store.stat(attempt)
            assert proxy.fault_count == 1
            assert proxy.client_bytes < 2 * whole_bytes, "nothing is sent twice"
            await scene.assert_gone(attempt)
            return outcome

    offsets = [1, 600, 1500, 200 * KiB, MiB, 2 * MiB + 1, whole_bytes - 100, *range(whole_bytes - 7, whole_bytes + 1)]
    outcomes = await asyncio.gather(*(cut(index, offset) for index, offset in enumerate(offsets)))

    assert outcomes[:-1] == ["broken"] * (len(offsets) - 1)  # even where only the last byte of b"0\r\n\r\n" is missing


async def test_an_answer_that_is_lost_is_not_sent_for_again(scene: Scene, proxy: Proxy) -> None:
    """The upload is recognised as there by what Glance holds."""
    attempt, data = new_attempt(), pattern(5 * MiB)
    before = proxy.client_bytes
    proxy.drop_reply()

    await scene.store.put(attempt, BodyOf(data, "sha512"), properties={})

    assert proxy.fault_count == 1
    assert len(data) < proxy.client_bytes - before < len(data) + 64 * KiB
    await scene.assert_whole(attempt, data)
    await scene.store.delete(attempt)


async def test_a_put_that_nobody_heard_is_made_again_to_the_same_image(scene: Scene, proxy: Proxy) -> None:
    """Not a byte of the body was taken, so this is no second sending. Glance is there again when it is asked."""
    attempt, data, calls = new_attempt(), pattern(MiB), []

    class Shy(Announced):
        """Glance is gone when this is first asked how much it is."""

        asked_count = 0

        @property
        def announced_bytes(self) -> int:
            self.asked_count += 1
            if self.asked_count == 1:
                proxy.refuse()
            return len(data)

    def heal(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event["event"] == "cloud.call":
            calls.append((event["call"].partition(" ")[0], event["status"]))
            if calls[-1] == ("PUT", 0):
                proxy.heal()
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[heal], wrapper_class=structlog.make_filtering_bound_logger(0))
    try:
        await scene.store.put(attempt, Shy(data), properties={})
    finally:
        structlog.configure(**before)

    assert calls[-3:] == [("PUT", 0), ("GET", 200), ("PUT", 204)]
    await scene.assert_whole(attempt, data)
    await scene.store.delete(attempt)


@pytest.mark.parametrize("taken_count", [1, 3, 99])
async def test_a_body_is_sent_once_even_if_http_wants_it_again(taken_count: int) -> None:
    """aiohttp before 3.14.4 repeats a PUT whose connection broke, with what is left of its body."""
    data = pattern(3 * MiB)
    upload = Upload(BodyOf(data, "sha512"), stall_timeout_s=5.0)
    async with upload.watched():
        first, pieces = aiter(upload), []
        async for piece in first:
            pieces.append(bytes(piece))
            if len(pieces) == taken_count:
                break
        with pytest.raises(CloudUnavailable, match="sent twice"):
            await anext(aiter(upload))
        async for piece in first:
            pieces.append(bytes(piece))

    assert b"".join(pieces) == data
    assert upload.is_whole
    assert max(map(len, pieces)) <= 512 * KiB, "uWSGI takes no HTTP chunk of 1 MiB"
    with pytest.raises(CloudUnavailable, match="sent twice"):
        await anext(aiter(upload))


# ---- slow ones, beside each other --------------------------------------------------------------------------


@pytest.mark.timeout(300)  # half a minute where nothing else runs
async def test_nothing_waits_for_ever_and_nothing_is_given_up_too_soon(cloud: Cloud, tmp_path: Path) -> None:
    """Half a minute, of real time: every one of these is about a clock that is not ours."""
    await asyncio.gather(
        _silence_of_our_own_side_does_not_break_an_upload(cloud, tmp_path / "silence"),
        _an_upload_that_nobody_takes_is_given_up(cloud, tmp_path / "stall"),
        _an_answer_that_does_not_come_is_given_up(cloud, tmp_path / "reply"),
        _an_image_that_saves_for_ever_is_given_up(cloud, tmp_path / "saving"),
        _a_download_that_never_comes_is_given_up(cloud, tmp_path / "download"),
    )


async def _silence_of_our_own_side_does_not_break_an_upload(cloud: Cloud, folder: Path) -> None:
    """Glance cuts what says nothing for 10 s. A slow disk, a rate limit or another destination may take longer."""

    async def send(name: str, silent_chunk: int, chunk_bytes: int) -> None:
        scene, attempt = Scene(cloud, folder / name, cloud.glance_url), new_attempt()
        data = pattern(4 * chunk_bytes)
        body = BodyOf(
            data,
            "sha512",
            chunk_bytes=chunk_bytes,
            before_chunk=lambda i: asyncio.sleep(14) if i == silent_chunk else 0,
        )
        await scene.store.put(attempt, body, properties={})
        await scene.assert_whole(attempt, data)
        await scene.store.delete(attempt)

    folder.mkdir()
    await asyncio.gather(
        send("after the header", 1, 4096),
        send("in the middle", 2, MiB),
    )


async def _an_upload_that_nobody_takes_is_given_up(cloud: Cloud, folder: Path) -> None:
    with Proxy.to(cloud.glance_url) as proxy:
        scene, attempt = Scene(cloud, folder, proxy.url, stall_timeout_s=2.0), new_attempt()
        body = BodyOf(pattern(48 * MiB), "sha512", before_chunk=lambda index: proxy.stall() if index == 4 else None)
        putting = asyncio.create_task(scene.refused(attempt, body))
        await until(lambda: proxy.client_bytes > 2 * MiB)
        began_s = time.monotonic()
        await asyncio.sleep(2.5)
        proxy_heals = asyncio.get_running_loop().call_later(4.0, proxy.heal)
        error = await putting
        proxy_heals.cancel()
        proxy.heal()

        assert time.monotonic() - began_s < 25
        assert isinstance(error, StoreUnavailable)
        assert "took no byte for 2 s" in str(error)
        await until(lambda: scene.status(attempt) == "queued", within_s=20)
        await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def _an_answer_that_does_not_come_is_given_up(cloud: Cloud, folder: Path) -> None:
    """The body is taken, and then nothing is said; the image is asked, and is there."""
    async with FakeGlance(cloud.glance_url) as fake:
        scene, attempt, data = Scene(cloud, folder, fake.url, reply_timeout_s=3.0), new_attempt(), pattern(100)
        held = fake.hold("PUT", "/file")
        began_s = time.monotonic()
        error = await scene.refused(attempt, BodyOf(data, "sha512"))

        assert 2.5 < time.monotonic() - began_s < 15
        assert isinstance(error, StoreUnavailable)
        held.set()
        fake.heal()
        await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def _an_image_that_saves_for_ever_is_given_up(cloud: Cloud, folder: Path) -> None:
    async with FakeGlance(cloud.glance_url) as fake:
        scene, attempt = Scene(cloud, folder, fake.url), new_attempt()
        fake.answer("PUT", "/file", passed_on=True, status=504)
        fake.edit("GET", f"/{attempt}", lambda body: body.replace(b'"active"', b'"saving"'), times=1000)

        began_s = time.monotonic()
        error = await scene.refused(attempt, BodyOf(pattern(MiB), "sha512"))

        assert 25 < time.monotonic() - began_s < 45
        assert isinstance(error, StoreUnavailable)
        fake.heal()
        await scene.assert_gone_and_a_new_attempt_succeeds(attempt)


async def _a_download_that_never_comes_is_given_up(cloud: Cloud, folder: Path) -> None:
    async with FakeGlance(cloud.glance_url) as fake:
        scene, attempt = Scene(cloud, folder, fake.url), new_attempt()
        await scene.store.put(attempt, BodyOf(pattern(MiB), "sha512"), properties={})
        fake.answer("GET", "/file", times=1000, **said(503))  # type: ignore[arg-type]

        with pytest.raises(StoreUnavailable, match=f"503 .{REQUEST_ID}"):
            await scene.store.read(attempt, offset=0, length=1)

        assert 2 < len([call for call in fake.calls if call.path.endswith("/file") and call.method == "GET"]) < 10
        fake.heal()
        await scene.assert_gone_and_a_new_attempt_succeeds(attempt)
