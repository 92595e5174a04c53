"""
Nothing is sent before what it stands on is kept, and nothing is proven unless it still is.

The images are those of a cloud that is played here: what Glance does is `tests/contract/test_parents.py`'s to show.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.flows.rig import Rig, copy_of, rig_on
from tests.flows.sealed_bases import backups, bases, job_on, opened, sealed_job, standing_on

from autobackup.cloud.glance import Image
from autobackup.container.header import HEADER_BYTES, decode
from autobackup.errors import CloudRefused, CloudUnavailable, StoreUnavailable
from autobackup.flows.places import Places
from autobackup.model import AttemptId, CopyState, JobRecord, JobState, Protection
from autobackup.rules.lineage import MOST_PARENTS, base_name
from autobackup.stores import PARENTS
from autobackup.terms import Destination

KiB = 1 << 10
CONTENT = os.urandom(300 * KiB + 77)
IMAGE = "155d900f-4e14-4e4c-a73d-069cbf4541e6"
DOWN = StoreUnavailable("the store is down")


@dataclass
class Images:
    """One image, and what becomes of it. Stands for `cloud.parents.Parents` and for the Glance that it has."""

    data: bytes
    status: str = "active"
    visibility: str = "private"
    protectable: bool = True
    protected: bool = False
    guard: Protection = Protection.PROTECTED  # what Glance does for it while it is protected
    trouble: CloudUnavailable | None = None
    looks: list[str] = field(default_factory=list)
    read_bytes: int = 0

    @property
    def glance(self) -> "Images":
        return self

    async def find(self, path: str, hints: Sequence[str]) -> Image | None:
        self._look("find")
        if not path.endswith(base_name(IMAGE)):
            return None
        return Image(
            id=IMAGE, status=self.status, owner="p", size_bytes=len(self.data), checksum=None, hash_algorithm="sha512",
            hash_value=hashlib.sha512(self.data).hexdigest(), tags=frozenset(), protected=self.protected,
            properties={"disk_format": "raw", "visibility": self.visibility},
        )  # fmt: skip

    async def protect(self, image_id: str) -> Protection:
        self._look("protect")
        if not self.protectable:
            raise CloudRefused("it is not ours to change")
        self.protected = True
        return self.guard

    async def is_protected(self, image_id: str, *, by_policy: bool) -> bool:
        self._look("is_protected")
        return self.protected and image_id == IMAGE and (self.guard is Protection.POLICY or not by_policy)

    async def read(self, image_id: str, *, offset: int, length: int) -> bytes:
        self.read_bytes += length
        return self.data[offset : offset + length]

    def _look(self, what: str) -> None:
        self.looks.append(what)
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_on(tmp_path) as one:
        yield one


def in_cloud(rig: Rig, images: Images, **terms: object) -> None:
    """As if the destinations lay in a cloud: with images beside them, and on the *terms* of one."""
    cloudy = [
        replace(_in_glance(place.destination), **terms)  # type: ignore[arg-type]
        for place in rig.places.all().values()
    ]
    opened_as = dict(rig.places.all())
    rig.places = Places(cloudy, lambda one: replace(opened_as[one.name], destination=one, parents=images))  # type: ignore[index, arg-type]


def _in_glance(one: Destination) -> Destination:
    return Destination(name=one.name, store="glance", cloud="lab", key="none", verify=one.verify)


def words_of(rig: Rig, attempt: str) -> dict[str, str]:
    words: dict[str, str] = json.loads((rig.doors["one"].root / f"{attempt}.json").read_text())["properties"]
    return words


def receipt(rig: Rig, record: JobRecord) -> str:
    return (Path(rig.spool.path) / "receipts" / f"{record.job}.json").read_text()


# ---- which way --------------------------------------------------------------------------------------------------


async def test_an_image_with_the_bytes_of_the_base_is_protected_and_no_copy_sent(rig: Rig) -> None:
    """Said where whoever decides reads it, in the header and on the receipt; and once more in the store, for lists."""
    images = Images(CONTENT)
    in_cloud(rig, images)
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))
    await rig.run_to_the_end(record.job)
    assert images.protected
    assert await bases(rig) == []
    [child] = await backups(rig)
    header = decode((rig.doors["one"].root / f"{child}.autobackup").read_bytes()[:HEADER_BYTES])
    assert header.parent == {"image": IMAGE, "base_0": f"image:{IMAGE}"}
    [parent] = (await opened(rig, child)).manifest.parents
    assert (parent.image, parent.sha256) == (IMAGE, hashlib.sha256(CONTENT).hexdigest())
    assert words_of(rig, child)[PARENTS] == IMAGE
    assert IMAGE in receipt(rig, record)


@pytest.mark.parametrize(
    ("other", "terms"),
    [
        ({"data": CONTENT[:-1] + b"?"}, {}),
        ({"data": CONTENT[:-1]}, {}),
        ({"status": "deactivated"}, {}),
        ({"protectable": False}, {}),
        ({}, {"members": ("a" * 32,)}),
        ({}, {"parents": "copy"}),
    ],
    ids=["other bytes", "shorter", "deactivated", "not ours", "not visible to all", "the terms say so"],
)
async def test_where_an_image_will_not_do_the_base_is_copied(
    rig: Rig, other: dict[str, object], terms: dict[str, object]
) -> None:
    in_cloud(rig, images := Images(**({"data": CONTENT} | other)), **terms)  # type: ignore[arg-type]
    child = await sealed_job(rig, rig.base(CONTENT, name=base_name(IMAGE)))
    assert not images.protected
    assert await standing_on(rig, child) == [CONTENT]


@pytest.mark.parametrize("other", [{"data": bytes(99)}, {"status": "deactivated"}, {"protectable": False}])
async def test_where_only_protection_will_do_the_copy_is_parked_until_an_operator_has_mended_it(
    rig: Rig, other: dict[str, object]
) -> None:
    """Nothing is sent, nothing scrubbed; and a retry after the mending ends well."""
    in_cloud(rig, images := Images(**({"data": CONTENT} | other)), parents="protect")  # type: ignore[arg-type]
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))
    await rig.run_to_the_end(record.job)
    parked = rig.jobs.get(record.job)
    assert parked.state is JobState.PARKED
    assert 'write parents = "auto"' in parked.last_error
    assert rig.doors["one"].held() == []
    assert rig.link(record).exists()
    images.data, images.status, images.protectable = CONTENT, "active", True
    await rig.jobs.order_retry(record.job)
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert images.protected


async def test_a_base_of_no_image_is_copied_even_where_only_protection_will_do(rig: Rig) -> None:
    in_cloud(rig, Images(CONTENT), parents="protect")
    child = await sealed_job(rig, rig.base(b"mkfs" * 999, name="ephemeral_1_abcdef0"))
    assert await standing_on(rig, child) == [b"mkfs" * 999]


async def test_a_cloud_that_does_not_answer_is_waited_for(rig: Rig) -> None:
    """Not taken for one that has no such image: the base would be copied, or the copy parked."""
    in_cloud(rig, images := Images(CONTENT, trouble=CloudUnavailable("image list", status=503)))
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))
    for _ in range(3):
        waiting = await rig.advance(record.job)
        assert waiting is not None
        assert (waiting.state, waiting.copies[0].state) == (JobState.QUEUED, CopyState.QUEUED)
        rig.clock.now_s = waiting.not_before_s + 1
    assert rig.doors["one"].held() == []
    images.trouble = None
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert images.protected


async def test_an_image_is_compared_once_on_each_host(rig: Rig) -> None:
    """By what was read of it where its hash says nothing; another upload is another image, and compared again."""
    link = rig.base(CONTENT + bytes(4 * KiB), name=base_name(IMAGE))
    in_cloud(rig, images := Images(CONTENT + bytes(4 * KiB)))
    await sealed_job(rig, link)
    assert images.read_bytes == 0, "its hash is that of the base"
    images.data = CONTENT + b"!" * (4 * KiB)
    await sealed_job(rig, link)
    assert images.read_bytes > 0
    assert len(await bases(rig)) == 1


# ---- kept until it is proven ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["in the put", "after the put"])
async def test_a_copy_whose_image_loses_its_protection_is_not_proven(rig: Rig, moment: str) -> None:
    """Its owner may unprotect it at any time; the copy is sent anew, and it is protected again."""
    in_cloud(rig, images := Images(CONTENT))
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))
    lost: list[str] = []

    def lose() -> None:
        if not lost:
            lost.append(moment)
            images.protected = False

    async def before() -> None:
        lose()

    if moment == "in the put":
        rig.doors["one"].before_put = before
    else:
        rig.doors["one"].after_put = lambda _attempt: lose()
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert lost
    assert images.protected
    assert images.looks.count("protect") == 2
    assert len(await backups(rig)) == 1


async def test_a_copy_whose_image_is_guarded_less_than_the_receipt_will_say_is_not_proven(rig: Rig) -> None:
    in_cloud(rig, images := Images(CONTENT, guard=Protection.POLICY))
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))

    async def without_policy() -> None:
        images.guard = Protection.PROTECTED

    rig.doors["one"].before_put = without_policy
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    [anchor] = json.loads(receipt(rig, record))["copies"][0]["parents"]
    assert anchor["protection"] == "protected"


async def test_the_disk_stays_while_what_it_stands_on_cannot_be_asked_for(rig: Rig) -> None:
    in_cloud(rig, images := Images(CONTENT))
    record = await job_on(rig, rig.base(CONTENT, name=base_name(IMAGE)))

    def lose_sight(_attempt: AttemptId) -> None:
        images.trouble = CloudUnavailable("image", status=None)

    rig.doors["one"].after_put = lose_sight
    waiting = await rig.advance(record.job)
    assert waiting is not None
    assert waiting.copies[0].state is CopyState.SENT
    assert rig.link(record).exists()
    images.trouble = None
    await rig.run_to_the_end(record.job)
    assert rig.is_gone(record.job)
    assert len([call for call, _ in rig.doors["one"].calls if call == "put"]) == 1, "what was sent stays sent"


# ---- what is journaled ------------------------------------------------------------------------------------------


async def test_what_a_copy_stands_on_is_journaled_before_its_store_hears_of_it(rig: Rig) -> None:
    """A base before it is put, an attempt's anchors with the attempt: a start after a crash has to know both."""
    record = await job_on(rig, rig.base(CONTENT))
    seen: list[tuple[str | None, list[str]]] = []

    async def look() -> None:
        copy = copy_of(rig.jobs.get(record.job), "one")
        assert rig.journaled(record.job).count(str(copy.base_attempt or copy.attempt.attempt).encode()) >= 1  # type: ignore[union-attr]
        seen.append((copy.base_attempt, [anchor.parent for anchor in copy.anchors]))

    rig.doors["one"].before_put = look
    await rig.run_to_the_end(record.job)
    [base] = await bases(rig)
    assert seen == [(base, []), (None, [base])]


