"""
The source `recipient`: what a host seals to public keys is opened by any one of the private keys, and by nothing else.

Two readers that share no code with ours open it, too: Tink's HPKE, and RFC 9180 written down here from the text of
docs/format.md, the hybrid KEM included.
"""

import asyncio
import base64
import gc
import json
import os
import stat
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Mapping
from hashlib import sha3_256, sha256
from pathlib import Path

import pytest
import tink
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from tink import hybrid, proto_keyset_format, secret_key_access
from tink.proto import hpke_pb2, tink_pb2

from autobackup.container.header import HYBRID, X25519, Header, decode, encode
from autobackup.errors import (
    AutobackupError,
    ContainerDamaged,
    KeyLost,
    KeyRefused,
    KeysUnavailable,
    TargetExists,
)
from autobackup.model import AttemptId
from autobackup.stores.keys import DataKey
from autobackup.stores.recipient import PrivateKeys, PublicKey, Recipients, is_private_key, write_key_pair

ATTEMPT = AttemptId("11111111-2222-3333-4444-555555555555")
OTHER = AttemptId("99999999-2222-3333-4444-555555555555")
INFO = b"autobackup/1 data key"
KEMS = {X25519: False, HYBRID: True}  # whether --post-quantum was said


def pair(folder: Path, name: str, kem: str = X25519) -> Path:
    """The private file; the public one is beside it."""
    write_key_pair(str(folder / name), post_quantum=KEMS[kem])
    return folder / name


def public(path: Path) -> str:
    return f"{path}.pub"


def id_of(path: Path) -> str:
    return PublicKey.read(public(path)).id


async def drawn_to(*private: Path) -> DataKey:
    return await Recipients([public(path) for path in private]).draw(ATTEMPT)


def opener(*private: Path) -> PrivateKeys:
    return PrivateKeys([str(path) for path in private])


async def refused(call: Awaitable[object]) -> AutobackupError:
    with pytest.raises(AutobackupError) as told:
        await call
    return told.value


def sealed_to(words: Mapping[str, str], name: str) -> tuple[str, bytes]:
    kem, _, text = words[name].partition(":")
    return kem, base64.b64decode(text, validate=True)


def with_sealed(words: Mapping[str, str], name: str, wrapped: bytes) -> dict[str, str]:
    return {**words, name: f"{words[name].partition(':')[0]}:{base64.b64encode(wrapped).decode()}"}


def in_a_header(words: Mapping[str, str]) -> Header:
    return Header(
        job="job", attempt=ATTEMPT, instance="6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e", destination="vault",
        created_at_s=0, expires_at_s=None, key=words, parent=None,
    )  # fmt: skip


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kem", KEMS)
def test_a_private_key_is_for_its_owner_alone_and_the_public_one_is_not_secret(tmp_path: Path, kem: str) -> None:
    for umask in (0o022, 0, 0o077):
        before = os.umask(umask)
        try:
            path = pair(tmp_path, f"key{umask}", kem)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(public(path)).stat().st_mode) == 0o644 & ~umask
        assert b"PRIVATE" in path.read_bytes()
        assert b"PRIVATE" not in Path(public(path)).read_bytes()
        assert is_private_key(str(path))


