"""Nothing cut, extended, reordered or edited passes, and nothing is released before it was proved."""

import itertools

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.unit.container.material import (
    AAD,
    KEY,
    NONCE_PREFIX,
    SALT,
    SIZES,
    plaintext,
    refused,
    seal,
    seal_segments,
    tink_open,
    tink_refuses,
    unseal,
    unseal_released,
)

from autobackup.container.seal import (
    FIRST_PLAIN_BYTES,
    MAX_SEGMENTS,
    NEXT_PLAIN_BYTES,
    SEGMENT_BYTES,
    sealed_bytes,
    segment_cipher,
    segment_nonce,
    stream_header,
)
from autobackup.container.unseal import (
    Opener,
    Unsealer,
    locate,
    plain_bytes,
    segment_count,
    segment_span,
)
from autobackup.errors import ContainerDamaged

SMALL = seal(b"seventeen bytes..")


def new_opener(stream: bytes) -> Opener:
    return Opener(key=KEY, associated_data=AAD, stream_header=stream[:40])


def open_by_segments(stream: bytes) -> bytes:
    """The whole of a stream as a reader of ranges opens it: by its length alone, from the end."""
    opener, plain = None, []
    for index in reversed(range(segment_count(len(stream)))):
        offset, length = segment_span(index, len(stream))
        opener = opener or new_opener(stream)
        segment = stream[offset : offset + length]
        plain.append(opener.open_segment(index, segment, last=offset + length == len(stream)))
    return b"".join(reversed(plain))


def cuts(length: int) -> list[int]:
    """Every boundary there is in a stream, and one byte to both sides."""
    edges = {0, 1, 33, 40, 56} | {length}
    for at in range(0, length + 1, SEGMENT_BYTES):
        edges |= {at, at + 16, at + 17, at + SEGMENT_BYTES - 16}
    return sorted({cut for edge in edges for cut in (edge - 1, edge, edge + 1) if 0 <= cut < length})


@pytest.mark.parametrize("size", SIZES)
def test_no_prefix_passes_for_the_whole(size: int) -> None:
    stream = seal(plaintext(size))
    for cut in cuts(len(stream)):
        assert refused(lambda: unseal(stream[:cut])), cut  # noqa: B023
        assert refused(lambda: open_by_segments(stream[:cut])), cut  # noqa: B023


def test_no_prefix_of_a_small_stream_passes() -> None:
    for cut in range(len(SMALL)):
        assert refused(lambda: unseal(SMALL[:cut])), cut  # noqa: B023
        assert refused(lambda: open_by_segments(SMALL[:cut])), cut  # noqa: B023


@pytest.mark.parametrize("size", SIZES)
def test_nothing_may_follow(size: int) -> None:
    stream = seal(plaintext(size))
    to_boundary = -len(stream) % SEGMENT_BYTES
    for count in {1, 16, 17, 40, 56, to_boundary, to_boundary + 1, to_boundary + 17, SEGMENT_BYTES} - {0}:
        for extended in (stream + bytes(count), stream + stream[:count]):
            assert refused(lambda: unseal(extended)), count  # noqa: B023
            assert refused(lambda: open_by_segments(extended)), count  # noqa: B023


@pytest.mark.parametrize("last_bytes", [1, NEXT_PLAIN_BYTES])
def test_segments_pass_in_their_own_order_only(last_bytes: int) -> None:
    """All 340 sequences of one to four out of four segments: dropped, swapped, repeated."""
    plain = plaintext(FIRST_PLAIN_BYTES + 2 * NEXT_PLAIN_BYTES + last_bytes)
    segments = seal_segments([plain])
    assert len(segments) == 4
    passed = [
        order
        for length in range(1, 5)
        for order in itertools.product(range(4), repeat=length)
        if not refused(lambda: list(unseal_released([segments[i] for i in order])))  # noqa: B023
    ]
    assert passed == [(0, 1, 2, 3)]


def test_no_flipped_bit_passes() -> None:
    """Every bit of a whole small stream: header, salt, nonce prefix, ciphertext, tag."""
    for at, bit in itertools.product(range(len(SMALL)), range(8)):
        edited = bytearray(SMALL)
        edited[at] ^= 1 << bit
        assert refused(lambda: unseal(bytes(edited))), (at, bit)  # noqa: B023


