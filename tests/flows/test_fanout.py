"""One read, N destinations: what each gets, what a bad one costs the others, and what is left when it ends early."""

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.flows.material import (
    CountingDisk,
    End,
    FailingDisk,
    MiB,
    contents_of,
    limits,
    open_bundle,
    open_files,
    opened,
    our_threads,
    write_disk,
)

from autobackup.container.seal import SEGMENT_BYTES
from autobackup.errors import OverlayChanged, SpoolUnavailable, StoreUnavailable
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.tap import FanoutLimits, Tap
from autobackup.host.disks import HeldDisk
from autobackup.model import DestinationName

REPOSITORY = Path(__file__).parents[2]
MIXED = [("data", 3 * MiB + 5), ("hole", 4 * MiB), ("zeros", MiB), ("data", 4097), ("hole", 123_456)]
LARGE = [("data", 40 * MiB)]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def name(end: End) -> DestinationName:
    return end.outlet.destination


def failing_at(index: int, error: Exception) -> Callable[[int], Awaitable[None]]:
    async def fail(at: int) -> None:
        if at == index:
            raise error

    return fail


# ---- what each gets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("level", [None, -1, 3])
async def test_every_destination_gets_the_same_content_sealed_for_it_alone(
    disk: Path, count: int, level: int | None
) -> None:
    content = write_disk(disk, MIXED)
    algorithms = ("sha512", "sha256", "sha1", "sha3_256", "blake2b")
    ends = [End(f"d{n}", algorithm=algorithms[n]) for n in range(count)]
    with opened(disk) as disks:
        contents = contents_of(disks, console=b"login:")
        outcomes = await fan_out(contents, [end.outlet for end in ends], limits(level=level))

    for end in ends:
        assert outcomes[name(end)] == Sent(
            size_bytes=len(end.data), digest=hashlib.new(end.outlet.digest_algorithm, end.data).hexdigest()
        )
        members, unpacked = open_bundle(end.data, end.outlet.key)
        assert members["disks/disk"] == content
        assert members["console.log"] == b"login:"
        assert unpacked.digests.members["disks/disk"].sha256 == hashlib.sha256(content).hexdigest()
        assert contents.digests == unpacked.digests.members
    segments = [bytes(c) for end in ends for c in end.chunks]
    assert len(set(segments)) == len(segments)
    assert our_threads() == []


async def test_the_disk_is_read_once_and_holes_not_at_all(disk: Path) -> None:
    write_disk(disk, MIXED)
    ends = [End(f"d{n}") for n in range(3)]
    with opened(disk, kind=CountingDisk) as disks:
        contents = contents_of(disks)
        await fan_out(contents, [end.outlet for end in ends], limits())
        reads = disks["disk"].reads  # type: ignore[attr-defined]

    offsets = [offset for offset, _ in reads]
    assert offsets == sorted(set(offsets))
    assert sum(length for _, length in reads) == contents.read_bytes <= 7 * MiB  # of 9 MiB
    assert 5 * MiB not in offsets


async def test_chunks_are_small_fresh_and_begin_with_the_header(disk: Path) -> None:
    """They are the consumer's to keep: `End` keeps them as they are, and they still open afterwards."""
    content = write_disk(disk, [("data", 12 * MiB)])
    end = End("d")
    with opened(disk) as disks:
        await fan_out(contents_of(disks), [end.outlet], limits(level=None))

    assert bytes(end.chunks[0]) == end.outlet.header
    assert max(len(chunk) for chunk in end.chunks) <= SEGMENT_BYTES
    assert len({id(chunk) for chunk in end.chunks}) == len(end.chunks)
    assert open_bundle(end.data, end.outlet.key)[0]["disks/disk"] == content


async def test_a_sparse_disk_costs_what_is_in_it(disk: Path) -> None:
    """8 GiB and a little, 2 MiB of data: nothing else is read, and the holes are a few KiB in the store."""
    size_bytes = 8 * 1024 * MiB + 5
    with disk.open("wb") as file:
        file.write(os.urandom(MiB))
        file.seek(5 * 1024 * MiB)
        file.write(os.urandom(MiB))
        file.truncate(size_bytes)
    end = End("d")
    with opened(disk) as disks:
        contents = contents_of(disks)
        outcomes = await fan_out(contents, [end.outlet], limits())

    assert isinstance(outcomes[name(end)], Sent)
    assert contents.read_bytes == 2 * MiB
    assert contents.digests["disks/disk"].size_bytes == size_bytes
    assert len(end.data) < 2 * MiB + 8192 * 64


