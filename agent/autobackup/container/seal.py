"""
Sealing: the plaintext of a stream in, authenticated segments of 1 MiB out.

The format is Tink's streaming AEAD AES256-GCM-HKDF, byte for byte (docs/format.md, section 2); Tink's own
Python binding is half as fast. Each byte is copied once, into the segment in which it is then encrypted
in place.

A segment says in its nonce whether it is the last, so a full one is kept back until more data proves that it
is not. Key, salt and nonce prefix are the caller's, who draws all three anew for each attempt: a repetition
would repeat nonces. Nothing here remembers what was used before.
"""

from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from autobackup.container import Buffer
from autobackup.units import MiB

SEGMENT_BYTES: Final = 1 * MiB
KEY_BYTES: Final = 32
SALT_BYTES: Final = 32
NONCE_PREFIX_BYTES: Final = 7
TAG_BYTES: Final = 16
STREAM_HEADER_BYTES: Final = 1 + SALT_BYTES + NONCE_PREFIX_BYTES
FIRST_PLAIN_BYTES: Final = SEGMENT_BYTES - STREAM_HEADER_BYTES - TAG_BYTES
NEXT_PLAIN_BYTES: Final = SEGMENT_BYTES - TAG_BYTES
MAX_SEGMENTS: Final = 2**32  # the nonce has four bytes for the number


def sealed_bytes(plain_bytes: int) -> int:
    """The length of the stream that *plain_bytes* of plaintext become, stream header and tags included."""
    if plain_bytes < 0:
        raise ValueError(f"plain_bytes is {plain_bytes}")
    further_bytes = max(0, plain_bytes - FIRST_PLAIN_BYTES)
    segments = 1 + -(-further_bytes // NEXT_PLAIN_BYTES)
    if segments > MAX_SEGMENTS:
        raise ValueError(f"{plain_bytes} bytes are more than {MAX_SEGMENTS} segments hold")
    return STREAM_HEADER_BYTES + plain_bytes + segments * TAG_BYTES


def stream_header(*, salt: bytes, nonce_prefix: bytes) -> bytes:
    if len(salt) != SALT_BYTES or len(nonce_prefix) != NONCE_PREFIX_BYTES:
        raise ValueError(f"salt must have {SALT_BYTES} bytes and nonce_prefix {NONCE_PREFIX_BYTES}")
    return bytes([STREAM_HEADER_BYTES]) + salt + nonce_prefix


def segment_cipher(*, key: bytes, salt: bytes, associated_data: bytes) -> AESGCM:
    """The cipher of all segments of a stream. The associated data is in the derived key, not in the tags."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key must have {KEY_BYTES} bytes")  # its length only: never the key in a text
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=associated_data).derive(key))


def segment_nonce(prefix: bytes, index: int, *, last: bool) -> bytes:
    if not 0 <= index < MAX_SEGMENTS:
        raise ValueError(f"segment {index}: a stream has at most {MAX_SEGMENTS} segments")
    return prefix + index.to_bytes(4, "big") + (b"\x01" if last else b"\x00")


class Sealer:
    """
    One stream. `push` all of the plaintext, then `finish`; everything returned, in order, is the stream.

    Every buffer is fresh and the caller's to keep: a reused one is corrupted on its way through a
    transport that still holds it (seen with asyncio on Python 3.12 and later).
    """

    def __init__(self, *, key: bytes, associated_data: bytes, salt: bytes, nonce_prefix: bytes) -> None:
        header = stream_header(salt=salt, nonce_prefix=nonce_prefix)
        self._cipher = segment_cipher(key=key, salt=salt, associated_data=associated_data)
        self._nonce_prefix = nonce_prefix
        self._index = 0
        self._segment = bytearray(SEGMENT_BYTES)
        self._segment[:STREAM_HEADER_BYTES] = header
        self._start = self._filled = STREAM_HEADER_BYTES
        self._pushing = False
        self._finished = False

    def push(self, data: Buffer) -> Iterator[bytearray]:
        """The segments that *data* completes. The iterator must be exhausted before the next call."""
        self._check_ready()
        self._pushing = True
        return self._push(memoryview(data).cast("B"))

    def finish(self) -> bytearray:
        """The last segment. There always is one, if need be an empty one."""
        self._check_ready()
        self._finished = True
        return self._seal(last=True)

    def _check_ready(self) -> None:
        if self._finished:
            raise RuntimeError("the stream is finished")
        if self._pushing:
            raise RuntimeError("the segments of the last push were not all taken")

    def _push(self, data: memoryview) -> Iterator[bytearray]:
        at = 0
        while at < len(data):
            if self._filled == NEXT_PLAIN_BYTES:
                segment = self._seal(last=False)
                self._index += 1
                self._segment = bytearray(SEGMENT_BYTES)
                self._start = self._filled = 0
                yield segment
            count = min(NEXT_PLAIN_BYTES - self._filled, len(data) - at)
            # Through a view: a slice assignment to the bytearray itself would copy twice.
            with memoryview(self._segment) as segment_view:
                segment_view[self._filled : self._filled + count] = data[at : at + count]
            self._filled += count
            at += count
        self._pushing = False

    def _seal(self, *, last: bool) -> bytearray:
        nonce = segment_nonce(self._nonce_prefix, self._index, last=last)
        end = self._filled + TAG_BYTES
        with memoryview(self._segment) as view:
            self._cipher.encrypt_into(nonce, view[self._start : self._filled], None, view[self._start : end])
        segment, self._segment = self._segment, bytearray()
        del segment[end:]
        return segment
