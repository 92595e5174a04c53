"""
Without compression the length of a sealed bundle is known before its first byte is read, and it is the length.

Glance is told it: a shorter body leaves an image that is never whole, a longer one is cut off. So what is announced is
compared with what was really sealed, for everything that a disk can be.
"""

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.flows.material import (
    INSTANCE,
    JOB,
    End,
    FailingDisk,
    MiB,
    limits,
    open_bundle,
    opened,
    write_disk,
)
from tests.flows.rig import Rig, copy_of, rig_on
from tests.lab.filesystem import loop_filesystem

from autobackup.container.bundle import CONSOLE_LOG
from autobackup.container.header import HEADER_BYTES
from autobackup.container.manifest import DiskEntry, FileEntry, Health, Manifest
from autobackup.container.seal import FIRST_PLAIN_BYTES, NEXT_PLAIN_BYTES, sealed_bytes
from autobackup.errors import AutobackupError, Refused, StoreUnavailable
from autobackup.flows.contents import Contents, Member
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.tap import Tap
from autobackup.host.disks import HeldDisk
from autobackup.stores import Begun, Body

GiB = 1024 * MiB
ROOM_BYTES = 64 * 1024  # what digests.json is padded by, for ranges that cannot be read
HEALTH = Health(member="disks/disk", tool="qemu-img check", result="ok", detail="größer als \U0001f98a" * 9)


def fixed(
    disks: Mapping[str, HeldDisk],
    *,
    console: bytes | None = None,
    health: tuple[Health, ...] = (),
    facts: Mapping[str, str] | None = None,
) -> Contents:
    """As `gather` makes them where nothing is compressed."""
    manifest = Manifest(
        job=JOB, instance=INSTANCE, instance_name="web", host="host", captured_at_s=1, verdict="terminated",
        verdict_reason="", bases=(), not_captured=(), facts=facts or {},
        disks=tuple(
            DiskEntry(
                name=name, member=f"disks/{name}", format="raw", size_bytes=disk.identity.size_bytes,
                source_path=disk.path, inode=disk.identity.inode, mtime_ns=disk.identity.mtime_ns, backing=None,
                backing_path=None, chain_source="none",
            )
            for name, disk in disks.items()
        ),
        files=() if console is None else (FileEntry(member=CONSOLE_LOG, size_bytes=len(console), source_path=""),),
    )  # fmt: skip
    members = [Member(name=f"disks/{name}", disk=disk, first=disk.identity) for name, disk in disks.items()]
    if console is not None:
        members.append(Member(name=CONSOLE_LOG, data=console))
    return Contents(manifest=manifest, members=members, health=health, mtime_s=1, fixed_length=True)


async def sent(contents: Contents) -> tuple[End, int, Sent | AutobackupError]:
    """Send *contents* as they are; returns the end, what was announced to it before, and the outcome."""
    announced_bytes = HEADER_BYTES + sealed_bytes(contents.stored_bytes())
    end = End("d")
    seen: list[int | None] = []

    async def look(tap: Tap) -> None:
        seen.append(tap.announced_bytes)
        await end.outlet.send(tap)

    outlet = dataclasses.replace(end.outlet, announced_bytes=announced_bytes, send=look)
    outcomes = await fan_out(contents, [outlet], limits(level=None))
    assert seen == [announced_bytes]
    return end, announced_bytes, outcomes[outlet.destination]


async def require_announced(contents: Contents) -> dict[str, bytes]:
    """The members of what was sent, which opens and is exactly as long as was announced."""
    end, announced_bytes, outcome = await sent(contents)
    assert isinstance(outcome, Sent)
    assert (outcome.size_bytes, len(end.data)) == (announced_bytes, announced_bytes)
    members, unpacked = open_bundle(end.data, end.outlet.key)
    assert unpacked.digests.members == contents.digests
    return members


# ---- whatever a disk is -----------------------------------------------------------------------------------------

