"""What every store promises to whoever keeps parents: who stands on what, what may be stood on, and what is there."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import pytest
from tests.contract.stores import FACTORIES, BodyOf, MiB, StoreBench, new_attempt, open_spec, pattern
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.images import PATCH

from autobackup.cloud.session import ProjectSession
from autobackup.errors import StoreRefused, StoreUnavailable
from autobackup.model import AttemptId
from autobackup.stores.glance import GlanceStore
from autobackup.stores.interface import BASE, KIND, KIND_BASE, PARENTS

PARENT: Final = "0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"
OTHER: Final = "1f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"
CONTENT: Final = "a" * 64 + ".0123456789abcdef"


@pytest.fixture(scope="module", params=sorted(FACTORIES.keys() - {"directory-xfs"}))  # one filesystem will do here
def new_bench(request: pytest.FixtureRequest) -> Iterator[Callable[[], StoreBench]]:
    with FACTORIES[request.param]() as factory:
        yield factory


@pytest.fixture
async def bench(new_bench: Callable[[], StoreBench]) -> AsyncIterator[StoreBench]:
    bench = new_bench()
    yield bench
    for attempt in await bench.store.everything():
        await bench.store.delete(attempt)


def body(bench: StoreBench, data: bytes = b"sealed", **how: object) -> BodyOf:
    return BodyOf(data, bench.store.digest_algorithm, **how)  # type: ignore[arg-type]


async def put(bench: StoreBench, *parents: str, **properties: str) -> AttemptId:
    attempt = new_attempt()
    standing = {PARENTS: " ".join(parents)} if parents else {}
    await bench.store.put(attempt, body(bench), properties={**standing, **properties})
    return attempt


async def put_base(bench: StoreBench, content: str = CONTENT) -> AttemptId:
    await asyncio.sleep(0.02)  # more than a tick of the filesystem's clock
    return await put(bench, **{KIND: KIND_BASE, BASE: content})


async def bases(bench: StoreBench, content: str | None = None) -> list[AttemptId]:
    return [stored.attempt for stored in await bench.store.bases(content)]


# ---- children ---------------------------------------------------------------------------------------------


async def test_children_are_all_that_were_put_on_it(bench: StoreBench) -> None:
    first, second, both = await put(bench, PARENT), await put(bench, OTHER), await put(bench, PARENT, OTHER)
    await put(bench)

    assert await bench.store.children(PARENT) == sorted([first, both])
    assert await bench.store.children(OTHER) == sorted([second, both])
    for nobody in (PARENT[:-1], PARENT + "0", PARENT[1:], "", " ", first):
        assert await bench.store.children(nobody) == [], nobody
    assert await open_spec(bench.spec).children(PARENT) == sorted([first, both]), "the medium knows, not the object"

    await bench.store.delete(first)
    assert await bench.store.children(PARENT) == [both]


async def test_an_object_shows_itself_before_its_first_byte(bench: StoreBench) -> None:
    """So that who looks at its parent after that finds either the child, or the parent gone in time."""
    attempt, told = new_attempt(), list[str]()

    async def begun() -> None:
        told.append("begun")
        assert await bench.store.children(PARENT) == [attempt]
        assert await open_spec(bench.spec).children(PARENT) == [attempt]
        assert attempt not in await bench.store.everything()
        assert attempt not in [stored.attempt for stored in await bench.store.held()]
        assert await bench.store.bases() == []

    sent = body(bench, pattern(2 * MiB), before_chunk=lambda index: told.append(str(index)))
    properties = {PARENTS: f"{OTHER} {PARENT}", KIND: KIND_BASE, BASE: CONTENT}
    await bench.store.put(attempt, sent, properties=properties, begun=begun)

    assert told == ["begun", "0", "1"]
    assert await bench.store.children(PARENT) == await bench.store.children(OTHER) == [attempt]
    assert await bench.store.everything() == [attempt]


async def test_what_begun_raises_ends_the_put(bench: StoreBench) -> None:
    """The parent was gone: not a byte is sent, nothing is held, and the delete that follows takes the child away."""
    attempt, sent = new_attempt(), body(bench)

    async def begun() -> None:
        raise StoreRefused("its parent is gone")

    with pytest.raises(StoreRefused, match="its parent is gone"):
        await bench.store.put(attempt, sent, properties={PARENTS: PARENT}, begun=begun)

    assert sent.iterations == 0
    assert await bench.store.everything() == []
    await bench.store.delete(attempt)
    assert await bench.store.children(PARENT) == []
    await bench.store.put(attempt, body(bench), properties={PARENTS: PARENT})
    assert await bench.store.children(PARENT) == [attempt]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_put_that_was_cut_short_and_deleted_is_nobodys_child(bench: StoreBench, how: str) -> None:
    attempt, reached = new_attempt(), asyncio.Event()

    def before_chunk(index: int) -> object:
        if index == 0:
            return None
        reached.set()
        if how == "fails":
            raise StoreUnavailable("the reader failed")
        return asyncio.sleep(60)

    sent = body(bench, pattern(3 * MiB), before_chunk=before_chunk)
    sending = asyncio.create_task(bench.store.put(attempt, sent, properties={PARENTS: PARENT}))
    await reached.wait()
    sending.cancel()
    await asyncio.wait({sending})

    await bench.store.delete(attempt)
    assert await bench.store.children(PARENT) == []
    assert await bench.store.everything() == []


async def test_a_child_is_told_of_at_every_instant_from_the_beginning_on(bench: StoreBench) -> None:
    """The change from under way to whole, too: for whoever asks just then it must not be in between."""
    is_fast = "wrong mode" in bench.outages  # a folder: then it takes many, and some to look through
    for _ in range(25 if is_fast else 2):
        await put(bench)
    asked = 0
    for _ in range(15 if is_fast else 3):
        attempt, begun = new_attempt(), asyncio.Event()

        async def note(begun: asyncio.Event = begun) -> None:
            begun.set()

        putting = asyncio.create_task(bench.store.put(attempt, body(bench), properties={PARENTS: PARENT}, begun=note))
        await begun.wait()
        while not putting.done():
            found = await asyncio.gather(*(bench.store.children(PARENT) for _ in range(3)))
            assert found == [[attempt]] * 3
            asked += 1
        await putting
        await bench.store.delete(attempt)
        assert await bench.store.children(PARENT) == []
    assert asked


# ---- links ------------------------------------------------------------------------------------------------


async def test_a_link_is_made_and_undone_and_changes_nothing_else(bench: StoreBench) -> None:
    attempt = await put(bench, PARENT, n="größe")
    for _ in range(2):
        await bench.store.link(attempt, OTHER)
        assert await bench.store.children(OTHER) == await bench.store.children(PARENT) == [attempt]
    assert await open_spec(bench.spec).children(OTHER) == [attempt]
    for _ in range(2):
        await bench.store.unlink(attempt, OTHER)
        assert (await bench.store.children(OTHER), await bench.store.children(PARENT)) == ([], [attempt])

    stored = await bench.store.stat(attempt)
    assert (stored.properties["n"], stored.size_bytes) == ("größe", len(b"sealed"))
    assert await bench.store.read(attempt, offset=0, length=9) == b"sealed"


async def test_links_of_one_object_by_several_at_once_are_all_there(bench: StoreBench) -> None:
    attempt = await put(bench)
    others = [await put(bench) for _ in range(3)]
    await asyncio.gather(*(bench.store.link(one, PARENT) for one in (attempt, *others)))
    assert await bench.store.children(PARENT) == sorted([attempt, *others])


async def test_what_is_not_there_cannot_be_linked(bench: StoreBench) -> None:
    for change in (bench.store.link, bench.store.unlink):
        with pytest.raises(StoreRefused):
            await change(new_attempt(), PARENT)
    assert await bench.store.children(PARENT) == []


# ---- bases ------------------------------------------------------------------------------------------------


async def test_bases_are_found_by_what_they_hold_oldest_first(bench: StoreBench) -> None:
    await put(bench, PARENT)
    first, other, second = await put_base(bench), await put_base(bench, "b" * 64), await put_base(bench)

    assert await bases(bench, CONTENT) == [first, second]
    assert await bases(bench, "b" * 64) == [other]
    assert await bases(bench) == [first, other, second]
    for nothing in ("", "a" * 64, CONTENT[:-1], CONTENT + "0"):
        assert await bases(bench, nothing) == [], nothing


async def test_a_retired_base_is_for_nobody_new(bench: StoreBench) -> None:
    kept, retired = await put_base(bench), await put_base(bench)
    child = await put(bench, retired)
    for _ in range(2):
        await bench.store.retire(retired)
        for store in (bench.store, open_spec(bench.spec)):
            assert [one.attempt for one in await store.bases(CONTENT)] == [kept]
            assert {one.attempt: one.retired for one in await store.bases()} == {kept: False, retired: True}
            assert [(await store.stat(one)).retired for one in (kept, retired)] == [False, True]

    assert await bench.store.children(retired) == [child]
    assert await bench.store.read(retired, offset=0, length=9) == b"sealed", "whoever stands on it needs it"
    await bench.store.delete(retired)
    assert await bases(bench) == [kept]


async def test_an_id_that_is_put_again_is_not_retired(bench: StoreBench) -> None:
    attempt = new_attempt()
    properties = {KIND: KIND_BASE, BASE: CONTENT}
    await bench.store.retire(attempt)  # of what another deleted meanwhile
    await bench.store.put(attempt, body(bench), properties=properties)
    await bench.store.retire(attempt)
    await bench.store.delete(attempt)
    await bench.store.put(attempt, body(bench), properties=properties)
    assert [(one.attempt, one.retired) for one in await bench.store.bases(CONTENT)] == [(attempt, False)]


async def test_an_id_that_is_none_is_refused_by_every_change(bench: StoreBench) -> None:
    kept = await put_base(bench)
    for hostile in ("", "..", "../x", "a/b", "x" * 300, "00000000-0000-0000-0000-00000000000\n"):
        for change in (bench.store.link, bench.store.unlink):
            with pytest.raises(StoreRefused):
                await change(AttemptId(hostile), PARENT)
        with pytest.raises(StoreRefused):
            await bench.store.retire(AttemptId(hostile))
    assert await bases(bench, CONTENT) == [kept]


# ---- everything -------------------------------------------------------------------------------------------


async def test_damaged_metadata_hides_nothing_from_whoever_lets_go(bench: StoreBench) -> None:
    """What is deleted next depends on these lists: one that cannot be had, or is shorter, would cost a disk."""
    child, damaged, base = await put(bench, PARENT), await put_base(bench), await put_base(bench)

    bench.damage_metadata(damaged)

    assert set(await bench.store.everything()) == {child, damaged, base}
    assert await bench.store.children(PARENT) == [child]
    assert await bases(bench, CONTENT) == [base]
    assert base in await bases(bench)


async def test_an_outage_is_no_empty_list(bench: StoreBench) -> None:
    """Nothing stands on it, says who has looked; who could not look says so."""
    child = await put(bench, PARENT)
    with bench.outages["gone"]():
        for asked in (bench.store.children(PARENT), bench.store.everything(), bench.store.bases()):
            with pytest.raises(StoreUnavailable):
                await asked
    assert await bench.store.children(PARENT) == [child]


# ---- what members of the project do to images -------------------------------------------------------------


class Images:
    """A glance store, and the images in it by the API."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        session = ProjectSession(cloud="autobackup", project="vault", clouds_yaml=cloud.clouds_file, call_timeout_s=10)
        self.store = GlanceStore(session)

    async def put(self, **properties: str) -> AttemptId:
        attempt = new_attempt()
        await self.store.put(attempt, BodyOf(b"sealed", self.store.digest_algorithm), properties=properties)
        return attempt

    def ask(self, method: str, path: str, *, who: tuple[str, str] = ("vera", "vault"), **what: Any) -> Any:
        answer = self._cloud.call(*who, method, f"{self._cloud.glance_url}/v2/images{path}", **what)
        assert answer.status < 300, answer
        return answer

    def edit(self, image: str, name: str, value: object = None) -> None:
        change = {"op": "remove" if value is None else "add", "path": f"/{name}"}
        change |= {} if value is None else {"value": value}  # type: ignore[dict-item]
        self.ask("PATCH", f"/{image}", data=json.dumps([change]).encode(), headers=PATCH)

    def make(self, who: tuple[str, str], *tags: str, **properties: str) -> str:
        fields = {"name": "x", "disk_format": "raw", "container_format": "bare", "visibility": "shared"}
        image: str = self.ask("POST", "", who=who, json={**fields, "tags": list(tags), **properties}).json()["id"]
        octets = {"Content-Type": "application/octet-stream"}
        self.ask("PUT", f"/{image}/file", who=who, data=b"theirs", headers=octets)
        return image


