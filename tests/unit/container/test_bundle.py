"""Any tar reads a bundle, and a bundle is the only tar that we read."""

import io
import itertools
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.container.material import archive, compress, in_pieces, plaintext, refused

from autobackup.container import bundle
from autobackup.container.bundle import (
    BLOCK_BYTES,
    END,
    MAX_MEMBER_BYTES,
    MAX_RECORD_BYTES,
    BundleReader,
    Event,
    MemberData,
    MemberEnd,
    MemberStart,
    member_head,
    member_padding,
)
from autobackup.container.frames import FRAME_BYTES, FrameDecompressor, SeekTable, stored_frame
from autobackup.errors import ContainerDamaged
from autobackup.units import GiB

MTIME_S = 1_700_000_000
MEMBERS = {
    "manifest.json": b"{}\n",
    "domain.xml": b"<domain/>\n",
    "disks/disk": plaintext(1025),
    "disks/disk.eph0": b"",
    "bases/da39a3ee5e6b4b0d3255bfef95601890afd80709_20": bytes(512),
    "nvram/instance-00000001_VARS.fd": plaintext(511),
    "swtpm/tpm2-00.permall": plaintext(513),
    "console.log": b"[    0.0] Linux\n",
    "digests.json": b"{}\n",
}
SMALL = b"".join(archive({"manifest.json": b"{}\n", "disks/disk": plaintext(600), "digests.json": b"{}\n"}))


def events(pieces: Iterable[bytes | memoryview]) -> Iterator[Event]:
    reader = BundleReader()
    for piece in pieces:
        yield from reader.push(piece)
    reader.finish()


def read(data: bytes, piece_bytes: int = 1 << 30) -> dict[str, bytes]:
    """The members, having checked that starts, data and ends come in their order."""
    members: dict[str, bytes] = {}
    current: MemberStart | None = None
    for event in events(in_pieces(data, piece_bytes)):
        match event:
            case MemberStart():
                assert current is None
                assert event.name not in members
                current = event
                members[event.name] = b""
            case MemberData():
                assert current is not None
                assert len(event.data)
                members[current.name] += event.data
            case MemberEnd():
                assert current is not None
                assert event.name == current.name
                assert len(members[event.name]) == current.size_bytes
                current = None
    assert current is None
    return members


