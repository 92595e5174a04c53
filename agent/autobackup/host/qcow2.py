"""
Whether a qcow2 header is to be trusted.

A guest with a raw disk writes what it likes at offset 0, and whoever could write an overlay's header can name any
file of the host in it. So the format is libvirt's word, the header is only compared with it, and QEMU's tools see a
disk only when the comparison held.

Invariant 5. What stands in a header: `qcow2.header`.
"""

import os
from collections.abc import Sequence
from typing import Final

from autobackup.errors import Damaged
from autobackup.model import ChainLink
from autobackup.qcow2.header import parse_header

_HEADER_READ_BYTES: Final = 4096


def read_head(fd: int) -> bytes:
    """What `parse_header` and `mistrust` look at; empty if the medium fails there."""
    try:
        return os.pread(fd, _HEADER_READ_BYTES, 0)
    except OSError:
        return b""


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
