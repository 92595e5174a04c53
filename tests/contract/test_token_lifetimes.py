"""
Hours of upload with a token that lives five minutes, in half a minute: a token that lives six seconds.

All of it runs beside each other, in real time: Keystone's clock is not ours to turn.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.contract.stores import BodyOf, MiB, new_attempt, pattern
from tests.lab.fake_glance import FakeGlance
from tests.lab.openstack.cloud import Cloud

from autobackup.cloud.session import ProjectSession
from autobackup.stores.barbican import BarbicanKeys
from autobackup.stores.glance import GlanceStore

LIFETIME_S: Final = 6
LIFETIMES: Final = 5


class Place:
    """A project behind a Keystone of short tokens, with something before Glance that writes down which were used."""

    def __init__(self, cloud: Cloud, folder: Path, *, keystone_url: str, fake: FakeGlance) -> None:
        folder.mkdir()
        clouds = cloud.clouds_with(folder, image=fake.url, auth=keystone_url)
        self.cloud, self.fake = cloud, fake
        self.session = ProjectSession(cloud="autobackup", project="vault", clouds_yaml=clouds, call_timeout_s=15)
        self.store = GlanceStore(self.session)

    def tokens_of(self, method: str) -> list[str]:
        return [call.headers["X-Auth-Token"] for call in self.fake.calls if call.method == method]

    def is_dead(self, token: str) -> bool:
        url = f"{self.cloud.glance_url}/v2/images?limit=1"
        return self.cloud.call("autobackup", "vault", "GET", url, headers={"X-Auth-Token": token}).status == 401

    def revoke(self, token: str) -> None:
        headers = {"X-Auth-Token": self.cloud.token("admin", "admin"), "X-Subject-Token": token}
        url = f"{self.cloud.keystone_url}/v3/auth/tokens"
        assert self.cloud.call("admin", "admin", "DELETE", url, headers=headers).status == 204


@pytest.fixture
def keystone_url(cloud: Cloud) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(cloud.keystone_with(token_lifetime_s=LIFETIME_S))


@pytest.mark.timeout(300)  # half a minute where nothing else runs
async def test_work_goes_on_over_many_lifetimes_of_a_token(cloud: Cloud, keystone_url: str, tmp_path: Path) -> None:
    async with FakeGlance(cloud.glance_url) as first, FakeGlance(cloud.glance_url) as second:
        await asyncio.gather(
            _an_upload_outlives_its_token(Place(cloud, tmp_path / "up", keystone_url=keystone_url, fake=first)),
            _a_download_outlives_its_token(Place(cloud, tmp_path / "down", keystone_url=keystone_url, fake=second)),
        )


async def _an_upload_outlives_its_token(place: Place) -> None:
    """And everything that is to be done afterwards is done with others."""
    count = LIFETIME_S * LIFETIMES + 1
    data, attempt = pattern(count * 100_000), new_attempt()
    keys = BarbicanKeys(place.session, readers=(), project_access=False)
    drawn = await keys.draw(attempt)
    body = BodyOf(data, "sha512", chunk_bytes=100_000, before_chunk=lambda _index: asyncio.sleep(1.0))

    await place.store.put(attempt, body, properties={"n": "1"})

    (token,) = place.tokens_of("PUT")
    assert await asyncio.to_thread(place.is_dead, token)
    stored = await place.store.stat(attempt)
    assert (stored.size_bytes, stored.digest) == (len(data), hashlib.sha512(data).hexdigest())
    assert await keys.fetch(drawn.header_words) == drawn.key
    assert await place.store.digest(attempt) == hashlib.sha512(data).hexdigest()
    assert await place.store.read(attempt, offset=100_001, length=9) == data[100_001:100_010]
    await place.store.delete(attempt)
    await keys.destroy(attempt)


async def _a_download_outlives_its_token(place: Place) -> None:
    """It is cut when the token it began with has ended, and again after another was revoked under its hands."""
    data, attempt = pattern(48 * MiB), new_attempt()
    await place.store.put(attempt, BodyOf(data, "sha512"), properties={})
    place.fake.calls.clear()
    place.fake.cut("GET", "/file", after_bytes=20 * MiB + 7)
    place.fake.cut("GET", "/file", after_bytes=5 * MiB)
    got = hashlib.sha512()
    at, revoked = 0, False
    async for piece in place.store.stream(attempt, offset=0):
        got.update(piece)
        at += len(piece)
        tokens = [call.headers["X-Auth-Token"] for call in place.fake.calls if call.path.endswith("/file")]
        if at == MiB:
            await asyncio.sleep(LIFETIME_S + 1)
            assert await asyncio.to_thread(place.is_dead, tokens[0])
        if len(tokens) == 2 and not revoked:
            revoked = True
            await asyncio.to_thread(place.revoke, tokens[1])

    assert (at, got.digest()) == (len(data), hashlib.sha512(data).digest())
    assert len(set(tokens)) == len(tokens) == 3
    await place.store.delete(attempt)