def made_by_python(*infos: tuple[tarfile.TarInfo, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive with some members between manifest and digests, as `tarfile` writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for info, data in (plain_info("manifest.json", b"{}\n"), *infos, plain_info("digests.json", b"{}\n")):
            tar.addfile(info, io.BytesIO(data))
    data = out.getvalue().rstrip(b"\0")
    return data + bytes(-len(data) % BLOCK_BYTES) + END


def plain_info(name: str, data: bytes = b"", **changed: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o600, MTIME_S
    for attribute, value in changed.items():
        setattr(info, attribute, value)
    return info, data


@pytest.mark.parametrize("piece_bytes", [1 << 30, 512, 511, 513, 7, 1])
def test_members_come_back_however_the_archive_is_cut(piece_bytes: int) -> None:
    members = read(b"".join(archive(MEMBERS)), piece_bytes)
    assert members == MEMBERS
    assert list(members) == list(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("size_bytes", [0, 1, 511, 512, 16 << 20])
def test_a_head_is_what_python_writes(name: str, size_bytes: int) -> None:
    info, _ = plain_info(name, size=size_bytes)
    assert member_head(name, size_bytes, MTIME_S) == info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "size_bytes",
    [8 * GiB - 1, 8 * GiB, 8 * GiB + 1, 10**10 - 1, 10**10, 10**12, 10**14, MAX_MEMBER_BYTES - 1, MAX_MEMBER_BYTES],
)
def test_a_head_of_a_large_member_is_what_python_writes(size_bytes: int) -> None:
    info, _ = plain_info("disks/disk", size=size_bytes)
    head = member_head("disks/disk", size_bytes, MTIME_S)
    assert head == info.tobuf(tarfile.PAX_FORMAT)
    assert len(head) == (512 if size_bytes < 8 * GiB else 1536)
    start = b"".join(archive({"manifest.json": b""}))[:-1024] + head
    for piece_bytes in (1 << 30, 100):
        reader = BundleReader()
        seen = [event for piece in in_pieces(start, piece_bytes) for event in reader.push(piece)]
        assert seen[-1] == MemberStart(name="disks/disk", size_bytes=size_bytes)


@pytest.mark.parametrize("mtime_s", [0, 1, 8**11 - 1])
def test_any_time_that_a_head_has_room_for_comes_through(mtime_s: int) -> None:
    assert read(b"".join(archive(MEMBERS, mtime_s=mtime_s))) == MEMBERS


@pytest.mark.parametrize(
    ("name", "size_bytes", "mtime_s"),
    [
        ("disks/disk", -1, 0),
        ("disks/disk", MAX_MEMBER_BYTES + 1, 0),
        ("manifest.json", MAX_RECORD_BYTES + 1, 0),
        ("digests.json", MAX_RECORD_BYTES + 1, 0),
        ("domain.xml", MAX_RECORD_BYTES + 1, 0),
        ("disks/disk", 0, -1),
        ("disks/disk", 0, 8**11),
    ],
)
def test_what_no_reader_would_take_is_not_written(name: str, size_bytes: int, mtime_s: int) -> None:
    with pytest.raises(ValueError, match=name):
        member_head(name, size_bytes, mtime_s)


BAD_NAMES = [
    *("", ".", "..", "/", "disks", "disks/", "/disks/disk", "../disks/disk", "disks/../x", "disks/..", "disks/."),
    *("disks/.disk", "disks/-disk", "disks//disk", "disks/a/b", "./disks/disk", "disks/disk/", "DISKS/disk"),
    *("disks/di sk", "disks/dis\\k", "disks/dïsk", "disks/disk\n", "disks/disk\0x", "disks/" + "x" * 65),
    *("manifest.json\n", "xmanifest.json", "manifestXjson", "manifest.json/x", "other/disk", "etc/passwd"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_neither_written_nor_read(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        member_head(name, 0, 0)
    if name.isascii() and "\0" not in name:
        assert refused(lambda: read(made_by_python(plain_info(name))))


def test_the_real_tar_lists_and_extracts_it(tmp_path: Path) -> None:
    file = tmp_path / "bundle.tar"
    file.write_bytes(b"".join(archive(MEMBERS)))
    listing = subprocess.run(["tar", "tvf", file], check=True, capture_output=True, text=True)
    assert listing.stderr == ""
    rows = [line.split() for line in listing.stdout.splitlines()]
    assert [(row[0], row[1], int(row[2]), row[-1]) for row in rows] == [
        ("-rw-------", "0/0", len(data), name) for name, data in MEMBERS.items()
    ]
    folder = tmp_path / "out"
    folder.mkdir()
    extracted = subprocess.run(["tar", "xf", file], cwd=folder, check=True, capture_output=True, text=True)
    assert extracted.stderr == ""
    assert {name: (folder / name).read_bytes() for name in MEMBERS} == MEMBERS


def test_the_real_tar_lists_a_large_member(tmp_path: Path) -> None:
    file, size_bytes = tmp_path / "bundle.tar", 9 * GiB + 5
    head = member_head("disks/disk", size_bytes, MTIME_S)
    with file.open("wb") as out:
        out.write(head)
        out.seek(len(head) + size_bytes + len(member_padding(size_bytes)))
        out.write(END)
    listing = subprocess.run(["tar", "tvf", file], check=True, capture_output=True, text=True)
    assert str(size_bytes) in listing.stdout
    assert listing.stderr == ""
    with tarfile.open(file) as tar:
        assert [(info.name, info.size) for info in tar] == [("disks/disk", size_bytes)]


def test_we_read_what_python_writes_in_our_form() -> None:
    names = [name for name in MEMBERS if not name.endswith(".json")]
    data = made_by_python(*(plain_info(name, MEMBERS[name]) for name in names))
    assert read(data) == {"manifest.json": b"{}\n", **{name: MEMBERS[name] for name in names}, "digests.json": b"{}\n"}


LINKS = [
    *((kind, "disks/other") for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)),
    *((kind, "../../etc/passwd") for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)),
    *((kind, "") for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)),
    *((kind, "") for kind in (tarfile.CONTTYPE, tarfile.AREGTYPE, b"D", b"V", b"M", b"A", b"Z")),
]


@pytest.mark.parametrize(("kind", "target"), LINKS)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_is_not_a_regular_file_is_refused(kind: bytes, target: str, tar_format: int) -> None:
    hostile = made_by_python(plain_info("disks/disk", type=kind, linkname=target), tar_format=tar_format)
    assert refused(lambda: read(hostile))


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": 0o4755},
        {"mode": 0o644},
        {"uid": 1},
        {"gid": 1},
        {"uname": "root"},
        {"gname": "root"},
        {"linkname": "x"},
        {"mtime": 1.5},
        {"mtime": -1},
        {"pax_headers": {"path": "../../etc/passwd"}},
        {"pax_headers": {"size": "1"}},
        {"pax_headers": {"mtime": "1.5"}},
        {"pax_headers": {"linkpath": "x"}},
        {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}},
        {"pax_headers": {"SCHILY.xattr.security.capability": "x"}},
    ],
)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_head_of_another_form_is_refused(changed: dict[str, Any], tar_format: int) -> None:
    assert read(made_by_python(plain_info("disks/disk", b"data")))
    hostile = made_by_python(plain_info("disks/disk", b"data", **changed), tar_format=tar_format)
    assert refused(lambda: read(hostile))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_long_name_is_refused(tar_format: int) -> None:
    hostile = made_by_python(plain_info("disks/" + "x" * 200, b"data"), tar_format=tar_format)
    assert refused(lambda: read(hostile))


def test_other_kinds_of_archive_are_refused() -> None:
    gnu = made_by_python(plain_info("disks/disk", b"x"), tar_format=tarfile.GNU_FORMAT)
    assert gnu[257:265] == b"ustar  \0"
    assert refused(lambda: read(gnu))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        tar.addfile(*(lambda info, data: (info, io.BytesIO(data)))(*plain_info("manifest.json")))
    with pytest.raises(ContainerDamaged, match="global pax header"):
        read(out.getvalue())


@pytest.mark.parametrize(
    "record",
    [
        b"19 size=8589934591\n",  # no record is needed for this
        b"19 size=858993459x\n",
        b"20 size=8589934592\n",
        b"20 size=08589934592\n",
        b"18 size=8589934592",
        b"19 size=8589934592\n19 size=8589934593\n",
        b"25 size=140737488355329999\n",
        b"19 SIZE=8589934592\n",
        b"",
    ],
)
def test_a_pax_record_says_the_size_in_one_way_only(record: bytes) -> None:
    good = member_head("disks/disk", 8 * GiB, MTIME_S)
    start = b"".join(archive({"manifest.json": b""}))[:-1024]
    info, _ = plain_info("././@PaxHeader", size=len(record), mode=0, mtime=0, type=b"x")
    bad = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + good[1024:]
    assert list(BundleReader().push(start + good))[-1] == MemberStart(name="disks/disk", size_bytes=8 * GiB)
    assert refused(lambda: list(BundleReader().push(start + bad)))


def with_checksum(block: bytes | bytearray) -> bytes:
    total = sum(block[:148]) + 8 * 32 + sum(block[156:512])
    return bytes(block[:148]) + b"%06o\0 " % total + bytes(block[156:])


@pytest.mark.parametrize("size_bytes", [600, 9 * GiB])
def test_no_byte_of_a_head_is_free(size_bytes: int) -> None:
    """Each byte, its checksum set right: what passes is another name, size or time, and nothing else."""
    start = b"".join(archive({"manifest.json": b""}))[:-1024]
    head = member_head("disks/disk", size_bytes, MTIME_S)
    free = set()
    for at, change in itertools.product(range(len(head)), (0x01, 0x10, 0x41, 0x80)):
        edited = bytearray(head)
        edited[at] ^= change
        block = slice(at // 512 * 512, at // 512 * 512 + 512)
        if len(head) == 512 or block.start != 512:  # a pax record has no checksum
            assert refused(lambda: list(BundleReader().push(start + edited))), at  # noqa: B023
            edited[block] = with_checksum(edited[block])
        if edited != head and not refused(lambda: list(BundleReader().push(start + edited))):  # noqa: B023
            free.add(at)
    main = len(head) - 512
    assert free - {main + at for at in (*range(len("disks/disk") + 1), *range(136, 147))} == (
        set(range(124, 135)) if main == 0 else set(range(512 + len("19 size="), 512 + len("19 size=9663676416")))
    )


def test_every_edit_of_what_is_not_data_is_refused() -> None:
    """Heads without their checksum set right, padding, and the end."""
    data = {at for at in range(len(SMALL)) if 512 <= at < 515 or 1536 <= at < 2136 or 3072 <= at < 3075}
    for at in sorted(set(range(len(SMALL))) - data):
        edited = bytearray(SMALL)
        edited[at] ^= 0x01
        assert refused(lambda: read(bytes(edited))), at  # noqa: B023


def test_no_prefix_passes_for_the_whole() -> None:
    for cut in range(len(SMALL)):
        assert refused(lambda: read(SMALL[:cut])), cut  # noqa: B023


@pytest.mark.parametrize("piece_bytes", [1 << 30, 512, 1])
@pytest.mark.parametrize("more", [b"\0", bytes(512), bytes(8192), b"x", SMALL])
def test_nothing_may_follow(more: bytes, piece_bytes: int) -> None:
    """Not even the NULs with which tar fills its last record."""
    with pytest.raises(ContainerDamaged, match="after the end"):
        read(SMALL + more, piece_bytes)


M, X, D = ("manifest.json", b"{}\n"), ("disks/disk", b"x"), ("digests.json", b"{}\n")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([], "last member is missing"),
        ([M], "last member is manifest.json"),
        ([D], "first member"),
        ([X, D], "first member"),
        ([D, M], "first member"),
        ([M, X], "last member is disks/disk"),
        ([M, D, X], "after digests.json"),
        ([M, D, D], "after digests.json"),
        ([M, M, D], "manifest.json occurs twice"),
        ([M, X, X, D], "disks/disk occurs twice"),
    ],
)
def test_members_come_once_and_between_their_records(members: list[tuple[str, bytes]], text: str) -> None:
    data = b"".join(member_head(name, len(data), MTIME_S) + data + member_padding(len(data)) for name, data in members)
    with pytest.raises(ContainerDamaged, match=text):
        read(data + END)


