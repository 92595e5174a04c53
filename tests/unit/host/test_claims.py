"""Claims: which names are one, that each inode has one, and that a race or a crash makes no other."""

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab.filesystem import bind_mount, loop_filesystem
from tests.unit.host.material import INSTANCE, OTHER

from autobackup.errors import SpoolUnavailable
from autobackup.host.claims import Claim, Claims, is_claimable, named_path, parse_claim, parse_folder
from autobackup.model import DiskIdentity
from autobackup.rules.termination import Place

OWNS_NOTHING: Callable[[int, Callable[[], DiskIdentity | None]], bool] = lambda _inode, _identify: False  # noqa: E731

CLAIMABLE = (
    "disk", "disk.local", "disk.eph0", "disk.eph1", "disk.eph12", "disk.swap", "disk.config", "disk.rescue",
    "console.log",
)  # fmt: skip
OUTSIDE = ("nvram", "swtpm.tpm2-00.permall", "swtpm.x", "swtpm.a-b_c.d")
NEVER = (
    "", ".", "..", "Disk", "disk ", " disk", "disk\n", "disk.", "disk.eph", "disk.eph-1", "disk.ephX", "disk.eph\u0663",
    "disk.info", "disk.tmp", "disk.delta", "xdisk", "disk.swap.part", "console.log.0", "libvirt.xml", "kernel",
    "disk/../x", "nvram", "swtpm.x", "rbd", "disk.config.bak",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    (tmp_path / INSTANCE).mkdir()
    return tmp_path


def claims_in(place: Path) -> Claims:
    claims = Claims(instances_path=str(place), folder=str(place / "spool"), is_owned=OWNS_NOTHING)
    claims.load()
    return claims


def links(place: Path) -> list[str]:
    return sorted(os.listdir(place / "spool"))


# ---- names ------------------------------------------------------------------------------------------------


def test_only_the_allow_list_is_claimable() -> None:
    assert all(map(is_claimable, CLAIMABLE))
    assert not any(map(is_claimable, NEVER))


def test_every_claims_name_reads_back_as_itself() -> None:
    for disk, inode in itertools.product((*CLAIMABLE, *OUTSIDE), (1, 2, 12345, 2**64 - 1)):
        claim = Claim(instance=INSTANCE, disk=disk, inode=inode)
        assert parse_claim(claim.name) == claim


def test_a_name_that_would_not_be_written_is_no_claim() -> None:
    """What reads as a claim but has another name would be looked for where it is not."""
    uuids = (INSTANCE, INSTANCE.upper(), INSTANCE[:-1], INSTANCE + "0", "")
    disks = (*CLAIMABLE, *OUTSIDE, *NEVER, "swtpm.", "swtpm..x", "swtpm.\u00fc", "nvram.x")
    inodes = ("1", "42", "", "-1", "x", "1.2", "1 ", "\u0661", "007", "0x1")
    for uuid, disk, inode in itertools.product(uuids, disks, inodes):
        name = f"{uuid}.{disk}.{inode}"
        claim = parse_claim(name)
        wanted = uuid == INSTANCE and disk in (*CLAIMABLE, *OUTSIDE) and inode in ("1", "42")
        if claim is not None:
            assert claim.name == name, name
        if wanted:
            assert claim is not None, name
        elif re.fullmatch(r"swtpm\.[\w.-]+", disk, re.ASCII) is None:  # ("swtpm.x.1", "2") is ("swtpm.x", "1.2"), too
            assert claim is None, name


def test_folders_of_novas() -> None:
    assert parse_folder(INSTANCE) == (INSTANCE, Place.INSTANCE)
    assert parse_folder(INSTANCE + "_del") == (INSTANCE, Place.DELETED)
    assert parse_folder(INSTANCE + "_resize") == (INSTANCE, Place.RESIZE)
    for name in (
        "_base",
        "locks",
        ".autobackup",
        INSTANCE.upper(),
        INSTANCE + "_",
        INSTANCE + "_delx",
        "compute_nodes",
    ):
        assert parse_folder(name) is None


# ---- claiming ---------------------------------------------------------------------------------------------


def test_every_disk_is_claimed_once_and_nothing_else(place: Path) -> None:
    for name in (*CLAIMABLE, "disk.info", "libvirt.xml"):
        (place / INSTANCE / name).write_bytes(name.encode())
    claims = claims_in(place)

    assert sorted(claim.disk for claim in claims.claim_folder(INSTANCE)) == sorted(CLAIMABLE)
    assert claims.claim_folder(INSTANCE) == []
    assert claims_in(place).count() == len(CLAIMABLE)
    for claim in claims.of(INSTANCE):
        assert os.stat(claims.path(claim)).st_ino == claim.inode == (place / INSTANCE / claim.disk).stat().st_ino
        assert claims.link_count(claim) == 2


def test_what_is_no_regular_file_is_not_claimed(place: Path) -> None:
    (place / "secret").write_bytes(b"secret")
    (place / INSTANCE / "disk").symlink_to(place / "secret")
    os.mkfifo(place / INSTANCE / "disk.swap")
    (place / INSTANCE / "disk.local").mkdir()
    os.mknod(place / INSTANCE / "disk.eph0", 0o600 | 0o020000, os.makedev(1, 3))

    assert claims_in(place).claim_folder(INSTANCE) == []
    assert links(place) == []


def test_a_folder_that_is_a_link_is_not_entered(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "disk").write_bytes(b"x")
    (place / OTHER).symlink_to(place / "elsewhere")
    claims = claims_in(place)
    assert claims.claim_folder(OTHER) == []
    assert claims.claim_file(OTHER, "disk") == []
    assert claims.claim_folder("../" + place.name) == []


def test_a_renamed_disk_keeps_its_claim(place: Path) -> None:
    (place / INSTANCE / "disk").write_bytes(b"x")
    claims = claims_in(place)
    (claim,) = claims.claim_folder(INSTANCE)
    for suffix, where in (("_resize", Place.RESIZE), ("_del", Place.DELETED)):
        folder = next(place.glob(f"{INSTANCE}*"))
        folder.rename(place / (INSTANCE + suffix))
        assert claims.claim_folder(INSTANCE + suffix) == []
        assert claims.place(claim) is where
    (place / f"{INSTANCE}_del" / "disk").unlink()
    assert claims.place(claim) is Place.NOWHERE
    assert claims.link_count(claim) == 1
    assert named_path(str(place), INSTANCE, "disk", claim.inode) is None


def test_a_replaced_disk_is_a_claim_more(place: Path) -> None:
    disk, claims = place / INSTANCE / "disk", claims_in(place)
    disk.write_bytes(b"old")
    (old,) = claims.claim_folder(INSTANCE)
    disk.unlink()
    disk.write_bytes(b"new")
    (new,) = claims.claim_folder(INSTANCE)

    assert old.inode != new.inode
    assert Path(claims.path(old)).read_bytes() == b"old"
    assert Path(claims.path(new)).read_bytes() == b"new"
    claims.release(old)
    assert links(place) == [new.name]


def test_what_a_job_owns_is_not_claimed_again(place: Path) -> None:
    (place / INSTANCE / "disk").write_bytes(b"x")
    inode = (place / INSTANCE / "disk").stat().st_ino
    asked: list[DiskIdentity | None] = []

    def owned(number: int, identify: Callable[[], DiskIdentity | None]) -> bool:
        asked.append(identify())
        return number == inode

    claims = Claims(instances_path=str(place), folder=str(place / "spool"), is_owned=owned)
    assert claims.claim_folder(INSTANCE) == []
    assert asked[0] is not None
    assert asked[0].inode == inode
    assert links(place) == []


def test_a_crash_between_link_and_index_loses_nothing(place: Path) -> None:
    (place / INSTANCE / "disk").write_bytes(b"x")
    inode = (place / INSTANCE / "disk").stat().st_ino
    name = f"{INSTANCE}.disk.{inode}"
    os.link(place / INSTANCE / "disk", place / "spool" / name)
    os.link(place / INSTANCE / "disk", place / "spool" / f"{OTHER}.disk.{inode}")
    (place / "spool" / f"{OTHER}.disk.99").write_bytes(b"not that inode")
    (place / "spool" / "README").write_bytes(b"theirs")

    claims = claims_in(place)
    assert claims.count() == 1
    assert len([link for link in links(place) if link.endswith(f".{inode}")]) == 1
    assert {"README", f"{OTHER}.disk.99"} <= set(links(place))


def test_a_stale_file_under_a_claims_name_does_not_stand_in_its_way(place: Path) -> None:
    (place / INSTANCE / "disk").write_bytes(b"x")
    inode = (place / INSTANCE / "disk").stat().st_ino
    claims = claims_in(place)
    (place / "spool" / f"{INSTANCE}.disk.{inode}").write_bytes(b"stale")

    (claim,) = claims.claim_folder(INSTANCE)
    assert Path(claims.path(claim)).read_bytes() == b"x"


def test_many_threads_make_one_claim_each_inode(place: Path) -> None:
    """inotify, libvirt and a scan see the same disk at once."""
    names = [f"disk.eph{n}" for n in range(30)] + ["disk"]
    for name in names:
        (place / INSTANCE / name).write_bytes(b"x")
    claims = claims_in(place)
    told: list[Claim] = []
    made: list[Claim] = []
    claims.on_claimed = told.append
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        for name in names:
            made.extend(claims.claim_file(INSTANCE, name))
        made.extend(claims.claim_folder(INSTANCE))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.name for c in made) == sorted(c.name for c in told) == links(place)
    assert len(made) == len(names) == claims.count()