PARTS = st.lists(
    st.tuples(
        st.sampled_from(["data", "zeros", "hole"]),
        st.one_of(
            st.integers(0, 20_000),
            st.sampled_from([511, 512, 4095, 4096, 4097, 65_536, MiB - 1, MiB, MiB + 1, 2 * MiB]),
        ),
    ),
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    disks=st.lists(PARTS, min_size=0, max_size=3),
    console=st.one_of(st.none(), st.binary(max_size=600)),
    level=st.sampled_from([None, -7, -1, 3]),
    threads=st.integers(1, 4),
    count=st.integers(1, 3),
)
def test_whatever_goes_in_comes_out(
    disks: list[list[tuple[str, int]]], console: bytes | None, level: int | None, threads: int, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"disk.eph{n}" for n in range(len(disks))]
        wanted = {f"disks/{path.name}": write_disk(path, parts) for path, parts in zip(paths, disks, strict=True)}
        ends = [End(f"d{n}") for n in range(count)]
        with opened(*paths) as held:
            contents = contents_of(held, console=console)
            asyncio.run(
                fan_out(contents, [e.outlet for e in ends], limits(level=level, compress_threads=threads, tokens=1))
            )
    if console is not None:
        wanted["console.log"] = console
    for end in ends:
        members, _ = open_bundle(end.data, end.outlet.key)
        assert {k: v for k, v in members.items() if k not in ("manifest.json", "digests.json")} == wanted


# ---- a bad destination and the others ---------------------------------------------------------------------


async def test_a_slow_destination_is_detached_and_the_others_go_on(disk: Path) -> None:
    content = write_disk(disk, LARGE)
    order: list[str] = []

    async def dawdle(index: int) -> None:
        if index == 1:
            await asyncio.sleep(4.0)
            order.append("slow woke up")

    async def note_last(index: int) -> None:
        if index == 40:
            order.append("fast is at its end")

    fast, other, slow = End("fast", before_chunk=note_last), End("other"), End("slow", before_chunk=dawdle)
    with opened(disk) as disks:
        outcomes = await fan_out(
            contents_of(disks), [slow.outlet, fast.outlet, other.outlet], limits(level=None, detach_after_s=0.5)
        )

    detached = outcomes[name(slow)]
    assert isinstance(detached, StoreUnavailable)
    assert "slow" in str(detached)
    assert "0.5" in str(detached)
    assert not slow.got_all
    assert order == ["fast is at its end"], "the others waited for the slow one to wake up"
    for end in (fast, other):
        assert isinstance(outcomes[name(end)], Sent)
        assert open_bundle(end.data, end.outlet.key)[0]["disks/disk"] == content


async def test_the_only_destination_is_waited_for_however_slow(disk: Path) -> None:
    """It holds nobody up. So is the last one that is left after the others failed."""
    content = write_disk(disk, [("data", 16 * MiB)])

    async def dawdle(index: int) -> None:
        if index in (1, 8):
            await asyncio.sleep(1.2)

    alone, left = End("alone", before_chunk=dawdle), End("left", before_chunk=dawdle)
    gone = End("gone", before_chunk=failing_at(0, StoreUnavailable("gone")))
    for outlets, end in (([alone.outlet], alone), ([gone.outlet, left.outlet], left)):
        with opened(disk) as disks:
            outcomes = await fan_out(contents_of(disks), outlets, limits(level=None, detach_after_s=0.3))
        assert isinstance(outcomes[name(end)], Sent)
        assert open_bundle(end.data, end.outlet.key)[0]["disks/disk"] == content


@pytest.mark.parametrize("failing_chunk", [0, 1, 2, 7, 12])
async def test_a_destination_that_fails_disturbs_no_other(disk: Path, failing_chunk: int) -> None:
    content = write_disk(disk, [("data", 11 * MiB)])
    error = StoreUnavailable("cut off")
    good, bad = End("good"), End("bad", before_chunk=failing_at(failing_chunk, error))
    with opened(disk) as disks:
        outcomes = await fan_out(contents_of(disks), [bad.outlet, good.outlet], limits(level=None))

    assert outcomes[name(bad)] is error
    assert isinstance(outcomes[name(good)], Sent)
    assert open_bundle(good.data, good.outlet.key)[0]["disks/disk"] == content
    assert our_threads() == []


async def test_the_read_stops_when_nobody_takes_it_any_more(disk: Path) -> None:
    write_disk(disk, [("data", 64 * MiB)])
    ends = [End(f"d{n}", before_chunk=failing_at(n, StoreUnavailable("cut off"))) for n in range(3)]
    with opened(disk, kind=CountingDisk) as disks:
        outcomes = await fan_out(contents_of(disks), [end.outlet for end in ends], limits(level=None))
        read_bytes = sum(length for _, length in disks["disk"].reads)  # type: ignore[attr-defined]

    assert {type(outcome) for outcome in outcomes.values()} == {StoreUnavailable}
    assert read_bytes <= 24 * MiB
    assert our_threads() == []


