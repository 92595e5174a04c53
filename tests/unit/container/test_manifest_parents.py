"""Format 2: parents are told as strictly as all the rest, and format 1 is what it was."""

import dataclasses
import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from tests.unit.container.test_manifest import (
    BASE,
    DISK,
    EMPTY,
    MANIFEST,
    add,
    as_text,
    at,
    changed,
    places,
    put,
    remove,
)

from autobackup.container.bundle import BundleReader, MemberData, MemberStart
from autobackup.container.frames import FrameReader
from autobackup.container.header import HEADER_BYTES
from autobackup.container.manifest import Manifest, ParentEntry
from autobackup.container.unseal import Unsealer
from autobackup.errors import ContainerDamaged

VECTOR: Final[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "vectors/bundle.json").read_text())
FIRST: Final = ParentEntry(
    name="da39",
    path="/var/lib/nova/instances/_base/da39",
    format="qcow2",
    size_bytes=1 << 40,
    sha256="0123456789abcdef" * 4,
    backing_path="/srv/größe 🦊",
    image="0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11",
    image_hash="sha512:" + "a" * 128,
)
SECOND: Final = ParentEntry(
    name="größe 🦊", path="/srv/größe 🦊", format="raw", size_bytes=0, sha256=None, backing_path=None, image="",
    image_hash="",
)  # fmt: skip
STANDING: Final = dataclasses.replace(DISK, backing=None)
CHAIN: Final = dataclasses.replace(
    MANIFEST, format="autobackup-bundle/2", disks=(STANDING,), bases=(), parents=(FIRST, SECOND)
)
NULLABLE: Final = {"backing": str, "backing_path": str, "sha256": str}


def refused(text: bytes) -> None:
    with pytest.raises(ContainerDamaged, match=r"manifest\.json"):
        Manifest.decode(text)


def parent(**how: object) -> Callable[[], Manifest]:
    return lambda: dataclasses.replace(CHAIN, parents=(dataclasses.replace(FIRST, **how), SECOND))  # type: ignore[arg-type]


# ---- the two formats --------------------------------------------------------------------------------------


def test_a_record_with_parents_comes_back() -> None:
    text = CHAIN.encode()
    assert Manifest.decode(text) == CHAIN
    assert Manifest.decode(text).encode() == text == as_text(json.loads(text))
    assert text.isascii()


def test_a_bundle_can_hold_some_bases_and_stand_on_others() -> None:
    mixed = dataclasses.replace(CHAIN, disks=(STANDING, dataclasses.replace(DISK, member="disks/other")), bases=(BASE,))
    assert Manifest.decode(mixed.encode()) == mixed
    assert mixed.members.keys() == {"disks/disk", "disks/other", BASE.member, "domain.xml"}, "parents are no members"


@pytest.mark.parametrize("record", [MANIFEST, EMPTY])
def test_without_parents_it_is_format_1_to_the_byte(record: Manifest) -> None:
    """Readers of before know no such member, and refuse what they do not know."""
    value = json.loads(record.encode())
    assert (value["format"], "parents" in value) == ("autobackup-bundle/1", False)
    refused(as_text({**value, "parents": []}))
    refused(as_text({**value, "parents": None}))


def test_neither_format_goes_with_the_others_members() -> None:
    with_parents, without = json.loads(CHAIN.encode()), json.loads(EMPTY.encode())
    assert with_parents["format"] == "autobackup-bundle/2"
    refused(as_text({**with_parents, "format": "autobackup-bundle/1"}))
    refused(as_text({**without, "format": "autobackup-bundle/2"}))
    refused(as_text({**without, "format": "autobackup-bundle/2", "parents": []}))
    refused(as_text({key: value for key, value in with_parents.items() if key != "parents"}))
    for other in ("autobackup-bundle/0", "autobackup-bundle/3", "autobackup-bundle/02", "2", ""):
        refused(as_text({**with_parents, "format": other}))
        refused(as_text({**without, "format": other}))


def test_what_our_own_reader_would_refuse_is_not_made() -> None:
    for how in ({"format": "autobackup-bundle/1"}, {"parents": ()}, {"parents": (FIRST, FIRST)}):
        with pytest.raises(ValueError, match="parent"):
            dataclasses.replace(CHAIN, **how)
    with pytest.raises(ValueError, match="parents"):
        dataclasses.replace(MANIFEST, parents=(FIRST,))


# ---- one spelling -----------------------------------------------------------------------------------------


def test_every_member_must_be_there() -> None:
    paths = [path for path in places(json.loads(CHAIN.encode())) if path and isinstance(path[-1], str)]
    assert sum(path[0] == "parents" for path in paths) == 1 + 2 * len(ParentEntry.__slots__)
    for path in paths:
        if path[:1] != ("facts",) or len(path) == 1:
            refused(changed(CHAIN, path, remove))


