"""
Where a key is, for every source: one spelling, exactly its own members, and a magic that cannot be edited.

What `test_header.py` promises of all headers is promised here again for each source: a changed bit opens nothing.
"""

import base64
import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
from tests.unit.container.material import HEADER, KEY, plaintext, refused, seal, unseal

from autobackup.container.header import (
    HEADER_BYTES,
    HYBRID,
    MAGIC,
    MAGIC_NONE,
    X25519,
    Header,
    decode,
    encode,
    require_room,
)
from autobackup.container.unseal import Opener
from autobackup.errors import ContainerDamaged

SECRET = "0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"
PROJECT = "5f3e9a0c1b2d4e6f8a7b6c5d4e3f2a1b"
SEALED_BYTES = {X25519: 80, HYBRID: 1168}


def b64(length: int, fill: int = 0xA5) -> str:
    return base64.b64encode(bytes([fill]) * length).decode()


def sealed_to(kem: str) -> str:
    return f"{kem}:{b64(SEALED_BYTES[kem])}"


def recipient_id(number: int) -> str:
    return f"{number:016x}"


def recipients(*kems: str) -> dict[str, str]:
    return {"source": "recipient"} | {recipient_id(n): sealed_to(kem) for n, kem in enumerate(kems)}


SOURCES: Mapping[str, dict[str, str]] = {
    "keyfile": dict(HEADER.key),
    "barbican": {"source": "barbican", "secret": SECRET, "project": PROJECT},
    "recipient-x25519": recipients(X25519),
    "recipient-hybrid": recipients(HYBRID),
    "recipient-both": recipients(X25519, HYBRID, X25519),
    "none": {"source": "none"},
}


def of(key: Mapping[str, Any]) -> Header:
    return dataclasses.replace(HEADER, key=key)


def magic_of(name: str) -> bytes:
    return MAGIC_NONE if name == "none" else MAGIC


def with_key(key: object, magic: bytes = MAGIC) -> bytes:
    """A header as a writer that checks nothing would make it: canonical but for what *key* is."""
    fields = json.loads(encode(HEADER)[len(MAGIC) :].rstrip(b"\0")) | {"key": key}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return (magic + text).ljust(HEADER_BYTES, b"\0")


# ---- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_comes_back_from_exactly_4096_bytes(name: str) -> None:
    one = of(SOURCES[name])
    data = encode(one)
    assert len(data) == HEADER_BYTES
    assert decode(data) == one
    assert encode(decode(data)) == data == with_key(SOURCES[name], magic_of(name))
    assert max(data) <= 0x7E


@pytest.mark.parametrize("name", SOURCES)
def test_the_magic_says_whether_it_is_secret(name: str) -> None:
    """`head -1` shows it; 18 bytes and no field."""
    first_line = encode(of(SOURCES[name])).split(b"{")[0]
    assert first_line == (b"autobackup-none/1\n" if name == "none" else b"autobackup/1\n")


@pytest.mark.parametrize(("name", "magic"), [(name, magic) for name in SOURCES for magic in (MAGIC, MAGIC_NONE)])
def test_a_magic_that_is_not_its_sources_is_refused(name: str, magic: bytes) -> None:
    """Else one edit would make a secret bundle look like one that never was, or the other way round."""
    data = with_key(SOURCES[name], magic)
    if magic == magic_of(name):
        assert decode(data) == of(SOURCES[name])
    else:
        with pytest.raises(ContainerDamaged, match="offset 0: the magic is not the one for key source"):
            decode(data)


@pytest.mark.parametrize(
    "start", [b"autobackup-none/2\n", b"autobackup-none/1x", b"autobackup-none/10\n", b"autobackup-none/\0"]
)
def test_a_newer_format_without_secrecy_is_named(start: bytes) -> None:
    with pytest.raises(ContainerDamaged, match="newer format of unencrypted bundle"):
        decode(start + with_key({"source": "none"}, MAGIC_NONE)[len(start) :])


@pytest.mark.parametrize(
    "start",
    [b"autobackup-none", b"autobackup-none\n", b"autobackup-None/1\n", b"autobackup-/1\n", b"autobackup-no/1\n"],
)
def test_what_only_resembles_a_magic_is_none(start: bytes) -> None:
    with pytest.raises(ContainerDamaged, match="not a sealed bundle"):
        decode(start.ljust(HEADER_BYTES, b"\0"))


def test_an_error_names_the_offset_at_which_the_text_of_either_magic_begins() -> None:
    for magic in (MAGIC, MAGIC_NONE):
        with pytest.raises(ContainerDamaged, match=f"offset {len(magic)}: "):
            decode((magic + b"{").ljust(HEADER_BYTES, b"\0"))
        with pytest.raises(ContainerDamaged, match="no NUL before offset 4096"):
            decode(magic.ljust(HEADER_BYTES, b" "))
        with pytest.raises(ContainerDamaged, match="offset 4095: padding"):
            decode((magic + b"{}").ljust(HEADER_BYTES - 1, b"\0") + b"\x01")


