"""The records have one encoding each, and say nothing that the reader did not understand."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.container.material import HEADER

from autobackup.container.bundle import MAX_RECORD_BYTES
from autobackup.container.manifest import (
    Digest,
    Digests,
    DiskEntry,
    FileEntry,
    Health,
    Manifest,
    NotCaptured,
    Unreadable,
    check_bundle,
)
from autobackup.errors import ContainerDamaged

DISK = DiskEntry(
    name="disk",
    member="disks/disk",
    format="qcow2",
    size_bytes=1 << 30,
    source_path="/var/lib/nova/instances/6a0b/disk",
    inode=2**63 - 1,
    mtime_ns=1_700_000_000_123_456_789,
    backing="bases/da39",
    backing_path="/var/lib/nova/instances/_base/da39",
    chain_source="libvirt",
)
BASE = dataclasses.replace(
    DISK, name="da39", member="bases/da39", format="raw", size_bytes=5, backing=None, backing_path=None
)
MANIFEST = Manifest(
    job=HEADER.job,
    instance=HEADER.instance,
    instance_name='café 🦊 "quoted" \\ \x01 \x7f',
    host="compute-1",
    captured_at_s=1_700_000_000,
    verdict="terminated",
    verdict_reason="Nova says deleted",
    disks=(DISK,),
    bases=(BASE,),
    files=(FileEntry(member="domain.xml", size_bytes=7, source_path=""),),
    not_captured=(NotCaptured(what="nvram", why="another filesystem"),),
    facts={"flavor": "m1.small", "a": "b"},
)
READ = {
    "manifest.json": Digest(size_bytes=900, sha256="1" * 64),
    "disks/disk": Digest(size_bytes=1 << 30, sha256="2" * 64),
    "bases/da39": Digest(size_bytes=5, sha256="3" * 64),
    "domain.xml": Digest(size_bytes=7, sha256="4" * 64),
}
DIGESTS = Digests(
    members=READ,
    unreadable=(Unreadable(member="disks/disk", offset_bytes=0, length_bytes=1 << 30),),
    health=(Health(member="disks/disk", tool="qemu-img check", result="ok", detail=""),),
)
EMPTY = dataclasses.replace(MANIFEST, disks=(), bases=(), files=(), not_captured=(), facts={})
RECORDS: list[Any] = [MANIFEST, EMPTY, DIGESTS, Digests(members={}, unreadable=(), health=())]


def as_text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=2).encode() + b"\n"


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


def changed(record: Any, path: tuple[str | int, ...], change: Callable[[Any, Any], None]) -> bytes:
    value = json.loads(record.encode())
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    change(parent, path[-1])
    return as_text(value)


def remove(parent: Any, key: Any) -> None:
    del parent[key]


def put(value: object) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    return change


def add(parent: Any, key: Any) -> None:
    parent[key]["zebra"] = "x"


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_comes_back(record: Any) -> None:
    text = record.encode()
    assert type(record).decode(text) == record
    assert type(record).decode(text).encode() == text == as_text(json.loads(text))
    assert text.isascii()


@pytest.mark.parametrize("record", [MANIFEST, DIGESTS])
def test_every_member_must_be_there(record: Any) -> None:
    for path in places(json.loads(record.encode())):
        free = path[:1] == ("facts",) and len(path) == 2  # a missing fact is no fault
        if path and isinstance(path[-1], str) and path[:-1] != ("members",) and not free:
            with pytest.raises(ContainerDamaged, match="json"):
                type(record).decode(changed(record, path, remove))


@pytest.mark.parametrize("record", [MANIFEST, DIGESTS])
def test_an_unknown_member_is_refused_at_every_level(record: Any) -> None:
    text = json.loads(record.encode())
    objects = [path for path in places(text) if path and isinstance(at(text, path), dict)]
    assert len(objects) > 3
    for path in objects:
        if path == ("facts",):
            continue
        with pytest.raises(ContainerDamaged, match="json"):
            type(record).decode(changed(record, path, add))
    with pytest.raises(ContainerDamaged, match="zebra"):
        type(record).decode(as_text({**text, "zebra": "x"}))


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


@pytest.mark.parametrize("record", [MANIFEST, DIGESTS])
@pytest.mark.parametrize("wrong", [None, True, 1.5, "1", "", 1, -(2**64), [], {}, [1], {"x": 1}, ["x"]])
def test_a_value_of_another_type_is_refused_in_every_place(record: Any, wrong: Any) -> None:
    text = json.loads(record.encode())
    for path in places(text):
        right = at(text, path)
        nullable = path[-1:] in (("backing",), ("backing_path",))
        if not path or type(right) is type(wrong) or (nullable and isinstance(wrong, (str, type(None)))):
            continue
        with pytest.raises(ContainerDamaged, match="json"):
            type(record).decode(changed(record, path, put(wrong)))


@pytest.mark.parametrize(
    ("record", "path", "value"),
    [
        (MANIFEST, ("format",), "autobackup-bundle/2"),
        (MANIFEST, ("captured_at_s",), -1),
        (MANIFEST, ("captured_at_s",), 2**63),
        (MANIFEST, ("disks", 0, "format"), "vmdk"),
        (MANIFEST, ("disks", 0, "chain_source"), "guess"),
        (MANIFEST, ("disks", 0, "size_bytes"), -1),
        (MANIFEST, ("disks", 0, "mtime_ns"), 2**63),
        (MANIFEST, ("disks", 0, "member"), "bases/disk"),
        (MANIFEST, ("disks", 0, "member"), "disks/../x"),
        (MANIFEST, ("disks", 0, "backing"), "bases/other"),
        (MANIFEST, ("bases", 0, "member"), "disks/da39"),
        (MANIFEST, ("files", 0, "member"), "disks/disk"),
        (MANIFEST, ("files", 0, "member"), "disks/more"),
        (MANIFEST, ("files", 0, "member"), "manifest.json"),
        (MANIFEST, ("files", 0, "member"), "digests.json"),
        (MANIFEST, ("files", 0, "member"), "/etc/passwd"),
        (DIGESTS, ("algorithm",), "md5"),
        (DIGESTS, ("members", "../x"), {"size_bytes": 1, "sha256": "0" * 64}),
        (DIGESTS, ("members", "digests.json"), {"size_bytes": 1, "sha256": "0" * 64}),
        (DIGESTS, ("members", "disks/disk", "sha256"), "A" * 64),
        (DIGESTS, ("members", "disks/disk", "sha256"), "0" * 63),
        (DIGESTS, ("members", "disks/disk", "size_bytes"), -1),
        (DIGESTS, ("unreadable", 0, "member"), "disks/other"),
        (DIGESTS, ("unreadable", 0, "offset_bytes"), 1),
        (DIGESTS, ("unreadable", 0, "offset_bytes"), -1),
        (DIGESTS, ("unreadable", 0, "length_bytes"), 0),
        (DIGESTS, ("health", 0, "member"), "x"),
    ],
)
def test_a_value_that_cannot_be_is_refused(record: Any, path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(ContainerDamaged, match="json"):
        type(record).decode(changed(record, path, put(value)))


def test_a_member_is_listed_once() -> None:
    with pytest.raises(ValueError, match="twice: disks/disk"):
        dataclasses.replace(MANIFEST, disks=(DISK, DISK))
    with pytest.raises(ValueError, match=r"twice: domain\.xml"):
        dataclasses.replace(MANIFEST, files=(*MANIFEST.files, *MANIFEST.files))


@pytest.mark.parametrize("record", RECORDS)
def test_any_other_spelling_is_refused(record: Any) -> None:
    text = record.encode()
    value = json.loads(text)
    others = [
        text[:-1],
        text + b"\n",
        b" " + text,
        b"\xef\xbb\xbf" + text,
        text.replace(b"\n", b"\r\n"),
        text.replace(b": ", b":", 1),
        json.dumps(value, sort_keys=True).encode() + b"\n",
        json.dumps(value, indent=2).encode() + b"\n" if list(value) != sorted(value) else b"",
        json.dumps(value, sort_keys=True, indent=4).encode() + b"\n",
        text.replace(b"{", b'{\n  "algorithm": "sha256",', 1) if b"sha256" in text else text.replace(b"{", b"{{", 1),
        text.replace(b"a", b"\\u0061", 1),
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff" * 100,
        bytes(100),
        b"9" * 10_000,
    ]
    for other in others:
        with pytest.raises(ContainerDamaged, match="json"):
            type(record).decode(other)


def test_non_ascii_is_escaped_and_only_so() -> None:
    text = MANIFEST.encode()
    assert b"caf\\u00e9 \\ud83e\\udd8a" in text
    with pytest.raises(ContainerDamaged, match="canonical"):
        Manifest.decode(text.replace(b"\\u00e9", "é".encode()))
    with pytest.raises(ContainerDamaged, match="canonical"):
        Manifest.decode(text.replace(b"\\u00e9", b"\\u00E9"))


def test_what_our_own_reader_would_refuse_is_not_written() -> None:
    """It must show while the disk is still there, not at a restore."""
    wrong: list[dict[str, Any]] = [
        {"instance_name": "\udc80"},
        {"host": None},
        {"facts": {"a": 1}},
        {"captured_at_s": True},
        {"captured_at_s": 1.0},
        {"verdict": 1},
        {"disks": (dataclasses.replace(DISK, format="vmdk"),)},  # type: ignore[arg-type]
        {"disks": (dataclasses.replace(DISK, source_path="/a\udcff"),)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match=r"."):
            dataclasses.replace(MANIFEST, **change).encode()


def test_a_record_too_large_is_neither_written_nor_read() -> None:
    large = dataclasses.replace(MANIFEST, verdict_reason="x" * MAX_RECORD_BYTES)
    with pytest.raises(ValueError, match="at most"):
        large.encode()
    with pytest.raises(ContainerDamaged, match="at most"):
        Manifest.decode(MANIFEST.encode().ljust(MAX_RECORD_BYTES + 1))


def test_a_record_keeps_no_hold_on_what_it_was_made_of() -> None:
    facts, members = {"a": "b"}, dict(READ)
    manifest = dataclasses.replace(MANIFEST, facts=facts)
    digests = dataclasses.replace(DIGESTS, members=members)
    facts.clear()
    members.clear()
    assert manifest.facts == {"a": "b"}
    assert digests.members == READ


def test_room_can_be_reserved_for_the_digests() -> None:
    """A bundle whose length was announced must have it, whatever the checks had to say."""
    plain = DIGESTS.encode()
    for length in (len(plain), len(plain) + 1, len(plain) + 1000):
        padded = DIGESTS.encode(pad_to_bytes=length)
        assert len(padded) == length
        assert padded.endswith(b"\n")
        assert Digests.decode(padded) == DIGESTS
        assert json.loads(padded) == json.loads(plain)
    with pytest.raises(ValueError, match="were reserved"):
        DIGESTS.encode(pad_to_bytes=len(plain) - 1)


@pytest.mark.parametrize("padding", [b"\t", b"\n", b"\r", b"\0", b" x"])
def test_room_is_filled_with_spaces_only(padding: bytes) -> None:
    with pytest.raises(ContainerDamaged, match="json"):
        Digests.decode(DIGESTS.encode()[:-1] + padding + b"\n")
    with pytest.raises(ContainerDamaged, match="json"):
        Digests.decode(DIGESTS.encode(pad_to_bytes=5000)[:-1] + b" ")


def test_header_records_and_content_must_agree() -> None:
    digests = dataclasses.replace(DIGESTS, unreadable=(), health=())
    check_bundle(header=HEADER, manifest=MANIFEST, digests=digests, read=READ)
    other = Digest(size_bytes=5, sha256="f" * 64)
    wrong: list[dict[str, Any]] = [
        {"header": dataclasses.replace(HEADER, job="job-2")},
        {"header": dataclasses.replace(HEADER, instance=HEADER.instance.replace("6", "7"))},
        {"manifest": dataclasses.replace(MANIFEST, files=())},
        {"manifest": dataclasses.replace(MANIFEST, disks=(dataclasses.replace(DISK, size_bytes=1),))},
        {"manifest": dataclasses.replace(MANIFEST, disks=(DISK, dataclasses.replace(DISK, member="disks/x")))},
        {"digests": dataclasses.replace(digests, members={**READ, "bases/da39": other})},
        {"digests": dataclasses.replace(digests, members={**READ, "console.log": other})},
        {"digests": dataclasses.replace(digests, members={})},
        {"read": {**READ, "bases/da39": other}},
        {"read": {**READ, "bases/da39": Digest(size_bytes=6, sha256="3" * 64)}},
        {"read": {**READ, "console.log": other}},
        {"read": {name: digest for name, digest in READ.items() if name != "disks/disk"}},
        {"read": {name: digest for name, digest in READ.items() if name != "manifest.json"}},
    ]
    for change in wrong:
        with pytest.raises(ContainerDamaged, match="json"):
            check_bundle(**{"header": HEADER, "manifest": MANIFEST, "digests": digests, "read": READ, **change})
