"""
What a promote sends is what the guest saw, proven to the root; or the image is gone again.

Here Glance is a few lines that keep what they are given, so that it can be made to fail where a real one does not;
`tests/e2e` has the real one.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pytest
from tests.flows.material import INSTANCE, JOB, End, limits
from tests.flows.rig import Rig, rig_on
from tests.flows.test_verify_restore import Held, hostile_header, keep
from tests.unit.qcow2.material import KiB, MiB, needs_qemu_img, qemu_img, qemu_reads, write_at_random

from autobackup.cloud.glance import Glance, Image
from autobackup.cloud.parents import Parents
from autobackup.cloud.upload import Upload
from autobackup.container.header import HEADER_BYTES, decode
from autobackup.container.manifest import DiskEntry, Manifest, ParentEntry
from autobackup.errors import AutobackupError, CloudRefused, CloudUnavailable, Damaged, Refused, Transient
from autobackup.flows.contents import Contents, Member
from autobackup.flows.fanout import fan_out
from autobackup.flows.fetch import Origins
from autobackup.flows.promote import Promoted, promote
from autobackup.flows.verify import SealedObject, open_sealed
from autobackup.host.disks import HeldDisk
from autobackup.model import AttemptId, ChainLink
from autobackup.stores import OpenDestination, Store
from autobackup.terms import Destination

pytestmark = needs_qemu_img
SIZE: Final = 4 * MiB


class Images:
    """Glance as `promote` knows it, and as a place where parents are. *before* may raise, or wait, by call."""

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}
        self.data: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.before: dict[str, Callable[[], Any]] = {}
        self.glance = cast(Glance, self)
        self.hash_said: Callable[[bytes], str] = lambda data: hashlib.sha512(data).hexdigest()

    def have(self, data: bytes, disk_format: str) -> str:
        image = str(uuid.uuid4())
        self.images[image] = self._active(image, data, {"disk_format": disk_format, "hw_disk_bus": "scsi", "x": "y"})
        self.data[image] = data
        return image

    def _active(self, image: str, data: bytes, properties: Mapping[str, str]) -> Image:
        return Image(
            id=image, status="active", owner="somebody", size_bytes=len(data), checksum="", hash_algorithm="sha512",
            hash_value=self.hash_said(data), tags=frozenset(), protected=False, properties=properties,
        )  # fmt: skip

    async def _reach(self, call: str) -> None:
        waiting = self.before.get(call, lambda: None)()
        if waiting is not None:
            await waiting

    async def create(self, image_id: str, *, name: str, properties: Mapping[str, str], **more: object) -> Image:
        await self._reach("create")
        assert (more["disk_format"], more["visibility"]) == ("qcow2", "private")
        properties = {**properties, "name": name}
        queued = replace(self._active(image_id, b"", properties), status="queued", size_bytes=None, hash_value=None)
        self.images[image_id] = queued
        return queued

    async def upload(self, image_id: str, upload: Upload, *, size_bytes: int) -> None:
        data = b"".join([bytes(piece) async for piece in upload])
        await self._reach("upload")
        assert len(data) == size_bytes
        self.data[image_id] = data
        self.images[image_id] = self._active(image_id, data, self.images[image_id].properties)

    async def newest_active(self) -> Image | None:
        return None

    async def get(self, image_id: str) -> Image | None:
        return self.images.get(image_id)

    async def read(self, image_id: str, *, offset: int, length: int) -> bytes:
        await self._reach("read")
        return self.data[image_id][offset : offset + length]

    async def delete(self, image_id: str) -> None:
        self.deleted.append(image_id)
        self.images.pop(image_id, None)
        self.data.pop(image_id, None)


class Scene:
    """A backup on a chain, its parents nowhere yet."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self.folder = folder
        self.target, self.cloud = Images(), Images()
        self.files: list[str] = []
        self.held: Held
        self.sealed: SealedObject | None = None  # instead
        self.seen = b""
        self.paths: list[Path] = []  # the base's first

    async def back_up(self, *layers: int, base_format: str = "raw") -> None:
        """A base, and an overlay for each of *layers*, which are sizes of clusters; the last one is the disk."""
        (self.folder / "images").mkdir()
        base = self.folder / "images/base"
        data = bytearray(random.Random(3).randbytes(SIZE))
        data[MiB : 2 * MiB + 5] = bytes(MiB + 5)
        base.write_bytes(data)
        if base_format == "qcow2":
            qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", base, f"{base}.packed")
            os.rename(f"{base}.packed", base)
        self.paths, links = [base], [ChainLink(path=str(base), format=base_format)]
        for number, cluster_bytes in enumerate(layers):
            path = self.folder / f"images/overlay{number}"
            qemu_img(
                "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_bytes}",
                "-b", links[0].path, "-F", links[0].format, path,
            )  # fmt: skip
            write_at_random(path, virtual_bytes=SIZE, cluster_bytes=cluster_bytes, seed=number)
            self.paths.append(path)
            links.insert(0, ChainLink(path=str(path), format="qcow2"))
        for link in links[1:]:
            assert self.rig.spool.bases.hold(link.path)
        self.seen = qemu_reads(self.paths[-1])
        self.held = await keep(
            self.rig, {"disk": self.paths[-1].read_bytes()}, format_name="qcow2", chain=tuple(links[1:])
        )

    def forget_sealed_bases(self) -> None:
        """As where parents are images: nothing lies beside the backup."""
        for path in self.rig.doors["one"].root.iterdir():
            if self.held.sent.attempt not in path.name:
                path.unlink()

    async def promote(self) -> Promoted:
        door, keys = self.rig.doors["one"], self.rig.keys["one"]
        place = OpenDestination(
            destination=Destination(name="one", store="directory", path=door.root, key="none"),
            store=cast(Store, door), keys=keys, parents=cast(Parents, self.cloud),
        )  # fmt: skip
        sealed = self.sealed or await open_sealed(door.store, keys, self.held.sent.attempt)
        return await promote(
            sealed, disk="disk", target=self.target.glance, name="", origins=Origins(places=[place], files=self.files),
            workers=self.rig.workers, show=_silent,
        )  # fmt: skip

    async def refused(self, kind: type[AutobackupError]) -> AutobackupError:
        """It is, and no image is left of it."""
        with pytest.raises(kind) as told:
            await self.promote()
        self.assert_nothing_left()
        return told.value

    def assert_nothing_left(self) -> None:
        assert (self.target.images, self.target.data) == ({}, {})

    async def assert_promoted(self) -> Promoted:
        promoted = await self.promote()
        path = self.folder / "promoted"
        path.write_bytes(self.target.data[promoted.image.id])
        assert qemu_img("check", "-f", "qcow2", path).startswith("No errors")
        assert qemu_reads(path) == self.seen
        assert promoted.virtual_bytes == SIZE
        assert list(self.target.images) == [promoted.image.id]
        return promoted


