"""
`keyfile`, the embedded default: a 32-byte key-encryption key (KEK) in a file, as 64 hex digits and a newline. The
header carries the data key wrapped with AES-KWP (RFC 5649). Who has the file opens everything sealed under it.
"""

import os
import secrets
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from autobackup.container.header import kek_id
from autobackup.errors import ContainerDamaged, KeyRefused, KeysUnavailable, TargetExists
from autobackup.host.filesystems import sync_folder
from autobackup.model import AttemptId
from autobackup.stores.keys import KEY_BYTES, DataKey


class KeyFile:
    """The `keyfile` source. *older* still open what they sealed; nothing new is sealed with them."""

    def __init__(self, path: str, *, older: Iterable[str] = ()) -> None:
        self._path = path
        self._older = tuple(older)

    async def check(self) -> None:
        for path in (self._path, *self._older):
            read_kek(path)

    async def draw(self, attempt: AttemptId) -> DataKey:
        kek, key = read_kek(self._path), secrets.token_bytes(KEY_BYTES)
        words = {
            "source": "keyfile",
            "kek_id": kek_id(kek),
            "wrapped": b64encode(aes_key_wrap_with_padding(kek, key)).decode(),
        }
        return DataKey(key=key, header_words=words)

    async def circle(self) -> str:
        return f"keyfile {kek_id(read_kek(self._path))}"

    async def settle(self, attempt: AttemptId) -> None:
        """Nothing is remembered of a key."""

    async def destroy(self, attempt: AttemptId) -> None:
        """The wrapped key is in the header alone, and goes with it."""

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        if header_words.get("source") != "keyfile":
            raise KeyRefused(f"sealed with a key from {header_words.get('source')!r}, not from a key file")
        wanted = header_words.get("kek_id", "")
        found = []
        for path in (self._path, *self._older):
            kek = read_kek(path)
            if kek_id(kek) == wanted:  # the name of a key is public
                return _unwrap(kek, header_words.get("wrapped", ""))
            found.append(f"{path} is {kek_id(kek)}")
        words = f"none of the key files at hand is that one: {', '.join(found)}"
        raise KeyRefused(f"sealed under the key-encryption key {wanted}; {words}")


def read_kek(path: str) -> bytes:
    """The KEK in *path*. The text of an error names the file and never what is in it."""
    try:
        with open(path, "rb") as file:
            is_open_to_others = os.fstat(file.fileno()).st_mode & 0o077
            text = file.read(1024).strip()
    except FileNotFoundError:
        remedy = f"put it back, or make a first one with: autobackup keygen {path}"
        raise KeysUnavailable(f"{path}: no such key file; {remedy}") from None
    except OSError as exc:
        raise KeysUnavailable(f"{path}: {exc.strerror}") from None
    if is_open_to_others:
        raise KeyRefused(f"{path}: others may read this key file; run: chmod 600 {path}")
    try:
        kek = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        kek = b""
    if len(kek) != KEY_BYTES:
        raise KeyRefused(f"{path}: not a key file; it must hold 64 hex digits, as autobackup keygen writes them")
    return kek


def write_kek(path: str) -> str:
    """Make a new key file, mode 0600; returns its id. Never overwrites: `TargetExists`."""
    kek = secrets.token_bytes(KEY_BYTES)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise TargetExists(f"{path}: exists; a key file is never overwritten") from None
    with open(fd, "w", encoding="ascii") as file:
        file.write(kek.hex() + "\n")
        file.flush()
        os.fsync(fd)
    sync_folder(os.path.dirname(os.path.abspath(path)))  # what is sealed under it must not outlive its name
    return kek_id(kek)


def _unwrap(kek: bytes, wrapped: str) -> bytes:
    try:
        key = aes_key_unwrap_with_padding(kek, b64decode(wrapped, validate=True))
    except (InvalidUnwrap, Base64Error, ValueError):
        raise ContainerDamaged("the wrapped key in the header was edited or is cut") from None
    if len(key) != KEY_BYTES:
        raise ContainerDamaged(f"the wrapped key in the header is {len(key)} bytes long, not {KEY_BYTES}")
    return key
