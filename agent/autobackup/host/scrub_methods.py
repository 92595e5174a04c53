"""
The three methods that come with the agent; see `host.scrub.ScrubMethod` for the contract.

`zero` and `random` overwrite in place, with O_DIRECT where the filesystem has it (2.5 times the speed of
`shred -n1` at a tenth of its CPU, and no page cache spent), and end with fdatasync. FALLOC_FL_ZERO_RANGE would be
faster and is no overwrite: it marks extents unwritten and leaves the bytes.
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR

from autobackup.units import KiB, MiB

_BLOCK_BYTES: Final = 4 * MiB
_ALIGN_BYTES: Final = 4 * KiB  # of offsets, lengths and memory under O_DIRECT


def zero(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
    """Overwrite with zeros, once."""
    with mmap.mmap(-1, _BLOCK_BYTES) as block:
        _overwrite(fd, ranges, size_bytes, block, refill=lambda: None)


def random(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
    """Overwrite with random bytes, once; fresh ones for every block, from a key that nobody keeps."""
    # os.urandom is a fifth as fast as the disk, this is ten times as fast (2.5 and 0.1 s of CPU per GiB)
    stream = Cipher(AES128(os.urandom(16)), CTR(os.urandom(16))).encryptor()
    with mmap.mmap(-1, _BLOCK_BYTES) as block, memoryview(block) as view:
        _overwrite(fd, ranges, size_bytes, block, refill=lambda: stream.update_into(view, view))


def unlink(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
    """Overwrite nothing: the blocks are given back as they are. For who has said so in the configuration."""


def _overwrite(
    fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int, block: mmap.mmap, *, refill: Callable[[], object]
) -> None:
    direct = _set_direct(fd, enable=True)
    with memoryview(block) as view:
        for start, length in ranges:
            at = start // _ALIGN_BYTES * _ALIGN_BYTES
            end = -(-(start + length) // _ALIGN_BYTES) * _ALIGN_BYTES
            while at < end:
                refill()
                try:
                    at += os.pwrite(fd, view[: min(_BLOCK_BYTES, end - at)], at)
                except OSError:
                    if not direct:
                        raise
                    direct = _set_direct(fd, enable=False)  # a device with larger blocks: go on buffered
    if direct:
        _set_direct(fd, enable=False)
    os.ftruncate(fd, size_bytes)  # the rounded-up tail
    os.fdatasync(fd)


def _set_direct(fd: int, *, enable: bool) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if enable else flags & ~os.O_DIRECT
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        return enable
    return False