@pytest.fixture
async def images(cloud: Cloud) -> AsyncIterator[Images]:
    images = Images(cloud)
    yield images
    for attempt in await images.store.everything():
        await images.store.delete(attempt)


async def test_no_edit_of_one_image_breaks_the_lists_of_the_others(images: Images) -> None:
    child, base = await images.put(**{PARENTS: PARENT}), await images.put(**{KIND: KIND_BASE, BASE: CONTENT})
    edits: list[tuple[str, object]] = [
        ("autobackup_created_at", "json:["),
        (BASE, "json:{"),
        ("autobackup_attempt", None),
        ("tags", []),
        ("tags", ["autobackup", "autobackup:", f"autobackup:{child}"]),
        ("tags", ["autobackup", f"autobackup:{PARENT}", "autobackup:x"]),
    ]
    for name, value in edits:
        edited = await images.put(**{KIND: KIND_BASE, BASE: CONTENT, PARENTS: PARENT, "autobackup_created_at": "1"})
        images.edit(edited, name, value)
        assert child in await images.store.children(PARENT), (name, value)
        assert base in [one.attempt for one in await images.store.bases(CONTENT)], (name, value)
        assert base in [one.attempt for one in await images.store.bases()], (name, value)
        assert {child, base, edited} <= set(await images.store.everything()), (name, value)
        images.ask("DELETE", f"/{edited}")


