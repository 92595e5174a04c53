"""
The qcow2 header, read as hostile bytes, and `qemu-img check` behind it.

A guest with a raw disk writes what it likes at offset 0, and whoever could write an overlay's header can name any
file of the host in it. So the format is libvirt's word; the header is only compared with it; and qemu-img sees a
disk only when the comparison held, with the backing file switched off, a data file refused, and under limits.

Invariant 5. Source of the layout: QEMU, docs/interop/qcow2.txt.
"""

import json
import os
import resource
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from autobackup.container.manifest import Health
from autobackup.errors import Damaged
from autobackup.model import ChainLink
from autobackup.units import GiB

_HEADER_READ_BYTES: Final = 4096
_MAGIC: Final = b"QFI\xfb"
_FIXED: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset
_V3: Final = struct.Struct(">QQQII")
_DATA_FILE: Final = 1 << 2  # incompatible feature: the data is in another file
_CORRUPT: Final = 1 << 1
_BACKING_FORMAT: Final = 0xE2792ACA
_LONGEST_NAME_BYTES: Final = 1023
_CHECK_MEMORY_BYTES: Final = 1 * GiB
_CHECK_CPU_S: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Header:
    """What the header claims."""

    version: int
    virtual_bytes: int
    backing_path: str | None
    backing_format: str | None
    has_data_file: bool
    is_marked_corrupt: bool


def read_head(fd: int) -> bytes:
    """What `parse_header` and `mistrust` look at; empty if the medium fails there."""
    try:
        return os.pread(fd, _HEADER_READ_BYTES, 0)
    except OSError:
        return b""


def parse_header(head: bytes) -> Qcow2Header:
    """Read a header from the head of a disk. Raises `Damaged` where it makes no sense."""
    if len(head) < _FIXED.size or head[:4] != _MAGIC:
        raise Damaged("no qcow2 header")
    fixed = _FIXED.unpack_from(head)
    version, name_offset, name_bytes, virtual_bytes = fixed[1], fixed[2], fixed[3], fixed[5]
    incompatible, header_bytes = 0, _FIXED.size
    if version == 3:
        if len(head) < _FIXED.size + _V3.size:
            raise Damaged("qcow2 header is cut short")
        incompatible, _, _, _, header_bytes = _V3.unpack_from(head, _FIXED.size)
    elif version != 2:
        raise Damaged(f"qcow2 version {version} is not known")
    backing_path = None
    if name_offset:
        if name_bytes > _LONGEST_NAME_BYTES or name_offset + name_bytes > len(head):
            raise Damaged("qcow2 backing file name lies outside the header")
        backing_path = head[name_offset : name_offset + name_bytes].decode("utf-8", "surrogateescape")
    return Qcow2Header(
        version=version,
        virtual_bytes=virtual_bytes,
        backing_path=backing_path,
        backing_format=_extension(head, header_bytes),
        has_data_file=bool(incompatible & _DATA_FILE),
        is_marked_corrupt=bool(incompatible & _CORRUPT),
    )


def mistrust(head: bytes, *, chain: Sequence[ChainLink], chain_source: str) -> str | None:
    """Why qemu-img must not open this disk, or None: the header says what the hypervisor said."""
    try:
        header = parse_header(head)
    except Damaged as exc:
        return str(exc)
    if header.has_data_file:
        return "the header names an external data file"
    expected = chain[0].path if chain else None
    if header.backing_path != expected:
        said = "nobody vouched for it" if chain_source == "none" else f"the hypervisor said {expected!r}"
        return f"the header names the backing file {header.backing_path!r}, {said}"
    return None


def check(path: str, *, member: str, mistrusted: str | None) -> Health:
    """The health of one qcow2 file; blocks for as long as qemu-img reads its tables. Nobody may have it open."""
    if mistrusted:
        return Health(member=member, tool="header", result="not trusted", detail=mistrusted)
    image = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None})
    try:
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", f"json:{image}"],
            capture_output=True,
            timeout=_CHECK_CPU_S * 2,
            check=False,
            preexec_fn=_limit,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except FileNotFoundError:
        return Health(member=member, tool="qemu-img check", result="not checked", detail="qemu-img is not installed")
    except subprocess.TimeoutExpired:
        return Health(member=member, tool="qemu-img check", result="not checked", detail="took too long")
    results = {0: "clean", 2: "corrupt", 3: "leaked clusters", 63: "not supported"}
    detail = done.stderr.decode(errors="replace").strip().replace(path, "<disk>")[:400]
    return Health(member=member, tool="qemu-img check", result=results.get(done.returncode, "failed"), detail=detail)


def _extension(head: bytes, at: int) -> str | None:
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return None
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode("ascii", "replace")
        at += 8 + (length + 7) // 8 * 8
    return None


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_CHECK_MEMORY_BYTES, _CHECK_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CHECK_CPU_S, _CHECK_CPU_S))
