"""What a proof notices, and what a restore leaves: the disks as they were, or nothing."""

import asyncio
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from tests.flows.rig import Rig, rig_on

from autobackup.container.header import HEADER_BYTES, decode, encode
from autobackup.container.seal import SEGMENT_BYTES
from autobackup.errors import (
    AutobackupError,
    ContainerDamaged,
    KeyRefused,
    KeysUnavailable,
    Refused,
    StoreRefused,
    TargetExists,
)
from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Restored, Wanted, restore
from autobackup.flows.verify import open_sealed, prove_copy
from autobackup.flows.workers import Workers
from autobackup.model import AttemptRecord, ChainLink, DestinationName, JobRecord
from autobackup.stores.keyfile import write_kek

MiB = 1 << 20
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


class Held:
    """One sent and unproven copy: stored, with the record of what was sent."""

    def __init__(self, rig: Rig, record: JobRecord, sent: AttemptRecord) -> None:
        self.rig, self.record, self.sent = rig, record, sent
        self.path = rig.doors["one"].root / f"{sent.attempt}.autobackup"

    async def prove(self, *, readback: bool) -> None:
        await prove_copy(
            store=self.rig.doors["one"].store,
            keys=self.rig.keys["one"],
            job=self.record.job,
            sent=self.sent,
            readback=readback,
            workers=self.rig.workers,
        )

    async def refused(self, *, readback: bool) -> AutobackupError:
        with pytest.raises(AutobackupError) as told:
            await self.prove(readback=readback)
        return told.value

    def edit(self, edit: Callable[[bytearray], None]) -> None:
        data = bytearray(self.path.read_bytes())
        edit(data)
        self.path.write_bytes(data)

    def resealed_as(self, data: bytes) -> "Held":
        """The same bytes as if the sender had sent exactly them: what is left to notice is inside."""
        self.path.write_bytes(data)
        sent = replace(self.sent, size_bytes=len(data), digest=hashlib.sha512(data).hexdigest())
        return Held(self.rig, self.record, sent)


async def keep(rig: Rig, disks: dict[str, bytes], **how: object) -> Held:
    """A job taken up to `sent`, no further: the proof is the test's."""
    record = await rig.new_job(disks, **how)  # type: ignore[arg-type]
    sent: list[AttemptRecord] = []

    def note(now: JobRecord) -> None:
        attempt = now.copies[0].attempt
        if attempt is not None and attempt.digest is not None and not sent:
            sent.append(attempt)
            rig.doors["one"].shut = {"stat": StoreRefused("the proof is not due yet")}

    rig.on_record = note
    await rig.backup.advance(record.job)
    rig.doors["one"].shut = None
    return Held(rig, record, sent[0])


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    with rig_on(tmp_path) as rig:
        yield await keep(rig, {"disk": os.urandom(4 * MiB + 99), "console.log": b"login:"})


# ---- the proof --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readback", [False, True])
async def test_what_was_sent_is_proven(held: Held, readback: bool) -> None:
    fetched = held.rig.keys["one"].fetched
    await held.prove(readback=readback)
    assert held.rig.keys["one"].fetched == fetched + 1, "the key was not fetched anew"


@pytest.mark.parametrize("readback", [False, True])
async def test_a_flip_in_any_segment_is_noticed(held: Held, readback: bool) -> None:
    """Every segment, its first and last byte; the header; by the store's digest or by reading all of it."""
    size_bytes = held.path.stat().st_size
    starts = [0, *range(HEADER_BYTES, size_bytes, SEGMENT_BYTES)]
    assert len(starts) > 5
    places = {at for start in starts for at in (start, start + 50, start - 1)} | {size_bytes - 1, HEADER_BYTES + 5}
    for at in sorted(place for place in places if 0 <= place < size_bytes):
        good = held.path.read_bytes()
        held.edit(lambda data, at=at: data.__setitem__(at, data[at] ^ 1))  # type: ignore[misc]
        assert not isinstance(await held.refused(readback=readback), StoreRefused), at
        held.path.write_bytes(good)
    await held.prove(readback=readback)


