"""The header has one encoding, fits in 4096 bytes, and cannot be edited."""

import dataclasses
import json
from typing import Any

import pytest
from tests.unit.container.material import AAD, HEADER, KEY, refused, seal

from autobackup.container import header
from autobackup.container.header import HEADER_BYTES, MAGIC, Header, decode, encode
from autobackup.container.unseal import Opener
from autobackup.errors import ContainerDamaged

TEXT = AAD[len(MAGIC) :].rstrip(b"\0")


def with_text(text: bytes) -> bytes:
    return (MAGIC + text).ljust(HEADER_BYTES, b"\0")


def with_fields(**changed: Any) -> bytes:
    fields = {**json.loads(TEXT), **changed}
    return with_text(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


HEADERS = [
    HEADER,
    dataclasses.replace(HEADER, expires_at_s=None, parent=None),
    dataclasses.replace(HEADER, created_at_s=0, expires_at_s=0),
    dataclasses.replace(HEADER, created_at_s=2**53 - 1, expires_at_s=2**53 - 1),
    dataclasses.replace(HEADER, job="0", attempt="a" * 64, destination="A.b_c-9"),
    dataclasses.replace(HEADER, parent={"image": 'quote " and \\ and ~ ', "sha512": "f" * 128}),
]


@pytest.mark.parametrize("one", HEADERS)
def test_a_header_comes_back_from_exactly_4096_bytes(one: Header) -> None:
    data = encode(one)
    assert len(data) == HEADER_BYTES
    assert data.startswith(b"autobackup/1\n{")
    assert data.endswith(b"}" + bytes(HEADER_BYTES - len(data.rstrip(b"\0"))))
    assert decode(data) == one
    assert encode(decode(memoryview(data))) == data


@pytest.mark.parametrize("one", HEADERS)
def test_no_byte_can_be_part_of_a_boot_signature(one: Header) -> None:
    """Glance refuses 55 AA at offset 510; a header has no byte above 0x7E anywhere."""
    assert max(encode(one)) <= 0x7E


@pytest.mark.parametrize("text", ["é", "\x7f", "\n", "\0", "\ud800", "🦊"])
def test_text_that_is_not_printable_ascii_is_refused_before_it_is_written(text: str) -> None:
    for changed in ({"job": text}, {"destination": "x" + text}, {"parent": {"image": text}}):
        with pytest.raises(ValueError, match="must match"):
            dataclasses.replace(HEADER, **changed)


def test_a_header_too_large_says_by_how_many_bytes() -> None:
    room = HEADER_BYTES - 1 - len(AAD.rstrip(b"\0"))
    parent = dict(HEADER.parent or {})
    names = iter("abcdefghijklmno")
    while room > 260:  # ,"a":"..." costs 7 bytes beside the value
        parent[next(names)] = "x" * 245
        room -= 252
    fits = dataclasses.replace(HEADER, parent={**parent, "z": "x" * (room - 7)})
    assert encode(fits)[-2:] == b"}\0"
    assert decode(encode(fits)) == fits
    for excess in (1, 2, 50):
        with pytest.raises(ValueError, match=f"{excess} bytes too long"):
            encode(dataclasses.replace(HEADER, parent={**parent, "z": "x" * (room - 7 + excess)}))


@pytest.mark.parametrize("change", [0x01, 0x20, 0x80, 0xFF])
def test_an_edit_of_any_byte_opens_nothing(change: int) -> None:
    """All 4096 positions: authentication refuses each of them, and `decode` most before that."""
    stream = seal(b"")
    undetected_by_decode = set()
    for at in range(HEADER_BYTES):
        edited = bytearray(AAD)
        edited[at] ^= change
        opener = Opener(key=KEY, associated_data=bytes(edited), stream_header=stream[:40])
        assert refused(lambda: opener.open_segment(0, stream, last=True)), at  # noqa: B023
        if not refused(lambda: decode(edited)):  # noqa: B023
            undetected_by_decode.add(at)
    # What remains are letters and digits of ids and numbers, which only authentication can know.
    assert all(chr(AAD[at]).isalnum() or AAD[at : at + 1] in b"-_./+=" for at in undetected_by_decode)
    assert undetected_by_decode.isdisjoint(range(len(MAGIC)))
    assert undetected_by_decode.isdisjoint(range(len(MAGIC) + len(TEXT), HEADER_BYTES))


@pytest.mark.parametrize("length", [0, 1, 12, 13, 512, 4095, 4097, 8192])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ContainerDamaged, match=f"{length} bytes"):
        decode(AAD.ljust(length, b"\0")[:length])


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (b"autobackup/2\n", "newer format"),
        (b"autobackup/1x", "newer format"),
        (b"autobackup/10\n", "newer format"),
        (b"autobackup-none/2\n", "newer format of unencrypted"),
        (b"QFI\xfb", "not a sealed bundle"),
        (b"Autobackup/1\n", "not a sealed bundle"),
    ],
)
def test_another_magic_is_named(start: bytes, text: str) -> None:
    with pytest.raises(ContainerDamaged, match=text):
        decode(start + AAD[len(start) :])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"3",
        TEXT + b" ",
        b" " + TEXT,
        TEXT.replace(b'":"', b'": "', 1),
        TEXT.replace(b"job-1", b"job\\u002d1"),
        TEXT.replace(b'"job"', b'"\\u006aob"'),
        TEXT.replace(b"1700000000", b"1700000000.0"),
        TEXT.replace(b"1700000000", b"1.7e9"),
        TEXT.replace(b"1700000000", b"01700000000"),
        TEXT.replace(b"1700000000", b"-0"),
        TEXT.replace(b"1700000000", b"9" * 3000),
        TEXT.replace(b"1700000000", b"NaN"),
        TEXT.replace(b"1700000000", b"true"),
        TEXT.replace(b'{"attempt"', b'{"attempt":"other","attempt"'),
        b'{"z":' + TEXT[1:],
        TEXT + TEXT,
        TEXT.replace(b"job-1", b"job-\xe9"),
        b"[" * 4000,
        b'{"a":' * 700,
    ],
)
def test_any_other_spelling_is_refused(text: bytes) -> None:
    """Deep nesting included: Python's parser answers that with a RecursionError."""
    with pytest.raises(ContainerDamaged, match="header"):
        decode(with_text(text))


