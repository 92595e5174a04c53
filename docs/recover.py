"""
Opens a sealed bundle without the agent: python recover.py KEYFILE SEALED | zstd -d | tar x

Needs the packages `tink` and `cryptography` and nothing of ours; docs/format.md says what it does. That a
file was cut shows only at its end, after most of it has gone to stdout: what came out is complete only if
this script ended with status 0. Use `set -o pipefail`, and believe nothing before the whole pipe succeeded.
"""

import base64
import json
import sys
from pathlib import Path

from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding
from tink import proto_keyset_format, secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

if len(sys.argv) != 3:
    sys.exit(__doc__)
streaming_aead.register()
sealed = Path(sys.argv[2]).open("rb")  # noqa: SIM115 - tink closes it
magic, _, text = (header := sealed.read(4096)).partition(b"\n")
if magic != b"autobackup/1":
    sys.exit("not a sealed bundle of version 1")
wrapped = base64.b64decode(json.loads(text.rstrip(b"\0"))["key"]["wrapped"])
secret = aes_key_unwrap_with_padding(bytes.fromhex(Path(sys.argv[1]).read_text()), wrapped)
params = {"ciphertext_segment_size": 1 << 20, "derived_key_size": 32, "hkdf_hash_type": common_pb2.SHA256}
value = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=secret, params=params).SerializeToString()
kind = {"type_url": "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey", "key_material_type": 1}
key = {"key_data": kind | {"value": value}, "status": tink_pb2.ENABLED, "key_id": 1, "output_prefix_type": tink_pb2.RAW}
keyset = tink_pb2.Keyset(primary_key_id=1, key=[key]).SerializeToString()
tink = proto_keyset_format.parse(keyset, secret_key_access.TOKEN).primitive(streaming_aead.StreamingAead)
plain = tink.new_decrypting_stream(sealed, header)
while piece := plain.read(1 << 20):
    sys.stdout.buffer.write(piece)
