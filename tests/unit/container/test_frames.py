"""Frames are what `zstd` reads, no larger than agreed, and all there."""

import itertools
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import zstandard
from tests.unit.container.material import compress, in_pieces, plaintext, refused

from autobackup.container.frames import (
    FRAME_BYTES,
    MAX_STORED_FRAME_BYTES,
    FrameCompressor,
    FrameDecompressor,
    FrameReader,
    SeekTable,
    stored_frame,
    stored_frame_bytes,
    zero_frame,
)
from autobackup.errors import ContainerDamaged

BLOCK = 128 * 1024
LENGTHS = sorted(
    {1, 2, 255, 256, 257, 511, 65_535, 65_536, 65_792}
    | {k * BLOCK + d for k in (1, 2, 7, 8) for d in (-1, 0, 1)} - {FRAME_BYTES + 1}
)
LEVELS = [-10, -5, -1, 1, 3, 19]


def read_all(stream: bytes, piece_bytes: int = 1 << 30) -> bytes:
    return b"".join(read_released(in_pieces(stream, piece_bytes)))


def read_released(pieces: Iterable[bytes | memoryview]) -> Iterable[bytes]:
    reader = FrameReader()
    for piece in pieces:
        yield from reader.push(piece)
    reader.finish()


def zeros(data: bytes) -> bytes:
    return zero_frame(len(data))


def by_hand(descriptor: int, header: bytes, *blocks: tuple[int, int, bytes]) -> bytes:
    """A frame of blocks (kind, size, content), the last one marked as such."""
    out = [struct.pack("<IB", 0xFD2FB528, descriptor), header]
    for number, (kind, size, content) in enumerate(blocks, 1):
        out += struct.pack("<I", size << 3 | kind << 1 | (number == len(blocks)))[:3], content
    return b"".join(out)


def claiming(length: int) -> bytes:
    return struct.pack("<I", length)


RAW, RLE, COMPRESSED, RESERVED = 0, 1, 2, 3
SINGLE = 0xA0  # single segment, content size in 4 bytes
GOOD = by_hand(SINGLE, claiming(3), (RAW, 3, b"abc"))


