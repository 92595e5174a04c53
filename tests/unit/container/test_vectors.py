"""The published vectors: a second writer made them from the spec, we make the same and open them."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.container.material import compress, plaintext

from autobackup.container import header
from autobackup.container.bundle import BundleReader, MemberData, MemberStart, member_head
from autobackup.container.frames import FrameDecompressor, FrameReader, SeekTable, stored_frame, zero_frame
from autobackup.container.manifest import Digest, Digests, Manifest, check_bundle
from autobackup.container.seal import Sealer, sealed_bytes
from autobackup.container.seek_table import table_bytes
from autobackup.container.unseal import Opener, Unsealer, locate, plain_bytes, segment_count, segment_span

FOLDER = Path(__file__).parents[2] / "vectors"
STREAMS: dict[str, Any] = json.loads((FOLDER / "streams.json").read_text())
BUNDLE: dict[str, Any] = json.loads((FOLDER / "bundle.json").read_text())
SEALED = base64.b64decode(BUNDLE["sealed"])
HEADER, STREAM = SEALED[: header.HEADER_BYTES], SEALED[header.HEADER_BYTES :]


def secret(name: str) -> bytes:
    return bytes.fromhex(STREAMS[name])


def seal(plain: bytes) -> bytes:
    sealer = Sealer(key=secret("key"), associated_data=HEADER, salt=secret("salt"), nonce_prefix=secret("nonce_prefix"))
    return b"".join([*sealer.push(plain), sealer.finish()])


def unsealed() -> bytes:
    unsealer = Unsealer(key=secret("key"), associated_data=HEADER)
    return b"".join([*unsealer.push(STREAM), unsealer.finish()])


def archived() -> bytes:
    reader = FrameReader()
    plain = b"".join(reader.push(unsealed()))
    reader.finish()
    return plain


def members() -> dict[str, bytes]:
    reader, found = BundleReader(), list[tuple[str, list[bytes]]]()
    for event in reader.push(archived()):
        if isinstance(event, MemberStart):
            found.append((event.name, []))
        elif isinstance(event, MemberData):
            found[-1][1].append(bytes(event.data))
    reader.finish()
    return {name: b"".join(pieces) for name, pieces in found}


def test_the_generator_still_makes_them(tmp_path: Path) -> None:
    """In a Python that cannot import the agent."""
    subprocess.run([sys.executable, "-I", FOLDER / "make.py", tmp_path], check=True)
    for name in ("streams.json", "bundle.json", "manifest-2.json"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


def test_the_header_is_ours() -> None:
    text = STREAMS["header_json"].encode()
    data = (header.MAGIC + text).ljust(header.HEADER_BYTES, b"\0")
    assert data == HEADER == header.encode(header.decode(data))
    assert hashlib.sha256(data).hexdigest() == STREAMS["header_sha256"]
    assert header.decode(data).key["kek_id"] == header.kek_id(secret("kek"))


@pytest.mark.parametrize("vector", STREAMS["streams"], ids=lambda vector: str(vector["plain_bytes"]))
def test_we_seal_the_same_stream(vector: dict[str, Any]) -> None:
    sealed = seal(plaintext(vector["plain_bytes"]))
    assert len(sealed) == vector["sealed_bytes"] == sealed_bytes(vector["plain_bytes"])
    assert hashlib.sha256(sealed).hexdigest() == vector["sealed_sha256"]
    assert sealed.hex() == vector.get("sealed", sealed.hex())


def test_the_whole_bundle_opens() -> None:
    found = members()
    read = {name: Digest(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in found.items()}
    assert {name: [digest.size_bytes, digest.sha256] for name, digest in read.items()} == {
        name: [digest["size_bytes"], digest["sha256"]] for name, digest in BUNDLE["members"].items()
    }
    read.pop("digests.json")
    manifest, digests = Manifest.decode(found["manifest.json"]), Digests.decode(found["digests.json"])
    check_bundle(header=header.decode(HEADER), manifest=manifest, digests=digests, read=read)
    assert manifest.encode() == found["manifest.json"]
    assert digests.encode() == found["digests.json"]
    assert manifest.instance_name == "café 🦊"


def test_a_manifest_with_parents_is_read_and_written_as_it_is() -> None:
    data = (FOLDER / "manifest-2.json").read_bytes()
    manifest = Manifest.decode(data)
    assert manifest.encode() == data
    assert [parent.path for parent in manifest.parents] == [disk.backing_path for disk in manifest.disks]


def test_we_make_the_same_bundle_from_the_same_members() -> None:
    def pieces() -> Iterator[bytes]:
        padding = b""
        for name, data in members().items():
            yield padding + member_head(name, len(data), 1_700_000_000)
            for at in range(0, len(data), 1 << 20):
                yield data[at : at + (1 << 20)]
            padding = bytes(-len(data) % 512)
        yield padding + bytes(1024)

    compressed = compress(pieces(), lambda piece: stored_frame(piece) if any(piece) else zero_frame(len(piece)))
    assert hashlib.sha256(compressed).hexdigest() == BUNDLE["compressed_sha256"]
    assert HEADER + seal(compressed) == SEALED


def test_one_mebibyte_of_a_disk_is_read_without_the_rest() -> None:
    """Section 6 of the spec, with ranges of the object and nothing else."""
    opener = Opener(key=secret("key"), associated_data=HEADER, stream_header=STREAM[:40])
    compressed_bytes, segments = plain_bytes(len(STREAM)), segment_count(len(STREAM))

    def compressed(start: int, length: int) -> bytes:
        (first, skip), (final, _) = locate(start), locate(start + length - 1)
        plain = b""
        for index in range(first, final + 1):
            offset, count = segment_span(index, len(STREAM))
            segment = STREAM[offset : offset + count]
            plain += opener.open_segment(index, segment, last=index == segments - 1)
        return plain[skip : skip + length]

    tail_bytes = table_bytes(compressed(compressed_bytes - 9, 9))
    table = SeekTable.decode(compressed(compressed_bytes - tail_bytes, tail_bytes), stream_bytes=compressed_bytes)
    disk = members()["disks/disk"]
    start = archived().index(disk[-1000:]) - (1 << 20)
    for at in (0, 1 << 20):
        span = table.at(start + at)
        assert span.plain_offset == start + at
        plain = FrameDecompressor().decompress(compressed(span.stored_offset, span.stored_bytes))
        assert plain == disk[at : at + (1 << 20)]
