"""What every source of keys promises alike, and how a destination finds the one that a header names."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from autobackup.container.header import Header, decode, encode
from autobackup.errors import KeyLost, KeyRefused
from autobackup.model import AttemptId
from autobackup.stores.keyfile import KeyFile, write_kek
from autobackup.stores.keys import DataKey, KeyOpener, Keyring, KeySource, PublishedKey
from autobackup.stores.recipient import PrivateKeys, Recipients, write_key_pair

ATTEMPT = AttemptId("11111111-2222-3333-4444-555555555555")
OTHER = AttemptId("99999999-2222-3333-4444-555555555555")


def keyfile(folder: Path) -> KeySource:
    write_kek(str(folder / "kek"))
    return KeyFile(str(folder / "kek"))


def recipient(folder: Path) -> KeySource:
    write_key_pair(str(folder / "key"), post_quantum=False)
    return Recipients([str(folder / "key.pub")])


def none(_folder: Path) -> KeySource:
    return PublishedKey()


SOURCES: Mapping[str, Callable[[Path], KeySource]] = {"keyfile": keyfile, "recipient": recipient, "none": none}


def header_with(words: Mapping[str, str]) -> Header:
    return Header(
        job="job", attempt=ATTEMPT, instance="6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e", destination="vault",
        created_at_s=0, expires_at_s=None, key=words, parent=None,
    )  # fmt: skip


# ---- every source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
async def test_what_is_drawn_is_32_bytes_in_words_that_a_header_takes(tmp_path: Path, name: str) -> None:
    keys = SOURCES[name](tmp_path)
    await keys.check()
    drawn = await keys.draw(ATTEMPT)
    assert len(drawn.key) == 32
    assert drawn.header_words["source"] == name
    assert decode(encode(header_with(drawn.header_words))).key == drawn.header_words
    assert drawn.key.hex() not in repr(drawn)


@pytest.mark.parametrize("name", SOURCES)
async def test_a_key_can_be_had_again_while_its_attempt_is_under_way(tmp_path: Path, name: str) -> None:
    """By the words as they come back out of a header, whatever happens to other attempts meanwhile."""
    keys = SOURCES[name](tmp_path)
    drawn, other = await keys.draw(ATTEMPT), await keys.draw(OTHER)
    read = decode(encode(header_with(drawn.header_words))).key
    await keys.destroy(OTHER)
    await keys.settle(OTHER)
    assert await keys.fetch(read) == drawn.key
    assert (other.key == drawn.key) is (name == "none")


@pytest.mark.parametrize("name", SOURCES)
async def test_nothing_to_settle_or_to_destroy_is_success(tmp_path: Path, name: str) -> None:
    """After a crash both are asked for what this process never drew."""
    keys = SOURCES[name](tmp_path)
    for _ in range(2):
        await keys.settle(ATTEMPT)
        await keys.destroy(ATTEMPT)


# ---- none -------------------------------------------------------------------------------------------------------


async def test_the_published_key_is_32_zeros_and_says_so() -> None:
    """docs/format.md, section 1: anybody opens it with what is written there."""
    keys = PublishedKey()
    drawn = await keys.draw(ATTEMPT)
    assert drawn == DataKey(key=bytes(32), header_words={"source": "none"})
    assert await keys.fetch(drawn.header_words) == bytes(32)
    assert encode(header_with(drawn.header_words)).startswith(b"autobackup-none/1\n")


# ---- the ring ---------------------------------------------------------------------------------------------------


def ring(folder: Path, name: str) -> tuple[Keyring, dict[str, KeySource]]:
    sources = {other: make(folder) for other, make in SOURCES.items()}
    return Keyring(sources[name], sources), sources


@pytest.mark.parametrize("name", SOURCES)
async def test_a_ring_draws_from_its_source_and_opens_what_every_other_sealed(tmp_path: Path, name: str) -> None:
    """A destination's source may change in the course of its life."""
    keys, sources = ring(tmp_path, name)
    await keys.check()
    drawn = await keys.draw(ATTEMPT)
    assert drawn.header_words["source"] == name
    assert await keys.fetch(drawn.header_words) == drawn.key
    for source in sources.values():
        before = await source.draw(OTHER)
        assert await keys.fetch(before.header_words) == before.key


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("keyfile", "name the key file with --keyfile FILE"),
        ("barbican", "name the cloud whose Barbican has it with --cloud ENTRY"),
        ("recipient", "name the file of a recipient's private key with --keyfile FILE"),
        ("vault", "nothing here opens that"),
        ("", "nothing here opens that"),
    ],
)
async def test_a_source_that_is_not_on_the_ring_is_refused_with_the_remedy(source: str, remedy: str) -> None:
    for words in ({"source": source}, {"source": source, "kek_id": "0" * 16}) if source else ({}, {"source": ""}):
        with pytest.raises(KeyRefused) as told:
            await Keyring(PublishedKey(), {}).fetch(words)
        assert str(told.value) == f"sealed with a key from {source!r}; {remedy}"


async def test_a_ring_never_takes_one_source_for_another(tmp_path: Path) -> None:
    """Above all not the key that everybody has for one that is secret."""
    keys, sources = ring(tmp_path, "keyfile")
    words = {name: (await source.draw(ATTEMPT)).header_words for name, source in sources.items()}
    for name in SOURCES:
        only: dict[str, KeyOpener] = {name: sources[name]}
        for other in words.keys() - {name}:
            with pytest.raises(KeyRefused, match=f"sealed with a key from '{other}'"):
                await Keyring(PublishedKey(), only).fetch(words[other])
    assert (await keys.draw(ATTEMPT)).key != bytes(32)


async def test_the_ends_of_an_attempt_reach_the_source(tmp_path: Path) -> None:
    for end in ("settle", "destroy"):
        folder = tmp_path / end
        folder.mkdir()
        keys, _ = ring(folder, "recipient")
        drawn = await keys.draw(ATTEMPT)
        await getattr(keys, end)(ATTEMPT)
        with pytest.raises(KeyLost):
            await keys.fetch(drawn.header_words)


async def test_a_check_asks_the_source_that_seals(tmp_path: Path) -> None:
    sources = {name: make(tmp_path) for name, make in SOURCES.items()}
    (tmp_path / "kek").chmod(0o644)
    with pytest.raises(KeyRefused, match="chmod 600"):
        await Keyring(sources["keyfile"], sources).check()
    await Keyring(sources["recipient"], sources).check()
    await Keyring(sources["none"], sources).check()


async def test_whoever_restores_opens_with_a_private_key_what_a_host_could_only_seal(tmp_path: Path) -> None:
    drawn = await recipient(tmp_path).draw(ATTEMPT)
    openers: dict[str, KeyOpener] = {"none": PublishedKey(), "recipient": PrivateKeys([str(tmp_path / "key")])}
    assert await Keyring(PublishedKey(), openers).fetch(drawn.header_words) == drawn.key
