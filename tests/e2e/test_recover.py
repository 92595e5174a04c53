"""`docs/recover.py`, which shares no code with us, opens what was sealed under every source of keys."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from autobackup.container import header as container_header
from autobackup.container.header import Header
from autobackup.container.seal import NONCE_PREFIX_BYTES, SALT_BYTES, Sealer
from autobackup.model import AttemptId
from autobackup.stores import DataKey
from autobackup.stores.keyfile import KeyFile, write_kek
from autobackup.stores.keys import PublishedKey
from autobackup.stores.recipient import Recipients, write_key_pair

RECOVER = Path(__file__).parents[2] / "docs" / "recover.py"
ATTEMPT = AttemptId("11111111-2222-3333-4444-555555555555")
PLAIN = hashlib.shake_128(b"plain").digest(1_500_000)


def drawn(source: str, folder: Path) -> tuple[DataKey, Path]:
    """A key, and the file that KEY is for it."""
    path = folder / "key"
    match source:
        case "keyfile":
            write_kek(str(path))
            return asyncio.run(KeyFile(str(path)).draw(ATTEMPT)), path
        case "barbican":
            path.write_bytes(hashlib.sha256(b"payload").digest())
            words = {"source": "barbican", "secret": ATTEMPT, "project": "0" * 32}
            return DataKey(key=path.read_bytes(), header_words=words), path
        case "none":
            return asyncio.run(PublishedKey().draw(ATTEMPT)), path
        case _:
            write_key_pair(str(path), post_quantum=source == "post-quantum")
            write_key_pair(str(folder / "other"), post_quantum=False)
            both = Recipients([str(folder / "other.pub"), f"{path}.pub"])
            return asyncio.run(both.draw(ATTEMPT)), path


@pytest.mark.parametrize("source", ["keyfile", "barbican", "none", "recipient", "post-quantum"])
def test_recover_opens_what_was_sealed(source: str, tmp_path: Path) -> None:
    key, path = drawn(source, tmp_path)
    head = container_header.encode(
        Header(
            job="job", attempt=ATTEMPT, instance=ATTEMPT, destination="vault", created_at_s=0, expires_at_s=None,
            key=key.header_words, parent=None,
        )
    )  # fmt: skip
    sealer = Sealer(key=key.key, associated_data=head, salt=bytes(SALT_BYTES), nonce_prefix=bytes(NONCE_PREFIX_BYTES))
    sealed = tmp_path / "sealed"
    sealed.write_bytes(head + b"".join([*sealer.push(PLAIN), sealer.finish()]))

    done = subprocess.run([sys.executable, str(RECOVER), str(path), str(sealed)], capture_output=True, check=True)

    assert done.stdout == PLAIN
