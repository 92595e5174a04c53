"""What we seal is what Tink seals, and Tink opens it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.container.material import (
    AAD,
    KEY,
    NONCE_PREFIX,
    SALT,
    SIZES,
    in_pieces,
    plaintext,
    seal,
    seal_segments,
    tink_open,
    tink_seal,
    unseal,
    unseal_released,
)

from autobackup.container.seal import (
    FIRST_PLAIN_BYTES,
    MAX_SEGMENTS,
    NEXT_PLAIN_BYTES,
    SEGMENT_BYTES,
    STREAM_HEADER_BYTES,
    Sealer,
    sealed_bytes,
    segment_nonce,
    stream_header,
)
from autobackup.container.unseal import plain_bytes


def new_sealer() -> Sealer:
    return Sealer(key=KEY, associated_data=AAD, salt=SALT, nonce_prefix=NONCE_PREFIX)


@pytest.mark.parametrize("size", SIZES)
def test_tink_opens_what_we_seal(size: int) -> None:
    assert tink_open(seal(plaintext(size))) == plaintext(size)


@pytest.mark.parametrize("size", SIZES)
def test_we_open_what_tink_seals(size: int) -> None:
    assert unseal(tink_seal(plaintext(size))) == plaintext(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_length_of_a_stream_is_known_from_its_plaintext(size: int) -> None:
    assert sealed_bytes(size) == len(seal(plaintext(size))) == len(tink_seal(plaintext(size)))
    assert plain_bytes(sealed_bytes(size)) == size


def test_lengths_are_told_both_ways_around_every_boundary() -> None:
    for segments in (1, 2, 3, 1000, MAX_SEGMENTS - 1):
        boundary = FIRST_PLAIN_BYTES + (segments - 1) * NEXT_PLAIN_BYTES
        assert sealed_bytes(boundary) == segments * SEGMENT_BYTES
        assert sealed_bytes(boundary + 1) == segments * SEGMENT_BYTES + 17
        for size in range(boundary - 40, boundary + 40):
            assert plain_bytes(sealed_bytes(size)) == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1 << 20, (1 << 20) - 16, 256 * 1024 + 1, 4093])
def test_how_the_plaintext_is_cut_does_not_show(size: int, piece_bytes: int) -> None:
    plain = plaintext(size)
    segments = seal_segments(in_pieces(plain, piece_bytes))
    assert b"".join(segments) == seal(plain)
    assert b"".join(unseal_released(in_pieces(b"".join(segments), piece_bytes))) == plain


@pytest.mark.parametrize("size", SIZES)
def test_single_bytes_around_a_boundary_do_not_show(size: int) -> None:
    """Byte by byte where it matters: up to, onto and past each boundary."""
    plain, near = plaintext(size), 20
    stream = seal(plain)

    def cut(data: bytes, boundaries: tuple[int, ...]) -> list[bytes]:
        single = {at for boundary in boundaries for at in range(boundary - near, boundary + near)}
        edges = sorted({0, len(data)} | {at for at in single if 0 < at < len(data)})
        return [data[at:end] for at, end in itertools.pairwise(edges)]

    plain_boundaries = tuple(FIRST_PLAIN_BYTES + i * NEXT_PLAIN_BYTES for i in range(3))
    assert b"".join(seal_segments(cut(plain, plain_boundaries))) == stream
    stream_boundaries = (0, 56, *(i * SEGMENT_BYTES for i in (1, 2, 3)))
    assert b"".join(unseal_released(cut(stream, stream_boundaries))) == plain


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 600_000), max_size=8))
def test_pieces_of_any_length_round_trip(lengths: list[int]) -> None:
    plain = plaintext(sum(lengths))
    ends = [0, *itertools.accumulate(lengths)]
    segments = seal_segments(plain[a:b] for a, b in itertools.pairwise(ends))
    assert unseal(b"".join(segments)) == plain


@pytest.mark.parametrize("size", SIZES)
def test_every_segment_but_the_last_is_full(size: int) -> None:
    segments = seal_segments([plaintext(size)])
    assert all(len(segment) == SEGMENT_BYTES for segment in segments[:-1])
    assert segments[0].startswith(stream_header(salt=SALT, nonce_prefix=NONCE_PREFIX))
    assert len(segments) == 1 or len(segments[-1]) >= 17


def test_an_empty_push_brings_nothing() -> None:
    sealer = new_sealer()
    assert list(sealer.push(b"")) == list(sealer.push(memoryview(b""))) == []
    assert len(sealer.finish()) == STREAM_HEADER_BYTES + 16


def test_a_full_segment_is_kept_back_until_more_data_comes() -> None:
    sealer = new_sealer()
    assert list(sealer.push(bytes(FIRST_PLAIN_BYTES))) == []
    assert [len(segment) for segment in sealer.push(b"x")] == [SEGMENT_BYTES]


def test_a_segment_is_the_callers_to_keep() -> None:
    """A reused buffer is corrupted by a transport that still holds it: each one is fresh, and stays."""
    sealer, kept = new_sealer(), []
    for piece in in_pieces(plaintext(5 * SEGMENT_BYTES), 300_001):
        kept += [(segment, bytes(segment)) for segment in sealer.push(piece)]
    last = sealer.finish()
    assert len({id(segment) for segment, _ in kept} | {id(last)}) == len(kept) + 1 == 6
    assert all(segment == copy for segment, copy in kept)
    for segment, _ in kept:
        segment.append(0)  # nothing of ours looks at it any more


def test_data_is_not_lost_when_the_segments_are_not_taken() -> None:
    """`push` without a loop around it would otherwise drop plaintext and seal the rest in peace."""
    for take in (0, 1):
        sealer = new_sealer()
        segments = sealer.push(bytes(3 * SEGMENT_BYTES))
        for _ in range(take):
            next(segments)
        with pytest.raises(RuntimeError, match="not all taken"):
            sealer.push(b"x")
        with pytest.raises(RuntimeError, match="not all taken"):
            sealer.finish()


def test_nothing_follows_finish() -> None:
    sealer = new_sealer()
    sealer.finish()
    with pytest.raises(RuntimeError, match="finished"):
        sealer.push(b"x")
    with pytest.raises(RuntimeError, match="finished"):
        sealer.finish()


def test_no_two_segments_share_a_nonce() -> None:
    indexes = (0, 1, 255, 256, 65_536, MAX_SEGMENTS - 1)
    nonces = {segment_nonce(NONCE_PREFIX, index, last=last) for index in indexes for last in (False, True)}
    assert len(nonces) == 2 * len(indexes)
    assert {len(nonce) for nonce in nonces} == {12}


@pytest.mark.parametrize("index", [MAX_SEGMENTS, MAX_SEGMENTS + 1, -1])
def test_more_segments_than_the_nonce_can_number_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="at most"):
        segment_nonce(NONCE_PREFIX, index, last=False)


def test_a_plaintext_that_no_stream_can_hold_is_refused() -> None:
    most = FIRST_PLAIN_BYTES + (MAX_SEGMENTS - 1) * NEXT_PLAIN_BYTES
    assert sealed_bytes(most) == MAX_SEGMENTS * SEGMENT_BYTES
    for size in (most + 1, -1):
        with pytest.raises(ValueError, match="bytes"):
            sealed_bytes(size)


@pytest.mark.parametrize("wrong", [{"key": bytes(31)}, {"salt": bytes(31)}, {"nonce_prefix": bytes(8)}])
def test_secrets_of_a_wrong_length_are_refused_without_being_shown(wrong: dict[str, bytes]) -> None:
    right = {"key": KEY, "associated_data": AAD, "salt": SALT, "nonce_prefix": NONCE_PREFIX}
    with pytest.raises(ValueError, match="must have") as caught:
        Sealer(**{**right, **wrong})
    assert "x00" not in str(caught.value)