def test_no_flipped_bit_passes_in_any_region_of_a_long_stream() -> None:
    stream = seal(plaintext(FIRST_PLAIN_BYTES + NEXT_PLAIN_BYTES + 1))
    regions = {0, 1, 32, 33, 39, 40, 41, 500_000, 1_500_000, len(stream) - 17}
    for end in (SEGMENT_BYTES, 2 * SEGMENT_BYTES, len(stream)):
        regions |= {end - 17, *range(end - 16, end)}  # the last of the ciphertext, and the tag
    regions |= {SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES}
    for number, at in enumerate(sorted(regions)):
        edited = bytearray(stream)
        edited[at] ^= 1 << number % 8
        assert refused(lambda: unseal(bytes(edited))), at  # noqa: B023


@pytest.mark.parametrize("damaged", [0, 1, 2, 3])
def test_nothing_of_a_segment_leaves_before_its_tag_was_verified(damaged: int) -> None:
    plain = plaintext(FIRST_PLAIN_BYTES + 3 * NEXT_PLAIN_BYTES)
    edited = bytearray(seal(plain))
    edited[(damaged + 1) * SEGMENT_BYTES - 1] ^= 1  # the last byte of its tag
    released: list[bytes] = []
    with pytest.raises(ContainerDamaged, match=f"segment {damaged}") as caught:
        released.extend(unseal_released([bytes(edited)]))
    assert b"".join(released) == plain[: plain_bytes(damaged * SEGMENT_BYTES) if damaged else 0]
    assert ("the last" in str(caught.value)) == (damaged == 3)


def test_a_damaged_stream_stays_damaged() -> None:
    edited = bytearray(seal(plaintext(2 * SEGMENT_BYTES)))
    edited[100] ^= 1
    unsealer = Unsealer(key=KEY, associated_data=AAD)
    with pytest.raises(ContainerDamaged):
        list(unsealer.push(edited))
    with pytest.raises(RuntimeError, match="damaged"):
        unsealer.push(b"x")
    with pytest.raises(RuntimeError, match="damaged"):
        unsealer.finish()


def test_no_other_key_opens_it() -> None:
    for at, bit in itertools.product(range(32), range(8)):
        key = bytearray(KEY)
        key[at] ^= 1 << bit
        assert refused(lambda: unseal(SMALL, key=bytes(key))), (at, bit)  # noqa: B023


@pytest.mark.parametrize("aad", [b"", AAD[:-1], AAD + b"\0", bytes(4096)])
def test_no_other_header_opens_it(aad: bytes) -> None:
    assert refused(lambda: unseal(SMALL, aad=aad))


def test_plaintext_that_is_not_taken_is_not_forgotten() -> None:
    unsealer = Unsealer(key=KEY, associated_data=AAD)
    unsealer.push(SMALL)
    with pytest.raises(RuntimeError, match="not all taken"):
        unsealer.finish()


def test_nothing_follows_finish() -> None:
    unsealer = Unsealer(key=KEY, associated_data=AAD)
    assert list(unsealer.push(SMALL)) == []
    assert unsealer.finish() == b"seventeen bytes.."
    with pytest.raises(RuntimeError, match="finished"):
        unsealer.push(b"")
    with pytest.raises(RuntimeError, match="finished"):
        unsealer.finish()


def test_released_plaintext_is_the_callers_to_keep() -> None:
    plain = plaintext(4 * SEGMENT_BYTES)
    unsealer = Unsealer(key=KEY, associated_data=AAD)
    views = list(unsealer.push(seal(plain)))
    views.append(unsealer.finish())
    assert b"".join(views) == plain


@pytest.mark.parametrize("size", SIZES)
def test_segments_open_in_any_order(size: int) -> None:
    assert open_by_segments(seal(plaintext(size))) == plaintext(size)


def test_a_segment_opens_at_its_own_place_only() -> None:
    """Four full segments, tried as each number and as the last or not: four of 32 ways."""
    segments = seal_segments([plaintext(FIRST_PLAIN_BYTES + 3 * NEXT_PLAIN_BYTES)])
    opener = new_opener(segments[0])
    opened = [
        (which, index, last)
        for which, index, last in itertools.product(range(4), range(4), (False, True))
        if not refused(lambda: opener.open_segment(index, segments[which], last=last))  # noqa: B023
    ]
    assert opened == [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, True)]


