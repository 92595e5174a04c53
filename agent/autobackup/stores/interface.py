"""
What every store offers: sealed bundles by attempt id, and nothing about what is in them.

`tests/contract/test_store_contract.py` is this interface in executable form; a new store is done when it passes.

A store never interprets, never resumes and never retries: a put that did not return is worth nothing, and what it
left behind is removed by `delete`. "It did not fail" proves nothing either: `stat`, `digest` and `read` ask what
the store holds now (invariant 4).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from autobackup.model import AttemptId

Chunk: TypeAlias = bytes | bytearray | memoryview
Begun: TypeAlias = Callable[[], Awaitable[None]]

PARENTS: Final = "autobackup_parents"  # property: ids, with spaces between, of what an object stands on
KIND: Final = "autobackup_kind"  # property: `KIND_BASE`, or absent for a backup
KIND_BASE: Final = "base"
BASE: Final = "autobackup_base"  # property of a sealed base: what is in it, and for whom


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One object as the store describes it. Unauthenticated: whoever can write the store can write this."""

    attempt: AttemptId
    size_bytes: int
    properties: Mapping[str, str]
    digest_algorithm: str = ""  # of `digest`, the hash that the store took by itself while the object was put
    digest: str = ""  # empty: it took none; ask `Store.digest`
    shared_by: str = ""  # id of another project whose object it is
    retired: bool = False  # nothing new is to stand on it
    version: str = ""  # another one where its bytes may be others


class Body(Protocol):
    """
    The bytes of one object, to be iterated once.

    Chunks of at most 1 MiB, the header first; each is the consumer's to keep. After the last one `size_bytes` and
    `digest` (hex, by the store's `digest_algorithm`) are those of everything that was yielded; before, they raise.
    """

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    @property
    def announced_bytes(self) -> int | None:
        """What `size_bytes` will be, where that is known before the first byte is read."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def digest(self) -> str: ...


class Store(Protocol):
    """Where sealed bundles go. Every method may raise `StoreUnavailable` (try again later)."""

    @property
    def digest_algorithm(self) -> str:
        """The hashlib name of the hash that `digest` answers with."""

    async def check(self) -> None:
        """Raise `StoreUnavailable` or `StoreRefused`, with the remedy, if a put could not succeed now."""

    async def put(
        self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None
    ) -> None:
        """
        Store *body* whole or not at all, durably. An id that exists raises `StoreRefused`.

        *begun* is awaited before the first byte, when `children` already tells of the object; its error ends the put.
        """

    async def stat(self, attempt: AttemptId) -> Stored:
        """What is held under *attempt*. `StoreRefused` if nothing is, or not all of it."""

    async def digest(self, attempt: AttemptId) -> str:
        """The hash of what the store holds now, by the store's own word, not by ours."""

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        """Exactly *length* bytes from *offset*; fewer only at the end of the object."""

    def stream(self, attempt: AttemptId, *, offset: int) -> AsyncGenerator[bytes, None]:
        """Everything from *offset* on, in order, at most 1 MiB at a time; taken up again where a connection broke."""

    async def delete(self, attempt: AttemptId) -> None:
        """Remove *attempt* and whatever an unfinished put left of it. Nothing there is success."""

    async def held(self) -> list[Stored]:
        """Everything held whole, oldest first."""

    async def children(self, parent: str) -> list[AttemptId]:
        """Every object, whole or under way, whose property `PARENTS` names *parent*. Whoever can write can edit it."""

    async def link(self, attempt: AttemptId, parent: str) -> None:
        """Let `children` of *parent* name *attempt*, too."""

    async def unlink(self, attempt: AttemptId, parent: str) -> None:
        """Undo `link`."""

    async def everything(self) -> list[AttemptId]:
        """All that was put whole, whatever it is said to be. To be asked before what others may stand on goes."""

    async def bases(self, content: str | None = None) -> list[Stored]:
        """
        Whole objects whose property `BASE` is *content*, and that were not retired, oldest first.

        Without *content*: every sealed base, retired or not.
        """

    async def retire(self, attempt: AttemptId) -> None:
        """From now on `bases` is silent about it, so that nothing new comes to stand on what may be deleted."""

    async def unfinished(self, agent_id: str) -> list[AttemptId]:
        """What puts with the property `autobackup_agent` of this value began and never ended, where it can be told."""
