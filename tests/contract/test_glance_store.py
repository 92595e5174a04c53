"""What the Glance store adds to the contract: names, tags, sharing, other people's hands, and broken downloads."""

import asyncio
import contextlib
import hashlib
import json
import os
import sqlite3
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from tests.contract.stores import BodyOf, MiB, new_attempt, pattern
from tests.flows.material import JOB, End, contents_of, limits, opened, write_disk
from tests.lab.fake_glance import FakeGlance
from tests.lab.openstack.cloud import Cloud

from autobackup.cloud.session import ProjectSession
from autobackup.container.header import decode
from autobackup.errors import ContainerDamaged, StoreRefused, StoreUnavailable
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.verify import prove_copy
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId, AttemptRecord, JobId
from autobackup.stores.glance import GlanceStore
from autobackup.stores.keys import PublishedKey

PATCH: Final = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
OCTETS: Final = {"Content-Type": "application/octet-stream"}
AGENT: Final = "11111111-1111-1111-1111-111111111111"


def store_of(
    cloud: Cloud, *, user: str = "autobackup", project: str = "vault", clouds: Path | None = None, **how: Any
) -> GlanceStore:
    entry = user if user == "autobackup" else f"{user}@{project}"
    session = ProjectSession(cloud=entry, project=project, clouds_yaml=clouds or cloud.clouds_file, call_timeout_s=10)
    return GlanceStore(session, **how)