async def test_a_child_that_was_hidden_is_a_child(images: Images) -> None:
    child, base = await images.put(**{PARENTS: PARENT}), await images.put(**{KIND: KIND_BASE, BASE: CONTENT})
    for image in (child, base):
        images.edit(image, "os_hidden", True)
    assert await images.store.children(PARENT) == [child]
    assert set(await images.store.everything()) == {child, base}
    assert [one.attempt for one in await images.store.bases(CONTENT)] == [base]


async def test_an_image_without_our_tags_is_among_everything(images: Images) -> None:
    """Its header may say that it is a child, whatever was done to the rest of it."""
    child = await images.put(**{PARENTS: PARENT})
    images.edit(child, "tags", [])
    theirs = images.make(("vera", "vault"))
    assert await images.store.children(PARENT) == []
    assert set(await images.store.everything()) == {child, theirs}


async def test_what_another_project_shares_is_neither_child_nor_base(images: Images, cloud: Cloud) -> None:
    """Or anybody could keep our parents from being let go, and have our backups stand on what is theirs."""
    words = {"autobackup_attempt": PARENT, KIND: KIND_BASE, BASE: CONTENT, "autobackup_created_at": "1"}
    theirs = images.make(
        ("mallory", "elsewhere"), "autobackup", f"autobackup:{PARENT}", f"autobackup:parent:{PARENT}", **words
    )
    vault = cloud.projects["vault"]
    images.ask("POST", f"/{theirs}/members", who=("mallory", "elsewhere"), json={"member": vault})
    images.ask("PUT", f"/{theirs}/members/{vault}", json={"status": "accepted"})
    try:
        assert theirs in [one["id"] for one in images.ask("GET", "").json()["images"]]
        assert await images.store.children(PARENT) == []
        assert await images.store.bases(CONTENT) == await images.store.bases() == []
        assert await images.store.everything() == []
    finally:
        images.ask("DELETE", f"/{theirs}", who=("mallory", "elsewhere"))