@pytest.mark.parametrize("length", LENGTHS)
def test_every_kind_of_frame_comes_back(length: int) -> None:
    random, empty = plaintext(length), bytes(length)
    frames = [(random, stored_frame(random)), (empty, stored_frame(empty)), (empty, zero_frame(length))]
    for level in LEVELS:
        compressor = FrameCompressor(level)
        mixed = random[: length // 2] + empty[length // 2 :]
        frames += [(data, compressor.compress(data)) for data in (random, empty, mixed)]
    for plain, frame in frames:
        assert FrameDecompressor().decompress(frame) == plain
        assert len(frame) <= MAX_STORED_FRAME_BYTES
        parameters = zstandard.get_frame_parameters(frame)
        assert parameters.content_size == len(plain)
        assert parameters.window_size <= FRAME_BYTES
        assert not parameters.has_checksum
        assert parameters.dict_id == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_of_a_stored_frame_is_known_beforehand(length: int) -> None:
    assert len(stored_frame(plaintext(length))) == len(stored_frame(bytes(length))) == stored_frame_bytes(length)


def test_a_mebibyte_of_zeros_is_45_bytes_and_made_once() -> None:
    assert len(zero_frame(FRAME_BYTES)) == 45
    assert zero_frame(FRAME_BYTES) is zero_frame(FRAME_BYTES)


def test_no_zero_frame_begins_with_a_run() -> None:
    """The zstd tool up to 1.4.3 refuses it (facebook/zstd issue 1881)."""
    for length in LENGTHS:
        assert zero_frame(length)[9] >> 1 & 3 == RAW


@pytest.mark.parametrize("length", [0, FRAME_BYTES + 1])
@pytest.mark.parametrize(
    "make", [FrameCompressor(1).compress, stored_frame, zeros, lambda data: stored_frame_bytes(len(data))]
)
def test_a_frame_of_another_length_is_not_made(make: Callable[[bytes], object], length: int) -> None:
    with pytest.raises(ValueError, match="a frame holds"):
        make(bytes(length))


@pytest.mark.parametrize("frame", [stored_frame, zeros, *(FrameCompressor(level).compress for level in LEVELS)])
def test_the_zstd_tool_reads_it(frame: Callable[[bytes], bytes], tmp_path: Path) -> None:
    if frame is zeros:
        pieces = [bytes(1), bytes(FRAME_BYTES), bytes(2), bytes(BLOCK), bytes(BLOCK + 1), bytes(BLOCK + 2)]
    else:
        pieces = [plaintext(FRAME_BYTES), bytes(FRAME_BYTES), b"text " * 100_000, b"x", plaintext(BLOCK + 1)]
    file = tmp_path / "stream.zst"
    file.write_bytes(compress(pieces, frame))
    plain = subprocess.run(["zstd", "-dc", file], check=True, capture_output=True).stdout
    assert plain == b"".join(pieces)
    listing = subprocess.run(["zstd", "-lv", file], check=True, capture_output=True, text=True).stdout
    assert f"({len(plain)} B)" in listing
    assert "Number of files listed" not in listing
    subprocess.run(["zstd", "-t", file], check=True, capture_output=True)


@pytest.mark.parametrize("piece_bytes", [1 << 30, 1 << 20, 65_537, 1000])
def test_how_a_stream_is_cut_does_not_show(piece_bytes: int) -> None:
    pieces = [
        plaintext(FRAME_BYTES),
        bytes(FRAME_BYTES),
        plaintext(513),
        plaintext(FRAME_BYTES - 1),
        bytes(9),
    ]
    for frame in (stored_frame, FrameCompressor(-1).compress):
        assert read_all(compress(pieces, frame), piece_bytes) == b"".join(pieces)


SMALL_PIECES = [plaintext(40), bytes(3000), b"text " * 100, b"x"]
SMALL = compress(SMALL_PIECES, FrameCompressor(1).compress)
SMALL_TABLE_BYTES = 8 + 4 * 8 + 9


def test_single_bytes_do_not_show() -> None:
    assert read_all(SMALL, 1) == b"".join(SMALL_PIECES)


def test_a_stream_without_frames_is_a_table_alone() -> None:
    assert read_all(compress([], stored_frame)) == b""


def test_no_prefix_passes_for_the_whole() -> None:
    for cut, piece_bytes in itertools.product(range(len(SMALL)), (1, 1 << 30)):
        assert refused(lambda: read_all(SMALL[:cut], piece_bytes)), cut  # noqa: B023


def test_nothing_may_follow() -> None:
    for more, piece_bytes in itertools.product((b"\0", SMALL[:4], GOOD, SMALL, bytes(FRAME_BYTES)), (1, 1 << 30)):
        assert refused(lambda: read_all(SMALL + more, piece_bytes))  # noqa: B023


def test_every_edit_of_the_seek_table_is_refused() -> None:
    start = len(SMALL) - SMALL_TABLE_BYTES
    assert SMALL[start : start + 4] == bytes.fromhex("5e2a4d18")
    for at, change in itertools.product(range(start, len(SMALL)), (0x01, 0x80, 0xFF)):
        edited = bytearray(SMALL)
        edited[at] ^= change
        assert refused(lambda: read_all(bytes(edited))), at  # noqa: B023


def test_frames_pass_in_their_own_number_and_order_only() -> None:
    """Every sequence of up to four out of four frames of different lengths, before the right one's table."""
    frames = [stored_frame(piece) for piece in SMALL_PIECES]
    table = compress(SMALL_PIECES, stored_frame)[-SMALL_TABLE_BYTES:]
    passed = [
        order
        for length in range(5)
        for order in itertools.product(range(4), repeat=length)
        if not refused(lambda: read_all(b"".join(frames[i] for i in order) + table))  # noqa: B023
    ]
    assert passed == [(0, 1, 2, 3)]


def test_a_table_with_checksums_is_refused() -> None:
    entries = b"".join(struct.pack("<III", len(stored_frame(p)), len(p), 0) for p in SMALL_PIECES)
    table = struct.pack("<II", 0x184D2A5E, len(entries) + 9) + entries + struct.pack("<IBI", 4, 0x80, 0x8F92EAB1)
    assert refused(lambda: read_all(b"".join(map(stored_frame, SMALL_PIECES)) + table))


def test_any_edited_byte_is_refused_or_stays_within_bounds() -> None:
    """What an edit does to content is for the tags. But nothing else may be raised, and no frame may grow."""
    for at, change in itertools.product(range(len(SMALL)), range(1, 256)):
        edited = bytearray(SMALL)
        edited[at] ^= change
        try:
            assert len(read_all(bytes(edited))) == len(b"".join(SMALL_PIECES))
        except ContainerDamaged:
            continue


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (by_hand(SINGLE, claiming(FRAME_BYTES + 1), (RAW, 1, b"x")), "claims 1048577 bytes"),
        (by_hand(SINGLE, claiming(0xFFFFFFFF), (RLE, BLOCK, b"x")), "claims 4294967295 bytes"),
        (by_hand(0xE0, b"\xff" * 8, (RLE, BLOCK, b"x")), "claims"),
        (by_hand(SINGLE, claiming(0), (RAW, 0, b"")), "claims 0 bytes"),
        (by_hand(0x20, b"\0", (RAW, 0, b"")), "claims 0 bytes"),
        (by_hand(0x00, b"\x00", (RAW, 3, b"abc")), "no content size"),
        (by_hand(SINGLE | 4, claiming(3), (RAW, 3, b"abc")) + b"\0\0\0\0", "checksum"),
        (by_hand(SINGLE | 1, b"\x07" + claiming(3), (RAW, 3, b"abc")), "dictionary"),
        (by_hand(SINGLE | 3, b"\x07\0\0\0" + claiming(3), (RAW, 3, b"abc")), "dictionary"),
        (by_hand(SINGLE | 8, claiming(3), (RAW, 3, b"abc")), "descriptor 0xa8"),
        (by_hand(SINGLE | 16, claiming(3), (RAW, 3, b"abc")), "descriptor 0xb0"),
        (by_hand(0x80, b"\x51" + claiming(3), (RAW, 3, b"abc")), "window of 1179648"),
        (by_hand(0x80, b"\xff" + claiming(3), (RAW, 3, b"abc")), "window of"),
        (by_hand(SINGLE, claiming(3), (RLE, BLOCK, b"x")), "offset 0"),
        (by_hand(SINGLE, claiming(3), (RAW, 4, b"abcd")), "offset 0"),
        (by_hand(SINGLE, claiming(3), (RAW, 2, b"ab")), "offset 0"),
        (by_hand(SINGLE, claiming(3), (RAW, 0, b"")), "offset 0"),
        (by_hand(SINGLE, claiming(FRAME_BYTES), *([(RLE, BLOCK, b"x")] * 9)), "offset 0"),
        (by_hand(SINGLE, claiming(3), (RESERVED, 3, b"abc")), "type 3"),
        (by_hand(SINGLE, claiming(FRAME_BYTES), (RAW, BLOCK + 1, bytes(BLOCK + 1))), "131073 bytes"),
        (by_hand(SINGLE, claiming(FRAME_BYTES), (RLE, 2**21 - 1, b"x")), "2097151 bytes"),
        (by_hand(SINGLE, claiming(3), (COMPRESSED, 3, b"abc")), "offset 0"),
        (by_hand(SINGLE, claiming(3), *([(RAW, 1000, bytes(1000))] * 1100)), "longer than"),
        (bytes.fromhex("502a4d18") + claiming(0), "not a zstd frame"),
        (bytes.fromhex("5f2a4d18") + claiming(4) + b"abcd", "not a zstd frame"),
        (bytes.fromhex("27b52ffd") + bytes(20), "not a zstd frame"),
        (b"\x1f\x8b\x08\0" + bytes(20), "not a zstd frame"),
        (bytes(600), "not a zstd frame"),
    ],
    ids=lambda value: value if isinstance(value, str) else "frame",
)
def test_a_frame_that_is_not_of_the_profile_is_refused(frame: bytes, text: str) -> None:
    """Before it is decompressed, where its headers tell; and never at the price of more than a few MiB."""
    tracemalloc.start()
    try:
        for read in (read_all, FrameDecompressor().decompress, lambda stream: read_all(stream, 100_000)):
            with pytest.raises(ContainerDamaged, match=text):
                read(frame)
        assert tracemalloc.get_traced_memory()[1] < 8 * FRAME_BYTES
    finally:
        tracemalloc.stop()