@contextlib.contextmanager
def _silent(_what: str, _size_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda _count: None


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    with rig_on(tmp_path / "rig") as rig:
        yield Scene(rig, tmp_path)


# ---- from wherever its parents are ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "base_format"),
    [((64 * KiB,), "raw"), ((64 * KiB,), "qcow2"), ((4 * KiB, 64 * KiB), "raw"), ((2 * MiB, 512), "qcow2")],
)
async def test_sealed_bases_beside_the_backup_will_do(scene: Scene, layers: Sequence[int], base_format: str) -> None:
    await scene.back_up(*layers, base_format=base_format)
    promoted = await scene.assert_promoted()
    said = promoted.image.properties
    assert (said["autobackup_origin"], said["name"]) == (scene.held.sent.attempt, "web disk")


@pytest.mark.parametrize("layers", [(64 * KiB,), (4 * KiB, 64 * KiB)], ids=["one", "small below"])
async def test_files_at_hand_will_do_in_any_order(scene: Scene, layers: Sequence[int]) -> None:
    """Which is which is told by their bytes; one that is none of them does no harm."""
    await scene.back_up(*layers)
    scene.forget_sealed_bases()
    stranger = scene.folder / "stranger"
    stranger.write_bytes(os.urandom(SIZE))
    scene.files = [str(stranger), *map(str, scene.paths[:-1][::-1])]
    await scene.assert_promoted()