async def test_a_destination_that_needs_no_base_first_is_not_kept_waiting(tmp_path: Path) -> None:
    with rig_on(tmp_path, destinations=("one", "two")) as rig:
        link = rig.base(CONTENT)
        rig.doors["two"].shut = DOWN
        first = await job_on(rig, link)
        await rig.advance(first.job)
        rig.doors["two"].shut = None
        second = await job_on(rig, link)
        order: list[str] = []
        for name, door in rig.doors.items():
            door.after_put = lambda _attempt, name=name: order.append(name)  # type: ignore[misc]
        await rig.run_to_the_end(second.job)
        assert order == ["one", "two", "two"], "its backup, then the other's base and backup"


# ---- what cannot be kept ----------------------------------------------------------------------------------------


async def test_a_base_that_is_gone_is_said_to_be_missing_wherever_somebody_may_look(rig: Rig) -> None:
    link = rig.base(CONTENT)
    record = await job_on(rig, link)
    rig.spool.bases.release_all_but(())
    Path(link.path).unlink()
    await rig.run_to_the_end(record.job)
    [child] = await backups(rig)
    manifest = (await opened(rig, child)).manifest
    assert [(one.path, one.sha256) for one in manifest.parents] == [(link.path, None)]
    assert [one.why for one in manifest.not_captured] == [f"the backing file {link.path} is gone and was not held"]
    assert link.path in receipt(rig, record)


