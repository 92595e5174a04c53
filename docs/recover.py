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

streaming_aead.register()
kek = bytes.fromhex(Path(sys.argv[1]).read_text().strip())
sealed = Path(sys.argv[2]).open("rb")  # noqa: SIM115 - tink closes it
header = sealed.read(4096)
magic, _, text = header.partition(b"\n")
if magic != b"autobackup/1":
    sys.exit("not a sealed bundle of version 1")
wrapped = json.loads(text.rstrip(b"\0"))["key"]["wrapped"]
key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
    key_value=aes_key_unwrap_with_padding(kek, base64.b64decode(wrapped)),
    params={
        "ciphertext_segment_size": 1 << 20,
        "derived_key_size": 32,
        "hkdf_hash_type": common_pb2.SHA256,
    },
)
keyset = tink_pb2.Keyset(
    primary_key_id=1,
    key=[
        {
            "key_data": {
                "type_url": "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
                "value": key.SerializeToString(),
                "key_material_type": tink_pb2.KeyData.SYMMETRIC,
            },
            "status": tink_pb2.ENABLED,
            "key_id": 1,
            "output_prefix_type": tink_pb2.RAW,
        }
    ],
)
handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
plain = handle.primitive(streaming_aead.StreamingAead).new_decrypting_stream(sealed, header)
while piece := plain.read(1 << 20):
    sys.stdout.buffer.write(piece)
