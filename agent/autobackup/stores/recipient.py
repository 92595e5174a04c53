"""
`recipient`: the data key sealed to public keys with HPKE (RFC 9180), once for each, in the header.

The host that wrote it cannot open it, and needs no service for it. X25519, or the hybrid of ML-KEM-768 and X25519,
which stays closed to whoever records today and has a quantum computer later. A key is a PEM file: one block for
X25519, two for the hybrid; the public half is beside the private one, as FILE.pub.

Until its attempt is proven a key is remembered here, in memory alone: nobody on this host could be asked for it.
After a crash it is lost (`KeyLost`), and what was not proven yet is sent again.
"""

import os
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from autobackup.container import header
from autobackup.container.header import HYBRID, X25519
from autobackup.errors import ContainerDamaged, KeyLost, KeyRefused, KeysUnavailable, TargetExists
from autobackup.host.filesystems import sync_folder
from autobackup.model import AttemptId
from autobackup.stores.keys import KEY_BYTES, DataKey

_INFO: Final = b"autobackup/1 data key"
_BLOCK: Final = re.compile(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----\n?", re.DOTALL)
_SUITES: Final = {
    X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    HYBRID: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
_PUBLIC_PARTS: Final[Mapping[str, tuple[type, ...]]] = {
    X25519: (X25519PublicKey,),
    HYBRID: (MLKEM768PublicKey, X25519PublicKey),
}
_PRIVATE_PARTS: Final[Mapping[str, tuple[type, ...]]] = {
    X25519: (X25519PrivateKey,),
    HYBRID: (MLKEM768PrivateKey, X25519PrivateKey),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """Somebody that can be sealed to. *id* is how a header names it."""

    kem: str
    id: str
    key: Any

    @classmethod
    def read(cls, path: str) -> "PublicKey":
        """The public key in *path*."""
        kem, keys = _parsed(path, private=False)
        return cls(kem=kem, id=_id(keys), key=keys[0] if kem == X25519 else MLKEM768X25519PublicKey(*keys))


class Recipients:
    """See `stores.keys.KeySource`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._unproven: dict[AttemptId, DataKey] = {}

    async def check(self) -> None:
        self._sealed(bytes(KEY_BYTES))

    async def draw(self, attempt: AttemptId) -> DataKey:
        key = secrets.token_bytes(KEY_BYTES)
        self._unproven[attempt] = drawn = DataKey(key=key, header_words=self._sealed(key))
        return drawn

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        for drawn in self._unproven.values():
            if drawn.header_words == header_words:
                return drawn.key
        raise KeyLost("sealed to public keys: only the private key of a recipient opens it, and it is not on this host")

    async def circle(self) -> str:
        return f"recipients {' '.join(sorted(PublicKey.read(path).id for path in self._paths))}"

    async def settle(self, attempt: AttemptId) -> None:
        self._unproven.pop(attempt, None)

    async def destroy(self, attempt: AttemptId) -> None:
        self._unproven.pop(attempt, None)

    def _sealed(self, key: bytes) -> dict[str, str]:
        """The words of *key*. The files are read each time: they may have changed since the start."""
        words = {"source": "recipient"}
        for path in self._paths:
            public = PublicKey.read(path)
            if public.id in words:
                raise KeyRefused(f"recipients: two files hold the same key ({public.id}); remove {path}")
            words[public.id] = _wrapped(key, public, path)
        try:
            header.require_room(words)
        except ValueError as exc:
            raise KeyRefused(f"recipients: too many of them: {exc}; name fewer, or X25519 keys") from None
        return words


class PrivateKeys:
    """Opens what was sealed to one of the keys in *paths*. See `stores.keys.KeyOpener`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        found = []
        for path in self._paths:
            kem, keys = _parsed(path, private=True)
            name = _id([key.public_key() for key in keys])
            if name in header_words:
                key = keys[0] if kem == X25519 else MLKEM768X25519PrivateKey(*keys)
                return _opened(kem, key, header_words[name])
            found.append(f"{path} is {name}")
        to = ", ".join(sorted(header_words.keys() - {"source"}))
        raise KeyRefused(f"sealed to {to}; none of the private keys at hand is one of them: {', '.join(found)}")


def is_private_key(path: str) -> bool:
    """Whether *path* is a recipient's private key, rather than a key file."""
    try:
        with open(path, "rb") as file:
            return file.read(11) == b"-----BEGIN "
    except OSError:
        return False


def write_key_pair(path: str, *, post_quantum: bool) -> str:
    """Make *path*, 0600, and *path*.pub; returns the id. Never overwrites: `TargetExists`."""
    x25519 = X25519PrivateKey.generate()
    private, public = [_private_pem(x25519)], [_public_pem(x25519.public_key())]
    if post_quantum:
        mlkem = MLKEM768PrivateKey.generate()
        private.insert(0, _private_pem(mlkem))
        public.insert(0, _public_pem(mlkem.public_key()))
    files = ((path, private, 0o600), (f"{path}.pub", public, 0o644))
    for name, _, _ in files:
        if os.path.lexists(name):  # before the first is made: no half of a pair is left behind
            raise TargetExists(f"{name}: exists; a key is never overwritten")
    for name, blocks, mode in files:
        try:
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
        except FileExistsError:
            raise TargetExists(f"{name}: exists; a key is never overwritten") from None
        except OSError as exc:
            raise KeyRefused(f"{name}: {exc.strerror}") from None
        with open(fd, "wb") as file:
            file.write(b"".join(blocks))
            file.flush()
            os.fsync(fd)
    sync_folder(os.path.dirname(os.path.abspath(path)))
    return PublicKey.read(f"{path}.pub").id


# ---- inside ---------------------------------------------------------------------------------------------


def _wrapped(key: bytes, public: PublicKey, path: str) -> str:
    try:
        wrapped = _SUITES[public.kem].encrypt(key, public.key, info=_INFO)
    except ValueError:  # a point of small order, which no private key has
        raise KeyRefused(f"{path}: nothing can be sealed to this key; make a pair with: autobackup keygen") from None
    return f"{public.kem}:{b64encode(wrapped).decode()}"


def _blocks(path: str, *, secret: bool) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            if secret and os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyRefused(f"{path}: others may read this private key; run: chmod 600 {path}")
            return _BLOCK.findall(file.read(64 * 1024))
    except FileNotFoundError:
        raise KeysUnavailable(f"{path}: no such file; make a pair with: autobackup keygen --recipient FILE") from None
    except OSError as exc:
        raise KeysUnavailable(f"{path}: {exc.strerror}") from None


def _parsed(path: str, *, private: bool) -> tuple[str, list[Any]]:
    """(KEM, the keys that make it up). The text of an error names the file and never what is in it."""
    blocks = _blocks(path, secret=private)
    try:
        if private:
            keys: list[Any] = [serialization.load_pem_private_key(block, password=None) for block in blocks]
        else:
            keys = [serialization.load_pem_public_key(block) for block in blocks]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        keys = []
    for kem, parts in (_PRIVATE_PARTS if private else _PUBLIC_PARTS).items():
        if len(keys) == len(parts) and all(map(isinstance, keys, parts)):
            return kem, keys
    kind = "private" if private else "public"
    raise KeyRefused(f"{path}: not a {kind} key of a recipient, as autobackup keygen --recipient writes them")


def _id(public_keys: Sequence[Any]) -> str:
    return sha256(b"".join(key.public_bytes_raw() for key in public_keys)).hexdigest()[:16]


def _opened(kem: str, key: Any, word: str) -> bytes:
    try:
        opened = _SUITES[kem].decrypt(b64decode(word.removeprefix(f"{kem}:"), validate=True), key, info=_INFO)
    except (InvalidTag, ValueError):
        raise ContainerDamaged("the key in the header that is sealed to a recipient was edited or is cut") from None
    if len(opened) != KEY_BYTES:
        raise ContainerDamaged(f"the key that is sealed to a recipient is {len(opened)} bytes long, not {KEY_BYTES}")
    return opened


def _private_pem(key: Any) -> bytes:
    none = serialization.NoEncryption()
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)
    return pem


def _public_pem(key: Any) -> bytes:
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem
