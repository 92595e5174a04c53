"""
The header: the first 4096 bytes of a sealed bundle, in plaintext, naming what it is and where its key is.

These bytes are also the associated data of the sealed stream, so an edited header opens nothing. That holds
only for the bytes as they were stored: a reader passes those to `unseal`, never a re-encoded header. Every
header has exactly one encoding, and `decode` refuses all others.

What is in it is known before the first byte of a disk is read; it decides nothing about keys or retention.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from autobackup.container import Buffer
from autobackup.errors import ContainerDamaged

HEADER_BYTES: Final = 4096
MAGIC: Final = b"autobackup/1\n"
SUITE: Final = "AES256-GCM-HKDF-1MiB"
NO_INSTANCE: Final = "00000000-0000-0000-0000-000000000000"  # of a sealed base

_MAGIC_FAMILY: Final = b"autobackup/"
MAGIC_NONE: Final = b"autobackup-none/1\n"
X25519: Final = "x25519"
HYBRID: Final = "mlkem768-x25519"

_MAGIC_NONE_FAMILY: Final = b"autobackup-none/"
_MAX_TIME_S: Final = 2**53 - 1  # what every JSON reader holds exactly
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KEK_ID: Final = re.compile(r"[0-9a-f]{16}")
_PARENT_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PRINTABLE: Final = re.compile(r"[ -~]{1,255}")
_WRAPPED_KEY_BYTES: Final = 40  # AES-KWP of 32 bytes
_SEALED_KEY_BYTES: Final = {X25519: 80, HYBRID: 1168}  # HPKE of 32 bytes: encapsulated key, ciphertext, tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who was sealed, for whom, until when, and where the key is."""

    job: str
    attempt: str
    instance: str
    destination: str
    created_at_s: int
    expires_at_s: int | None
    suite: str = SUITE
    key: Mapping[str, str]
    parent: Mapping[str, str] | None

    def __post_init__(self) -> None:
        for name in ("job", "attempt", "destination"):
            _check_text(name, getattr(self, name), _ID)
        _check_text("instance", self.instance, _UUID)
        _check_time("created_at_s", self.created_at_s, minimum=0)
        if self.expires_at_s is not None:
            _check_time("expires_at_s", self.expires_at_s, minimum=self.created_at_s)
        if self.suite != SUITE:
            raise ValueError(f"suite is {self.suite!r}; this version knows {SUITE} only")
        object.__setattr__(self, "key", _checked_key(self.key))
        if self.parent is not None:
            object.__setattr__(self, "parent", _checked_parent(self.parent))


def encode(header: Header) -> bytes:
    """The 4096 bytes. A header that does not fit is an error of the configuration, known at start."""
    text = _canonical(header)
    magic = _magic(header)
    too_many = len(magic) + len(text) + 1 - HEADER_BYTES
    if too_many > 0:
        raise ValueError(f"the header is {too_many} bytes too long for its {HEADER_BYTES}")
    return (magic + text).ljust(HEADER_BYTES, b"\0")


def require_room(key: Mapping[str, str]) -> None:
    """Raise ValueError unless a header with *key* fits, whatever its other members are; of parents, for one."""
    longest, uuid = "x" * 64, "0" * 8 + "-0000" * 3 + "-" + "0" * 12
    encode(
        Header(
            job=longest, attempt=longest, instance=uuid, destination=longest,
            created_at_s=_MAX_TIME_S, expires_at_s=_MAX_TIME_S, key=key,
            parent={"image": uuid, "base_0": f"sealed:{uuid}"},
        )
    )  # fmt: skip


def decode(data: Buffer) -> Header:
    """The header in *data*, which must be its only encoding. Authentication is up to `unseal`."""
    raw = bytes(data)
    if len(raw) != HEADER_BYTES:
        raise ContainerDamaged(f"header: {len(raw)} bytes, must be {HEADER_BYTES}")
    magic = _checked_magic(raw)
    text, _, padding = raw[len(magic) :].partition(b"\0")
    if len(magic) + len(text) == HEADER_BYTES:
        raise ContainerDamaged(f"header: no NUL before offset {HEADER_BYTES}")
    if padding.strip(b"\0"):
        at = HEADER_BYTES - len(padding.lstrip(b"\0"))
        raise ContainerDamaged(f"header: offset {at}: padding is not NUL")
    header = _parsed(text, at=len(magic))
    if _canonical(header) != text:
        raise ContainerDamaged(f"header: offset {len(magic)}: JSON is not in its canonical form")
    if _magic(header) != magic:
        raise ContainerDamaged(f"header: offset 0: the magic is not the one for key source {header.key['source']!r}")
    return header


def kek_id(kek: bytes) -> str:
    """The name under which a header refers to a key-encryption key: a wrong key file is noticed by it."""
    return hashlib.sha256(kek).hexdigest()[:16]


def _magic(header: Header) -> bytes:
    return MAGIC_NONE if header.key["source"] == "none" else MAGIC


def _checked_magic(raw: bytes) -> bytes:
    for magic in (MAGIC, MAGIC_NONE):
        if raw.startswith(magic):
            return magic
    if raw.startswith(_MAGIC_FAMILY):
        raise ContainerDamaged("header: offset 0: a newer format of sealed bundle; this program reads version 1")
    if raw.startswith(_MAGIC_NONE_FAMILY):
        raise ContainerDamaged("header: offset 0: a newer format of unencrypted bundle; this program reads version 1")
    raise ContainerDamaged("header: offset 0: not a sealed bundle")


def _parsed(text: bytes, *, at: int) -> Header:
    try:
        value = json.loads(text.decode("ascii"))
    except RecursionError:
        raise ContainerDamaged(f"header: offset {at}: JSON is nested too deeply") from None
    except ValueError as exc:  # JSONDecodeError, UnicodeDecodeError and overlong integers
        raise ContainerDamaged(f"header: offset {at}: not JSON: {exc}") from None
    fields = _checked_fields(value)
    try:
        return Header(**fields)
    except ValueError as exc:
        raise ContainerDamaged(f"header: {exc}") from None


def _checked_fields(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ContainerDamaged(f"header: JSON is a {type(value).__name__}, must be an object")
    known = set(Header.__slots__)
    unknown, missing = sorted(value.keys() - known), sorted(known - value.keys())
    if unknown or missing:
        raise ContainerDamaged(f"header: unknown members {unknown}, missing members {missing}")
    return value


def _canonical(header: Header) -> bytes:
    value = {name: getattr(header, name) for name in Header.__slots__}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _check_text(name: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"{name} is {value!r}, must match {pattern.pattern}")


def _check_time(name: str, value: object, *, minimum: int) -> None:
    if type(value) is not int or not minimum <= value <= _MAX_TIME_S:  # a bool is an int, too
        raise ValueError(f"{name} is {value!r}, must be an integer from {minimum} to {_MAX_TIME_S}")


def _checked_key(key: object) -> dict[str, str]:
    if not isinstance(key, Mapping):
        raise ValueError(f"key is {key!r}, must be an object")
    source = key.get("source")
    checks = _KEY_SOURCES.get(source) if isinstance(source, str) else None
    if checks is None:
        raise ValueError(f"key source is {source!r}; this version knows {', '.join(_KEY_SOURCES)}")
    if source == "recipient":
        _check_recipients(key)
    elif key.keys() - {"source"} != checks.keys():
        raise ValueError(f"key of source {source} has members {sorted(map(str, key))}, not {sorted(checks)}")
    for name, check in checks.items():
        check(key[name])
    return dict(key)


def _check_recipients(key: Mapping[str, object]) -> None:
    """One member for each: the id of a public key, and the data key sealed to it."""
    if len(key) < 2:
        raise ValueError("key of source recipient names no recipient")
    for name in key.keys() - {"source"}:
        _check_text("a recipient's id", name, _KEK_ID)
        kem, _, text = str(key[name]).partition(":")
        if kem not in _SEALED_KEY_BYTES:
            raise ValueError(f"key.{name} is sealed by {kem!r}; this version knows {', '.join(_SEALED_KEY_BYTES)}")
        _check_base64(f"key.{name}", text, _SEALED_KEY_BYTES[kem])


def _check_kek_id(value: object) -> None:
    _check_text("key.kek_id", value, _KEK_ID)


def _check_wrapped(value: object) -> None:
    _check_base64("key.wrapped", value, _WRAPPED_KEY_BYTES)


def _check_base64(name: str, value: object, length: int) -> None:
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) and value.isascii() else b""
    except binascii.Error:
        raw = b""
    if len(raw) != length or base64.b64encode(raw).decode() != value:
        raise ValueError(f"{name} must be the base64 of {length} bytes")


def _check_secret(value: object) -> None:
    _check_text("key.secret", value, _UUID)


def _check_project(value: object) -> None:
    _check_text("key.project", value, _ID)


# What a source needs beside its name. A new source is a new row here and in docs/format.md.
_KEY_SOURCES: Final[Mapping[str, Mapping[str, Callable[[object], None]]]] = {
    "keyfile": {"kek_id": _check_kek_id, "wrapped": _check_wrapped},
    "barbican": {"secret": _check_secret, "project": _check_project},
    "recipient": {},
    "none": {},
}


def _checked_parent(parent: object) -> dict[str, str]:
    if not isinstance(parent, Mapping) or not 1 <= len(parent) <= 16:
        raise ValueError("parent must be null or an object of 1 to 16 members")
    for name, value in parent.items():
        _check_text("a name in parent", name, _PARENT_NAME)
        _check_text(f"parent.{name}", value, _PRINTABLE)
    return dict(parent)
