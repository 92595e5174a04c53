"""The seek table finds any byte's frame, in little memory, and is refused if it cannot be right."""

import itertools
import struct
import tracemalloc

import pytest
from tests.unit.container.material import compress, plaintext, refused

from autobackup.container.frames import FRAME_BYTES, FrameCompressor, FrameDecompressor, SeekTable, zero_frame
from autobackup.container.seek_table import FOOTER_BYTES, MAX_FRAMES, MAX_STORED_FRAME_BYTES, table_bytes
from autobackup.errors import ContainerDamaged

PIECES = [plaintext(512), plaintext(FRAME_BYTES), bytes(FRAME_BYTES), b"text " * 1000, b"x", plaintext(1536)]
STREAM = compress(PIECES, FrameCompressor(1).compress)
TABLE_BYTES = 8 + 8 * len(PIECES) + 9


def table_of(*entries: tuple[int, int], frames: int | None = None, descriptor: int = 0) -> bytes:
    body = b"".join(struct.pack("<II", *entry) for entry in entries)
    count = len(entries) if frames is None else frames
    return struct.pack("<II", 0x184D2A5E, len(body) + 9) + body + struct.pack("<IBI", count, descriptor, 0x8F92EAB1)


def test_its_bytes_are_those_of_the_seekable_format() -> None:
    table = SeekTable()
    table.add(frame_bytes=21, plain_bytes=12)
    table.add(frame_bytes=45, plain_bytes=FRAME_BYTES)
    assert table.encode() == table_of((21, 12), (45, FRAME_BYTES))
    assert table.encoded_bytes == len(table.encode()) == 33
    assert SeekTable().encode().hex(" ") == "5e 2a 4d 18 09 00 00 00 00 00 00 00 00 b1 ea 92 8f"


def test_every_byte_is_found_in_its_frame() -> None:
    table = SeekTable.decode(STREAM[-TABLE_BYTES:], stream_bytes=len(STREAM))
    assert table.plain_bytes == len(b"".join(PIECES))
    edges = [0, *itertools.accumulate(map(len, PIECES))]
    for piece, start, end in zip(PIECES, edges, edges[1:], strict=False):
        for offset in {start, start + 1, (start + end) // 2, end - 1} & set(range(start, end)):
            span = table.at(offset)
            assert (span.plain_offset, span.plain_bytes) == (start, len(piece))
            frame = STREAM[span.stored_offset : span.stored_offset + span.stored_bytes]
            assert FrameDecompressor().decompress(frame) == piece
    for offset in (-1, edges[-1]):
        with pytest.raises(ValueError, match="plain_offset"):
            table.at(offset)


def test_any_longer_tail_will_do() -> None:
    for tail in (STREAM[-TABLE_BYTES:], STREAM[-TABLE_BYTES - 1 :], memoryview(STREAM)):
        assert table_bytes(tail) == TABLE_BYTES
        assert SeekTable.decode(tail, stream_bytes=len(STREAM)).encode() == STREAM[-TABLE_BYTES:]


def test_a_tail_too_short_is_refused() -> None:
    for length in range(TABLE_BYTES):
        assert refused(lambda: SeekTable.decode(STREAM[len(STREAM) - length :], stream_bytes=len(STREAM)))  # noqa: B023
    for length in range(FOOTER_BYTES):
        assert refused(lambda: table_bytes(STREAM[len(STREAM) - length :]))  # noqa: B023


def test_an_edit_that_moves_a_frame_is_refused() -> None:
    """Every bit of the table but those of plaintext lengths, which nothing here can know."""
    start = len(STREAM) - TABLE_BYTES
    for at, bit in itertools.product(range(TABLE_BYTES), range(8)):
        within_entry = (at - 8) % 8 if 8 <= at < TABLE_BYTES - 9 else 0
        if within_entry >= 4:
            continue
        edited = bytearray(STREAM)
        edited[start + at] ^= 1 << bit
        assert refused(lambda: SeekTable.decode(edited, stream_bytes=len(edited))), (at, bit)  # noqa: B023


@pytest.mark.parametrize(
    "table",
    [
        table_of((20, 0)),
        table_of((20, FRAME_BYTES + 1)),
        table_of((0, 1)),
        table_of((9, 1)),
        table_of((MAX_STORED_FRAME_BYTES + 1, FRAME_BYTES)),
        table_of((0xFFFFFFFF, 1)),
        table_of((20, 12), descriptor=0x80),
        table_of((20, 12), frames=0),
        table_of((20, 12), frames=2),
        table_of((20, 12), frames=MAX_FRAMES + 1),
        table_of((20, 12), frames=0xFFFFFFFF),
    ],
    ids=bytes.hex,
)
def test_what_cannot_be_is_refused(table: bytes) -> None:
    entries = struct.unpack(f"<{(len(table) - 17) // 4}I", table[8:-9])
    stream_bytes = sum(entries[::2]) + len(table)
    with pytest.raises(ContainerDamaged, match="seek table"):
        SeekTable.decode(bytes(100) + table, stream_bytes=stream_bytes)


@pytest.mark.parametrize("frames", [MAX_FRAMES + 1, 0xFFFFFFFF])
def test_nobody_is_sent_to_fetch_a_table_that_cannot_be(frames: int) -> None:
    """A reader of ranges fetches as much as the footer says."""
    assert table_bytes(table_of(frames=MAX_FRAMES)) == 8 + 8 * MAX_FRAMES + 9
    with pytest.raises(ContainerDamaged, match=f"{frames} frames"):
        table_bytes(table_of(frames=frames))


@pytest.mark.parametrize("off_by", [-1, 1, 1 << 20])
def test_a_table_of_a_stream_of_another_length_is_refused(off_by: int) -> None:
    with pytest.raises(ContainerDamaged, match="bytes, not"):
        SeekTable.decode(STREAM, stream_bytes=len(STREAM) + off_by)


@pytest.mark.parametrize(
    ("frame_bytes", "plain_bytes"),
    [(9, 1), (MAX_STORED_FRAME_BYTES + 1, 1), (20, 0), (20, FRAME_BYTES + 1), (-1, 1)],
)
def test_what_no_reader_would_take_is_not_written(frame_bytes: int, plain_bytes: int) -> None:
    with pytest.raises(ValueError, match="a frame"):
        SeekTable().add(frame_bytes=frame_bytes, plain_bytes=plain_bytes)


def test_a_frame_costs_eight_bytes() -> None:
    """A disk of 2 TiB has two million frames."""
    frame_bytes = len(zero_frame(FRAME_BYTES))
    tracemalloc.start()
    try:
        table = SeekTable()
        for _ in range(50_000):
            table.add(frame_bytes=frame_bytes, plain_bytes=FRAME_BYTES)
        assert tracemalloc.get_traced_memory()[0] < 50_000 * 10
    finally:
        tracemalloc.stop()
    assert SeekTable.decode(table.encode(), stream_bytes=50_000 * 45 + table.encoded_bytes).plain_bytes == 50_000 << 20