async def test_a_base_that_is_gone_stands_on_its_image_though_nobody_can_compare_them(rig: Rig) -> None:
    in_cloud(rig, images := Images(CONTENT))
    link = rig.base(CONTENT, name=base_name(IMAGE))
    record = await job_on(rig, link)
    rig.spool.bases.release_all_but(())
    Path(link.path).unlink()
    await rig.run_to_the_end(record.job)
    assert images.protected
    [child] = await backups(rig)
    [parent] = (await opened(rig, child)).manifest.parents
    assert (parent.image, parent.sha256) == (IMAGE, None)


async def test_a_base_that_changes_while_it_is_read_is_waited_for(rig: Rig) -> None:
    """It is there, and will be read: whoever sealed the overlay without it would have lost the rest of the disk."""
    record = await job_on(rig, link := rig.base(CONTENT))
    with rig.workers.cpu_tokens, rig.workers.cpu_tokens:  # what was read is not hashed yet
        advancing = asyncio.create_task(rig.advance(record.job))
        while not _is_open(link.path):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        with Path(link.path).open("ab") as base:
            base.write(b"more")
    waiting = await advancing
    assert waiting is not None
    assert waiting.state is JobState.QUEUED
    assert link.path in waiting.last_error
    assert rig.doors["one"].held() == []
    await rig.run_to_the_end(record.job)
    [child] = await backups(rig)
    assert await standing_on(rig, child) == [CONTENT + b"more"]


