"""Only the sealing of a stream in memory, by us or by Tink's own Python binding: `ours|tink seal|open MIB`."""

import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import tink  # noqa: F401
from tink import proto_keyset_format, secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from autobackup.container.seal import Sealer
from autobackup.container.unseal import Unsealer

_MIB = 1 << 20
_KEY, _AAD = bytes(range(32)), b"header"


class _Discard(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


class _Kept(io.BytesIO):
    def close(self) -> None:
        """Tink closes what it wrote to."""


def main(who: str, what: str, mib: str) -> None:
    piece, count = bytes(range(256)) * (_MIB // 256), int(mib)
    work: Callable[[], int]
    if what == "seal":
        work = (lambda: _ours_seal(piece, count)) if who == "ours" else (lambda: _tink_seal(piece, count))
    else:
        stored = _Kept()
        with _tink().new_encrypting_stream(stored, _AAD) as stream:
            for _ in range(count):
                stream.write(piece)
        whole = stored.getvalue()
        work = (lambda: _ours_open(whole)) if who == "ours" else (lambda: _tink_open(whole))
    started_s = time.process_time()
    done_bytes = work()
    cpu_s = time.process_time() - started_s
    if done_bytes != count * _MIB:
        sys.exit(f"{who} {what}: {done_bytes} bytes of {count} MiB")
    print(json.dumps({"cpu_s": cpu_s}))


def _ours_seal(piece: bytes, count: int) -> int:
    sealer = Sealer(key=_KEY, associated_data=_AAD, salt=bytes(32), nonce_prefix=bytes(7))
    segments, made = 0, 0
    for _ in range(count):
        for segment in sealer.push(piece):
            segments, made = segments + 1, made + len(segment)
    made += len(sealer.finish())
    return made - 40 - 16 * (segments + 1)


def _ours_open(whole: bytes) -> int:
    unsealer, opened, view = Unsealer(key=_KEY, associated_data=_AAD), 0, memoryview(whole)
    for at in range(0, len(whole), _MIB):
        for plain in unsealer.push(view[at : at + _MIB]):
            opened += len(plain)
    return opened + len(unsealer.finish())


def _tink_seal(piece: bytes, count: int) -> int:
    with _tink().new_encrypting_stream(_Discard(), _AAD) as stream:
        return sum(stream.write(piece) for _ in range(count))


def _tink_open(whole: bytes) -> int:
    stream = _tink().new_decrypting_stream(io.BytesIO(whole), _AAD)
    return sum(len(piece) for piece in iter(lambda: stream.read(_MIB), b""))


def _tink() -> streaming_aead.StreamingAead:
    streaming_aead.register()
    inner = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
        key_value=_KEY,
        params={"ciphertext_segment_size": _MIB, "derived_key_size": 32, "hkdf_hash_type": common_pb2.SHA256},
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


if __name__ == "__main__":
    main(*sys.argv[1:])
