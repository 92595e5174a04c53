"""The recovery script opens a bundle with Tink alone, and never ends well on a damaged one."""

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from tests.unit.container.material import HEADER, KEY, archive, compress, plaintext, seal

from autobackup.container.frames import FrameCompressor
from autobackup.container.header import HEADER_BYTES, encode, kek_id
from autobackup.container.seal import SEGMENT_BYTES

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "docs" / "recover.py"
VECTOR = json.loads((ROOT / "tests" / "vectors" / "bundle.json").read_text())
KEK = bytes(range(200, 232))
MEMBERS = {
    "manifest.json": b"{}\n",
    "disks/disk": plaintext(2_500_000),
    "disks/disk.swap": bytes(3_000_000),
    "digests.json": b"{}\n",
}


@pytest.fixture(scope="module")
def sealed() -> bytes:
    wrapped = base64.b64encode(aes_key_wrap_with_padding(KEK, KEY)).decode()
    head = encode(dataclasses.replace(HEADER, key={"source": "keyfile", "kek_id": kek_id(KEK), "wrapped": wrapped}))
    data = head + seal(compress(archive(MEMBERS), FrameCompressor(1).compress), aad=head)
    assert len(data) > HEADER_BYTES + 2 * SEGMENT_BYTES
    return data


def recover(folder: Path, sealed: bytes, kek: bytes) -> subprocess.CompletedProcess[bytes]:
    """The pipe of the docstring, in a Python that cannot import the agent."""
    (folder / "key").write_text(kek.hex() + "\n")
    (folder / "sealed").write_bytes(sealed)
    (folder / "out").mkdir()
    pipe = f"set -o pipefail; '{sys.executable}' -I '{SCRIPT}' ../key ../sealed | zstd -d | tar x"
    return subprocess.run(["bash", "-c", pipe], cwd=folder / "out", capture_output=True, check=False)


def exit_status(folder: Path, sealed: bytes, kek: bytes = KEK) -> int:
    """Of the script alone: it must fail by itself, not only the tools behind it."""
    (folder / "key").write_text(kek.hex() + "\n")
    (folder / "sealed").write_bytes(sealed)
    argv = [sys.executable, "-I", SCRIPT, folder / "key", folder / "sealed"]
    return subprocess.run(argv, capture_output=True, check=False).returncode


def found(folder: Path) -> dict[str, bytes]:
    out = folder / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_it_recovers_a_bundle(tmp_path: Path, sealed: bytes) -> None:
    done = recover(tmp_path, sealed, KEK)
    assert (done.returncode, done.stderr) == (0, b"")
    assert found(tmp_path) == MEMBERS


def test_it_recovers_the_published_vector(tmp_path: Path) -> None:
    done = recover(tmp_path, base64.b64decode(VECTOR["sealed"]), bytes.fromhex(VECTOR["kek"]))
    assert (done.returncode, done.stderr) == (0, b"")
    assert {name: len(data) for name, data in found(tmp_path).items()} == {
        name: digest["size_bytes"] for name, digest in VECTOR["members"].items()
    }


def test_it_leaves_a_newer_format_alone(tmp_path: Path, sealed: bytes) -> None:
    """Sealed with the right key under a header of version 2, whatever that may come to mean."""
    head = sealed[:HEADER_BYTES].replace(b"autobackup/1", b"autobackup/2", 1)
    assert exit_status(tmp_path, head + seal(b"", aad=head)) == 1
    head = sealed[:HEADER_BYTES]
    assert exit_status(tmp_path, head + seal(b"", aad=head)) == 0


def test_it_fails_on_every_kind_of_damage(tmp_path: Path, sealed: bytes) -> None:
    flipped, swapped_head = bytearray(sealed), bytearray(sealed)
    flipped[-1] ^= 1
    swapped_head[sealed.index(b"job-1")] ^= 1
    damaged = {
        "cut at a segment": sealed[: HEADER_BYTES + SEGMENT_BYTES],
        "cut at two segments": sealed[: HEADER_BYTES + 2 * SEGMENT_BYTES],
        "cut by a byte": sealed[:-1],
        "extended": sealed + b"\0",
        "header alone": sealed[:HEADER_BYTES],
        "cut in the header": sealed[:100],
        "empty": b"",
        "flipped bit in the last tag": bytes(flipped),
        "edited header": bytes(swapped_head),
        "newer format": sealed.replace(b"autobackup/1", b"autobackup/2", 1),
    }
    statuses = {name: exit_status(tmp_path, data) for name, data in damaged.items()}
    assert all(status == 1 for status in statuses.values()), statuses
    assert exit_status(tmp_path, sealed, bytes(32)) == 1
    assert exit_status(tmp_path, sealed) == 0
