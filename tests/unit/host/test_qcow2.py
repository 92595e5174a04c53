"""The qcow2 header as hostile bytes, and as qemu-img really makes it."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autobackup.errors import Damaged
from autobackup.host import qcow2, qemu_img
from autobackup.model import ChainLink

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
MiB = 1 << 20


def parses(head: bytes) -> bool:
    """Whether it parses. Any exception but `Damaged` is a failure of the test."""
    try:
        header = qcow2.parse_header(head)
    except Damaged:
        return False
    assert header.version in (2, 3)
    return True


field32 = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 3, 8, 72, 104, 1023, 1024, 4096, 2**31]))
field64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 72, 104, 512, 4095, 4096, 2**63]))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=4096))
@example(b"")
@example(b"QFI\xfb")
def test_any_bytes_are_a_header_or_damaged(data: bytes) -> None:
    parses(data)
    parses(b"QFI\xfb" + data)
    parses(b"QFI\xfb\x00\x00\x00\x03" + data)


@settings(max_examples=400, deadline=None)
@given(version=field32, name_offset=field64, name_bytes=field32, features=field64, header_bytes=field32,
       extensions=st.binary(max_size=300), fill=st.integers(0, 255))  # fmt: skip
def test_any_fields_are_a_header_or_damaged(
    version: int, name_offset: int, name_bytes: int, features: int, header_bytes: int, extensions: bytes, fill: int
) -> None:
    """Fields that point anywhere: outside, into each other, backwards."""
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, name_offset, name_bytes, 16, MiB, 0, 1, 0, 0, 1, 0, 0)
    head = fixed + struct.pack(">QQQII", features, 0, 0, 4, header_bytes) + extensions
    parses(head.ljust(4096, bytes([fill])))
    parses(head)


@pytest.mark.parametrize(
    ("name_offset", "name_bytes"), [(4090, 7), (4096, 1), (2**63, 1), (200, 1024), (200, 2**32 - 1)]
)
def test_a_name_outside_the_header_is_damage(name_offset: int, name_bytes: int) -> None:
    """Half a path that happened to be the expected one would be trusted."""
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, name_offset, name_bytes, 16, MiB, 0, 1, 0, 0, 1, 0, 0)
    assert not parses((fixed + struct.pack(">QQQII", 0, 0, 0, 4, 104)).ljust(4096, b"/"))


def make(path: Path, *arguments: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, str(path), "1M"], check=True)
    with path.open("rb") as file:
        return qcow2.read_head(file.fileno())


@needs_qemu_img
@pytest.mark.parametrize(("compat", "version"), [("0.10", 2), ("1.1", 3)])
@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
def test_what_qemu_img_makes_reads_as_it_was_made(tmp_path: Path, compat: str, version: int, format_name: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", format_name, str(tmp_path / "base"), "1M"], check=True)
    plain = qcow2.parse_header(make(tmp_path / "plain", "-o", f"compat={compat}"))
    assert (plain.version, plain.virtual_bytes, plain.backing_path) == (version, MiB, None)
    base = str(tmp_path / "base")
    over = qcow2.parse_header(make(tmp_path / "over", "-o", f"compat={compat}", "-b", base, "-F", format_name))
    assert (over.version, over.backing_path, over.backing_format) == (version, base, format_name)
    assert not over.has_data_file
    assert not over.is_marked_corrupt


@needs_qemu_img
def test_an_external_data_file_is_seen(tmp_path: Path) -> None:
    head = make(tmp_path / "disk", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    assert qcow2.parse_header(head).has_data_file
    assert "data file" in str(qcow2.mistrust(head, chain=(), chain_source="libvirt"))


@needs_qemu_img
def test_the_header_is_trusted_where_it_says_what_the_hypervisor_said(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MiB))
    base = str(tmp_path / "base")
    plain, over = make(tmp_path / "plain"), make(tmp_path / "over", "-b", base, "-F", "raw")
    link, other = ChainLink(path=base, format="raw"), ChainLink(path="/other", format="raw")

    trusted = {
        (name, source, len(chain), chain[:1] == (link,))
        for name, head in (("plain", plain), ("over", over))
        for source in ("libvirt", "header", "none")
        for chain in ((), (link,), (other,))
        if qcow2.mistrust(head, chain=chain, chain_source=source) is None
    }
    assert trusted == {
        (name, source, count, matches)
        for name, count, matches in (("plain", 0, False), ("over", 1, True))
        for source in ("libvirt", "header", "none")
    }


@pytest.mark.parametrize("head", [b"", b"QFI", bytes(4096), b"QFI\xfb" + bytes(4092), b"KDMV" + bytes(4092)])
def test_what_is_no_header_is_mistrusted(head: bytes) -> None:
    assert qcow2.mistrust(head, chain=(), chain_source="none") is not None


@needs_qemu_img
def test_the_check_says_what_qemu_img_finds_and_never_opens_what_is_not_trusted(tmp_path: Path) -> None:
    make(tmp_path / "good")
    assert qemu_img.check(str(tmp_path / "good"), member="disks/disk", mistrusted=None).result == "clean"
    assert qemu_img.check("/nonexistent", member="disks/disk", mistrusted="why").result == "not trusted"
    assert qemu_img.check("/nonexistent", member="disks/disk", mistrusted=None).result == "failed"

    bad = bytearray((tmp_path / "good").read_bytes())
    bad[48:56] = struct.pack(">Q", 1 << 40)  # the refcount table lies far outside
    (tmp_path / "bad").write_bytes(bad)
    health = qemu_img.check(str(tmp_path / "bad"), member="disks/disk", mistrusted=None)
    assert health.result not in ("clean", "not checked")
    assert str(tmp_path) not in health.detail