@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("there", ["", ".pub"])
def test_neither_half_of_a_pair_is_ever_overwritten_or_left_alone(tmp_path: Path, kem: str, there: str) -> None:
    """Half a pair would look like a key whose public half somebody lost."""
    (tmp_path / f"key{there}").write_bytes(b"precious")
    with pytest.raises(TargetExists, match=f"key{there}: exists; a key is never overwritten"):
        pair(tmp_path, "key", kem)
    assert os.listdir(tmp_path) == [f"key{there}"]
    assert (tmp_path / f"key{there}").read_bytes() == b"precious"


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetExists):
        pair(tmp_path, "key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeyRefused, match=r"No such file or directory"):
        pair(tmp_path / "absent", "key")


@pytest.mark.parametrize("kem", KEMS)
def test_the_files_are_those_that_the_format_describes(tmp_path: Path, kem: str) -> None:
    """PKCS #8 and SubjectPublicKeyInfo; the id is the start of the digest over the raw public key, ML-KEM's first."""
    path = pair(tmp_path, "key", kem)
    private = [serialization.load_pem_private_key(b, None) for b in pem_blocks(path)]
    shown = [serialization.load_pem_public_key(b) for b in pem_blocks(Path(public(path)))]
    kinds = [X25519PrivateKey] if kem == X25519 else [MLKEM768PrivateKey, X25519PrivateKey]
    assert len(private) == len(kinds)
    assert all(map(isinstance, private, kinds))
    raw = [key.public_bytes_raw() for key in shown]  # type: ignore[union-attr]
    assert raw == [key.public_key().public_bytes_raw() for key in private]  # type: ignore[union-attr]
    assert [len(one) for one in raw] == ([32] if kem == X25519 else [1184, 32])
    assert id_of(path) == sha256(b"".join(raw)).hexdigest()[:16]


def pem_blocks(path: Path) -> list[bytes]:
    return [b"-----BEGIN" + block for block in path.read_bytes().split(b"-----BEGIN")[1:]]


@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o601, 0o660, 0o666, 0o700 | 0o004])
async def test_a_private_key_that_others_may_read_is_refused_with_the_remedy(
    tmp_path: Path, kem: str, mode: int
) -> None:
    path = pair(tmp_path, "key", kem)
    drawn = await drawn_to(path)
    path.chmod(mode)
    error = await refused(opener(path).fetch(drawn.header_words))
    assert isinstance(error, KeyRefused)
    assert f"chmod 600 {path}" in str(error)
    path.chmod(0o400)
    assert await opener(path).fetch(drawn.header_words) == drawn.key


def not_keys(folder: Path) -> dict[str, bytes]:
    x25519, mlkem = X25519PrivateKey.generate(), MLKEM768PrivateKey.generate()
    nist = ec.generate_private_key(ec.SECP256R1())
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    locked = serialization.BestAvailableEncryption(b"password")
    private_x, private_m = x25519.private_bytes(pem, pkcs8, none), mlkem.private_bytes(pem, pkcs8, none)
    public_x = x25519.public_key().public_bytes(pem, spki)
    public_m = mlkem.public_key().public_bytes(pem, spki)
    unknown = (
        x25519.public_key().public_bytes(serialization.Encoding.DER, spki).replace(b"\x2b\x65\x6e", b"\x2b\x65\x01")
    )
    return {
        "empty": b"",
        "text": b"hello",
        "a kek": b"11" * 32 + b"\n",
        "cut": private_x[:60],
        "cut base64": private_x.replace(b"MC4C", b"MC4"),
        "locked": x25519.private_bytes(pem, pkcs8, locked),
        "another curve, private": nist.private_bytes(pem, pkcs8, none),
        "another curve, public": nist.public_key().public_bytes(pem, spki),
        "an algorithm that nobody knows": (
            b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(unknown) + b"\n-----END PUBLIC KEY-----\n"
        ),
        "an algorithm that nobody knows, private": (
            b"-----BEGIN PRIVATE KEY-----\n"
            + base64.b64encode(bytes.fromhex("302e020100300506032b650104220420") + bytes(32))
            + b"\n-----END PRIVATE KEY-----\n"
        ),
        "half of a hybrid, private": private_m,
        "half of a hybrid, public": public_m,
        "the other order, private": private_x + private_m,
        "the other order, public": public_x + public_m,
        "two of a kind, private": private_x * 2,
        "two of a kind, public": public_x * 2,
        "one too many": private_m + private_x * 2,
        "a certificate": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "both halves in one": private_x + public_x,
        "large": b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 200_000,
    }  # fmt: skip


