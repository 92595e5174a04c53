"""
Makes the vectors beside it: python make.py [FOLDER]

A second writer of docs/format.md, written from that text with `cryptography` and the standard library, and
with nothing of the agent's. It does everything in memory and in the simplest way.
"""

import base64
import hashlib
import hmac
import json
import struct
import sys
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

MIB = 1 << 20
KEK = hashlib.sha256(b"vectors: key-encryption key").digest()
KEY = hashlib.sha256(b"vectors: data key").digest()
SALT = hashlib.sha256(b"vectors: salt").digest()
PREFIX = hashlib.sha256(b"vectors: nonce prefix").digest()[:7]
MTIME_S = 1_700_000_000
FIRST, NEXT = MIB - 40 - 16, MIB - 16


def header() -> bytes:
    fields = {
        "attempt": "attempt-1",
        "created_at_s": MTIME_S,
        "destination": "vectors",
        "expires_at_s": MTIME_S + 30 * 86400,
        "instance": "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e",
        "job": "job-1",
        "key": {
            "kek_id": hashlib.sha256(KEK).hexdigest()[:16],
            "source": "keyfile",
            "wrapped": base64.b64encode(aes_key_wrap_with_padding(KEK, KEY)).decode(),
        },
        "parent": {"image": "0f5c3c57-2c43-4b8e-8b60-5e9f6f2a7c11"},
        "suite": "AES256-GCM-HKDF-1MiB",
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return (b"autobackup/1\n" + text.encode()).ljust(4096, b"\0")


def seal(plain: bytes) -> bytes:
    cipher = AESGCM(hmac.digest(hmac.digest(SALT, KEY, "sha256"), header() + b"\x01", "sha256"))
    pieces = [plain[:FIRST]] + [plain[at : at + NEXT] for at in range(FIRST, len(plain), NEXT)]
    stream = b"\x28" + SALT + PREFIX
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        stream += cipher.encrypt(PREFIX + struct.pack(">IB", index, last), piece, None)
    return stream


def frame(plain: bytes) -> bytes:
    """A stored frame, or a zero frame for zeros."""
    out = bytes.fromhex("28b52ffda0") + struct.pack("<I", len(plain))
    zeros = not any(plain)
    at = 0
    while at < len(plain):
        rle = zeros and at > 0
        count = min(1 if zeros and not rle else 131072, len(plain) - at)
        last = at + count == len(plain)
        out += struct.pack("<I", count << 3 | rle << 1 | last)[:3]
        out += b"\0" if rle else plain[at : at + count]
        at += count
    return out


def compress(pieces: list[bytes]) -> bytes:
    frames = [frame(piece) for piece in pieces]
    entries = b"".join(struct.pack("<II", len(f), len(p)) for f, p in zip(frames, pieces, strict=True))
    head = struct.pack("<II", 0x184D2A5E, len(entries) + 9)
    return b"".join(frames) + head + entries + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)


def head(name: str, size: int) -> bytes:
    fields = f"{name:\0<100}{0o600:07o}\0{0:07o}\0{0:07o}\0{size:011o}\0{MTIME_S:011o}\0"
    rest = "0" + 100 * "\0" + "ustar\0" + "00" + 247 * "\0"
    total = sum((fields + 8 * " " + rest).encode())
    return (fields + f"{total:06o}\0 " + rest).encode()


def cut(members: dict[str, bytes]) -> list[bytes]:
    """The archive in the pieces that become frames."""
    pieces, padding = [], b""
    for name, data in members.items():
        pieces.append(padding + head(name, len(data)))
        pieces += [data[at : at + MIB] for at in range(0, len(data), MIB)]
        padding = bytes(-len(data) % 512)
    return [*pieces, padding + bytes(1024)]


def record(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=2).encode() + b"\n"