# ---- refusals ---------------------------------------------------------------------------------------------------

X_ID, X_WORD = recipient_id(0), sealed_to(X25519)
UUIDS_THAT_ARE_NONE: list[Any] = [
    "", SECRET.upper(), SECRET[:-1], SECRET + "0", SECRET.replace("-", ""), SECRET.replace("-", "_"),
    f"https://barbican/v1/secrets/{SECRET}", f"../{SECRET}", SECRET + "/payload", SECRET + "\n", None, 5, [SECRET],
]  # fmt: skip
WORDS_THAT_ARE_NONE: list[Any] = [
    "", ":", X25519, f"{X25519}:", b64(80), f":{b64(80)}", f"x448:{b64(80)}", f"X25519:{b64(80)}",
    f"mlkem768:{b64(1136)}", f"p256:{b64(113)}", f"{X25519} :{b64(80)}", f" {X_WORD}", f"{X_WORD} ", f"{X_WORD}\n",
    f"{X25519}::{b64(80)}", f"{X25519}:{b64(80)}:", f"{X25519}:{X_WORD}", f"{X25519}:{'=' * 108}",
    *(f"{X25519}:{b64(length)}" for length in (0, 32, 48, 79, 81, 1168)),
    *(f"{HYBRID}:{b64(length)}" for length in (0, 80, 1120, 1167, 1169)),
    f"{X25519}:{b64(80).rstrip('=')}",  # without its padding
    f"{X25519}:{b64(80).replace('=', '')}A=",
    f"{X25519}:{b64(80)[:-2]}V=",  # the same 80 bytes, spelled otherwise
    f"{X25519}:{b64(80, 0xFB).replace('+', '-').replace('/', '_')}",  # the other alphabet of RFC 4648
    f"{X25519}:{b64(80)[:-1]}é", None, 5, True, [X_WORD], {"kem": X25519}, {},
]  # fmt: skip
WRONG: Mapping[str, list[Any]] = {
    "barbican": [
        {"source": "barbican"},
        {"source": "barbican", "secret": SECRET},
        {"source": "barbican", "project": PROJECT},
        {**SOURCES["barbican"], "url": "https://barbican"},
        {**SOURCES["barbican"], "wrapped": HEADER.key["wrapped"]},
        *({**SOURCES["barbican"], "secret": one} for one in UUIDS_THAT_ARE_NONE),
        *({**SOURCES["barbican"], "project": one} for one in ("", " ", "a/b", "-x", "x" * 65, "é", None, 1, [PROJECT])),
    ],
    "recipient": [
        {"source": "recipient"},  # sealed to nobody
        {**SOURCES["recipient-x25519"], "secret": SECRET},
        {**SOURCES["recipient-x25519"], "": X_WORD},
        *({"source": "recipient", name: X_WORD} for name in
          ("F" * 16, "0" * 15, "0" * 17, "0" * 15 + "g", " " + "0" * 15, "0" * 16 + "\n", "kek_id", "٣" * 16)),
        *({"source": "recipient", X_ID: one} for one in WORDS_THAT_ARE_NONE),
        # one that is wrong among others that are right
        *({**recipients(X25519, HYBRID), recipient_id(7): one} for one in WORDS_THAT_ARE_NONE[:6]),
    ],
    "none": [
        {"source": "none", "kek_id": "0" * 16},
        {"source": "none", "secret": SECRET, "project": PROJECT},
        {"source": "none", X_ID: X_WORD},
        {"source": "none", "": ""},
    ],
    "unknown": [
        {"source": one} for one in ("None", "NONE", "vault", "keyfile ", "recipients", "", None, 0, True, [], {})
    ],
    "of another": [
        {**key, "source": other}
        for name, key in SOURCES.items()
        for other in ("keyfile", "barbican", "recipient", "none")
        if other != name.partition("-")[0]
        and not (name == "none" and other == "none")
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, keys in WRONG.items() for n in range(len(keys))])
def test_any_other_words_of_a_key_are_refused_by_writer_and_reader(kind: str, number: int) -> None:
    key = WRONG[kind][number]
    with pytest.raises(ValueError, match=r"."):
        of(key)
    for magic in (MAGIC, MAGIC_NONE):
        with pytest.raises(ContainerDamaged, match="header"):
            decode(with_key(key, magic))


def test_a_refusal_does_not_print_what_is_sealed() -> None:
    """It would fill a log with 1.5 KiB; and a wrapped key belongs in the header alone."""
    word = b64(1167, 0x77)
    for key in ({"source": "recipient", X_ID: f"{HYBRID}:{word}"}, {**HEADER.key, "wrapped": b64(39, 0x77)}):
        with pytest.raises(ValueError, match="must be the base64 of") as told:
            of(key)
        assert "d3d3" not in str(told.value)


# ---- room -------------------------------------------------------------------------------------------------------