async def test_read_back_needs_nobodys_word_for_a_middle_segment(held: Held) -> None:
    """Even if the digest is that of the damaged bytes; the fast proof stands on the store's digest there."""
    data = bytearray(held.path.read_bytes())
    segments = range(1, (len(data) - HEADER_BYTES) // SEGMENT_BYTES)
    assert len(segments) >= 3
    for index in segments:
        bad = bytearray(data)
        bad[HEADER_BYTES + index * SEGMENT_BYTES + 77] ^= 1
        assert isinstance(await held.resealed_as(bytes(bad)).refused(readback=True), ContainerDamaged)


@pytest.mark.parametrize("readback", [False, True])
@pytest.mark.parametrize("cut", ["byte", "segment", "all segments", "to the header", "extended", "extended a segment"])
async def test_an_end_that_is_not_the_end_is_noticed(held: Held, cut: str, readback: bool) -> None:
    """By the size that was sent, and by the last segment alone where size and digest agree with the cut."""
    data = held.path.read_bytes()
    last = HEADER_BYTES + (len(data) - HEADER_BYTES - 1) // SEGMENT_BYTES * SEGMENT_BYTES
    changed = {
        "byte": data[:-1],
        "segment": data[:last],
        "all segments": data[: HEADER_BYTES + SEGMENT_BYTES],
        "to the header": data[:HEADER_BYTES],
        "extended": data + b"\0",
        "extended a segment": data + data[-SEGMENT_BYTES:],
    }[cut]
    held.path.write_bytes(changed)
    assert isinstance(await held.refused(readback=readback), ContainerDamaged)
    assert isinstance(await held.resealed_as(changed).refused(readback=readback), ContainerDamaged)


@pytest.mark.parametrize("readback", [False, True])
async def test_another_size_or_digest_than_was_sent_is_noticed(held: Held, readback: bool) -> None:
    for wrong in (
        replace(held.sent, size_bytes=(held.sent.size_bytes or 0) + 1),
        replace(held.sent, digest="0" * 128),
        replace(held.sent, digest=None),
        replace(held.sent, size_bytes=None),
    ):
        assert isinstance(await Held(held.rig, held.record, wrong).refused(readback=readback), ContainerDamaged)


@pytest.mark.parametrize("readback", [False, True])
async def test_the_bundle_of_another_attempt_or_job_is_noticed(held: Held, readback: bool) -> None:
    """Whole, authentic, under a key of ours, in the right place: and not what was to be there."""
    other = await keep(held.rig, {"disk": os.urandom(1000)})
    data = other.path.read_bytes()
    refusal = await held.resealed_as(data).refused(readback=readback)
    assert isinstance(refusal, ContainerDamaged)

    header = decode(data[:HEADER_BYTES])
    for edited in (replace(header, attempt=held.sent.attempt), replace(header, job=held.record.job)):
        forged = encode(edited) + data[HEADER_BYTES:]
        assert isinstance(await held.resealed_as(forged).refused(readback=readback), ContainerDamaged)


@pytest.mark.parametrize("readback", [False, True])
async def test_without_its_key_nothing_is_proven(held: Held, readback: bool) -> None:
    kek = held.rig.folder / "one.kek"
    kek.unlink()
    assert isinstance(await held.refused(readback=readback), KeysUnavailable)
    write_kek(str(kek))
    assert isinstance(await held.refused(readback=readback), KeyRefused)


@pytest.mark.parametrize("readback", [False, True])
async def test_an_object_that_is_gone_is_not_proven(held: Held, readback: bool) -> None:
    held.path.unlink()
    assert isinstance(await held.refused(readback=readback), StoreRefused)


# ---- restore ----------------------------------------------------------------------------------------------


async def bring_back(
    held: Held,
    target: Path,
    *,
    parents: Sequence[Path] = (),
    with_parents: bool = True,
    progress: Callable[[int], None] = lambda _count: None,
) -> Restored:
    """All disks, from the one destination and from *parents*, files at hand."""
    place = held.rig.places.all()[DestinationName("one")]
    sealed = await open_sealed(place.store, place.keys, held.sent.attempt)
    return await restore(
        sealed,
        target=str(target),
        wanted=Wanted(with_parents=with_parents),
        origins=Origins(places=[place], files=[str(path) for path in parents]),
        workers=held.rig.workers,
        show=lambda _words, _size_bytes: nullcontext(progress),
    )


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


async def test_what_comes_back_is_what_was_there_and_as_sparse(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        content = os.urandom(70_000) + bytes(30 * MiB) + os.urandom(5) + bytes(MiB) + os.urandom(3) + bytes(333)
        held = await keep(rig, {"disk": content, "disk.eph0": b"", "console.log": b"login:"})
        target = tmp_path / "out"
        before = tree(tmp_path)
        restored = await bring_back(held, target)

        assert (target / "disks/disk").read_bytes() == content
        assert (target / "disks/disk.eph0").read_bytes() == b""
        assert (target / "console.log").read_bytes() == b"login:"
        assert (target / "disks/disk").stat().st_blocks * 512 < MiB
        for name, digest in restored.unpacked.digests.members.items():
            data = (target / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (digest.size_bytes, digest.sha256)
        assert {path.stat().st_mode & 0o077 for path in target.rglob("*")} == {0}
        written = {path for path in tree(tmp_path) - before if not path.startswith("out/")}
        assert written == {"out"}


async def test_a_target_that_exists_is_left_alone(held: Held, tmp_path: Path) -> None:
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_bytes(b"theirs")
        with pytest.raises(TargetExists):
            await bring_back(held, tmp_path / "out")
        assert (tmp_path / name / "precious").read_bytes() == b"theirs"
        shutil.rmtree(tmp_path / name)
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists):
        await bring_back(held, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


async def test_a_target_that_appears_meanwhile_is_not_overwritten(held: Held, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear(_count: int) -> None:
        target.mkdir(exist_ok=True)

    with pytest.raises(TargetExists):
        await bring_back(held, target, progress=appear)
    assert tree(target) == set()
    assert not (tmp_path / "out.partial").exists()


async def test_damage_anywhere_brings_back_nothing(held: Held, tmp_path: Path) -> None:
    data = held.path.read_bytes()
    for at in (HEADER_BYTES + 60, *range(HEADER_BYTES + 99, len(data), SEGMENT_BYTES), len(data) - 1):
        held.edit(lambda data, at=at: data.__setitem__(at, data[at] ^ 1))  # type: ignore[misc]
        with pytest.raises(ContainerDamaged):
            await bring_back(held, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        held.path.write_bytes(data)
    held.path.write_bytes(data[:-SEGMENT_BYTES])
    with pytest.raises(ContainerDamaged):
        await bring_back(held, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


async def test_a_cancelled_restore_leaves_nothing_or_all(tmp_path: Path) -> None:
    """At random moments, the release itself among them; no thread goes on writing into what was removed."""
    draw = random.Random(3)
    with rig_on(tmp_path) as rig:
        held = await keep(rig, {"disk": os.urandom(24 * MiB)})
        ended = 0
        for round_ in range(25):
            target = tmp_path / f"out{round_}"
            running = asyncio.create_task(bring_back(held, target))
            await asyncio.wait({running}, timeout=draw.random() * 0.3)
            running.cancel()
            await asyncio.wait({running})
            await asyncio.sleep(0.01)
            assert not (tmp_path / f"out{round_}.partial").exists()
            if target.exists():
                ended += 1
                assert (target / "disks/disk").stat().st_size == 24 * MiB
                assert (target / "digests.json").exists()
                shutil.rmtree(target)
        assert ended < 25


async def test_work_in_a_thread_is_waited_for_when_cancelled() -> None:
    """Whoever is cancelled closes and removes things; the thread must not be at work on them any more."""
    workers = Workers(threads=1)
    events: list[str] = []
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        time.sleep(0.3)
        events.append("work ended")

    async def flow() -> None:
        try:
            await workers.blocking(work)
        finally:
            events.append("flow ended")

    running = asyncio.create_task(flow())
    await started.wait()
    queued = asyncio.create_task(workers.blocking(lambda: events.append("never begun")))
    await asyncio.sleep(0)
    for task in (queued, running, running):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({running, queued})
    workers.close()
    assert events == ["work ended", "flow ended"]
    assert running.cancelled()
    assert queued.cancelled()


# ---- the chain --------------------------------------------------------------------------------------------


def qemu_img(*arguments: object) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def make_chain(folder: Path, depth: int, size_bytes: int = 2 * MiB) -> tuple[Path, list[ChainLink]]:
    """A raw base, *depth* - 1 qcow2 above it, and the path of an overlay on top, each with data of its own."""
    folder.mkdir()
    base = folder / "base0.img"
    base.write_bytes(os.urandom(size_bytes))
    links = [ChainLink(path=str(base), format="raw")]
    for n in range(1, depth + 1):
        layer = folder / (f"base{n}.img" if n < depth else "overlay")
        below = links[-1]
        qemu_img("create", "-q", "-f", "qcow2", "-b", below.path, "-F", below.format, layer)
        io = ["qemu-io", "-f", "qcow2", "-c", f"write -P {n} {n * 70_000} 100000", str(layer)]
        subprocess.run(io, check=True, capture_output=True)
        links.append(ChainLink(path=str(layer), format="qcow2"))
    return Path(links[-1].path), links[-2::-1]


@needs_qemu_img
@pytest.mark.parametrize("depth", [1, 2, 4])
async def test_a_chain_comes_back_put_together(tmp_path: Path, depth: int) -> None:
    """Bit for bit what the guest saw, by qemu-img's own reading, with the bases of the dead host gone."""
    with rig_on(tmp_path) as rig:
        overlay, chain = make_chain(tmp_path / "images", depth)
        qemu_img("convert", "-O", "raw", overlay, tmp_path / "seen.raw")
        for link in chain:
            assert rig.spool.bases.hold(link.path)
        held = await keep(rig, {"disk": overlay.read_bytes()}, format_name="qcow2", chain=tuple(chain))
        shutil.rmtree(tmp_path / "images")
        restored = await bring_back(held, tmp_path / "out")

        assert restored.notes == ()
        assert [health.result for health in restored.unpacked.digests.health] == ["clean"]
        disk = tmp_path / "out" / restored.unpacked.manifest.disks[0].member
        assert (
            qemu_img("compare", "-f", "qcow2", "-F", "raw", disk, tmp_path / "seen.raw").strip()
            == "Images are identical."
        )
        shutil.move(tmp_path / "out", tmp_path / "elsewhere")
        info = json.loads(
            qemu_img(
                "info", "--backing-chain", "--output=json", tmp_path / "elsewhere" / disk.relative_to(tmp_path / "out")
            )
        )
        assert len(info) == depth + 1
        assert len(rig.doors["one"].held()) == depth + 1
        assert all("backing-filename-format" in layer for layer in info[:-1])


def hostile_header(backing: bytes, *, data_file: bool = False) -> bytes:
    """A qcow2 v3 header that names *backing*."""
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 512 if backing else 0, len(backing), 16, MiB, 0, 1, 0x30000, 0x10000, 1, 0, 0
    )
    head = fixed + struct.pack(">QQQII", 4 if data_file else 0, 0, 0, 4, 104)
    return (head.ljust(512, b"\0") + backing).ljust(0x40000, b"\0")


@pytest.mark.parametrize(
    ("content", "chain_known"),
    [
        (hostile_header(b"/etc/shadow"), True),
        (hostile_header(b"/etc/shadow"), False),
        (hostile_header(b'json:{"driver":"file","filename":"/etc/shadow"}'), True),
        (hostile_header(b"nbd://127.0.0.1/x"), False),
        (hostile_header(b"", data_file=True), False),
        (b"QFI\xfb" + bytes(100), True),
        (os.urandom(70_000), True),
        (b"", False),
    ],
)
async def test_a_header_that_says_something_else_is_left_as_it_was_and_said_so(
    tmp_path: Path, content: bytes, chain_known: bool
) -> None:
    with rig_on(tmp_path) as rig:
        base = tmp_path / "base.img"
        base.write_bytes(os.urandom(4096))
        chain = (ChainLink(path=str(base), format="raw"),) if chain_known else ()
        held = await keep(rig, {"disk": content}, format_name="qcow2", chain=chain)
        restored = await bring_back(held, tmp_path / "out")

        assert (tmp_path / "out/disks/disk").read_bytes() == content
        assert len(restored.notes) == 1
        assert "disks/disk" in restored.notes[0]
        assert [health.result for health in restored.unpacked.digests.health] == ["not trusted"]


async def test_a_raw_disk_is_raw_whatever_its_guest_wrote_into_it(tmp_path: Path) -> None:
    with rig_on(tmp_path) as rig:
        content = hostile_header(b"/etc/shadow")
        held = await keep(rig, {"disk": content})
        restored = await bring_back(held, tmp_path / "out")
        assert (tmp_path / "out/disks/disk").read_bytes() == content
        assert restored.notes == ()
        assert restored.unpacked.digests.health == ()


@needs_qemu_img
async def test_a_chain_whose_base_was_gone_comes_back_with_one_that_somebody_has_or_not_at_all(tmp_path: Path) -> None:
    """
    Nobody could say any more what it was: what is put under the overlay is named, and was not compared. The overlay
    alone comes back as it was, for whoever asks for just that.
    """
    with rig_on(tmp_path) as rig:
        overlay, chain = make_chain(tmp_path / "images", 1)
        qemu_img("convert", "-O", "raw", overlay, tmp_path / "seen.raw")
        content = overlay.read_bytes()
        shutil.move(chain[0].path, tmp_path / "base0.img")
        shutil.rmtree(tmp_path / "images")
        held = await keep(rig, {"disk": content}, format_name="qcow2", chain=tuple(chain))

        with pytest.raises(Refused, match=r"base0\.img.*--parent FILE"):
            await bring_back(held, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

        restored = await bring_back(held, tmp_path / "out", parents=[tmp_path / "base0.img"])
        assert any("base0.img" in missing.why for missing in restored.unpacked.manifest.not_captured)
        assert ["not compared" in note for note in restored.notes] == [True]
        disk = tmp_path / "out" / "disks/disk"
        words = qemu_img("compare", "-f", "qcow2", "-F", "raw", disk, tmp_path / "seen.raw")
        assert words.strip() == "Images are identical."

        alone = await bring_back(held, tmp_path / "alone", with_parents=False)
        assert (tmp_path / "alone/disks/disk").read_bytes() == content
        assert any("base0.img" in note for note in alone.notes)
