"""
Opens a sealed bundle without the agent: python recover.py KEY SEALED | zstd -d | tar x

KEY is what the header's key source asks for: a key file; the 32 bytes that Barbican has for the secret which the header
names (`head -c 4096 SEALED`); a recipient's private key; anything at all for source `none`.

Needs the packages `tink` and `cryptography` and nothing of ours; docs/format.md says what it does. That a
file was cut shows only at its end, after most of it has gone to stdout: what came out is complete only if
this script ended with status 0. Use `set -o pipefail`, and believe nothing before the whole pipe succeeded.
"""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tink import proto_keyset_format, secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2


def data_key(key: dict[str, str], path: Path) -> bytes:
    if key["source"] == "none":
        return bytes(32)
    if key["source"] == "barbican":
        return path.read_bytes()
    if key["source"] == "keyfile":
        return aes_key_unwrap_with_padding(bytes.fromhex(path.read_text()), base64.b64decode(key["wrapped"]))
    blocks = re.findall(rb"-----BEGIN.*?END PRIVATE KEY-----", path.read_bytes(), re.DOTALL)
    keys = [load_pem_private_key(block, None) for block in blocks]
    name = hashlib.sha256(b"".join(one.public_key().public_bytes_raw() for one in keys)).hexdigest()[:16]
    kem = hpke.KEM.X25519 if len(keys) == 1 else hpke.KEM.MLKEM768_X25519
    private = keys[0] if len(keys) == 1 else hpke.MLKEM768X25519PrivateKey(*keys)
    if name not in key:
        sys.exit(f"sealed to {sorted(key.keys() - {'source'})}, and that private key is {name}")
    wrapped = base64.b64decode(key[name].partition(":")[2])
    return hpke.Suite(kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM).decrypt(
        wrapped, private, b"autobackup/1 data key"
    )


if len(sys.argv) != 3:
    sys.exit(__doc__)
streaming_aead.register()
sealed = Path(sys.argv[2]).open("rb")  # noqa: SIM115 - tink closes it
magic, _, text = (header := sealed.read(4096)).partition(b"\n")
if magic not in (b"autobackup/1", b"autobackup-none/1"):
    sys.exit("not a sealed bundle of version 1")
secret = data_key(json.loads(text.rstrip(b"\0"))["key"], Path(sys.argv[1]))
params = {"ciphertext_segment_size": 1 << 20, "derived_key_size": 32, "hkdf_hash_type": common_pb2.SHA256}
value = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=secret, params=params).SerializeToString()
kind = {"type_url": "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey", "key_material_type": 1}
key = {"key_data": kind | {"value": value}, "status": tink_pb2.ENABLED, "key_id": 1, "output_prefix_type": tink_pb2.RAW}
keyset = tink_pb2.Keyset(primary_key_id=1, key=[key]).SerializeToString()
tink = proto_keyset_format.parse(keyset, secret_key_access.TOKEN).primitive(streaming_aead.StreamingAead)
plain = tink.new_decrypting_stream(sealed, header)
while piece := plain.read(1 << 20):
    sys.stdout.buffer.write(piece)