def test_a_disk_that_is_replaced_while_it_is_claimed_gives_true_claims_only(place: Path) -> None:
    """Whatever the race does: each link has the inode that its name says, and none was lost on the way."""
    disk, claims, stop = place / INSTANCE / "disk", claims_in(place), threading.Event()
    disk.write_bytes(b"0")

    def replace() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            (place / "new").write_bytes(str(n).encode())
            os.rename(place / "new", disk)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        made = [claim for _ in range(400) for claim in claims.claim_folder(INSTANCE)]
    finally:
        stop.set()
        thread.join()
    assert made
    assert sorted(claim.name for claim in made) == links(place)
    for claim in made:
        assert os.stat(claims.path(claim)).st_ino == claim.inode


def test_claims_released_and_made_at_once_do_not_mix(place: Path) -> None:
    for n in range(10):
        (place / INSTANCE / f"disk.eph{n}").write_bytes(b"x")
    claims, stop = claims_in(place), threading.Event()

    def release() -> None:
        while not stop.is_set():
            for claim in claims.of(INSTANCE):
                claims.release(claim)

    thread = threading.Thread(target=release)
    thread.start()
    for _ in range(200):
        claims.claim_folder(INSTANCE)
    stop.set()
    thread.join()
    claims.claim_folder(INSTANCE)
    assert claims.count() == 10 == len(links(place))


