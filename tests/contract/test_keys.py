"""What a key source promises, and what the embedded one, `keyfile`, adds to it."""

import asyncio
import os
import re
import shutil
import stat
import subprocess
import traceback
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path

import pytest

from autobackup.container.header import kek_id
from autobackup.errors import AutobackupError, ContainerDamaged, KeyRefused, KeysUnavailable, TargetExists
from autobackup.model import AttemptId
from autobackup.stores.keyfile import KeyFile, read_kek, write_kek

ATTEMPT = AttemptId("11111111-2222-3333-4444-555555555555")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_kek(str(tmp_path / "kek"))
    return tmp_path / "kek"


def write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


async def refused(keys: KeyFile, words: Mapping[str, str]) -> AutobackupError:
    with pytest.raises(AutobackupError) as told:
        await keys.fetch(words)
    return told.value


async def test_what_was_drawn_can_be_had_again_by_another_process(path: Path) -> None:
    drawn = await KeyFile(str(path)).draw(ATTEMPT)

    assert len(drawn.key) == 32
    assert await KeyFile(str(path)).fetch(drawn.header_words) == drawn.key


async def test_no_draw_repeats(path: Path) -> None:
    """Neither the key nor what the header carries of it."""
    keys = KeyFile(str(path))
    drawn = [await keys.draw(ATTEMPT) for _ in range(500)]

    assert len({one.key for one in drawn}) == len(drawn)
    assert len({one.header_words["wrapped"] for one in drawn}) == len(drawn)


async def test_the_header_words_hold_no_key_and_no_kek(path: Path) -> None:
    drawn = await KeyFile(str(path)).draw(ATTEMPT)
    words = repr(drawn.header_words)

    for secret in (drawn.key, read_kek(str(path))):
        assert secret.hex() not in words
        assert b64encode(secret).decode() not in words
    assert set(drawn.header_words) == {"source", "kek_id", "wrapped"}


async def test_each_fetch_asks_the_source_anew(path: Path) -> None:
    """A key remembered from `draw` would prove nothing about the one that a restore will need."""
    keys = KeyFile(str(path))
    drawn = await keys.draw(ATTEMPT)
    kept = path.read_bytes()

    write_private(path, b"11" * 32 + b"\n")
    assert isinstance(await refused(keys, drawn.header_words), KeyRefused)
    path.unlink()
    assert isinstance(await refused(keys, drawn.header_words), KeysUnavailable)
    path.write_bytes(kept)
    path.chmod(0o600)

    assert await keys.fetch(drawn.header_words) == drawn.key


async def test_older_key_files_open_what_they_sealed_and_seal_nothing_new(path: Path, tmp_path: Path) -> None:
    old = await KeyFile(str(path)).draw(ATTEMPT)
    write_kek(str(tmp_path / "new"))
    keys = KeyFile(str(tmp_path / "new"), older=[str(path)])

    assert await keys.fetch(old.header_words) == old.key
    drawn = await keys.draw(ATTEMPT)
    assert drawn.header_words["kek_id"] == kek_id(read_kek(str(tmp_path / "new")))
    assert isinstance(await refused(KeyFile(str(path)), drawn.header_words), KeyRefused)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"source": "recipient"},
        {"source": "keyfile"},
        {"source": "keyfile", "kek_id": "0" * 16, "wrapped": "A" * 54 + "=="},
        {"source": "keyfile", "kek_id": "größe", "wrapped": ""},
    ],
)
async def test_words_that_are_not_for_this_key_file_are_refused(path: Path, words: dict[str, str]) -> None:
    assert isinstance(await refused(KeyFile(str(path)), words), KeyRefused)


async def test_an_edited_wrapped_key_opens_nothing_whichever_byte(path: Path) -> None:
    keys = KeyFile(str(path))
    drawn = await keys.draw(ATTEMPT)
    wrapped = b64decode(drawn.header_words["wrapped"])
    assert len(wrapped) == 40

    edits = [wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :] for at in range(len(wrapped))]
    edits += [b"", wrapped[:-8], wrapped + bytes(8), wrapped[::-1]]
    for edited in edits:
        words = {**drawn.header_words, "wrapped": b64encode(edited).decode()}
        assert isinstance(await refused(keys, words), ContainerDamaged)
    for text in ("", "!", "ä", drawn.header_words["wrapped"][:-1], drawn.header_words["wrapped"] + "\n"):
        assert isinstance(await refused(keys, {**drawn.header_words, "wrapped": text}), ContainerDamaged)


async def test_a_key_is_neither_forgotten_nor_kept_by_a_settled_or_destroyed_attempt(path: Path) -> None:
    """All that there is of it is the wrapped key in the header, which goes where the header goes."""
    keys, never_drawn = KeyFile(str(path)), AttemptId("00000000-0000-0000-0000-000000000000")
    before = path.read_bytes()
    drawn = await keys.draw(ATTEMPT)
    for attempt in (ATTEMPT, ATTEMPT, never_drawn):
        await keys.settle(attempt)
        await keys.destroy(attempt)
        assert await keys.fetch(drawn.header_words) == drawn.key
    assert drawn.key.hex() not in repr(vars(keys))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["kek"]