class Hands:
    """Of whoever may touch an image, by the API and not by our code."""

    def __init__(self, cloud: Cloud, user: str = "vera", project: str = "vault") -> None:
        self.cloud, self.user, self.project = cloud, user, project

    def ask(self, method: str, path: str = "", **what: Any) -> Any:
        url = f"{self.cloud.glance_url}/v2/images{path}"
        return self.cloud.call(self.user, self.project, method, url, **what)

    def show(self, image: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/{image}")
        assert answer.status == 200, answer
        return dict(answer.json())

    def ids(self, query: str) -> list[str]:
        return [str(one["id"]) for one in self.ask("GET", f"?{query}").json()["images"]]

    def edit(self, image: str, *changes: tuple[str, str, object]) -> None:
        patch = [{"op": op, "path": path, "value": value} for op, path, value in changes]
        answer = self.ask("PATCH", f"/{image}", data=json.dumps(patch).encode(), headers=PATCH)
        assert answer.status == 200, answer

    def tag(self, image: str, tag: str) -> None:
        assert self.ask("PUT", f"/{image}/tags/{tag}").status == 204

    def untag(self, image: str, tag: str) -> None:
        assert self.ask("DELETE", f"/{image}/tags/{tag}").status == 204

    def make(self, *tags: str, data: bytes | None = b"theirs", visibility: str = "shared", **properties: str) -> str:
        fields = {"name": "x", "disk_format": "raw", "container_format": "bare", "visibility": visibility}
        made = self.ask("POST", json={**fields, "tags": list(tags), **properties})
        assert made.status == 201, made
        image = str(made.json()["id"])
        if data is not None:
            assert self.ask("PUT", f"/{image}/file", data=data, headers=OCTETS).status == 204
        return image

    def share(self, image: str, project: str) -> None:
        answer = self.ask("POST", f"/{image}/members", json={"member": self.cloud.projects[project]})
        assert answer.status == 200, answer

    def delete(self, *images: str) -> None:
        for image in images:
            assert self.ask("DELETE", f"/{image}").status == 204


@pytest.fixture
async def store(cloud: Cloud) -> AsyncIterator[GlanceStore]:
    """In a project where nothing else is held; nothing is afterwards."""
    store = store_of(cloud)
    for stored in await store.held():
        await store.delete(stored.attempt)
    yield store
    for stored in await store.held():
        await store.delete(stored.attempt)


async def put(store: GlanceStore, data: bytes = b"sealed", **properties: str) -> AttemptId:
    attempt = new_attempt()
    await store.put(attempt, BodyOf(data, store.digest_algorithm), properties=properties)
    return attempt


async def read(store: GlanceStore, attempt: AttemptId) -> bytes:
    return b"".join([piece async for piece in store.stream(attempt, offset=0)])


# ---- what others see of it --------------------------------------------------------------------------------


async def test_an_image_is_private_opaque_and_says_whose_it_is(cloud: Cloud, store: GlanceStore) -> None:
    attempt = await put(
        store,
        autobackup_instance="0b0b0b0b-0000-0000-0000-000000000000",
        autobackup_instance_name="web-1",
        autobackup_key_ref="12345678-0000-0000-0000-000000000000",
        other="words",
        owner="somebody",
        status="deleted",
    )

    seen = Hands(cloud).show(attempt)

    assert {name: seen[name] for name in ("visibility", "disk_format", "container_format", "owner", "name")} == {
        "visibility": "private",
        "disk_format": "raw",
        "container_format": "bare",
        "owner": cloud.projects["vault"],
        "name": "autobackup of web-1",
    }
    assert sorted(seen["tags"]) == ["autobackup", f"autobackup:{attempt}"]
    assert (seen["image_type"], seen["instance_uuid"]) == ("autobackup", "0b0b0b0b-0000-0000-0000-000000000000")
    assert seen["os_encrypt_key_id"] == "12345678-0000-0000-0000-000000000000"
    # neither of these two may ever be told to delete the key: its end is the agent's to bring
    assert seen["os_encrypt_key_deletion_policy"] == "do_not_delete"
    assert not any(name.startswith("cinder_encryption") for name in seen)
    assert seen["os_encrypt_format"] == "AES256-GCM-HKDF"
    properties = dict((await store.stat(attempt)).properties)
    assert (properties["other"], properties["owner"], properties["status"]) == ("words", "somebody", "deleted")


async def test_without_a_key_in_barbican_nothing_is_said_of_one(cloud: Cloud, store: GlanceStore) -> None:
    seen = Hands(cloud).show(await put(store))

    assert not any("encrypt" in name for name in seen)
    assert "instance_uuid" not in seen


@pytest.mark.parametrize("name", ["größe 磁盘 \U0001f4be\U0001f600", "\U0010ffff" * 300, "x" * 300, "\ud83d", "json:x"])
async def test_any_name_of_an_instance_is_taken(cloud: Cloud, store: GlanceStore, name: str) -> None:
    attempt = await put(store, autobackup_instance_name=name)

    assert (await store.stat(attempt)).properties["autobackup_instance_name"] == name
    assert len(Hands(cloud).show(attempt)["name"]) <= 255


async def test_members_read_at_once_and_nobody_else_does(cloud: Cloud, store: GlanceStore) -> None:
    """Before they accept, which somebody in their project would have to do."""
    attempt = new_attempt()
    shared = store_of(cloud, members=[cloud.projects["tenant-a"]])
    await shared.put(attempt, BodyOf(b"sealed", "sha512"), properties={"n": "1"})
    unshared = await put(store)

    theirs = store_of(cloud, user="alice", project="tenant-a")
    assert await theirs.read(attempt, offset=0, length=10) == b"sealed"
    assert (await theirs.stat(attempt)).properties == {"n": "1"}
    assert not {attempt, unshared} & {one.attempt for one in await theirs.held()}, "nobody fills our lists unasked"
    accepted = cloud.call(
        "alice", "tenant-a", "PUT", f"{cloud.glance_url}/v2/images/{attempt}/members/{cloud.projects['tenant-a']}",
        json={"status": "accepted"},
    )  # fmt: skip
    assert accepted.status == 200
    listed = [one for one in await theirs.held() if one.attempt in (attempt, unshared)]
    assert [(one.attempt, dict(one.properties)) for one in listed] == [(attempt, {"n": "1"})]
    assert listed[0].shared_by == cloud.projects["vault"]
    assert [one.shared_by for one in await shared.held() if one.attempt == attempt] == [""], "once, and ours"
    with pytest.raises(StoreRefused, match="not there, or not ours to see"):
        await theirs.stat(unshared)
    await theirs.delete(attempt)  # nothing of theirs is there
    assert await read(shared, attempt) == b"sealed"
    others = store_of(cloud, user="bob", project="tenant-b")
    with pytest.raises(StoreRefused, match="not there, or not ours to see"):
        await others.stat(attempt)
    assert attempt not in [one.attempt for one in await others.held()]


async def test_an_image_is_shared_before_a_byte_of_it_is_sent(cloud: Cloud, tmp_path: Path) -> None:
    async with FakeGlance(cloud.glance_url) as fake:
        members = [cloud.projects["tenant-a"], cloud.projects["tenant-b"]]
        store = store_of(cloud, clouds=cloud.clouds_with(tmp_path, image=fake.url), members=members)
        attempt = await put(store)
        calls = [str(call) for call in fake.calls if call.method != "GET"]
        assert calls == [
            "POST /v2/images",
            "POST /v2/images/ID/members",
            "POST /v2/images/ID/members",
            "PUT /v2/images/ID/file",
        ]
        await store.delete(attempt)


async def test_who_is_a_member_already_is_no_reason_to_fail(cloud: Cloud) -> None:
    members = [cloud.projects["tenant-a"]] * 2
    store = store_of(cloud, members=members)
    await store.delete(await put(store))


# ---- ids --------------------------------------------------------------------------------------------------


async def test_an_id_that_was_deleted_is_put_as_a_second_image_that_every_call_finds(
    cloud: Cloud, store: GlanceStore
) -> None:
    attempt = await put(store, b"first")
    await store.delete(attempt)

    await store.put(attempt, BodyOf(b"second", "sha512"), properties={"n": "2"})

    (image,) = Hands(cloud).ids(f"tag=autobackup:{attempt}")
    assert image != attempt
    assert (await store.stat(attempt)).properties == {"n": "2"}
    assert await store.digest(attempt) == hashlib.sha512(b"second").hexdigest()
    assert await store.read(attempt, offset=1, length=3) == b"eco"
    assert [one.attempt for one in await store.held()] == [attempt]
    with pytest.raises(StoreRefused, match="used once"):
        await store.put(attempt, BodyOf(b"third", "sha512"), properties={})
    await store.delete(attempt)
    assert Hands(cloud).ids(f"tag=autobackup:{attempt}") == []


@pytest.mark.parametrize("is_second", [False, True])
async def test_a_hidden_image_is_held_all_the_same(cloud: Cloud, store: GlanceStore, is_second: bool) -> None:
    """Glance leaves `os_hidden` ones out of every list that does not ask for them."""
    attempt, vera = await put(store), Hands(cloud)
    if is_second:
        await store.delete(attempt)
        await store.put(attempt, BodyOf(b"sealed", "sha512"), properties={})
    (image,) = vera.ids(f"tag=autobackup:{attempt}")

    vera.edit(image, ("replace", "/os_hidden", True))

    assert vera.ids(f"tag=autobackup:{attempt}") == []
    assert [one.attempt for one in await store.held()] == [attempt]
    assert await read(store, attempt) == b"sealed"
    await store.delete(attempt)
    assert vera.ask("GET", f"/{image}").status == 404


# ---- other people's hands ---------------------------------------------------------------------------------


async def test_edited_tags_and_properties_are_said_and_hide_nothing(cloud: Cloud, store: GlanceStore) -> None:
    vera = Hands(cloud)
    untouched, untagged, more_tags, renamed, nameless = [await put(store, n=str(n)) for n in range(5)]
    vera.untag(untagged, f"autobackup:{untagged}")
    for other in (untouched, new_attempt(), "zzz", ""):
        if other:
            vera.tag(more_tags, f"autobackup:{other}")
    vera.edit(renamed, ("replace", "/autobackup_attempt", untouched), ("add", "/name", "mine"))
    vera.edit(nameless, ("remove", "/autobackup_attempt", ""), ("add", "/hw_disk_bus", "ide"))

    held = {one.attempt: dict(one.properties) for one in await store.held()}

    assert held == {untouched: {"n": "0"}, untagged: {"n": "1"}, more_tags: {"n": "2"}, renamed: {}, nameless: {}}
    for attempt in (untouched, untagged, more_tags):
        assert (await store.stat(attempt)).attempt == attempt
    for attempt in (renamed, nameless):
        assert dict((await store.stat(attempt)).properties) == {}
        assert await store.read(attempt, offset=0, length=9) == b"sealed"
    for attempt in (untagged, more_tags, renamed, nameless):
        await store.delete(attempt)
    assert [one.attempt for one in await store.held()] == [untouched]


async def test_another_image_with_our_tag_in_our_own_project_does_not_stand_before_ours(
    cloud: Cloud, store: GlanceStore
) -> None:
    """Whatever its state, and also if ours is a second image, which only the tag tells."""
    vera, attempt, second = Hands(cloud), await put(store), await put(store)
    await store.delete(second)
    await store.put(second, BodyOf(b"sealed", "sha512"), properties={})
    theirs = []
    for one in (attempt, second):
        tags = ("autobackup", f"autobackup:{one}")
        theirs += [vera.make(*tags, data=None), vera.make(*tags, data=b"theirs", visibility="private")]

    assert await store.read(attempt, offset=0, length=9) == b"sealed"
    assert await store.read(second, offset=0, length=9) == b"sealed"
    assert sorted(one.attempt for one in await store.held()) == sorted([attempt, second])
    await store.delete(attempt)
    await store.delete(second)
    assert await store.held() == []


async def test_images_of_others_under_our_tags_poison_nothing(cloud: Cloud, store: GlanceStore) -> None:
    """
    Any project may tag an image `autobackup:<attempt>` and share it with ours, where somebody may have accepted it.

    Not what is read, not what is listed of ours, not a delete, and not another put.
    """
    mallory, vera = Hands(cloud, "mallory", "elsewhere"), Hands(cloud)
    first, second, deleted = [await put(store, n=str(n)) for n in range(3)]
    await store.delete(second)
    await store.put(second, BodyOf(b"sealed", "sha512"), properties={"n": "1"})
    await store.delete(deleted)
    theirs = []
    for attempt in (first, second, deleted):
        for is_accepted in (False, True):
            expired = {"autobackup_attempt": attempt, "autobackup_expires_at": "1", "autobackup_agent": AGENT}
            image = mallory.make("autobackup", f"autobackup:{attempt}", **expired)
            mallory.share(image, "vault")
            if is_accepted:
                member = f"/{image}/members/{cloud.projects['vault']}"
                assert vera.ask("PUT", member, json={"status": "accepted"}).status == 200
            theirs.append(image)
    try:
        for attempt, n in ((first, "0"), (second, "1")):
            assert dict((await store.stat(attempt)).properties) == {"n": n}
            assert await read(store, attempt) == b"sealed"
            assert [dict(one.properties) for one in await store.held() if one.attempt == attempt] == [{"n": n}]
        assert await store.unfinished(AGENT) == []
        await store.delete(deleted)
        await store.put(deleted, BodyOf(b"again", "sha512"), properties={})
        assert await read(store, deleted) == b"again"
        for attempt in (first, second, deleted):
            await store.delete(attempt)
            assert vera.ids(f"owner={cloud.projects['vault']}&tag=autobackup:{attempt}") == []
    finally:
        mallory.delete(*theirs)


# ---- what a crash left ------------------------------------------------------------------------------------


async def test_unfinished_are_the_own_agents_and_only_those(cloud: Cloud, store: GlanceStore) -> None:
    vera, mallory = Hands(cloud), Hands(cloud, "mallory", "elsewhere")
    whole = await put(store, autobackup_agent=AGENT)
    tags = ("autobackup", f"autobackup:{new_attempt()}")
    mine, theirs = new_attempt(), new_attempt()
    made = [
        vera.make("autobackup", f"autobackup:{mine}", data=None, autobackup_agent=AGENT),
        vera.make("autobackup", f"autobackup:{theirs}", data=None, autobackup_agent="another"),
        vera.make("autobackup", f"autobackup:{new_attempt()}", data=None),
        vera.make(data=None, autobackup_agent=AGENT),
    ]
    foreign = mallory.make(*tags, data=None, autobackup_agent=AGENT)
    mallory.share(foreign, "vault")
    try:
        assert await store.unfinished(AGENT) == [mine]
        assert await store.unfinished("another") == [theirs]
        assert await store.unfinished("") == []
        assert [one.attempt for one in await store.held()] == [whole]
    finally:
        vera.delete(*made)
        mallory.delete(foreign)


async def test_a_whole_backup_is_never_called_unfinished_for_a_tag_that_somebody_gave(
    cloud: Cloud, store: GlanceStore
) -> None:
    """What is unfinished and unknown is deleted, with its key (`flows.places`)."""
    vera, attempt = Hands(cloud), await put(store, autobackup_agent=AGENT)
    decoy = vera.make(
        "autobackup", f"autobackup:{attempt}", data=None, autobackup_agent=AGENT, autobackup_attempt=attempt
    )

    assert await store.unfinished(AGENT) == []

    vera.delete(decoy)


# ---- hashes -----------------------------------------------------------------------------------------------


async def test_the_hash_is_the_one_that_this_glance_takes(cloud: Cloud, tmp_path: Path) -> None:
    """By its newest image, which it may have to have first. A mismatch costs a whole read, never the copy."""
    data = pattern(2 * MiB)
    with cloud.glance_with(hashing_algorithm="sha256") as url:
        clouds = cloud.clouds_with(tmp_path, image=url)
        first = store_of(cloud, clouds=clouds, project="tenant-b")
        attempt = new_attempt()
        body = BodyOf(data, "sha512")
        await first.put(attempt, body, properties={})
        stored = await first.stat(attempt)
        assert (stored.digest_algorithm, stored.digest) == ("sha256", hashlib.sha256(data).hexdigest())

        second = store_of(cloud, clouds=clouds, project="tenant-b")
        assert second.digest_algorithm == "sha512"
        await second.check()
        assert second.digest_algorithm == "sha256"
        assert await second.digest(attempt) == stored.digest
        await second.delete(attempt)


async def test_a_copy_that_glance_hashed_otherwise_is_proven_by_reading_it(cloud: Cloud, tmp_path: Path) -> None:
    """The first one to a Glance with another hash: nobody could know. And a rotten byte of it shows, too."""
    write_disk(tmp_path / "disk", [("data", 3 * MiB)])
    end = End("vault")
    with opened(tmp_path / "disk") as disks:
        (outcome,) = (await fan_out(contents_of(disks), [end.outlet], limits(level=None))).values()
    assert isinstance(outcome, Sent)
    header = decode(end.outlet.header)
    attempt = AttemptId(header.attempt)

    class Keys(PublishedKey):
        async def fetch(self, header_words: Mapping[str, str]) -> bytes:
            return end.outlet.key

    with cloud.glance_with(hashing_algorithm="sha256") as url:
        clouds = tmp_path / "clouds"
        clouds.mkdir()
        store = store_of(cloud, clouds=cloud.clouds_with(clouds, image=url))
        await store.put(attempt, BodyOf(end.data, "sha512"), properties={})
        assert (await store.stat(attempt)).digest_algorithm == "sha256"

        async def prove(digest: str) -> None:
            sent = AttemptRecord(
                attempt=attempt, started_at_s=1.0, size_bytes=len(end.data), digest_algorithm="sha512", digest=digest
            )
            await prove_copy(
                store=store, keys=Keys(), job=JobId(JOB), sent=sent, readback=False, workers=Workers(threads=2)
            )

        await prove(hashlib.sha512(end.data).hexdigest())
        with pytest.raises(ContainerDamaged, match="sha512 is not that of what was sent"):
            await prove(hashlib.sha512(b"another").hexdigest())
        with cloud.image_file(attempt).open("r+b") as file:
            file.seek(2 * MiB)
            file.write(b"rotten")
        with pytest.raises(ContainerDamaged):
            await prove(hashlib.sha512(end.data).hexdigest())
        await store.delete(attempt)


async def test_a_hash_that_nobody_here_can_take_is_not_followed(cloud: Cloud, tmp_path: Path) -> None:
    """`shake_*` are in hashlib's list, and have no length of their own."""
    async with FakeGlance(cloud.glance_url) as fake:
        store = store_of(cloud, clouds=cloud.clouds_with(tmp_path, image=fake.url))
        attempt = await put(store)
        for algorithm in ("shake_128", "whirlpool2", "", "../x", None, 7):
            word = json.dumps(algorithm).encode()
            fake.edit("GET", "/v2/images", lambda body, word=word: body.replace(b'"sha512"', word))  # type: ignore[misc]
            await store.check()
            assert await store.digest(attempt) == hashlib.sha512(b"sealed").hexdigest()
            fake.heal()
        await store.delete(attempt)


# ---- downloads --------------------------------------------------------------------------------------------


async def test_a_download_goes_on_where_it_was_cut(cloud: Cloud, tmp_path: Path) -> None:
    """
    At odd offsets, several times, in the middle of what is read at once, and right at the end.

    As long as each try brings something, although it may never be as much as is read at once.
    """
    data = pattern(5 * MiB + 4099)

    async def read_in_parts(cuts: list[int], offset: int) -> None:
        async with FakeGlance(cloud.glance_url) as fake:
            folder = tmp_path / f"{offset}-{len(cuts)}"
            folder.mkdir()
            store = store_of(cloud, clouds=cloud.clouds_with(folder, image=fake.url))
            for after_bytes in cuts:
                fake.cut("GET", "/file", after_bytes=after_bytes)
            got = b"".join([piece async for piece in store.stream(attempt, offset=offset)])
            assert got == data[offset:]
            ranges = [call.headers.get("Range", "") for call in fake.calls if call.path.endswith("/file")]
            assert len(ranges) == len(cuts) + 1

    store = store_of(cloud)
    attempt = await put(store, data)
    await asyncio.gather(
        read_in_parts([2 * MiB + 7], 0),
        read_in_parts([MiB - 1, MiB + 1], 1),
        read_in_parts([0, 3 * MiB + 4095], 4096),
        read_in_parts([MiB, MiB, MiB], MiB + 1),
        read_in_parts([len(data) - 5000 - 1], 5000),
        read_in_parts([700_000] * 7, 7),
    )
    await store.delete(attempt)


async def test_a_download_whose_token_was_revoked_goes_on_with_another(cloud: Cloud, tmp_path: Path) -> None:
    data = pattern(4 * MiB)
    async with FakeGlance(cloud.glance_url) as fake:
        store = store_of(cloud, clouds=cloud.clouds_with(tmp_path, image=fake.url))
        attempt, got = await put(store, data), b""
        fake.cut("GET", "/file", after_bytes=2 * MiB + 7)
        async for piece in store.stream(attempt, offset=0):
            if not got:
                used = {"X-Auth-Token": cloud.token("admin", "admin"), "X-Subject-Token": _tokens(fake)[0]}
                url = f"{cloud.keystone_url}/v3/auth/tokens"
                assert cloud.call("admin", "admin", "DELETE", url, headers=used).status == 204
            got += piece

        first, again, renewed = _tokens(fake)
        assert got == data
        assert first == again != renewed
        await store.delete(attempt)


def _tokens(fake: FakeGlance) -> list[str]:
    return [call.headers["X-Auth-Token"] for call in fake.calls if str(call) == "GET /v2/images/ID/file"]


async def test_a_server_that_knows_no_ranges_is_not_misread(cloud: Cloud, tmp_path: Path) -> None:
    """From the start its answer serves, and is left after what was asked for; from elsewhere it is refused."""
    data = pattern(64 * MiB)
    async with FakeGlance(cloud.glance_url) as fake:
        store = store_of(cloud, clouds=cloud.clouds_with(tmp_path, image=fake.url))
        attempt = await put(store, data)
        fake.ignore_range("GET", "/file", times=9)
        passed_on = fake.passed_on_bytes

        assert await store.read(attempt, offset=0, length=4096) == data[:4096]
        assert fake.passed_on_bytes - passed_on < 32 * MiB, "the rest was not waited for"
        assert await store.read(attempt, offset=0, length=MiB + 1) == data[: MiB + 1]
        for offset in (1, 4096, MiB):
            with pytest.raises(StoreRefused, match="the whole came"):
                await store.read(attempt, offset=offset, length=10)
        await store.delete(attempt)


async def test_a_slow_reader_holds_little_of_a_large_image(cloud: Cloud) -> None:
    size_bytes, attempt, store = 200 * MiB, new_attempt(), store_of(cloud)
    await store.put(attempt, BodyOf(b"x", "sha512"), properties={})
    # no need to upload as much
    os.truncate(cloud.image_file(attempt), size_bytes)
    with contextlib.closing(sqlite3.connect(cloud.folder / "glance/glance.db", timeout=60)) as database, database:
        database.execute("UPDATE images SET size = ? WHERE id = ?", (size_bytes, attempt))
    got = 0
    tracemalloc.start()
    try:
        async for piece in store.stream(attempt, offset=0):
            got += len(piece)
            assert len(piece) <= MiB
            if got % (16 * MiB) == 0:
                await asyncio.sleep(0.02)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    await store.delete(attempt)

    assert got == size_bytes
    assert peak_bytes < 12 * MiB


async def test_an_image_that_is_deactivated_or_half_there_is_not_held(cloud: Cloud, store: GlanceStore) -> None:
    vera = Hands(cloud)
    attempt = new_attempt()
    queued = vera.make("autobackup", f"autobackup:{attempt}", data=None, autobackup_attempt=attempt)
    for asked in (store.stat(attempt), store.read(attempt, offset=0, length=1), store.digest(attempt)):
        with pytest.raises(StoreRefused, match="is queued: not all of it was stored"):
            await asked
    vera.delete(queued)

    kept = await put(store)
    admin = Hands(cloud, "admin", "admin")
    assert admin.ask("POST", f"/{kept}/actions/deactivate").status == 204
    with pytest.raises((StoreRefused, StoreUnavailable), match="is deactivated"):
        await store.stat(kept)
    assert admin.ask("POST", f"/{kept}/actions/reactivate").status == 204
    assert await read(store, kept) == b"sealed"