@pytest.mark.parametrize("name", not_keys(Path()))
async def test_what_is_no_key_is_refused_by_name_and_nothing_of_it_is_shown(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / "key", not_keys(tmp_path)[name]
    path.touch(mode=0o600)
    path.write_bytes(content)
    for call in (
        Recipients([str(path)]).check(),
        Recipients([str(path)]).draw(ATTEMPT),
        opener(path).fetch({"source": "recipient", "0" * 16: ""}),
    ):
        error = await refused(call)
        assert isinstance(error, KeyRefused)
        assert str(error).startswith(f"{path}: ")
        assert "keygen --recipient" in str(error)
        for line in content.splitlines():
            assert len(line) < 12 or line.decode() not in str(error)


@pytest.mark.parametrize("kem", KEMS)
async def test_the_halves_of_a_pair_are_not_taken_for_each_other(tmp_path: Path, kem: str) -> None:
    """A private key on the host that writes would undo the reason for having one."""
    path = pair(tmp_path, "key", kem)
    Path(public(path)).chmod(0o600)
    error = await refused(Recipients([str(path)]).check())
    assert str(error).startswith(f"{path}: not a public key of a recipient")
    error = await refused(PrivateKeys([public(path)]).fetch({}))
    assert str(error).startswith(f"{path}.pub: not a private key of a recipient")


@pytest.mark.parametrize("point", [0, 1])
async def test_a_public_key_that_no_private_key_has_is_refused_by_name(tmp_path: Path, point: int) -> None:
    """X25519 of a point of small order is zero for everybody: what is sealed to it is sealed to all."""
    path = tmp_path / "nobody.pub"
    path.write_bytes(
        X25519PublicKey.from_public_bytes(point.to_bytes(32, "little")).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    for call in (Recipients([str(path)]).check(), Recipients([str(path)]).draw(ATTEMPT)):
        error = await refused(call)
        assert isinstance(error, KeyRefused)
        assert str(error).startswith(f"{path}: nothing can be sealed to this key")


async def test_a_file_that_is_not_there_is_waited_for_with_the_remedy(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for call in (Recipients([str(absent)]).check(), Recipients([str(absent)]).draw(ATTEMPT), opener(absent).fetch({})):
        error = await refused(call)
        assert isinstance(error, KeysUnavailable)
        assert f"{absent}: no such file" in str(error)
        assert "autobackup keygen --recipient" in str(error)
    assert isinstance(await refused(Recipients([str(tmp_path)]).check()), KeysUnavailable)
    assert not is_private_key(str(absent))


# ---- who opens what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kems", [(X25519,), (HYBRID,), (X25519, X25519, X25519), (HYBRID, X25519), (HYBRID, HYBRID)])
async def test_each_recipient_opens_alone_and_nobody_else_does(tmp_path: Path, kems: tuple[str, ...]) -> None:
    private = [pair(tmp_path, f"key{n}", kem) for n, kem in enumerate(kems)]
    strangers = [pair(tmp_path, f"stranger{n}", kem) for n, kem in enumerate(KEMS)]
    drawn = await drawn_to(*private)

    assert len(drawn.key) == 32
    assert set(drawn.header_words) == {"source", *map(id_of, private)}
    assert decode(encode(in_a_header(drawn.header_words))).key == drawn.header_words
    for path in private:
        assert await opener(path).fetch(drawn.header_words) == drawn.key
        assert await opener(*strangers, path).fetch(drawn.header_words) == drawn.key
    error = await refused(opener(*strangers).fetch(drawn.header_words))
    assert isinstance(error, KeyRefused)
    for path in strangers:
        assert f"{path} is {id_of(path)}" in str(error)
    for path in private:
        assert id_of(path) in str(error)


async def test_a_key_opens_only_what_was_sealed_to_it_even_under_its_name(tmp_path: Path) -> None:
    """An edited header may name anybody; the id is no proof of anything."""
    for kem in KEMS:
        ours, theirs = pair(tmp_path, f"ours-{kem}", kem), pair(tmp_path, f"theirs-{kem}", kem)
        drawn = await drawn_to(theirs)
        moved = {"source": "recipient", id_of(ours): drawn.header_words[id_of(theirs)]}
        assert isinstance(await refused(opener(ours).fetch(moved)), ContainerDamaged)


@pytest.mark.parametrize(("kem", "other"), [(X25519, HYBRID), (HYBRID, X25519)])
async def test_a_word_of_the_other_kind_is_damage_and_no_accident(tmp_path: Path, kem: str, other: str) -> None:
    """A valid header may say so, and it is read before anything of it is authenticated."""
    path, stranger = pair(tmp_path, "key", kem), pair(tmp_path, "stranger", other)
    drawn = await drawn_to(stranger)
    words = {"source": "recipient", id_of(path): drawn.header_words[id_of(stranger)]}
    assert decode(encode(in_a_header(words))).key == words
    assert isinstance(await refused(opener(path).fetch(words)), ContainerDamaged)


@pytest.mark.parametrize("kem", KEMS)
async def test_an_edited_sealed_key_opens_nothing_whichever_byte(tmp_path: Path, kem: str) -> None:
    path = pair(tmp_path, "key", kem)
    words = (await drawn_to(path)).header_words
    name = id_of(path)
    said, wrapped = sealed_to(words, name)
    assert said == kem
    assert len(wrapped) == {X25519: 80, HYBRID: 1168}[kem]
    # of the hybrid: ML-KEM's ciphertext sampled, then all of X25519's part, the data key and the tag
    positions = [*range(0, len(wrapped) - 80, 41), *range(max(0, len(wrapped) - 80), len(wrapped))]
    for at in positions:
        for bit in (0x01, 0x80):
            edited = wrapped[:at] + bytes([wrapped[at] ^ bit]) + wrapped[at + 1 :]
            error = await refused(opener(path).fetch(with_sealed(words, name, edited)))
            assert isinstance(error, ContainerDamaged), at
    for other in (
        b"",
        wrapped[:-1],
        wrapped[1:],
        wrapped + b"\0",
        wrapped[::-1],
        bytes(len(wrapped)),
        b"\xff" * len(wrapped),
    ):
        error = await refused(opener(path).fetch(with_sealed(words, name, other)))
        assert isinstance(error, ContainerDamaged)
    for text in ("", "!", "ä", ":", words[name][:-1], words[name] + "\n"):
        error = await refused(opener(path).fetch({**words, name: text}))
        assert isinstance(error, ContainerDamaged), text


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
async def test_a_data_key_of_another_length_is_damage(tmp_path: Path, length: int) -> None:
    """Anybody can seal to a public key."""
    path = pair(tmp_path, "key")
    key = PublicKey.read(public(path))
    wrapped = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM).encrypt(bytes(length), key.key, info=INFO)
    words = {"source": "recipient", key.id: f"{X25519}:{base64.b64encode(wrapped).decode()}"}
    assert isinstance(await refused(opener(path).fetch(words)), ContainerDamaged)


# ---- on the host that writes ------------------------------------------------------------------------------------


async def test_no_draw_repeats(tmp_path: Path) -> None:
    path = pair(tmp_path, "key")
    keys = Recipients([public(path)])
    drawn = [await keys.draw(AttemptId(f"{n:036x}")) for n in range(200)]
    assert len({one.key for one in drawn}) == len(drawn)
    sealed = [sealed_to(one.header_words, id_of(path))[1] for one in drawn]
    for part in (slice(0, 32), slice(32, 64), slice(64, 80)):
        assert len({one[part] for one in sealed}) == len(drawn)


async def test_until_it_is_settled_or_destroyed_an_attempts_key_can_be_had_again(tmp_path: Path) -> None:
    """The proof needs it; afterwards the host has no more of it than anybody else."""
    keys = Recipients([public(pair(tmp_path, "key"))])
    for end in (keys.settle, keys.destroy):
        drawn, other = await keys.draw(ATTEMPT), await keys.draw(OTHER)
        assert await keys.fetch(drawn.header_words) == drawn.key
        assert await keys.fetch(dict(other.header_words)) == other.key
        await end(ATTEMPT)
        error = await refused(keys.fetch(drawn.header_words))
        assert isinstance(error, KeyLost)
        assert "private key of a recipient" in str(error)
        assert await keys.fetch(other.header_words) == other.key
        await end(ATTEMPT)  # none there is success
        await end(OTHER)
    assert vars(keys)["_unproven"] == {}


async def test_words_that_were_not_drawn_here_are_lost_whatever_they_resemble(tmp_path: Path) -> None:
    """The remembered key is never given for a header that is not, word for word, the one that was sealed."""
    one, two = pair(tmp_path, "one"), pair(tmp_path, "two", HYBRID)
    keys = Recipients([public(one), public(two)])
    words = dict((await keys.draw(ATTEMPT)).header_words)
    less = {name: word for name, word in words.items() if name != id_of(two)}
    edited = {**words, id_of(one): words[id_of(one)][:-2] + "B="}
    for other in (less, edited, {**words, "0" * 16: "x"}, {"source": "recipient"}, {}):
        assert isinstance(await refused(keys.fetch(other)), KeyLost)


async def test_a_key_that_another_process_drew_is_lost_to_this_one(tmp_path: Path) -> None:
    """After a crash nothing on the host opens it: there is no copy of it in a file, a header or the environment."""
    path = pair(tmp_path, "key")
    code = (
        "import asyncio, json, sys; from autobackup.stores.recipient import Recipients\n"
        "drawn = asyncio.run(Recipients([sys.argv[1]]).draw('a'))\n"
        "print(json.dumps([dict(drawn.header_words), drawn.key.hex()]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, public(path)], check=True, capture_output=True, text=True)
    words, key = json.loads(ended.stdout)
    keys = Recipients([public(path)])
    await keys.draw(ATTEMPT)
    assert isinstance(await refused(keys.fetch(words)), KeyLost)
    assert isinstance(await refused(Recipients([public(path)]).fetch(words)), KeyLost)
    assert (await opener(path).fetch(words)).hex() == key
    assert sorted(os.listdir(tmp_path)) == ["key", "key.pub"]


async def test_the_files_are_read_anew_for_each_draw(tmp_path: Path) -> None:
    """A recipient who was replaced gets nothing more."""
    first, second = pair(tmp_path, "first"), pair(tmp_path, "second")
    current = tmp_path / "current.pub"
    current.write_bytes(Path(public(first)).read_bytes())
    keys = Recipients([str(current)])
    assert set((await keys.draw(ATTEMPT)).header_words) == {"source", id_of(first)}
    current.write_bytes(Path(public(second)).read_bytes())
    assert set((await keys.draw(OTHER)).header_words) == {"source", id_of(second)}


@pytest.mark.parametrize(
    ("hybrids", "plains", "fits"), [(2, 0, True), (3, 0, False), (0, 20, True), (0, 40, False), (2, 20, False)]
)
async def test_too_many_recipients_are_said_before_anything_is_sealed(
    tmp_path: Path, hybrids: int, plains: int, fits: bool
) -> None:
    kems = [HYBRID] * hybrids + [X25519] * plains
    keys = Recipients([public(pair(tmp_path, f"key{n}", kem)) for n, kem in enumerate(kems)])
    if fits:
        await keys.check()
        encode(in_a_header((await keys.draw(ATTEMPT)).header_words))
        return
    for call in (keys.check(), keys.draw(ATTEMPT)):
        error = await refused(call)
        assert isinstance(error, KeyRefused)
        assert "recipients: too many of them: " in str(error)
        assert "bytes too long" in str(error)
        assert "name fewer, or X25519 keys" in str(error)
    assert vars(keys)["_unproven"] == {}


async def test_one_recipient_named_twice_is_said(tmp_path: Path) -> None:
    """Whoever wrote it believes that two people can open it."""
    path, other = pair(tmp_path, "key"), pair(tmp_path, "other")
    again = tmp_path / "copy.pub"
    again.write_bytes(b"# a comment\n" + Path(public(path)).read_bytes())
    for paths in ([public(path), public(other), str(again)], [public(path), public(path)]):
        for call in (Recipients(paths).check(), Recipients(paths).draw(ATTEMPT)):
            error = await refused(call)
            assert isinstance(error, KeyRefused)
            assert f"two files hold the same key ({id_of(path)})" in str(error)
            assert paths[-1] in str(error)


async def test_a_check_remembers_nothing(tmp_path: Path) -> None:
    keys = Recipients([public(pair(tmp_path, "key"))])
    await keys.check()
    assert vars(keys)["_unproven"] == {}


async def test_no_text_that_can_be_logged_holds_a_key(tmp_path: Path) -> None:
    """Not repr, not str, not an error's text, not a traceback of it or of what it came from."""
    private = [pair(tmp_path, f"key-{kem}", kem) for kem in KEMS]
    keys = Recipients([public(path) for path in private])
    drawn = await keys.draw(ATTEMPT)
    seeds = [
        serialization.load_pem_private_key(block, None).private_bytes_raw()  # type: ignore[union-attr]
        for path in private
        for block in pem_blocks(path)
    ]
    secrets = [drawn.key, *seeds]
    pem_lines = [line for path in private for line in path.read_text().splitlines() if "-----" not in line]
    readers = opener(*private)
    texts = [repr(one) for one in (drawn, keys, readers, drawn.header_words)] + [str(drawn), f"{drawn}"]
    texts += [repr(PublicKey.read(public(path))) for path in private]

    half = tmp_path / "half"
    half.touch(mode=0o600)
    half.write_bytes(private[0].read_bytes()[:-40])
    damaged = [with_sealed(drawn.header_words, id_of(path), bytes(80)) for path in private]
    for failing in (
        *(PrivateKeys([str(path)]).fetch(words) for path, words in zip(private, damaged, strict=True)),
        readers.fetch({"source": "recipient", "0" * 16: ""}),
        keys.fetch({"source": "recipient"}),
        PrivateKeys([str(half)]).fetch(drawn.header_words),
        Recipients([str(private[0])]).check(),
    ):
        (failure,) = await asyncio.gather(failing, return_exceptions=True)
        assert isinstance(failure, AutobackupError)
        chain: BaseException | None = failure
        while chain is not None:
            texts += [str(chain), repr(chain), "".join(traceback.format_exception(chain))]
            chain = chain.__cause__ or chain.__context__
    for text in texts:
        for secret in secrets:
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
            assert base64.b64encode(secret).decode().rstrip("=")[:20] not in text
        assert not any(line in text for line in pem_lines)


async def test_what_was_settled_is_not_kept_anywhere_of_ours(tmp_path: Path) -> None:
    """Of a sealed key nothing stays in the process but what the garbage collector has not come to yet."""
    keys = Recipients([public(pair(tmp_path, "key"))])
    drawn = await keys.draw(ATTEMPT)
    secret = bytearray(drawn.key)
    await keys.settle(ATTEMPT)
    del drawn
    gc.collect()
    held = [one for one in gc.get_objects() if isinstance(one, DataKey) and one.key == secret]
    assert held == []


# ---- readers that are not ours ----------------------------------------------------------------------------------


def tink_open(private: X25519PrivateKey, wrapped: bytes) -> bytes:
    hybrid.register()
    params = hpke_pb2.HpkeParams(
        kem=hpke_pb2.DHKEM_X25519_HKDF_SHA256, kdf=hpke_pb2.HKDF_SHA256, aead=hpke_pb2.AES_256_GCM
    )
    shown = hpke_pb2.HpkePublicKey(params=params, public_key=private.public_key().public_bytes_raw())
    inner = hpke_pb2.HpkePrivateKey(public_key=shown, private_key=private.private_bytes_raw())
    keyset = tink_pb2.Keyset(primary_key_id=1)
    keyset.key.add(
        key_data={
            "type_url": "type.googleapis.com/google.crypto.tink.HpkePrivateKey",
            "value": inner.SerializeToString(),
            "key_material_type": tink_pb2.KeyData.ASYMMETRIC_PRIVATE,
        },
        status=tink_pb2.ENABLED,
        key_id=1,
        output_prefix_type=tink_pb2.RAW,
    )
    handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    opened: bytes = handle.primitive(hybrid.HybridDecrypt).decrypt(wrapped, INFO)
    return opened


async def test_tink_opens_what_we_seal_and_refuses_what_we_refuse(tmp_path: Path) -> None:
    path = pair(tmp_path, "key")
    drawn = await drawn_to(path)
    private = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(private, X25519PrivateKey)
    _, wrapped = sealed_to(drawn.header_words, id_of(path))
    assert tink_open(private, wrapped) == drawn.key
    for at in (0, 31, 32, 63, 64, 79):
        with pytest.raises(tink.TinkError):
            tink_open(private, wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :])


class Rfc9180:
    """HPKE's base mode with HKDF-SHA256 and AES-256-GCM, by hand; *kem* is its number in IANA's registry."""

    def __init__(self, kem: int) -> None:
        self._kem_suite = b"KEM" + kem.to_bytes(2, "big")
        self._suite = b"HPKE" + kem.to_bytes(2, "big") + (1).to_bytes(2, "big") + (2).to_bytes(2, "big")

    def dhkem_secret(self, private: X25519PrivateKey, enc: bytes) -> bytes:
        dh = private.exchange(X25519PublicKey.from_public_bytes(enc))
        prk = self._extract(b"", b"eae_prk", dh, self._kem_suite)
        context = enc + private.public_key().public_bytes_raw()
        return self._expand(prk, b"shared_secret", context, 32, self._kem_suite)

    def open(self, secret: bytes, sealed: bytes) -> bytes:
        context = b"\0" + self._extract(b"", b"psk_id_hash", b"", self._suite)
        context += self._extract(b"", b"info_hash", INFO, self._suite)
        prk = self._extract(secret, b"secret", b"", self._suite)
        key, nonce = (
            self._expand(prk, b"key", context, 32, self._suite),
            self._expand(prk, b"base_nonce", context, 12, self._suite),
        )
        return AESGCM(key).decrypt(nonce, sealed, b"")

    @staticmethod
    def _extract(salt: bytes, label: bytes, ikm: bytes, suite: bytes) -> bytes:
        mac = HMAC(salt or bytes(32), SHA256())
        mac.update(b"HPKE-v1" + suite + label + ikm)
        return mac.finalize()

    @staticmethod
    def _expand(prk: bytes, label: bytes, info: bytes, length: int, suite: bytes) -> bytes:
        info = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
        return HKDFExpand(SHA256(), length, info).derive(prk)


async def test_the_rfc_by_hand_opens_what_we_seal(tmp_path: Path) -> None:
    path = pair(tmp_path, "key")
    drawn = await drawn_to(path)
    private = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(private, X25519PrivateKey)
    _, wrapped = sealed_to(drawn.header_words, id_of(path))
    hpke = Rfc9180(0x0020)
    assert hpke.open(hpke.dhkem_secret(private, wrapped[:32]), wrapped[32:]) == drawn.key


async def test_the_hybrid_by_hand_opens_what_we_seal(tmp_path: Path) -> None:
    """ML-KEM-768 and X25519 each by itself, joined by SHA3-256 (X-Wing): both must be broken to open it."""
    path = pair(tmp_path, "key", HYBRID)
    drawn = await drawn_to(path)
    mlkem, x25519 = (serialization.load_pem_private_key(block, None) for block in pem_blocks(path))
    assert isinstance(mlkem, MLKEM768PrivateKey)
    assert isinstance(x25519, X25519PrivateKey)
    _, wrapped = sealed_to(drawn.header_words, id_of(path))
    kem_text, enc, sealed = wrapped[:1088], wrapped[1088:1120], wrapped[1120:]
    secrets = mlkem.decapsulate(kem_text) + x25519.exchange(X25519PublicKey.from_public_bytes(enc))
    joined = sha3_256(secrets + enc + x25519.public_key().public_bytes_raw() + rb"\.//^\ "[:-1]).digest()
    assert Rfc9180(0x647A).open(joined, sealed) == drawn.key
