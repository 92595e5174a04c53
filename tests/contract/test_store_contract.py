"""`stores.interface.Store` in executable form: what every store promises, whichever it is."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.stores import FACTORIES, BodyOf, MiB, StoreBench, new_attempt, open_spec, pattern

from autobackup.container.seal import SEGMENT_BYTES
from autobackup.errors import StoreRefused, StoreUnavailable
from autobackup.model import AttemptId

REPOSITORY = Path(__file__).parents[2]
SIZES = (
    1, 4095, 4096, 4097, 4096 + 56,
    SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 4096 + SEGMENT_BYTES, 4096 + 2 * SEGMENT_BYTES + 17,
    5 * MiB + 3,
)  # fmt: skip


@pytest.fixture(scope="module", params=sorted(FACTORIES))
def new_bench(request: pytest.FixtureRequest) -> Iterator[Callable[[], StoreBench]]:
    with FACTORIES[request.param]() as factory:
        yield factory


@pytest.fixture
async def bench(new_bench: Callable[[], StoreBench]) -> AsyncIterator[StoreBench]:
    bench = new_bench()
    yield bench
    for stored in await bench.store.held():  # the filesystems are small
        await bench.store.delete(stored.attempt)


def body(bench: StoreBench, data: bytes, **how: object) -> BodyOf:
    return BodyOf(data, bench.store.digest_algorithm, **how)  # type: ignore[arg-type]


async def put(bench: StoreBench, data: bytes = b"sealed", **properties: str) -> AttemptId:
    attempt = new_attempt()
    await bench.store.put(attempt, body(bench, data), properties=properties)
    return attempt


async def assert_nothing(bench: StoreBench, attempt: AttemptId) -> None:
    """Nothing is held under *attempt*, whichever way one asks."""
    assert attempt not in [stored.attempt for stored in await bench.store.held()]
    for asked in (
        bench.store.stat(attempt),
        bench.store.digest(attempt),
        bench.store.read(attempt, offset=0, length=1),
    ):
        with pytest.raises(StoreRefused):
            await asked


async def assert_whole(bench: StoreBench, attempt: AttemptId, data: bytes) -> None:
    assert (await bench.store.stat(attempt)).size_bytes == len(data)
    assert await bench.store.read(attempt, offset=0, length=len(data)) == data
    assert await bench.store.digest(attempt) == hashlib.new(bench.store.digest_algorithm, data).hexdigest()


# ---- what was put is what is held -------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", SIZES)
async def test_what_was_put_is_what_is_held(bench: StoreBench, size_bytes: int) -> None:
    data, attempt = pattern(size_bytes), new_attempt()
    sent = body(bench, data)

    await bench.store.put(attempt, sent, properties={"a": "b"})

    assert sent.iterations == 1
    await assert_whole(bench, attempt, data)
    assert await bench.store.digest(attempt) == sent.digest


@pytest.mark.parametrize("chunk_bytes", [1, 511, 4096, 256 * 1024, MiB])
async def test_the_cut_of_the_chunks_does_not_matter(bench: StoreBench, chunk_bytes: int) -> None:
    data, attempt = pattern(min(3 * MiB + 1, 400 * chunk_bytes)), new_attempt()

    await bench.store.put(attempt, body(bench, data, chunk_bytes=chunk_bytes), properties={})

    await assert_whole(bench, attempt, data)


async def test_what_is_held_is_held_by_the_medium_and_not_by_the_object(bench: StoreBench) -> None:
    """Another process, opened on the same place, says the same."""
    data = pattern(MiB + 5)
    attempt = await put(bench, data, name="x")

    other = open_spec(bench.spec)

    assert await other.stat(attempt) == await bench.store.stat(attempt)
    assert await other.digest(attempt) == await bench.store.digest(attempt)
    assert await other.read(attempt, offset=MiB, length=99) == data[MiB:]


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"empty": ""},
        {"name": "größe 磁盘 \U0001f4be"},
        {"größe": "ключ"},
        {"quotes": "\"'\\\n\t\x00", "long": "x" * 4000},
        {f"key_{n}": str(n) for n in range(100)},
    ],
)
async def test_properties_are_kept(bench: StoreBench, properties: dict[str, str]) -> None:
    attempt = new_attempt()
    await bench.store.put(attempt, body(bench, b"sealed"), properties=properties)

    assert dict((await bench.store.stat(attempt)).properties) == properties
    assert [dict(one.properties) for one in await bench.store.held()] == [properties]


async def test_a_range_is_exact_at_every_edge(bench: StoreBench) -> None:
    data = pattern(2 * MiB + 4099)
    attempt = await put(bench, data)
    edges = sorted({
        near for at in (0, 4096, MiB, 2 * MiB, len(data)) for near in (at - 1, at, at + 1) if 0 <= near <= len(data) + 1
    })  # fmt: skip

    for offset in edges:
        for length in {0, 1, 4096, MiB, *(end - offset for end in edges if end >= offset)}:
            got = await bench.store.read(attempt, offset=offset, length=length)
            assert got == data[offset : offset + length], (offset, length)


# ---- by the store's own word, now -------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4095, MiB + 1, 3 * MiB + 6])
async def test_the_digest_is_of_what_is_held_now(bench: StoreBench, offset: int) -> None:
    """A byte that rots on the medium shows in `digest` and in `read`; a remembered hash would not show it."""
    data = pattern(3 * MiB + 7)
    attempt = await put(bench, data)
    before = await bench.store.digest(attempt)

    bench.flip(attempt, offset)

    assert await bench.store.digest(attempt) != before
    assert await bench.store.read(attempt, offset=offset, length=1) == bytes([data[offset] ^ 1])


async def test_only_whole_objects_are_listed_oldest_first(bench: StoreBench) -> None:
    attempts = []
    for _ in range(4):
        attempts.append(await put(bench))
        await asyncio.sleep(0.02)  # more than a tick of the filesystem's clock
    await bench.store.delete(attempts.pop(1))

    assert [stored.attempt for stored in await bench.store.held()] == attempts
    assert all(stored.size_bytes == len(b"sealed") for stored in await bench.store.held())


async def test_an_object_under_way_is_not_held(bench: StoreBench) -> None:
    attempt, reached, go_on = new_attempt(), asyncio.Event(), asyncio.Event()

    def before_chunk(index: int) -> object:
        if index == 1:
            reached.set()
            return go_on.wait()
        return None

    data = pattern(3 * MiB)
    sending = asyncio.create_task(bench.store.put(attempt, body(bench, data, before_chunk=before_chunk), properties={}))
    await reached.wait()
    await assert_nothing(bench, attempt)
    go_on.set()
    await sending

    await assert_whole(bench, attempt, data)


async def test_concurrent_puts_do_not_mix(bench: StoreBench) -> None:
    wanted = {new_attempt(): pattern(MiB // 2 + n, seed=bytes([n])) for n in range(12)}

    async with asyncio.TaskGroup() as group:
        for attempt, data in wanted.items():
            group.create_task(
                bench.store.put(attempt, body(bench, data, chunk_bytes=70_001), properties={"n": attempt})
            )

    assert {one.attempt: one.properties["n"] for one in await bench.store.held()} == {a: a for a in wanted}
    for attempt, data in wanted.items():
        await assert_whole(bench, attempt, data)


# ---- whole or not at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing_chunk", [0, 1, 3])
async def test_a_body_that_fails_leaves_nothing(bench: StoreBench, failing_chunk: int) -> None:
    attempt = new_attempt()

    def before_chunk(index: int) -> None:
        if index == failing_chunk:
            raise StoreUnavailable("the reader failed")

    with pytest.raises(StoreUnavailable, match="the reader failed"):
        await bench.store.put(attempt, body(bench, pattern(4 * MiB), before_chunk=before_chunk), properties={})

    await assert_nothing(bench, attempt)
    await bench.store.delete(attempt)
    await bench.store.put(attempt, body(bench, b"again"), properties={})
    await assert_whole(bench, attempt, b"again")


async def test_a_put_cancelled_at_any_moment_is_whole_or_nothing(bench: StoreBench) -> None:
    """And what is left of it, `delete` removes; no descriptor stays open."""
    data = pattern(MiB)
    await put(bench)  # whatever the store opens for good is open now
    open_before = len(os.listdir("/proc/self/fd"))
    for turns in range(40):
        attempt = new_attempt()
        sending = asyncio.create_task(bench.store.put(attempt, body(bench, data, chunk_bytes=99_999), properties={}))
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        sending.cancel()
        await asyncio.wait({sending})

        held = [stored.attempt for stored in await bench.store.held()]
        if sending.cancelled():
            assert attempt not in held or await bench.store.digest(attempt)
        else:
            assert attempt in held
        if attempt in held:
            await assert_whole(bench, attempt, data)
        await bench.store.delete(attempt)
        await assert_nothing(bench, attempt)
        await bench.store.put(attempt, body(bench, b"again"), properties={})
        await bench.store.delete(attempt)
    assert len(os.listdir("/proc/self/fd")) <= open_before


@pytest.mark.parametrize("stop_before_chunk", [0, 1, 4, 5])
async def test_a_put_that_was_killed_leaves_nothing_that_delete_does_not_remove(
    bench: StoreBench, stop_before_chunk: int
) -> None:
    """By SIGKILL of the sending process; the id can be put again after the delete."""
    attempt = new_attempt()
    done = _put_in_child(bench, attempt, 6 * MiB, stop_before_chunk)

    assert done == -signal.SIGKILL
    await assert_nothing(bench, attempt)
    await bench.store.delete(attempt)
    await bench.store.put(attempt, body(bench, b"again"), properties={})
    await assert_whole(bench, attempt, b"again")


async def test_a_put_that_returned_survives_the_death_of_its_process(bench: StoreBench) -> None:
    attempt = new_attempt()

    assert _put_in_child(bench, attempt, 6 * MiB, -1) == -signal.SIGKILL

    await assert_whole(bench, attempt, pattern(6 * MiB))
    assert dict((await bench.store.stat(attempt)).properties) == {"from": "child"}


def _put_in_child(bench: StoreBench, attempt: AttemptId, size_bytes: int, stop_before_chunk: int) -> int:
    return subprocess.run(
        [sys.executable, "-m", "tests.contract.stores", bench.spec, attempt, str(size_bytes), str(stop_before_chunk)],
        cwd=REPOSITORY,
        check=False,
    ).returncode


# ---- ids --------------------------------------------------------------------------------------------------


async def test_an_id_is_used_once(bench: StoreBench) -> None:
    attempt = await put(bench, b"first", which="first")

    with pytest.raises(StoreRefused):
        await bench.store.put(attempt, body(bench, b"second"), properties={"which": "second"})

    await assert_whole(bench, attempt, b"first")
    assert dict((await bench.store.stat(attempt)).properties) == {"which": "first"}


async def test_two_puts_of_one_id_at_once_give_one_object(bench: StoreBench) -> None:
    """The second is refused and takes nothing away from the first."""
    attempt, reached, go_on = new_attempt(), asyncio.Event(), asyncio.Event()

    def before_chunk(index: int) -> object:
        reached.set()
        return go_on.wait() if index == 1 else None

    data = pattern(2 * MiB)
    first = asyncio.create_task(bench.store.put(attempt, body(bench, data, before_chunk=before_chunk), properties={}))
    await reached.wait()
    with pytest.raises(StoreRefused):
        await bench.store.put(attempt, body(bench, b"second"), properties={})
    go_on.set()
    await first

    await assert_whole(bench, attempt, data)


async def test_what_is_not_there_is_refused_and_deleting_it_is_success(bench: StoreBench) -> None:
    attempt = new_attempt()
    await assert_nothing(bench, attempt)

    await bench.store.delete(attempt)
    kept, gone = await put(bench), await put(bench)
    await bench.store.delete(gone)
    await bench.store.delete(gone)

    await assert_nothing(bench, gone)
    await assert_whole(bench, kept, b"sealed")


HOSTILE_IDS = (
    "", ".", "..", "/", "../x", "a/b", "/etc/passwd", "x" * 300, "\0" * 36, "00000000-0000-0000-0000-00000000000\n",
    "00000000-0000-0000-0000-0000000000\0a", "../0000-0000-0000-0000-000000000000a",
    "ÄÖ000000-0000-0000-0000-000000000000",
)  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE_IDS)
async def test_an_id_that_is_none_is_refused_by_every_call(bench: StoreBench, hostile: str) -> None:
    attempt = AttemptId(hostile)
    kept = await put(bench)

    for asked in (
        bench.store.put(attempt, body(bench, b"x"), properties={}),
        bench.store.stat(attempt),
        bench.store.digest(attempt),
        bench.store.read(attempt, offset=0, length=1),
        bench.store.delete(attempt),
    ):
        with pytest.raises(StoreRefused):
            await asked

    assert [stored.attempt for stored in await bench.store.held()] == [kept]


# ---- damage and outages -----------------------------------------------------------------------------------


async def test_damaged_metadata_is_said_and_hides_nothing_else(bench: StoreBench) -> None:
    """An operator must still see, and restore, all the rest: and the damaged one, whose bundle describes itself."""
    first, damaged, last = [await put(bench, b"sealed", n=str(n)) for n in range(3)]

    bench.damage_metadata(damaged)

    found = await bench.store.stat(damaged)
    assert (found.size_bytes, dict(found.properties)) == (len(b"sealed"), {})
    held = {stored.attempt: stored for stored in await bench.store.held()}
    assert set(held) == {first, damaged, last}
    assert (held[damaged].size_bytes, dict(held[damaged].properties)) == (len(b"sealed"), {})
    assert dict(held[last].properties) == {"n": "2"}
    assert await bench.store.read(damaged, offset=0, length=9) == b"sealed"


async def test_an_outage_is_said_with_the_place_and_passes(bench: StoreBench) -> None:
    """`check` says beforehand what a put would meet; afterwards everything works again."""
    kept = await put(bench, b"kept")
    for name, outage in bench.outages.items():
        attempt = new_attempt()
        with outage():
            for asked in (bench.store.check(), bench.store.put(attempt, body(bench, b"x"), properties={})):
                with pytest.raises(StoreUnavailable) as told:
                    await asked
                assert _place(bench) in str(told.value), name
                assert any(word in str(told.value) for word in ("mount", "chmod", "make")), f"no remedy for {name}"
        await bench.store.check()
        await assert_whole(bench, kept, b"kept")
        await bench.store.delete(attempt)
        await bench.store.put(attempt, body(bench, b"x"), properties={})


async def test_a_place_that_is_gone_is_never_taken_for_an_empty_one(bench: StoreBench) -> None:
    """What cannot be seen is not absent: no listing, no refusal, no successful delete."""
    kept = await put(bench)
    with bench.outages["gone"]():
        for asked in (
            bench.store.stat(kept),
            bench.store.digest(kept),
            bench.store.read(kept, offset=0, length=1),
            bench.store.delete(kept),
            bench.store.held(),
        ):
            with pytest.raises(StoreUnavailable):
                await asked
    await assert_whole(bench, kept, b"sealed")


async def test_a_store_that_runs_full_keeps_nothing_of_the_put_and_what_it_had(bench: StoreBench) -> None:
    if bench.capacity_bytes is None or bench.capacity_bytes > 64 * MiB:
        pytest.skip("too large to be filled in a test")
    kept = await put(bench, b"kept")
    attempt = new_attempt()

    with pytest.raises(StoreUnavailable, match="full") as told:
        await bench.store.put(attempt, body(bench, pattern(bench.capacity_bytes + 2 * MiB)), properties={})

    assert _place(bench) in str(told.value)
    await assert_nothing(bench, attempt)
    await assert_whole(bench, kept, b"kept")
    await bench.store.delete(attempt)
    await assert_whole(bench, await put(bench, pattern(2 * MiB)), pattern(2 * MiB))


async def test_check_passes_where_a_put_would(bench: StoreBench) -> None:
    await bench.store.check()


def _place(bench: StoreBench) -> str:
    return bench.spec.split('"')[3]