async def test_a_check_says_what_a_draw_would_and_looks_at_the_older_files_too(path: Path, tmp_path: Path) -> None:
    """What an older file sealed must still open: that it is gone is told before it is needed."""
    await KeyFile(str(path)).check()
    await KeyFile(str(path), older=[str(path)]).check()
    absent, opened_up, not_one = tmp_path / "absent", tmp_path / "open", tmp_path / "text"
    write_kek(str(opened_up))
    opened_up.chmod(0o604)
    write_private(not_one, b"a key")
    for bad, error, words in (
        (absent, KeysUnavailable, f"autobackup keygen {absent}"),
        (opened_up, KeyRefused, f"chmod 600 {opened_up}"),
        (not_one, KeyRefused, f"{not_one}: not a key file"),
    ):
        for keys in (KeyFile(str(bad)), KeyFile(str(path), older=[str(bad)])):
            with pytest.raises(error, match=re.escape(words)):
                await keys.check()
        with pytest.raises(error, match=re.escape(words)):
            await KeyFile(str(bad)).draw(ATTEMPT)


@pytest.mark.parametrize("content", [b"", b"\n", b"zz" * 32, b"11" * 31, b"11" * 33, bytes(32), b"\xff" * 64])
async def test_a_file_that_is_no_key_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kek"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyRefused, match=f"{path}: not a key file"):
        await KeyFile(str(path)).draw(ATTEMPT)


async def test_a_key_file_that_others_may_read_is_refused_with_the_remedy(path: Path) -> None:
    path.chmod(0o640)
    with pytest.raises(KeyRefused, match=f"chmod 600 {path}"):
        await KeyFile(str(path)).draw(ATTEMPT)


async def test_a_source_that_cannot_be_read_is_unavailable_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(KeysUnavailable, match="autobackup keygen"):
        await KeyFile(str(tmp_path / "absent")).draw(ATTEMPT)
    with pytest.raises(KeysUnavailable):
        await KeyFile(str(tmp_path)).draw(ATTEMPT)


def test_a_key_file_is_for_its_owner_alone_and_never_overwritten(path: Path) -> None:
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(text) == 65
    assert bytes.fromhex(text) == read_kek(str(path))

    with pytest.raises(TargetExists):
        write_kek(str(path))
    assert path.read_text() == text


def test_a_key_file_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_kek(str(tmp_path / "kek"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kek").stat().st_mode) == 0o600


async def test_no_text_that_can_be_logged_holds_a_key(path: Path, tmp_path: Path) -> None:
    """Not repr, not str, not an error's text, not a traceback with the locals of every frame that raised."""
    keys = KeyFile(str(path))
    drawn = await keys.draw(ATTEMPT)
    secrets = [drawn.key, read_kek(str(path))]
    texts = [repr(drawn), str(drawn), f"{drawn}", repr(keys), str(keys)]

    damaged = {**drawn.header_words, "wrapped": b64encode(bytes(40)).decode()}
    write_private(tmp_path / "half", path.read_bytes()[:40])
    (tmp_path / "half").chmod(0o600)
    for failing in (
        keys.fetch(damaged),
        keys.fetch({**drawn.header_words, "kek_id": "0" * 16}),
        KeyFile(str(tmp_path / "half")).draw(ATTEMPT),
    ):
        (failure,) = await asyncio.gather(failing, return_exceptions=True)
        assert isinstance(failure, AutobackupError)
        chain: BaseException | None = failure
        while chain is not None:
            texts += [str(chain), repr(chain), "".join(traceback.format_exception(chain))]
            chain = chain.__cause__ or chain.__context__
    for text in texts:
        for secret in (*secrets, secrets[1][:20]):
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
            assert b64encode(secret).decode().rstrip("=")[:20] not in text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
async def test_the_wrapped_key_is_rfc_5649_by_an_independent_reader(path: Path) -> None:
    drawn = await KeyFile(str(path)).draw(ATTEMPT)
    opened = subprocess.run(
        # A65959A6 is RFC 5649's alternative initial value; the tool knows the cipher but not the constant
        ["openssl", "enc", "-d", "-id-aes256-wrap-pad", "-K", path.read_text().strip(), "-iv", "A65959A6", "-nopad"],
        input=b64decode(drawn.header_words["wrapped"]),
        capture_output=True,
        check=False,
    )
    if b"wrap" in opened.stderr.lower() and b"unsupported" in opened.stderr.lower():
        pytest.skip("this openssl does not unwrap from the command line")
    assert opened.stdout == drawn.key, opened.stderr
