"""
The unavoidable work on one file, each primitive alone in one thread, at its best piece size: `FILE COMPRESSION`.

Read (and drop behind), the member's SHA-256, [zstd], one copy into the segment, AES-GCM, the store's SHA-512. CPU
seconds of each; what hands the pieces on, and all waiting, is what the sealer adds to it.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_MIB = 1 << 20


def main(path: str, compression: str) -> None:
    spent: Counter[str] = Counter()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started_s = time.thread_time()
        answer = work()
        spent[name] += time.thread_time() - started_s  # type: ignore[assignment]
        return answer

    level = None if compression == "none" else int(compression.partition(":")[2])
    compressor = zstandard.ZstdCompressor(level=level or 0, write_checksum=False)
    cipher, member, stored = AESGCM(bytes(32)), hashlib.sha256(), hashlib.sha512()
    buffer, segment = memoryview(bytearray(_MIB)), memoryview(bytearray(_MIB + 16))
    fd, at, filled, sealed_bytes = os.open(path, os.O_RDONLY), 0, 0, 0
    started_s = time.perf_counter()

    def read() -> int:
        count = os.preadv(fd, [buffer], at)
        os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)
        return count

    def seal(length: int) -> None:
        nonlocal sealed_bytes
        nonce = sealed_bytes.to_bytes(12, "big")
        timed("aes-gcm", lambda: cipher.encrypt_into(nonce, segment[:length], None, segment[: length + 16]))
        timed("sha512", lambda: stored.update(segment[: length + 16]))
        sealed_bytes += length + 16

    while count := timed("read", read):
        at += count
        piece = buffer[:count]
        timed("sha256", partial(member.update, piece))
        if level is not None:
            piece = memoryview(timed("zstd", partial(compressor.compress, piece)))
        while len(piece):
            part = piece[: _MIB - filled]

            def copy(data: memoryview = part, to: int = filled) -> None:
                segment[to : to + len(data)] = data

            timed("copy", copy)
            filled += len(part)
            piece = piece[len(part) :]
            if filled == _MIB:
                seal(filled)
                filled = 0
    seal(filled)
    print(json.dumps({
        "wall_s": time.perf_counter() - started_s, "cpu_s": spent, "sealed_bytes": sealed_bytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