def test_an_unknown_member_is_refused_in_a_parent() -> None:
    for number in range(len(CHAIN.parents)):
        refused(changed(CHAIN, ("parents", number), add))


@pytest.mark.parametrize("wrong", [None, True, 1.5, "1", "", 1, -(2**64), [], {}, [1], {"x": 1}, ["x"]])
def test_a_value_of_another_type_is_refused_in_every_place(wrong: Any) -> None:
    text = json.loads(CHAIN.encode())
    for path in places(text):
        right = at(text, path)
        can_be = NULLABLE.get(str(path[-1])) if path else None
        if not path or path[0] != "parents" or type(right) is type(wrong):
            continue
        if can_be is not None and (wrong is None or (isinstance(wrong, can_be) and path[-1] != "sha256")):
            continue
        refused(changed(CHAIN, path, put(wrong)))


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("format", "vmdk"),
        ("format", ""),
        ("size_bytes", -1),
        ("size_bytes", 2**63),
        ("sha256", ""),
        ("sha256", "0" * 63),
        ("sha256", "0" * 65),
        ("sha256", "A" * 64),
        ("sha256", "g" * 64),
        ("sha256", "0" * 63 + "\n"),
        ("sha256", "sha256:" + "0" * 57),
        ("image", "a b"),
        ("image", "a/b"),
        ("image", "größe"),
        ("image", "x" * 256),
        ("image", "x\n"),
        ("image_hash", "sha512:\0"),
        ("image_hash", "x" * 256),
        ("path", SECOND.path),
    ],
)
def test_a_value_that_cannot_be_is_refused(member: str, value: object) -> None:
    refused(changed(CHAIN, ("parents", 0, member), put(value)))
    with pytest.raises(ValueError, match=r"."):
        parent(**{member: value})().encode()


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_what_can_be_is_taken(sha256: str | None) -> None:
    size_bytes = 0 if sha256 is None else 2**63 - 1
    for how in (
        {"image": "", "image_hash": ""},
        {"image": "x" * 255, "image_hash": "md5:" + "0" * 32},
        {"format": "unknown"},
        {"backing_path": None, "name": ""},
    ):
        record = parent(sha256=sha256, size_bytes=size_bytes, **how)()
        assert Manifest.decode(record.encode()) == record


def test_an_unread_parent_has_no_size() -> None:
    """So that no reader takes a size for known where the digest is not."""
    refused(changed(CHAIN, ("parents", 1, "size_bytes"), put(1)))


def test_a_chain_that_goes_round_is_refused() -> None:
    """No file stands on itself; a reader that follows one would never end."""
    refused(changed(CHAIN, ("parents", 0, "backing_path"), put(FIRST.path)))
    refused(changed(CHAIN, ("parents", 1, "backing_path"), put(FIRST.path)))
    refused(changed(MANIFEST, ("bases", 0, "backing"), put(BASE.member)))


def test_any_other_spelling_is_refused() -> None:
    text = CHAIN.encode()
    value = json.loads(text)
    turned = {**value, "parents": [dict(reversed(one.items())) for one in value["parents"]]}
    for other in (
        text[:-1],
        text + b"\n",
        text.replace(b'"parents": [', b'"parents":[', 1),
        text.replace(b'"sha256": null', b'"sha256": null ', 1),
        text.replace(b"\\ud83e\\udd8a", "🦊".encode()),
        text.replace(b"1099511627776", b"1099511627776.0"),
        text.replace(b"1099511627776", b"1.099511627776e12"),
        text.replace(b'"size_bytes": 0', b'"size_bytes": -0'),
        text.replace(b'"name": "da39"', b'"name": "da39", "name": "da39"'),
        json.dumps(value, sort_keys=True, indent=3).encode() + b"\n",
        json.dumps(turned, indent=2).encode() + b"\n",
    ):
        assert other != text
        refused(other)


# ---- what was written before ------------------------------------------------------------------------------


def test_the_published_vector_is_read_and_made_as_before() -> None:
    sealed = b64decode(VECTOR["sealed"])
    unsealer, frames, reader = (
        Unsealer(key=bytes.fromhex(VECTOR["key"]), associated_data=sealed[:HEADER_BYTES]),
        FrameReader(),
        BundleReader(),
    )
    stream = b"".join([*map(bytes, unsealer.push(sealed[HEADER_BYTES:])), unsealer.finish()])
    found: dict[str, bytes] = {}
    for event in reader.push(b"".join(frames.push(stream))):
        if isinstance(event, MemberStart):
            found[event.name] = b""
        elif isinstance(event, MemberData):
            found[list(found)[-1]] += bytes(event.data)
    old = Manifest.decode(found["manifest.json"])
    assert (old.format, old.parents) == ("autobackup-bundle/1", ())
    assert old.encode() == found["manifest.json"]
