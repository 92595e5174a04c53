"""
Where data keys come from. A data key is 32 random bytes, drawn anew for every attempt (invariant 6).

`draw` gives a fresh one and the words that the header carries so that it can be had again; `fetch` gets it again
from those words, asking its source anew each time, because a verification with a key from memory proves nothing.

One module for each source: `keyfile`, `barbican`, `recipient`; `none` is here, being none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from autobackup.errors import KeyRefused
from autobackup.model import AttemptId

KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKey:
    """One key and its words for the header. The key is in no repr, and so in no log or traceback."""

    key: bytes = field(repr=False)
    header_words: Mapping[str, str]


class KeyOpener(Protocol):
    """Gets keys again."""

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        """
        The key that *header_words* stand for, from its source anew.

        `KeyRefused` if it is not ours to have, `KeyLost` if nobody has it any more, `KeysUnavailable`: ask again later.
        """


class KeySource(KeyOpener, Protocol):
    """Draws keys, gets them again, and lets them go."""

    async def check(self) -> None:
        """Raise what `draw` would, with the remedy, if it could not succeed now."""

    async def draw(self, attempt: AttemptId) -> DataKey:
        """A fresh key for *attempt*, which is journaled. `KeysUnavailable` if the source cannot be asked now."""

    async def circle(self) -> str:
        """Who may have the keys that are drawn now: the same text, the same people."""

    async def settle(self, attempt: AttemptId) -> None:
        """*attempt* is proven: what is remembered of its key here goes."""

    async def destroy(self, attempt: AttemptId) -> None:
        """*attempt* came to nothing: its key goes, here and at its source. None there is success."""


class Keyring:
    """
    The keys of one destination: drawn from one source, opened by whichever the header names.

    A destination's source may change in the course of its life; what was sealed before must still open.
    """

    def __init__(self, source: KeySource, openers: Mapping[str, KeyOpener]) -> None:
        self._source = source
        self._openers = openers

    async def check(self) -> None:
        await self._source.check()

    async def draw(self, attempt: AttemptId) -> DataKey:
        return await self._source.draw(attempt)

    async def circle(self) -> str:
        return await self._source.circle()

    async def settle(self, attempt: AttemptId) -> None:
        await self._source.settle(attempt)

    async def destroy(self, attempt: AttemptId) -> None:
        await self._source.destroy(attempt)

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        source = header_words.get("source", "")
        opener = self._openers.get(source)
        if opener is None:
            raise KeyRefused(f"sealed with a key from {source!r}; {_HOW.get(source, 'nothing here opens that')}")
        return await opener.fetch(header_words)


_HOW: Final = {
    "keyfile": "name the key file with --keyfile FILE",
    "barbican": "name the cloud whose Barbican has it with --cloud ENTRY",
    "recipient": "name the file of a recipient's private key with --keyfile FILE",
}


class PublishedKey:
    """
    The source `none`: a key that everybody has. Same framing, same digests, no secrecy.

    An explicit word in a destination, and another magic in the header, so that no edit of one makes the other.
    """

    KEY: Final = bytes(KEY_BYTES)

    async def check(self) -> None:
        """Nothing to go wrong."""

    async def draw(self, attempt: AttemptId) -> DataKey:
        return DataKey(key=self.KEY, header_words={"source": "none"})

    async def circle(self) -> str:
        return "everybody"

    async def settle(self, attempt: AttemptId) -> None:
        """Nothing to forget."""

    async def destroy(self, attempt: AttemptId) -> None:
        """Nothing to destroy."""

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        return self.KEY
