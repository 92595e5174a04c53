"""What the tests of this room share: fixed keys, plaintexts, the real Tink, bundles put together by hand."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping

import tink
from tink import proto_keyset_format, secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from autobackup.container import bundle
from autobackup.container.frames import FRAME_BYTES, SeekTable
from autobackup.container.header import Header, encode
from autobackup.container.seal import FIRST_PLAIN_BYTES, NEXT_PLAIN_BYTES, Sealer
from autobackup.container.unseal import Unsealer
from autobackup.errors import ContainerDamaged

KEY = bytes(range(32))
SALT = bytes(range(100, 132))
NONCE_PREFIX = b"prefix7"
HEADER = Header(
    job="job-1",
    attempt="attempt-1",
    instance="6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e",
    destination="glance",
    created_at_s=1_700_000_000,
    expires_at_s=1_702_592_000,
    key={"source": "keyfile", "kek_id": "00112233aabbccdd", "wrapped": "A" * 53 + "A=="},
    parent={"image": "0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"},
)
AAD = encode(HEADER)

# Around every boundary of one, two and three segments.
SIZES = sorted(
    {0, 1} | {FIRST_PLAIN_BYTES + further * NEXT_PLAIN_BYTES + offset for further in (0, 1, 2) for offset in (-1, 0, 1)}
)


def plaintext(length: int) -> bytes:
    return hashlib.shake_128(b"autobackup").digest(length)


def in_pieces(data: bytes, piece_bytes: int) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + piece_bytes] for at in range(0, len(view), piece_bytes))


def seal_segments(pieces: Iterable[bytes | memoryview], *, aad: bytes = AAD) -> list[bytes]:
    sealer = Sealer(key=KEY, associated_data=aad, salt=SALT, nonce_prefix=NONCE_PREFIX)
    segments = [bytes(segment) for piece in pieces for segment in sealer.push(piece)]
    return [*segments, bytes(sealer.finish())]


def seal(plain: bytes, *, aad: bytes = AAD) -> bytes:
    return b"".join(seal_segments([plain], aad=aad))


def unseal_released(pieces: Iterable[bytes | memoryview], *, key: bytes = KEY, aad: bytes = AAD) -> Iterator[bytes]:
    """What an `Unsealer` lets go of, piece by piece."""
    unsealer = Unsealer(key=key, associated_data=aad)
    for piece in pieces:
        for plain in unsealer.push(piece):
            yield bytes(plain)
    yield bytes(unsealer.finish())


def unseal(stream: bytes, *, key: bytes = KEY, aad: bytes = AAD) -> bytes:
    return b"".join(unseal_released([stream], key=key, aad=aad))


def refused(action: Callable[[], object]) -> bool:
    """Whether *action* raises `ContainerDamaged`. Any other exception is a failure of the test."""
    try:
        action()
    except ContainerDamaged:
        return True
    return False


class KeptOpen(io.BytesIO):
    """Tink closes what it reads and writes."""

    def close(self) -> None:
        pass


def tink_primitive(key: bytes = KEY) -> streaming_aead.StreamingAead:
    streaming_aead.register()
    inner = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
        key_value=key,
        params={
            "ciphertext_segment_size": 1 << 20,
            "derived_key_size": 32,
            "hkdf_hash_type": common_pb2.SHA256,
        },
    )
    keyset = tink_pb2.Keyset(primary_key_id=1)
    keyset.key.add(
        key_data={
            "type_url": "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
            "value": inner.SerializeToString(),
            "key_material_type": tink_pb2.KeyData.SYMMETRIC,
        },
        status=tink_pb2.ENABLED,
        key_id=1,
        output_prefix_type=tink_pb2.RAW,
    )
    handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def tink_seal(plain: bytes) -> bytes:
    out = KeptOpen()
    with tink_primitive().new_encrypting_stream(out, AAD) as stream:
        for piece in in_pieces(plain, 1 << 20):
            stream.write(bytes(piece))
    return out.getvalue()


def tink_open(stream: bytes) -> bytes:
    plain = tink_primitive().new_decrypting_stream(KeptOpen(stream), AAD)
    return b"".join(iter(lambda: plain.read(1 << 20), b""))


def tink_refuses(stream: bytes) -> bool:
    try:
        tink_open(stream)
    except tink.TinkError:
        return True
    return False


def archive(members: Mapping[str, bytes], *, mtime_s: int = 1_700_000_000) -> list[bytes]:
    """A tar archive of the profile, in the pieces that must become frames."""
    pieces, padding = [], b""
    for name, data in members.items():
        pieces.append(padding + bundle.member_head(name, len(data), mtime_s))
        pieces += [bytes(piece) for piece in in_pieces(data, FRAME_BYTES)]
        padding = bundle.member_padding(len(data))
    return [*pieces, padding + bundle.END]


def compress(pieces: Iterable[bytes], frame: Callable[[bytes], bytes]) -> bytes:
    table, out = SeekTable(), []
    for piece in pieces:
        out.append(frame(piece))
        table.add(frame_bytes=len(out[-1]), plain_bytes=len(piece))
    return b"".join([*out, table.encode()])