async def test_what_is_not_ours_to_stop_ends_all_of_it(disk: Path) -> None:
    """A bug in a store is no outcome of a destination."""
    write_disk(disk, LARGE)
    ends = [End("good"), End("bug", before_chunk=failing_at(3, ZeroDivisionError()))]
    with opened(disk) as disks, pytest.raises(ExceptionGroup) as told:
        await fan_out(contents_of(disks), [end.outlet for end in ends], limits())
    assert told.group_contains(ZeroDivisionError)
    assert our_threads() == []


async def test_a_store_that_did_not_take_all_has_not_been_sent(disk: Path) -> None:
    """Returning early must not look like success: size and digest are known only at the end."""
    write_disk(disk, LARGE)
    end = End("d")

    async def half(tap: Tap) -> None:
        async for _ in tap:
            return

    outlet = type(end.outlet)(**{f: getattr(end.outlet, f) for f in end.outlet.__slots__ if f != "send"}, send=half)
    with opened(disk) as disks, pytest.raises(ExceptionGroup) as told:
        await fan_out(contents_of(disks), [outlet], limits())
    assert told.group_contains(RuntimeError)
    assert our_threads() == []


async def test_a_body_can_be_sent_once(disk: Path) -> None:
    """An HTTP client that resends a broken PUT would send what is left of it, and call it all."""
    write_disk(disk, [("data", 2 * MiB)])
    end = End("d")

    async def twice(tap: Tap) -> None:
        taken = 0
        async for _ in tap:
            taken += 1
            if taken == 2:
                break
        async for _ in tap:
            pytest.fail("the second iteration gave a chunk")

    outlet = type(end.outlet)(**{f: getattr(end.outlet, f) for f in end.outlet.__slots__ if f != "send"}, send=twice)
    with opened(disk) as disks:
        outcomes = await fan_out(contents_of(disks), [outlet], limits())
    assert isinstance(outcomes[name(end)], StoreUnavailable)
    assert "twice" in str(outcomes[name(end)])


# ---- a bad disk -------------------------------------------------------------------------------------------


def _write_one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"x")


def _truncate(path: Path) -> None:
    os.truncate(path, 30 * MiB)


def _grow(path: Path) -> None:
    os.truncate(path, 80 * MiB)


@pytest.mark.parametrize("change", [_write_one_byte, _truncate, _grow])
@pytest.mark.parametrize("level", [None, -1])
async def test_a_disk_that_changes_under_the_read_is_sealed_for_nobody(
    disk: Path, change: Callable[[Path], None], level: int | None
) -> None:
    """The change comes while the read is under way; no destination is given an end, so none holds a whole object."""
    write_disk(disk, LARGE)

    async def disturb(index: int) -> None:
        if index == 2:
            change(disk)

    ends = [End("a", before_chunk=disturb), End("b")]
    with opened(disk) as disks:
        outcomes = await fan_out(contents_of(disks), [end.outlet for end in ends], limits(level=level))

    assert {type(outcome) for outcome in outcomes.values()} == {OverlayChanged}
    assert not any(end.got_all for end in ends)
    assert our_threads() == []


async def test_a_change_of_one_disk_is_seen_after_another_was_read(tmp_path: Path) -> None:
    first, second = tmp_path / "disk", tmp_path / "disk.eph0"
    write_disk(first, [("data", MiB)])
    write_disk(second, LARGE)

    async def disturb(index: int) -> None:
        if index == 8:
            os.utime(first, ns=(1, 1))

    end = End("a", before_chunk=disturb)
    with opened(first, second) as disks:
        outcomes = await fan_out(contents_of(disks), [end.outlet], limits(level=None))
    assert isinstance(outcomes[name(end)], OverlayChanged)


async def test_a_disk_that_fails_otherwise_is_tried_again_later(disk: Path) -> None:
    class GoneDisk(HeldDisk):
        def read_into(self, buffer: memoryview, offset: int) -> list[tuple[int, int]]:
            if offset:
                raise OSError(116, "Stale file handle")
            return super().read_into(buffer, offset)

    write_disk(disk, LARGE)
    ends = [End("a"), End("b")]
    with opened(disk, kind=GoneDisk) as disks:
        outcomes = await fan_out(contents_of(disks), [end.outlet for end in ends], limits())
    assert {type(outcome) for outcome in outcomes.values()} == {SpoolUnavailable}
    assert not any(end.got_all for end in ends)


