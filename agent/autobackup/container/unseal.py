"""
Unsealing: segments in, plaintext out, and none of it before its tag has verified.

`Unsealer` reads a stream from front to back, `Opener` opens single segments in any order for readers that
fetch ranges. Both check what the format demands (docs/format.md, section 2) and raise `ContainerDamaged` with
the number of the segment.

What an `Unsealer` releases before `finish` is true but may be incomplete: that a stream was cut shows only
at its end. Nobody may act on a prefix. A wrong key and an edited byte look alike here; telling them apart is
not possible and not attempted.
"""

from collections.abc import Iterator

from cryptography.exceptions import InvalidTag

from autobackup.container import Buffer
from autobackup.container.seal import (
    FIRST_PLAIN_BYTES,
    MAX_SEGMENTS,
    NEXT_PLAIN_BYTES,
    SALT_BYTES,
    SEGMENT_BYTES,
    STREAM_HEADER_BYTES,
    TAG_BYTES,
    segment_cipher,
    segment_nonce,
)
from autobackup.errors import ContainerDamaged

_SMALLEST_STREAM_BYTES = STREAM_HEADER_BYTES + TAG_BYTES


def segment_count(stream_bytes: int) -> int:
    """How many segments a stream of this length has; a length that no stream can have is refused."""
    count = -(-stream_bytes // SEGMENT_BYTES)
    if count > MAX_SEGMENTS:
        raise ContainerDamaged(f"stream of {stream_bytes} bytes: more than {MAX_SEGMENTS} segments")
    if count > 0:
        _check_length(count - 1, stream_bytes - (count - 1) * SEGMENT_BYTES, last=True)
        return count
    raise ContainerDamaged(f"stream of {stream_bytes} bytes: the shortest has {_SMALLEST_STREAM_BYTES}")


def segment_span(index: int, stream_bytes: int) -> tuple[int, int]:
    """Offset in the stream and length of a segment, stream header and tag included."""
    count = segment_count(stream_bytes)
    if not 0 <= index < count:
        raise ValueError(f"segment {index} of {count}")
    offset = index * SEGMENT_BYTES
    return offset, min(SEGMENT_BYTES, stream_bytes - offset)


def plain_bytes(stream_bytes: int) -> int:
    """The length of the plaintext in a stream: the inverse of `sealed_bytes`."""
    return stream_bytes - STREAM_HEADER_BYTES - segment_count(stream_bytes) * TAG_BYTES


def locate(plain_offset: int) -> tuple[int, int]:
    """The segment that holds a byte of plaintext, and the byte's offset in that segment's plaintext."""
    if plain_offset < 0:
        raise ValueError(f"plain_offset is {plain_offset}")
    if plain_offset < FIRST_PLAIN_BYTES:
        return 0, plain_offset
    index, offset = divmod(plain_offset - FIRST_PLAIN_BYTES, NEXT_PLAIN_BYTES)
    return index + 1, offset


class Opener:
    """Opens single segments of one stream. Keeps no position; may be asked in any order."""

    def __init__(self, *, key: bytes, associated_data: bytes, stream_header: Buffer) -> None:
        self._header = bytes(stream_header)
        if len(self._header) != STREAM_HEADER_BYTES or self._header[0] != STREAM_HEADER_BYTES:
            raise ContainerDamaged(f"stream offset 0: not a stream header of {STREAM_HEADER_BYTES} bytes")
        salt, self._nonce_prefix = self._header[1 : 1 + SALT_BYTES], self._header[1 + SALT_BYTES :]
        self._cipher = segment_cipher(key=key, salt=salt, associated_data=associated_data)

    def open_segment(self, index: int, segment: Buffer, *, last: bool) -> bytearray:
        """
        The plaintext of one whole segment (segment 0 with its stream header), in a fresh buffer.

        *last* is what the reader knows from the length of the object: the segment authenticates only if it
        was sealed as the last, or not the last, accordingly.
        """
        sealed = memoryview(segment).cast("B")
        _check_length(index, len(sealed), last=last)
        overhead_bytes = TAG_BYTES + (STREAM_HEADER_BYTES if index == 0 else 0)
        plain = bytearray(len(sealed) - overhead_bytes)
        self._open(index, sealed, memoryview(plain), last=last)
        return plain

    def open_in_place(self, index: int, segment: bytearray, *, last: bool) -> memoryview:
        """As `open_segment`, but the plaintext overwrites *segment*; what is returned is a view of it."""
        sealed = memoryview(segment)
        _check_length(index, len(sealed), last=last)
        plain = sealed[STREAM_HEADER_BYTES if index == 0 else 0 : -TAG_BYTES]
        self._open(index, sealed, plain, last=last)
        return plain

    def _open(self, index: int, sealed: memoryview, plain: memoryview, *, last: bool) -> None:
        if index == 0:
            if sealed[:STREAM_HEADER_BYTES] != self._header:
                raise ContainerDamaged("segment 0: its stream header is not the one of this stream")
            sealed = sealed[STREAM_HEADER_BYTES:]
        nonce = segment_nonce(self._nonce_prefix, index, last=last)
        try:
            self._cipher.decrypt_into(nonce, sealed, None, plain)
        except InvalidTag:
            raise ContainerDamaged(
                f"segment {index}{', the last' if last else ''}: does not authenticate: cut, extended, "
                "edited, or sealed under another key or header"
            ) from None


class Unsealer:
    """One stream from front to back, in pieces of any size. Only `finish` proves that it was all."""

    def __init__(self, *, key: bytes, associated_data: bytes) -> None:
        self._key = key
        self._associated_data = associated_data
        self._opener: Opener | None = None
        self._index = 0
        self._segment = bytearray(SEGMENT_BYTES)
        self._filled = 0
        self._pushing = False
        self._finished = False

    def push(self, data: Buffer) -> Iterator[memoryview]:
        """
        The plaintext of the segments that *data* proves not to be the last, one view of a fresh buffer each.

        The iterator must be exhausted before the next call. After an error the stream is lost: every
        further call fails.
        """
        self._check_ready()
        self._pushing = True
        return self._push(memoryview(data).cast("B"))

    def finish(self) -> memoryview:
        """The plaintext of the last segment: the proof that the stream is whole."""
        self._check_ready()
        self._finished = True
        del self._segment[self._filled :]
        return self._open(last=True)

    def _check_ready(self) -> None:
        if self._finished:
            raise RuntimeError("the stream is finished")
        if self._pushing:
            raise RuntimeError("the plaintext of the last push was not all taken, or the stream is damaged")

    def _push(self, data: memoryview) -> Iterator[memoryview]:
        at = 0
        while at < len(data):
            if self._filled == SEGMENT_BYTES:
                plain = self._open(last=False)
                self._index += 1
                self._segment = bytearray(SEGMENT_BYTES)
                self._filled = 0
                yield plain
            count = min(SEGMENT_BYTES - self._filled, len(data) - at)
            with memoryview(self._segment) as segment_view:
                segment_view[self._filled : self._filled + count] = data[at : at + count]
            self._filled += count
            at += count
        self._pushing = False

    def _open(self, *, last: bool) -> memoryview:
        _check_length(self._index, self._filled, last=last)
        if self._opener is None:
            header = bytes(self._segment[:STREAM_HEADER_BYTES])
            self._opener = Opener(key=self._key, associated_data=self._associated_data, stream_header=header)
        return self._opener.open_in_place(self._index, self._segment, last=last)


def _check_length(index: int, segment_bytes: int, *, last: bool) -> None:
    # After others an empty last segment has no reason to be: Tink reads one, nobody writes one.
    smallest = _SMALLEST_STREAM_BYTES if index == 0 else TAG_BYTES + 1
    if not last and segment_bytes != SEGMENT_BYTES:
        raise ContainerDamaged(f"segment {index}: {segment_bytes} bytes, must be {SEGMENT_BYTES}")
    if last and not smallest <= segment_bytes <= SEGMENT_BYTES:
        raise ContainerDamaged(
            f"segment {index}, the last: {segment_bytes} bytes, must be {smallest} to {SEGMENT_BYTES}"
        )