LONGEST = dataclasses.replace(
    HEADER, job="x" * 64, attempt="y" * 64, destination="z" * 64, created_at_s=2**53 - 1, expires_at_s=2**53 - 1,
    parent={"image": "0" * 36, "base_0": "sealed:" + "0" * 36},  # one base: more are rare, and are told when they come
)  # fmt: skip


def has_room(key: Mapping[str, str]) -> bool:
    try:
        require_room(key)
    except ValueError as exc:
        assert "bytes too long" in str(exc)  # noqa: PT017
        return False
    return True


def test_two_hybrid_recipients_have_room_and_three_have_not() -> None:
    assert has_room(recipients(HYBRID))
    assert has_room(recipients(HYBRID, HYBRID))
    assert not has_room(recipients(HYBRID, HYBRID, HYBRID))


def test_twenty_recipients_have_room_and_some_more_but_not_forty() -> None:
    """docs/format.md says "about 20"."""
    most = max(count for count in range(1, 60) if has_room(recipients(*[X25519] * count)))
    assert 20 <= most < 40
    assert all(has_room(recipients(*[X25519] * count)) for count in range(1, most + 1))


def test_what_has_room_fits_with_the_longest_of_everything_else() -> None:
    """Asked at start, so that no backup fails for it; and not stricter than need be, to the byte."""
    keys = [recipients(*([HYBRID] * hybrid + [X25519] * plain)) for hybrid in range(4) for plain in range(50)]
    decided = set()
    for key in keys[1:]:
        try:
            fits = len(encode(dataclasses.replace(LONGEST, key=key))) == HEADER_BYTES
        except ValueError:
            fits = False
        assert has_room(key) is fits
        decided.add(fits)
    assert decided == {True, False}


@pytest.mark.parametrize("name", SOURCES)
def test_a_header_is_full_to_its_last_byte_but_one_whichever_magic_it_has(name: str) -> None:
    """One NUL ends the text. A longer header would be a shorter stream to its reader."""
    bare = dataclasses.replace(HEADER, key=SOURCES[name], parent={"a": "x"})
    room = HEADER_BYTES - 1 - len(encode(bare).rstrip(b"\0"))
    names = iter("bcdefghijklmno")
    parent = {"a": "x"}
    while room > 262:  # ,"b":"..." costs 7 bytes beside the value
        value = "x" * min(255, room - 7 - 40)
        parent[next(names)] = value
        room -= 7 + len(value)
    for short, fits in ((1, True), (0, True), (-1, False), (-9, False)):
        one = dataclasses.replace(bare, parent={**parent, "z": "x" * (room - 7 - short)})
        if fits:
            data = encode(one)
            assert len(data) == HEADER_BYTES
            assert data.endswith(b"}" + bytes(1 + short))
            assert decode(data) == one
        else:
            with pytest.raises(ValueError, match=f"{-short} bytes too long"):
                encode(one)


@pytest.mark.parametrize("name", SOURCES)
def test_every_other_source_always_has_room(name: str) -> None:
    require_room(SOURCES[name])
    assert decode(encode(dataclasses.replace(LONGEST, key=SOURCES[name]))).key == SOURCES[name]


# ---- a changed bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("change", [0x01, 0x20, 0x80])
def test_an_edit_of_any_byte_opens_nothing_whatever_the_source(name: str, change: int) -> None:
    """All 4096 positions, with the key at hand: those of a bundle that is not secret included."""
    aad = encode(of(SOURCES[name]))
    stream = seal(b"", aad=aad)
    assert unseal(stream, aad=aad) == b""
    for at in range(HEADER_BYTES):
        edited = bytearray(aad)
        edited[at] ^= change
        opener = Opener(key=KEY, associated_data=bytes(edited), stream_header=stream[:40])
        assert refused(lambda: opener.open_segment(0, stream, last=True)), at  # noqa: B023


@pytest.mark.parametrize("name", SOURCES)
def test_every_bit_of_the_magic_and_the_padding_is_refused_before_any_key_is_asked_for(name: str) -> None:
    data = encode(of(SOURCES[name]))
    end = len(data.rstrip(b"\0"))
    for at, bit in itertools.product(
        [*range(len(magic_of(name))), *range(end, HEADER_BYTES, 17), HEADER_BYTES - 1], range(8)
    ):
        edited = bytearray(data)
        edited[at] ^= 1 << bit
        assert refused(lambda: decode(edited)), (at, bit)  # noqa: B023


def test_no_edit_makes_a_secret_bundle_one_that_is_not_or_the_other_way_round() -> None:
    """A restore would take the key that everybody has, and call what a forger wrote our backup."""
    plain = plaintext(5000)
    for name, other in itertools.permutations(SOURCES, 2):
        if "none" not in (name, other):
            continue
        stream = seal(plain, aad=encode(of(SOURCES[name])))
        for key in (KEY, bytes(32)):
            assert refused(lambda: unseal(stream, key=key, aad=encode(of(SOURCES[other])))), (name, other)  # noqa: B023