def bundle() -> dict[str, bytes]:
    base = b"a backing file\n" * 40
    disk = bytes(MIB) + plaintext(1000)
    xml = b"<domain type='kvm'><name>instance-00000001</name></domain>\n"
    console = "[    0.000000] Linux version 6.1.0 — début\n".encode()
    manifest = {
        "format": "autobackup-bundle/1",
        "job": "job-1",
        "instance": "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e",
        "instance_name": "café 🦊",
        "host": "compute-1",
        "captured_at_s": MTIME_S,
        "verdict": "terminated",
        "verdict_reason": "Nova says deleted, and the disk lost its last name",
        "disks": [
            {
                "name": "disk",
                "member": "disks/disk",
                "format": "qcow2",
                "size_bytes": len(disk),
                "source_path": "/var/lib/nova/instances/6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e/disk",
                "inode": 131077,
                "mtime_ns": MTIME_S * 10**9 + 123456789,
                "backing": "bases/da39a3ee5e6b4b0d3255bfef95601890afd80709",
                "backing_path": "/var/lib/nova/instances/_base/da39a3ee5e6b4b0d3255bfef95601890afd80709",
                "chain_source": "libvirt",
            }
        ],
        "bases": [
            {
                "name": "da39a3ee5e6b4b0d3255bfef95601890afd80709",
                "member": "bases/da39a3ee5e6b4b0d3255bfef95601890afd80709",
                "format": "raw",
                "size_bytes": len(base),
                "source_path": "/var/lib/nova/instances/_base/da39a3ee5e6b4b0d3255bfef95601890afd80709",
                "inode": 131072,
                "mtime_ns": MTIME_S * 10**9,
                "backing": None,
                "backing_path": None,
                "chain_source": "none",
            }
        ],
        "files": [
            {"member": "domain.xml", "size_bytes": len(xml), "source_path": ""},
            {
                "member": "console.log",
                "size_bytes": len(console),
                "source_path": "/var/lib/nova/instances/6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e/console.log",
            },
        ],
        "not_captured": [{"what": "nvram", "why": "another filesystem"}],
        "facts": {"flavor": "m1.small"},
    }
    members = {
        "manifest.json": record(manifest),
        "domain.xml": xml,
        "disks/disk": disk,
        "bases/da39a3ee5e6b4b0d3255bfef95601890afd80709": base,
        "console.log": console,
    }
    digests = {
        "algorithm": "sha256",
        "members": {
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        },
        "unreadable": [{"member": "disks/disk", "offset_bytes": 4096, "length_bytes": 512}],
        "health": [{"member": "disks/disk", "tool": "qemu-img check", "result": "skipped", "detail": ""}],
    }
    return {**members, "digests.json": record(digests)}


def plaintext(length: int) -> bytes:
    return hashlib.shake_128(b"autobackup").digest(length)


def secrets() -> dict[str, str]:
    return {
        "kek": KEK.hex(),
        "key": KEY.hex(),
        "salt": SALT.hex(),
        "nonce_prefix": PREFIX.hex(),
    }


def streams_json() -> dict[str, object]:
    streams = []
    for length in (
        *(0, 1, FIRST - 1, FIRST, FIRST + 1),
        *(FIRST + NEXT - 1, FIRST + NEXT, FIRST + NEXT + 1),
    ):
        sealed = seal(plaintext(length))
        entry = {"plain_bytes": length, "sealed_bytes": len(sealed)}
        entry["sealed_sha256"] = hashlib.sha256(sealed).hexdigest()
        if length < 100:
            entry["sealed"] = sealed.hex()
        streams.append(entry)
    return {
        "about": "Section 2 of docs/format.md. The keys are published and protect nothing.",
        **secrets(),
        "header_json": header()[13:].rstrip(b"\0").decode(),
        "header_sha256": hashlib.sha256(header()).hexdigest(),
        "plaintext": "the first plain_bytes bytes of SHAKE128 over the 10 bytes 'autobackup'",
        "streams": streams,
    }


def bundle_json() -> dict[str, object]:
    members = bundle()
    compressed = compress(cut(members))
    return {
        "about": "A whole sealed bundle, header included. The keys are published and protect nothing.",
        **secrets(),
        "members": {
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        },
        "compressed_sha256": hashlib.sha256(compressed).hexdigest(),
        "sealed": base64.b64encode(header() + seal(compressed)).decode(),
    }


def manifest_with_parents() -> bytes:
    """Section 5, format 2: the disk's base is not in the bundle."""
    manifest = json.loads(bundle()["manifest.json"])
    [base] = manifest["bases"]
    manifest["format"], manifest["bases"] = "autobackup-bundle/2", []
    manifest["disks"][0]["backing"] = None
    manifest["parents"] = [
        {
            "name": base["name"],
            "path": base["source_path"],
            "format": base["format"],
            "size_bytes": base["size_bytes"],
            "sha256": hashlib.sha256(bundle()[base["member"]]).hexdigest(),
            "backing_path": None,
            "image": "c2b4fd54-1d0e-4c3a-9d0f-1b6f3c1e8a55",
            "image_hash": "sha512:" + "5a" * 64,
        }
    ]
    return record(manifest)


def main(folder: Path) -> None:
    for name, value in (("streams.json", streams_json()), ("bundle.json", bundle_json())):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    (folder / "manifest-2.json").write_bytes(manifest_with_parents())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