async def test_nothing_else_is_taken_for_a_parent(scene: Scene) -> None:
    """By its digest: neither a bit more or less, nor the disk itself, nor a whole other base of that size."""
    await scene.back_up(64 * KiB)
    scene.forget_sealed_bases()
    await scene.refused(Refused)
    flipped = bytearray(scene.paths[0].read_bytes())
    flipped[-1] ^= 1
    other = scene.folder / "other"
    for data in (bytes(flipped), flipped[:-1], bytes(flipped) + b"\0", os.urandom(SIZE), b"", scene.seen):
        other.write_bytes(data)
        scene.files = [str(other), str(scene.folder / "none")]
        assert str(scene.paths[0]) in str(await scene.refused(AutobackupError))
    scene.files += [str(scene.paths[0])]
    await scene.assert_promoted()


async def on_image(scene: Scene, data: bytes, disk_format: str) -> Scene:
    """The backup of a disk on a raw base that was made of an image with *data*; nobody has a copy of the base."""
    await scene.back_up(64 * KiB)
    base = scene.paths[0].read_bytes()
    image = scene.cloud.have(data, disk_format)
    parent = ParentEntry(
        name="base", path=str(scene.paths[0]), format="raw", size_bytes=len(base),
        sha256=hashlib.sha256(base).hexdigest(), backing_path=None, image=image, image_hash="",
    )  # fmt: skip
    end = End("one")
    with HeldDisk(str(scene.paths[-1])) as disk:
        entry = DiskEntry(
            name="disk", member="disks/disk", format="qcow2", size_bytes=disk.identity.size_bytes,
            source_path=disk.path, inode=disk.identity.inode, mtime_ns=disk.identity.mtime_ns, backing=None,
            backing_path=parent.path, chain_source="libvirt",
        )  # fmt: skip
        manifest = Manifest(
            format="autobackup-bundle/2", job=JOB, instance=INSTANCE, instance_name="web", host="host",
            captured_at_s=1, verdict="terminated", verdict_reason="", disks=(entry,), bases=(), files=(),
            not_captured=(), facts={}, parents=(parent,),
        )  # fmt: skip
        member = Member(name="disks/disk", disk=disk, first=disk.identity)
        contents = Contents(manifest=manifest, members=[member], health=(), mtime_s=1)
        await fan_out(contents, [end.outlet], limits())
    attempt = AttemptId(decode(end.data[:HEADER_BYTES]).attempt)
    (scene.rig.doors["one"].root / f"{attempt}.autobackup").write_bytes(end.data)
    scene.sealed = SealedObject(
        store=scene.rig.doors["one"].store, attempt=attempt, size_bytes=len(end.data),
        header=decode(end.data[:HEADER_BYTES]), header_bytes=end.data[:HEADER_BYTES], key=end.outlet.key,
    )  # fmt: skip
    for path in scene.rig.doors["one"].root.iterdir():
        if str(attempt) not in path.name:
            path.unlink()
    return scene


def packed(scene: Scene, cluster_bytes: int) -> bytes:
    """What Nova made the base of."""
    path = scene.folder / "packed"
    base = scene.folder / "base"
    data = bytearray(random.Random(3).randbytes(SIZE))
    data[MiB : 2 * MiB + 5] = bytes(MiB + 5)
    base.write_bytes(data)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_bytes}", base, path)
    return path.read_bytes()


@pytest.mark.parametrize("cluster_bytes", [4 * KiB, 64 * KiB, 2 * MiB])
async def test_an_image_that_nova_made_the_base_of_will_do(scene: Scene, cluster_bytes: int) -> None:
    """And what it says of how it wants to be booted is said of the new one, but nothing else of it."""
    await on_image(scene, packed(scene, cluster_bytes), "qcow2")
    said = (await scene.assert_promoted()).image.properties
    assert (said["hw_disk_bus"], "x" in said) == ("scsi", False)