def test_a_header_without_a_nul_is_refused() -> None:
    with pytest.raises(ContainerDamaged, match="no NUL"):
        decode(AAD.rstrip(b"\0").ljust(HEADER_BYTES, b" "))


def test_padding_is_nul_to_the_end() -> None:
    with pytest.raises(ContainerDamaged, match="offset 4095: padding"):
        decode(AAD[:-1] + b"\x01")


@pytest.mark.parametrize("name", sorted(json.loads(TEXT)))
def test_a_missing_member_is_refused(name: str) -> None:
    fields = json.loads(TEXT)
    del fields[name]
    with pytest.raises(ContainerDamaged, match=name):
        decode(with_text(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()))


def test_an_unknown_member_is_refused() -> None:
    with pytest.raises(ContainerDamaged, match="unknown members"):
        decode(with_fields(zebra="x"))


KEYFILE = dict(HEADER.key)
NOT_AN_ID: list[Any] = ["", " ", "-x", ".x", "a/b", "x" * 65, 1, None, ["x"]]
WRONG: dict[str, list[Any]] = {
    "job": NOT_AN_ID,
    "attempt": NOT_AN_ID,
    "destination": NOT_AN_ID,
    "instance": [
        "",
        HEADER.instance.upper(),
        HEADER.instance + "0",
        HEADER.instance.replace("-", ""),
        None,
        1,
    ],
    "created_at_s": [-1, 2**53, 1.5, "1", None, True, 1_702_592_001],
    "expires_at_s": [1_699_999_999, 2**53, "x", False, 1.0],
    "suite": ["", "AES256-GCM-HKDF-4KB", None],
    "parent": [
        *({}, [], "x", 0, {"image": ""}, {"image": 1}, {"Image": "x"}, {"": "x"}, {"image": "x" * 256}),
        {f"a{number}": "x" for number in range(17)},
    ],
    "key": [
        *({}, None, "keyfile", [], {"source": "keyfile"}),
        {"source": "keyfile", "kek_id": KEYFILE["kek_id"]},
        {**KEYFILE, "more": "x"},
        *({**KEYFILE, "source": source} for source in ("barbican", "recipient", "", None, [])),
        *({**KEYFILE, "kek_id": name} for name in (KEYFILE["kek_id"].upper(), "0" * 15, "0" * 17, 1)),
        *({**KEYFILE, "wrapped": "A" * count} for count in (0, 52, 55, 56, 60)),
        {**KEYFILE, "wrapped": KEYFILE["wrapped"] + "\n"},
        {**KEYFILE, "wrapped": KEYFILE["wrapped"][:-3] + "B=="},  # the same 40 bytes, spelled otherwise
        {**KEYFILE, "wrapped": None},
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_writer_and_reader(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        dataclasses.replace(HEADER, **{name: value})
    with pytest.raises(ContainerDamaged, match="header"):
        decode(with_fields(**{name: value}))


def test_a_header_keeps_no_hold_on_what_it_was_made_of() -> None:
    key = dict(HEADER.key)
    one = dataclasses.replace(HEADER, key=key)
    key["source"] = "changed"
    assert one.key["source"] == "keyfile"


def test_the_name_of_a_key_encryption_key_is_the_start_of_its_digest() -> None:
    assert header.kek_id(bytes(32)) == "66687aadf862bd77"