EDGES = sorted(
    {0, 1, 511, 512, 513, 4095, 4096, 4097}
    | {128 * 1024 + off for off in (-1, 0, 1)}
    | {count * MiB + off for count in (1, 2, 3) for off in (-1, 0, 1, 512)}
)


@pytest.mark.parametrize("kind", ["data", "hole", "zeros"])
async def test_the_length_holds_for_every_size_at_a_boundary(tmp_path: Path, kind: str) -> None:
    """Of a frame, a block, a sector: of data, of nothing, and of zeros that were written."""
    for size_bytes in EDGES:
        path = tmp_path / f"disk.eph{size_bytes}"
        content = write_disk(path, [(kind, size_bytes)] if size_bytes else [])
        with opened(path) as disks:
            assert (await require_announced(fixed(disks)))[f"disks/{path.name}"] == content


async def test_the_length_holds_on_both_sides_of_a_full_segment(tmp_path: Path) -> None:
    """A tar grows by 512; so does the stream here, until it needs a segment more."""
    path = tmp_path / "disk"
    write_disk(path, [("hole", 4096)])
    segments = set()
    with opened(path) as disks:
        left_bytes = FIRST_PLAIN_BYTES - fixed(disks, console=b"").stored_bytes()
        for step in range(-4, 3):
            contents = fixed(disks, console=b"c" * (left_bytes // 512 * 512 + step * 512))
            segments.add(-(-max(0, contents.stored_bytes() - FIRST_PLAIN_BYTES) // NEXT_PLAIN_BYTES))
            await require_announced(contents)
    assert segments == {0, 1}


@pytest.mark.parametrize(
    "parts",
    [
        [("hole", 5 * MiB), ("data", 1), ("hole", 5 * MiB - 1)],
        [("data", MiB), ("hole", MiB), ("data", MiB), ("hole", MiB)],
        [("hole", MiB - 1), ("data", 2), ("hole", MiB)],
        [("data", 4096), ("hole", 64 * MiB)],
        [("hole", 64 * MiB), ("data", 4096)],
        [("zeros", 3 * MiB), ("hole", 3 * MiB), ("zeros", 5)],
        [("hole", 123_457)],
    ],
)
async def test_the_length_holds_wherever_the_holes_are(tmp_path: Path, parts: list[tuple[str, int]]) -> None:
    content = write_disk(tmp_path / "disk", parts)
    with opened(tmp_path / "disk") as disks:
        assert (await require_announced(fixed(disks)))["disks/disk"] == content


async def test_a_disk_that_is_all_hole_announces_next_to_nothing(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", [("hole", 32 * MiB)])
    with opened(tmp_path / "disk") as disks:
        assert fixed(disks).stored_bytes() < 32 * 64 + 2 * ROOM_BYTES
        await require_announced(fixed(disks))


async def test_the_length_holds_for_several_disks_and_files_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("disk", "disk.eph0", "disk.swap", "disk.config")]
    kinds = ([("data", 2 * MiB + 3)], [("hole", 3 * MiB)], [], [("data", 512)])
    wanted = {f"disks/{path.name}": write_disk(path, parts) for path, parts in zip(paths, kinds, strict=True)}
    facts = {f"fact{n}": "größe" * 50 for n in range(40)}
    with opened(*paths) as disks:
        members = await require_announced(fixed(disks, console=b"login:" * 300_000, health=(HEALTH,) * 3, facts=facts))
    assert {name: members[name] for name in wanted} == wanted


PARTS = st.lists(
    st.tuples(
        st.sampled_from(["data", "zeros", "hole"]),
        st.one_of(st.integers(0, 20_000), st.sampled_from([4096, 65_536, MiB - 1, MiB, MiB + 1, 2 * MiB])),
    ),
    max_size=5,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    disks=st.lists(PARTS, max_size=3),
    console=st.one_of(st.none(), st.binary(max_size=600)),
    health=st.integers(0, 2),
)
def test_the_length_holds_for_whatever_there_is(
    disks: list[list[tuple[str, int]]], console: bytes | None, health: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"disk.eph{n}" for n in range(len(disks))]
        for path, parts in zip(paths, disks, strict=True):
            write_disk(path, parts)
        with opened(*paths) as held:
            asyncio.run(require_announced(fixed(held, console=console, health=(HEALTH,) * health)))


def test_a_member_of_8_gib_has_a_longer_head_and_that_is_counted(tmp_path: Path) -> None:
    """Two blocks more of the head, one byte less of padding. Not sent here: to hash 8 GiB takes long."""
    lengths = []
    for size_bytes in (8 * GiB - 1, 8 * GiB):
        write_disk(tmp_path / "disk", [])
        os.truncate(tmp_path / "disk", size_bytes)
        with opened(tmp_path / "disk") as disks:
            lengths.append(fixed(disks).stored_bytes())
    assert lengths[1] - lengths[0] == 2 * 512 - 1


# ---- a map of holes that changes its mind -----------------------------------------------------------------------


class FickleDisk(HeldDisk):
    """SEEK_DATA's answer about preallocated blocks depends on the page cache: another one each time it is asked."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.asked = 0

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        self.asked += 1
        yield from ([(0, self.identity.size_bytes)], [], super().data_ranges())[self.asked % 3]


@pytest.mark.parametrize("asked_before", [0, 1, 2])
async def test_the_length_holds_when_the_map_of_holes_changes_its_mind(tmp_path: Path, asked_before: int) -> None:
    content = write_disk(tmp_path / "disk", [("zeros", 2 * MiB), ("hole", 4 * MiB)])
    with opened(tmp_path / "disk", kind=FickleDisk) as disks:
        for _ in range(asked_before):
            list(disks["disk"].data_ranges())
        contents = fixed(disks)
        assert contents.stored_bytes() == contents.stored_bytes()
        assert (await require_announced(contents))["disks/disk"] == content


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_the_length_holds_for_preallocated_blocks_whose_pages_leave_the_cache(
    kind: Literal["ext4", "xfs"],
) -> None:
    """fallocate'd blocks that somebody looked at count as data until their clean pages are dropped."""
    with loop_filesystem(kind) as filesystem:
        path = filesystem.mount_point / "disk"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 12 * MiB)
            file.seek(5 * MiB)
            file.write(os.urandom(MiB + 1))
            os.fsync(file.fileno())
        content = path.read_bytes()  # fills the cache
        with opened(path) as disks:
            disk = disks["disk"]
            before = list(disk.data_ranges())
            contents = fixed(disks)
            announced = contents.stored_bytes()
            os.posix_fadvise(disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            after = list(disk.data_ranges())
            print(f"{kind}: data by SEEK_DATA before {before}, after {after}")
            assert contents.stored_bytes() == announced
            assert (await require_announced(contents))["disks/disk"] == content


# ---- what is not known before -----------------------------------------------------------------------------------


async def test_the_record_of_digests_is_padded_and_still_one_record(tmp_path: Path) -> None:
    """docs/format.md, section 5: spaces before the final line feed."""
    write_disk(tmp_path / "disk", [("data", 100)])
    with opened(tmp_path / "disk") as disks:
        raw = (await require_announced(fixed(disks, health=(HEALTH,))))["digests.json"]
    text = raw.rstrip(b"\n").rstrip(b" ")
    assert raw == text + b" " * (len(raw) - len(text) - 1) + b"\n"
    assert text.endswith(b"}")
    assert len(raw) - len(text) - 1 == ROOM_BYTES


def bad_pages(count: int) -> list[int]:
    """None beside another: each is a range of its own."""
    return list(range(0, 2 * count, 2))


@pytest.mark.parametrize("count", [1, 20, 400])
async def test_the_length_holds_however_much_cannot_be_read_while_there_is_room(count: int) -> None:
    data = os.urandom((2 * count + 1) * 4096)
    with FailingDisk(data, bad_pages(count)) as failing:
        contents = fixed({"disk": failing})
        members = await require_announced(contents)
    assert len(contents.unreadable) == count
    wanted = bytearray(data)
    for page in bad_pages(count):
        wanted[page * 4096 : (page + 1) * 4096] = bytes(4096)
    assert members["disks/disk"] == wanted


async def test_too_many_ranges_that_cannot_be_read_are_refused_with_the_remedy() -> None:
    """Nothing whole is sent, and it is not tried for ever: the same disk would have them again."""
    count = 800
    with FailingDisk(os.urandom((2 * count + 1) * 4096), bad_pages(count)) as failing:
        end, _, outcome = await sent(fixed({"disk": failing}))
    assert isinstance(outcome, Refused)
    assert "too many ranges cannot be read" in str(outcome)
    assert 'with compression = "zstd:-1" they have room' in str(outcome)
    assert not end.got_all


async def test_the_remedy_helps() -> None:
    count = 800
    end = End("d")
    with FailingDisk(os.urandom((2 * count + 1) * 4096), bad_pages(count)) as failing:
        made = fixed({"disk": failing})
        contents = Contents(
            manifest=Manifest.decode(made._members[0].data), members=made._members[1:], health=(), mtime_s=1
        )
        outcomes = await fan_out(contents, [end.outlet], limits(level=-1))
    assert isinstance(outcomes[end.outlet.destination], Sent)
    _, unpacked = open_bundle(end.data, end.outlet.key)
    assert len(unpacked.digests.unreadable) == count


# ---- what a store is told ---------------------------------------------------------------------------------------


class Told:
    """A store that notes what was announced to it, and what it was then given."""

    def __init__(self, store: object) -> None:
        self._store = store
        self.announced: list[int | None] = []
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def put(self, attempt: str, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None) -> None:
        self.announced.append(body.announced_bytes)
        await self._store.put(attempt, body, properties=properties, begun=begun)  # type: ignore[attr-defined]
        self.sizes.append(body.size_bytes)


@pytest.fixture
async def told(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Rig, dict[str, Told]]]:
    with rig_on(tmp_path, destinations=("one", "two"), fanout_limits=limits(level=request.param)) as rig:
        stores = {name: Told(door.store) for name, door in rig.doors.items()}
        for name, door in rig.doors.items():
            door.store = stores[name]  # type: ignore[assignment]
        yield rig, stores


@pytest.mark.parametrize("told", [None], indirect=True)
async def test_every_store_is_told_the_length_beforehand(told: tuple[Rig, dict[str, Told]]) -> None:
    rig, stores = told
    record = await rig.new_job({"disk": os.urandom(2 * MiB + 5), "disk.eph0": bytes(70_000), "console.log": b"login:"})
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    for name, store in stores.items():
        (announced_bytes,) = store.announced
        (attempt,) = rig.doors[name].held()
        held_bytes = (rig.doors[name].root / f"{attempt}.autobackup").stat().st_size
        assert announced_bytes == store.sizes[0] == held_bytes


@pytest.mark.parametrize("told", [-1, 3], indirect=True)
async def test_with_compression_nothing_is_announced(told: tuple[Rig, dict[str, Told]]) -> None:
    """Nobody can know it; a guess would cut the bundle."""
    rig, stores = told
    record = await rig.new_job({"disk": os.urandom(100_000)})
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert all(store.announced == [None] for store in stores.values())


@pytest.mark.parametrize("told", [None], indirect=True)
async def test_a_copy_that_is_sent_again_is_announced_again(told: tuple[Rig, dict[str, Told]]) -> None:
    """By a read of its own, which may find other holes."""
    rig, stores = told
    record = await rig.new_job({"disk": os.urandom(300_000)})
    rig.doors["two"].shut = {"put": StoreUnavailable("down")}
    now = await rig.advance(record.job)
    assert now is not None
    assert copy_of(now, "two").failure_count == 1
    rig.doors["two"].shut = None
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert stores["two"].announced == stores["two"].sizes
    assert stores["one"].announced == stores["one"].sizes
