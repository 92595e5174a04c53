"""A sealed bundle read in the middle: every byte is that of the whole, or it is refused."""

import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contract.stores import BodyOf
from tests.flows.material import End, MiB, contents_of, limits, open_bundle, opened, write_disk

from autobackup.container.header import HEADER_BYTES, decode, encode
from autobackup.container.seal import SEGMENT_BYTES, STREAM_HEADER_BYTES
from autobackup.errors import ContainerDamaged
from autobackup.flows.fanout import Sent, fan_out
from autobackup.flows.sealed_file import MemberSource, SealedFile, open_file
from autobackup.flows.verify import SealedObject
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.stores.directory import DirectoryStore


class CountingStore(DirectoryStore):
    """Notes how much of what is held was asked for."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read_bytes = 0

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        data = await super().read(attempt, offset=offset, length=length)
        self.read_bytes += len(data)
        return data


class Bundle:
    """A sealed bundle in a store, and all that is in it as one who reads it in order has it."""

    def __init__(self, root: Path, data: bytes, key: bytes) -> None:
        root.mkdir(mode=0o700)
        self.store = CountingStore(str(root))
        self.attempt = AttemptId(str(uuid.uuid4()))
        self.path = root / f"{self.attempt}.autobackup"
        self.data = data
        self.key = key
        self.members, self.unpacked = open_bundle(data, key)
        self.workers = Workers(cpu_tokens=2, threads=2)

    async def hold(self) -> None:
        await self.store.put(self.attempt, BodyOf(self.data, "sha512"), properties={})

    async def open(self, data: bytes = b"", *, key: bytes = b"") -> SealedFile:
        held = data or self.data
        self.path.write_bytes(held)
        sealed = SealedObject(
            store=self.store, attempt=self.attempt, size_bytes=len(held), header=decode(self.data[:HEADER_BYTES]),
            header_bytes=held[:HEADER_BYTES], key=key or self.key,
        )  # fmt: skip
        return await open_file(sealed, self.workers)


@pytest.fixture(params=[-1, None], ids=["compressed", "stored"])
async def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bundle]:
    mixed = [("data", 2 * MiB + 5), ("hole", 3 * MiB), ("zeros", MiB), ("data", 4097), ("hole", 123_456)]
    write_disk(tmp_path / "disk", mixed)
    write_disk(tmp_path / "disk.eph0", [("data", 512)])
    write_disk(tmp_path / "disk.local", [])
    write_disk(tmp_path / "disk.swap", [("hole", 2 * MiB), ("data", MiB)])
    end = End("one")
    names = [tmp_path / name for name in ("disk", "disk.eph0", "disk.local", "disk.swap")]
    with opened(*names) as disks:
        contents = contents_of(disks, console=b"login:")
        [sent] = (await fan_out(contents, [end.outlet], limits(level=request.param))).values()
    assert isinstance(sent, Sent)
    bundle = Bundle(tmp_path / "store", end.data, end.outlet.key)
    await bundle.hold()
    yield bundle
    bundle.workers.close()


def ranges(size_bytes: int, draw: random.Random) -> list[tuple[int, int]]:
    """Round every MiB, where a frame begins; some anywhere; and what lies behind the end."""
    edges = [
        edge for at in range(0, size_bytes + MiB, MiB) for edge in (at - 1, at, at + 1) if 0 <= edge <= size_bytes + 1
    ]
    edges += [max(0, size_bytes - 1), size_bytes]
    found = [(at, length) for at in edges for length in (0, 1, 2, 513, MiB + 1)]
    found += [(draw.randrange(size_bytes + 1), draw.choice([1, 4096, 65536, 3 * MiB])) for _ in range(25)]
    draw.shuffle(found)
    return found


async def test_any_range_is_that_of_the_whole(bundle: Bundle) -> None:
    """Whichever was read before: what is kept at hand must not be taken for something else."""
    file, draw = await bundle.open(), random.Random(5)
    assert await file.manifest() == bundle.unpacked.manifest
    for name, whole in draw.sample(list(bundle.members.items()), len(bundle.members)):
        offset, size_bytes = await file.member(name)
        assert size_bytes == len(whole)
        source = MemberSource(file, offset, size_bytes)
        assert source.size_bytes == size_bytes
        for at, length in ranges(size_bytes, draw):
            assert await source.read(at, length) == whole[at : at + length].ljust(length, b"\0"), (name, at, length)


@pytest.mark.parametrize("step", [4096, 1_000_003])
async def test_forwards_and_backwards_are_the_same(bundle: Bundle, step: int) -> None:
    file = await bundle.open()
    whole = bundle.members["disks/disk"]
    source = MemberSource(file, *await file.member("disks/disk"))
    places = range(0, len(whole), step) if step > 4096 else range(MiB - 5 * step - 7, MiB + 5 * step, step)
    for at in (*places, *reversed(places)):
        assert await source.read(at, step) == whole[at : at + step].ljust(step, b"\0")


async def test_the_archive_ends_where_it_ends(bundle: Bundle) -> None:
    file = await bundle.open()
    offset, size_bytes = await file.member("digests.json")
    tail = await file.read(offset, 100 * MiB)
    assert tail[:size_bytes] == bundle.members["digests.json"]
    assert not tail[size_bytes:].strip(b"\0")
    assert await file.read(offset + len(tail), 1) == await file.read(1 << 50, 1) == b""


async def test_what_is_not_in_it_is_not_found(bundle: Bundle) -> None:
    file = await bundle.open()
    for name in 2 * ("disks/disk.eph1", "disks/dis", "disks/", "disks/disk/", "", "bases/x", "disk"):
        with pytest.raises(ContainerDamaged):
            await file.member(name)
    assert await file.member("disks/disk.eph0")


async def test_a_little_is_read_for_a_little(bundle: Bundle) -> None:
    """The end, and the segments that it is in: not all that is before it."""
    assert len(bundle.data) > 3 * SEGMENT_BYTES
    bundle.store.read_bytes = 0
    file = await bundle.open()
    at_first = bundle.store.read_bytes
    assert at_first <= 3 * SEGMENT_BYTES
    offset, size_bytes = await file.member("disks/disk.swap")
    assert size_bytes == 3 * MiB
    before = bundle.store.read_bytes
    for at in range(2 * MiB, 3 * MiB, 4096):
        await file.read(offset + at, 4096)
    assert bundle.store.read_bytes - before <= 3 * SEGMENT_BYTES, "a segment is read once for many pieces of it"


# ---- refused ----------------------------------------------------------------------------------------------


async def read_all(file: SealedFile, members: list[str]) -> dict[str, bytes]:
    return {name: await file.read(*await file.member(name)) for name in members}


async def test_a_bit_anywhere_is_noticed_by_whoever_needs_it(bundle: Bundle) -> None:
    """No member is read whole past a changed segment; what came out before was right."""
    names = list(bundle.members)
    for start in range(HEADER_BYTES, len(bundle.data), SEGMENT_BYTES):
        end = min(start + SEGMENT_BYTES, len(bundle.data))
        for at in (start + STREAM_HEADER_BYTES, (start + end) // 2, end - 1):
            bad = bytearray(bundle.data)
            bad[at] ^= 1
            with pytest.raises(ContainerDamaged):
                await read_all(await bundle.open(bytes(bad)), names)
    assert await read_all(await bundle.open(), names) == bundle.members


async def test_an_end_that_is_not_the_end_is_refused(bundle: Bundle) -> None:
    whole = bundle.data
    last = HEADER_BYTES + (len(whole) - HEADER_BYTES - 1) // SEGMENT_BYTES * SEGMENT_BYTES
    first = HEADER_BYTES + SEGMENT_BYTES
    for cut in (
        whole[:-1], whole[:last], whole[:first], whole[:HEADER_BYTES + 60], whole[:HEADER_BYTES],
        whole + b"\0", whole + whole[last:], whole[:first] + whole[last:],
    ):  # fmt: skip
        with pytest.raises(ContainerDamaged):
            await bundle.open(cut)


async def test_segments_that_changed_places_are_refused(bundle: Bundle) -> None:
    one, two, three = (HEADER_BYTES + n * SEGMENT_BYTES for n in (1, 2, 3))
    whole = bundle.data
    swapped = whole[:one] + whole[two:three] + whole[one:two] + whole[three:]
    assert swapped != whole
    file = await bundle.open(swapped)
    with pytest.raises(ContainerDamaged):
        await read_all(file, ["disks/disk"])


async def test_another_key_or_header_opens_nothing(bundle: Bundle) -> None:
    with pytest.raises(ContainerDamaged):
        await bundle.open(key=bytes(32))
    header = replace(decode(bundle.data[:HEADER_BYTES]), created_at_s=2)
    with pytest.raises(ContainerDamaged):
        await bundle.open(encode(header) + bundle.data[HEADER_BYTES:])