@pytest.mark.parametrize("end", [b"", END[:512], END[:-1], END[:512] + SMALL])
def test_the_end_is_two_blocks(end: bytes) -> None:
    assert refused(lambda: read(SMALL[:-1024] + end))


def test_more_members_than_agreed_are_refused() -> None:
    reader, most = BundleReader(), bundle.MAX_MEMBERS
    names = ["manifest.json", *(f"swtpm/{number}" for number in range(most - 1))]
    assert len(list(reader.push(b"".join(member_head(name, 0, 0) for name in names)))) == 2 * most
    with pytest.raises(ContainerDamaged, match="more than 4096"):
        list(reader.push(member_head("digests.json", 0, 0)))


def test_a_record_too_large_to_hold_is_refused() -> None:
    info, _ = plain_info("manifest.json", size=MAX_RECORD_BYTES + 1)
    with pytest.raises(ContainerDamaged, match=r"manifest\.json: 16777217 bytes"):
        list(BundleReader().push(info.tobuf(tarfile.PAX_FORMAT)))


def test_an_error_says_where() -> None:
    edited = bytearray(SMALL)
    edited[1024 + 148] = ord("9")
    with pytest.raises(ContainerDamaged, match="offset 1024: the checksum"):
        read(bytes(edited))


def test_events_that_are_not_taken_are_not_forgotten() -> None:
    reader = BundleReader()
    reader.push(SMALL)
    for call in (lambda: reader.push(b""), reader.finish):
        with pytest.raises(RuntimeError, match="not all taken"):
            call()


def test_a_damaged_bundle_stays_damaged() -> None:
    reader = BundleReader()
    with pytest.raises(ContainerDamaged):
        list(reader.push(b"y" * 512))
    with pytest.raises(RuntimeError, match="damaged"):
        reader.finish()


def test_nothing_follows_finish() -> None:
    reader = BundleReader()
    list(reader.push(SMALL))
    reader.finish()
    calls: list[Callable[[], object]] = [reader.finish, lambda: reader.push(b"")]
    for call in calls:
        with pytest.raises(RuntimeError, match="finished"):
            call()


def test_data_is_a_view_of_what_was_pushed() -> None:
    """No copy of a disk is made here, and nobody can change it through the view."""
    data = bytearray(SMALL)
    views = [event.data for event in BundleReader().push(data) if isinstance(event, MemberData)]
    assert all(view.obj is data and view.readonly for view in views)


def test_mebibyte_k_of_a_disk_is_one_frame() -> None:
    disk = plaintext(3 * FRAME_BYTES + 77)
    pieces = archive({"manifest.json": plaintext(700), "disks/disk": disk, "digests.json": b"{}\n"})
    stream = compress(pieces, stored_frame)
    table = SeekTable.decode(stream, stream_bytes=len(stream))
    start = 512 + 1024 + 512
    for k in range(4):
        span = table.at(start + k * FRAME_BYTES)
        frame = stream[span.stored_offset : span.stored_offset + span.stored_bytes]
        assert span.plain_offset == start + k * FRAME_BYTES
        assert FrameDecompressor().decompress(frame) == disk[k * FRAME_BYTES : (k + 1) * FRAME_BYTES]


def test_hostile_noise_is_refused_and_raises_nothing_else() -> None:
    for seed, piece_bytes in itertools.product(range(200), (1 << 30, 100)):
        noise = os.urandom(512)
        kinds = (noise, with_checksum(noise), with_checksum(noise[:156] + b"x" + noise[157:]) + noise * 2)
        assert refused(lambda: read(kinds[seed % 3], piece_bytes))  # noqa: B023