async def test_a_base_that_was_replaced_is_not_guessed_at(rig: Rig) -> None:
    """Two files of one name were held for the instances on it; an operator says which it is."""
    record = await job_on(rig, link := rig.base(CONTENT))
    Path(link.path).unlink()
    rig.base(b"another" * 999)
    await rig.run_to_the_end(record.job)
    assert rig.jobs.get(record.job).state is JobState.PARKED
    assert "was replaced by a file of other content" in rig.jobs.get(record.job).last_error
    assert rig.doors["one"].held() == []
    assert rig.link(record).exists()
    [wrong] = [held for held in rig.spool.bases.held(link) if Path(held).read_bytes() != CONTENT]
    Path(wrong).unlink()
    await rig.jobs.order_retry(record.job)
    await rig.run_to_the_end(record.job)
    [child] = await backups(rig)
    assert await standing_on(rig, child) == [CONTENT]


async def test_a_base_that_was_replaced_by_the_same_bytes_is_that_base(rig: Rig) -> None:
    """Nova fetched it anew; the disks of before and after stand on the same."""
    first = await sealed_job(rig, link := rig.base(CONTENT))
    Path(link.path).unlink()
    second = await sealed_job(rig, rig.base(CONTENT))
    assert (await opened(rig, first)).parents == (await opened(rig, second)).parents
    assert len(await bases(rig)) == 1


def _is_open(path: str) -> bool:
    inode = Path(path).stat().st_ino
    return any(entry.stat().st_ino == inode for entry in Path("/proc/self/fd").iterdir() if entry.exists())


async def test_a_chain_that_a_header_cannot_name_is_parked(rig: Rig) -> None:
    """Before anything of it is sent. Nova's have one or two; a snapshot chain of libvirt's may be any length."""
    links = [rig.base(b"%d" % n, name=f"layer{n}") for n in range(MOST_PARENTS + 1)]
    assert len(await standing_on(rig, await sealed_job(rig, *links[:-1]))) == MOST_PARENTS
    held = rig.doors["one"].held()
    record = await job_on(rig, *links)
    await rig.run_to_the_end(record.job)
    assert rig.jobs.get(record.job).state is JobState.PARKED
    assert "15 backing files" in rig.jobs.get(record.job).last_error
    assert rig.doors["one"].held() == held