def test_handing_over_is_idempotent_and_takes_no_stranger(place: Path) -> None:
    (place / INSTANCE / "disk").write_bytes(b"x")
    (place / "job").mkdir()
    claims = claims_in(place)
    (claim,) = claims.claim_folder(INSTANCE)

    assert claims.hand_over(claim.name, str(place / "job"))
    assert not claims.hand_over(claim.name, str(place / "job"))
    assert not claims.hand_over("README", str(place / "job"))
    assert os.listdir(place / "job") == [claim.name]
    assert claims.count() == 0


def test_firmware_state_is_claimed_only_under_its_names(place: Path) -> None:
    (place / "nvram").mkdir()
    (place / "nvram" / "x_VARS.fd").write_bytes(b"vars")
    claims = claims_in(place)
    assert claims.claim_outside(INSTANCE, "disk", str(place / "nvram" / "x_VARS.fd")) == []
    (claim,) = claims.claim_outside(INSTANCE, "nvram", str(place / "nvram" / "x_VARS.fd"))
    assert (claim.disk, Path(claims.path(claim)).read_bytes()) == ("nvram", b"vars")


def test_another_mount_is_said_as_such() -> None:
    """EXDEV even on one filesystem, seen through two bind mounts."""
    with loop_filesystem("ext4", 32 << 20) as filesystem:
        root = filesystem.mount_point
        for folder in ("instances/" + INSTANCE, "spool"):
            (root / folder).mkdir(parents=True)
        (root / "instances" / INSTANCE / "disk").write_bytes(b"x")
        with bind_mount(root / "instances", root / "instances"):
            claims = Claims(instances_path=str(root / "instances"), folder=str(root / "spool"), is_owned=OWNS_NOTHING)
            with pytest.raises(OSError, match="cross-device"):
                claims.claim_folder(INSTANCE)
            assert claims.count() == 0


def test_a_full_filesystem_is_said_with_the_instance() -> None:
    with loop_filesystem("ext4", 16 << 20, mkfs_options=("-b", "1024", "-N", "100")) as filesystem:
        root = filesystem.mount_point
        (root / INSTANCE).mkdir()
        (root / "spool").mkdir()
        (root / INSTANCE / "disk").write_bytes(b"x")
        with (root / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1024)):
                pass
        for name_bytes in (200, 100, 40, 20):  # until the folder has no room for one more name, nor for a block
            with contextlib.suppress(OSError):
                for n in itertools.count():
                    os.link(root / INSTANCE / "disk", root / "spool" / f"{n:0{name_bytes}}")
        claims = Claims(instances_path=str(root), folder=str(root / "spool"), is_owned=OWNS_NOTHING)
        with pytest.raises(SpoolUnavailable, match=INSTANCE):
            claims.claim_folder(INSTANCE)