def test_opening_leaves_the_callers_bytes_alone_unless_asked_otherwise() -> None:
    stream = bytearray(SMALL)
    opener = new_opener(SMALL)
    assert opener.open_segment(0, stream, last=True) == b"seventeen bytes.."
    assert stream == SMALL
    assert opener.open_in_place(0, stream, last=True) == b"seventeen bytes.."
    assert stream != SMALL


def test_a_first_segment_of_another_stream_is_refused() -> None:
    other = bytearray(SMALL)
    other[1] ^= 1
    with pytest.raises(ContainerDamaged, match="not the one of this stream"):
        new_opener(SMALL).open_segment(0, other, last=True)


@pytest.mark.parametrize("header", [b"", SMALL[:39], SMALL[:41], b"\x29" + SMALL[1:40], b"\0" + SMALL[1:40]])
def test_what_is_not_a_stream_header_is_refused(header: bytes) -> None:
    assert refused(lambda: Opener(key=KEY, associated_data=AAD, stream_header=header))


def test_an_empty_last_segment_after_others_is_refused() -> None:
    """Tink reads one and writes none. To us each plaintext has one stream."""
    cipher: AESGCM = segment_cipher(key=KEY, salt=SALT, associated_data=AAD)
    plain = plaintext(FIRST_PLAIN_BYTES)
    stream = (
        stream_header(salt=SALT, nonce_prefix=NONCE_PREFIX)
        + cipher.encrypt(segment_nonce(NONCE_PREFIX, 0, last=False), plain, None)
        + cipher.encrypt(segment_nonce(NONCE_PREFIX, 1, last=True), b"", None)
    )
    assert tink_open(stream) == plain
    assert refused(lambda: unseal(stream))
    assert refused(lambda: open_by_segments(stream))


def test_we_refuse_whatever_tink_refuses() -> None:
    stream = seal(plaintext(FIRST_PLAIN_BYTES + 1))
    wrong = [stream[:cut] for cut in cuts(len(stream))] + [stream + b"\0", stream[:SEGMENT_BYTES]]
    for one in wrong:
        assert tink_refuses(one)
        assert refused(lambda: unseal(one))  # noqa: B023


def test_lengths_that_no_stream_has_are_refused() -> None:
    impossible = {*range(56), *(k * SEGMENT_BYTES + d for k in (1, 2, 77) for d in range(1, 17))}
    impossible |= {MAX_SEGMENTS * SEGMENT_BYTES + d for d in (1, 17, SEGMENT_BYTES)}
    for length in impossible:
        for ask in (segment_count, plain_bytes):
            with pytest.raises(ContainerDamaged, match=r"segment|stream"):
                ask(length)
    for length in (
        56,
        57,
        SEGMENT_BYTES,
        SEGMENT_BYTES + 17,
        2 * SEGMENT_BYTES,
        MAX_SEGMENTS * SEGMENT_BYTES,
    ):
        assert sealed_bytes(plain_bytes(length)) == length


def test_spans_cover_the_stream_without_gap_or_overlap() -> None:
    for size in SIZES:
        length = sealed_bytes(size)
        spans = [segment_span(index, length) for index in range(segment_count(length))]
        assert [offset for offset, _ in spans] == [index * SEGMENT_BYTES for index in range(len(spans))]
        assert sum(count for _, count in spans) == length
        for index in (-1, len(spans)):
            with pytest.raises(ValueError, match="segment"):
                segment_span(index, length)


def test_a_byte_is_located_where_it_is() -> None:
    plain = plaintext(FIRST_PLAIN_BYTES + NEXT_PLAIN_BYTES + 100)
    segments = seal_segments([plain])
    opener = new_opener(segments[0])
    opened = [opener.open_segment(i, one, last=i == 2) for i, one in enumerate(segments)]
    for boundary in (0, FIRST_PLAIN_BYTES, FIRST_PLAIN_BYTES + NEXT_PLAIN_BYTES):
        for offset in range(max(0, boundary - 20), boundary + 20):
            index, within = locate(offset)
            assert opened[index][within] == plain[offset]
    with pytest.raises(ValueError, match="plain_offset"):
        locate(-1)