async def test_what_cannot_be_read_is_zeros_and_said_so() -> None:
    """EIO by the kernel's own word, at single blocks, at the ends, and over the border of two reads."""
    bad_pages = [0, 7, *range(250, 262), 511, 700]
    data = os.urandom(3 * MiB - 1000)
    wanted = bytearray(data)
    for page in bad_pages:
        wanted[page * 4096 : (page + 1) * 4096] = bytes(4096)
    end = End("d")
    with FailingDisk(data, bad_pages) as failing:
        contents = contents_of({"disk": failing})
        outcomes = await fan_out(contents, [end.outlet], limits())

    assert isinstance(outcomes[name(end)], Sent)
    members, unpacked = open_bundle(end.data, end.outlet.key)
    assert members["disks/disk"] == wanted
    assert unpacked.digests.unreadable == contents.unreadable
    assert [(gap.member, gap.offset_bytes, gap.length_bytes) for gap in contents.unreadable] == [
        ("disks/disk", 0, 4096),
        ("disks/disk", 7 * 4096, 4096),
        ("disks/disk", 250 * 4096, 12 * 4096),  # one range, however many blocks: the record of them is bounded
        ("disks/disk", 511 * 4096, 4096),
        ("disks/disk", 700 * 4096, 4096),
    ]


# ---- ended early ------------------------------------------------------------------------------------------


async def test_a_cancelled_fan_out_leaves_no_thread_and_no_open_file(disk: Path) -> None:
    write_disk(disk, LARGE)
    draw = random.Random(7)

    async def sometimes_slow(_index: int) -> None:
        await asyncio.sleep(draw.choice((0, 0, 0.01)))

    before = open_files()
    cancelled = 0
    for _ in range(18):
        ends = [End(f"d{n}", before_chunk=sometimes_slow, keep=False) for n in range(3)]
        with opened(disk) as disks:
            running = asyncio.create_task(
                fan_out(contents_of(disks), [end.outlet for end in ends], limits(level=draw.choice((None, -1))))
            )
            await asyncio.sleep(draw.random() * 0.25)
            running.cancel()
            await asyncio.wait({running})
            assert our_threads() == []
        cancelled += running.cancelled()
    assert cancelled > 5
    assert open_files() == before


async def test_cancelling_twice_still_waits_for_the_threads(disk: Path) -> None:
    write_disk(disk, LARGE)
    end = End("d", keep=False)
    with opened(disk) as disks:
        running = asyncio.create_task(fan_out(contents_of(disks), [end.outlet], limits()))
        await asyncio.sleep(0.05)
        for _ in range(3):
            running.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({running})
        assert our_threads() == []
    assert running.cancelled()


# ---- what it costs ----------------------------------------------------------------------------------------


async def test_the_loop_goes_on_while_threads_work(disk: Path) -> None:
    """A bound far above the measured 10 ms: two cores, others busy. A hash or a compression in the loop shows."""
    write_disk(disk, [("data", 96 * MiB)])
    gaps: list[float] = []

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.002)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    ends = [End(f"d{n}", keep=False) for n in range(2)]
    with opened(disk) as disks:
        await fan_out(contents_of(disks), [end.outlet for end in ends], limits())
    ticking.cancel()

    print(f"ticks {len(gaps)}, longest gap {max(gaps) * 1000:.1f} ms")
    assert len(gaps) > 20
    assert max(gaps) < 0.5


_MEASURE = """
import asyncio, sys
from pathlib import Path
from tests.flows.material import End, contents_of, limits, opened

async def main():
    disk = Path(sys.argv[1])
    ends = [End(f"d{n}", keep=False) for n in range(2)]
    with opened(disk) as disks:
        await fan_out(contents_of(disks), [end.outlet for end in ends], limits(level=-1))
    assert all(end.got_all for end in ends)

from autobackup.flows.fanout import fan_out
asyncio.run(main())
# not ru_maxrss: that begins with the peak of the process that forked us
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    peaks_kib = {}
    block = os.urandom(MiB)
    for size_mib in (64, 512):
        disk = tmp_path / f"disk.eph{size_mib}"
        with disk.open("wb") as file:
            for _ in range(size_mib):
                file.write(block)
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(disk)], cwd=REPOSITORY, check=True, capture_output=True
        )
        peaks_kib[size_mib] = int(done.stdout)
        disk.unlink()
    print(peaks_kib)
    assert peaks_kib[512] - peaks_kib[64] < 24 * 1024


def test_limits_are_the_whole_processs(tmp_path: Path) -> None:
    """Two fan-outs at once share the tokens, and one token is enough for both to end."""
    shared = limits(tokens=1, level=-1)
    paths = [tmp_path / f"disk.eph{n}" for n in range(2)]
    wanted = {path.name: write_disk(path, [("data", 5 * MiB)]) for path in paths}

    async def one(path: Path, with_limits: FanoutLimits) -> None:
        end = End("d")
        with opened(path) as disks:
            await fan_out(contents_of(disks), [end.outlet], with_limits)
        assert open_bundle(end.data, end.outlet.key)[0][f"disks/{path.name}"] == wanted[path.name]

    async def both() -> None:
        await asyncio.gather(*(one(path, shared) for path in paths))

    asyncio.run(both())