def test_a_bomb_is_read_in_the_space_of_a_frame() -> None:
    """256 MiB of zeros in 13 kB, pushed at once."""
    bomb = compress([bytes(FRAME_BYTES)] * 256, zeros)
    tracemalloc.start()
    try:
        reader = FrameReader()
        assert sum(len(plain) for plain in reader.push(bomb)) == 256 * FRAME_BYTES
        reader.finish()
        assert tracemalloc.get_traced_memory()[1] < 4 * FRAME_BYTES
    finally:
        tracemalloc.stop()


def test_what_is_pushed_at_once_is_not_copied_at_once() -> None:
    stream = compress([plaintext(FRAME_BYTES)] * 32, stored_frame)
    tracemalloc.start()
    try:
        for _ in FrameReader().push(stream):
            assert tracemalloc.get_traced_memory()[1] < 8 * FRAME_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("frame", [GOOD + GOOD, GOOD + b"\0", GOOD[:-1], GOOD[:4], b""], ids=len)
def test_a_single_frame_is_exactly_one(frame: bytes) -> None:
    assert FrameDecompressor().decompress(GOOD) == b"abc"
    assert refused(lambda: FrameDecompressor().decompress(frame))


def test_frames_that_are_not_taken_are_not_forgotten() -> None:
    reader = FrameReader()
    reader.push(SMALL)
    with pytest.raises(RuntimeError, match="not all taken"):
        reader.push(b"")
    with pytest.raises(RuntimeError, match="not all taken"):
        reader.finish()


def test_a_damaged_stream_stays_damaged() -> None:
    reader = FrameReader()
    with pytest.raises(ContainerDamaged):
        list(reader.push(bytes(100)))
    with pytest.raises(RuntimeError, match="damaged"):
        reader.finish()


def test_nothing_follows_finish() -> None:
    reader = FrameReader()
    list(reader.push(SMALL))
    reader.finish()
    with pytest.raises(RuntimeError, match="finished"):
        reader.push(b"")
    with pytest.raises(RuntimeError, match="finished"):
        reader.finish()


def test_a_cut_says_where() -> None:
    with pytest.raises(ContainerDamaged, match="ends in the frame at offset 0"):
        read_all(SMALL[:20])
    with pytest.raises(ContainerDamaged, match=f"ends in the seek table, at offset {len(SMALL) - 1}"):
        read_all(SMALL[:-1])
    with pytest.raises(ContainerDamaged, match=f"ends at offset {len(GOOD)}, without a seek table"):
        read_all(GOOD)


def test_the_reader_and_the_table_agree_on_what_a_table_is() -> None:
    assert len(SeekTable.decode(SMALL, stream_bytes=len(SMALL))) == len(SMALL_PIECES)