async def test_an_image_that_is_another_or_gone_is_no_parent(scene: Scene) -> None:
    good = packed(scene, 64 * KiB)
    await on_image(scene, good, "qcow2")
    [image] = scene.cloud.data
    for bad in (os.urandom(SIZE), hostile_header(b"/etc/shadow"), good[: len(good) // 2], b""):
        scene.cloud.data[image] = bad
        scene.cloud.images[image] = replace(scene.cloud.images[image], size_bytes=len(bad))
        await scene.refused(AutobackupError)
    scene.cloud.images.clear()
    await scene.refused(Refused)


# ---- refused, and gone ------------------------------------------------------------------------------------


async def test_a_sealed_base_that_is_another_is_damage(scene: Scene) -> None:
    """Swapped as a whole for another one of ours, which opens with our key; or with a bit of it changed."""
    await scene.back_up(64 * KiB)
    root = scene.rig.doors["one"].root
    [base] = [path for path in root.glob("*.autobackup") if scene.held.sent.attempt not in path.name]
    good = base.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    for data in (bytes(bad), good[:-1], scene.held.path.read_bytes()):
        base.write_bytes(data)
        assert isinstance(await scene.refused(AutobackupError), Damaged)
    base.write_bytes(good)
    await scene.assert_promoted()


async def test_a_bit_of_the_backup_is_damage(scene: Scene) -> None:
    await scene.back_up(64 * KiB)
    good = scene.held.path.read_bytes()
    for at in (60, 4096 + 99, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        scene.held.path.write_bytes(bad)
        await scene.refused(AutobackupError)
    scene.held.path.write_bytes(good)
    await scene.assert_promoted()


@pytest.mark.parametrize(
    "head",
    [
        hostile_header(b"/etc/shadow"),
        hostile_header(b'json:{"driver":"file","filename":"/etc/shadow"}'),
        hostile_header(b""),
        hostile_header(b"", data_file=True),
        b"QFI\xfb" + bytes(100),
        b"",
    ],
)
async def test_a_header_that_says_something_else_is_not_followed(scene: Scene, head: bytes) -> None:
    """The hypervisor said which file it stands on. What the guest's disk is cannot be told then."""
    base = scene.rig.base(os.urandom(MiB))
    scene.held = await keep(scene.rig, {"disk": head}, format_name="qcow2", chain=(base,))
    await scene.refused(AutobackupError)


async def test_what_glance_holds_must_be_what_was_sent(scene: Scene) -> None:
    await scene.back_up(64 * KiB)
    scene.target.hash_said = lambda data: hashlib.sha512(data + b"x").hexdigest()
    await scene.refused(Damaged)
    assert len(scene.target.deleted) == 1


@pytest.mark.parametrize("error", [CloudUnavailable("no answer"), CloudRefused("over quota")])
@pytest.mark.parametrize("call", ["create", "upload"])
async def test_a_cloud_that_fails_is_left_without_it(scene: Scene, call: str, error: AutobackupError) -> None:
    await scene.back_up(64 * KiB)

    def fail() -> None:
        raise error

    scene.target.before[call] = fail
    await scene.refused(Transient if isinstance(error, CloudUnavailable) else Refused)


async def test_cancelled_it_leaves_no_image(scene: Scene) -> None:
    await scene.back_up(64 * KiB)
    reached = asyncio.Event()

    async def wait() -> None:
        reached.set()
        await asyncio.sleep(60)

    scene.target.before["upload"] = wait
    running = asyncio.create_task(scene.promote())
    await reached.wait()
    assert len(scene.target.images) == 1
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    scene.assert_nothing_left()


async def test_a_disk_that_is_not_in_it_is_refused(scene: Scene) -> None:
    await scene.back_up(64 * KiB)
    sealed = await open_sealed(scene.held.rig.doors["one"].store, scene.rig.keys["one"], scene.held.sent.attempt)
    with pytest.raises(Refused, match="it has: disk"):
        await promote(
            sealed, disk="disk.eph0", target=scene.target.glance, name="", origins=Origins(places=[]),
            workers=scene.rig.workers, show=_silent,
        )  # fmt: skip
    scene.assert_nothing_left()
