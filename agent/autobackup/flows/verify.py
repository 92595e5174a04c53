"""
Proof that a store holds what was sent: asked of the store, opened with a key that was fetched anew.

`fast`: the size and the digest by the store's own word (the hash that it took while it received, or takes now), the
header byte for byte, the first and the last segment opened (the last one shows that nothing is cut or added).
`readback`: all of it read, opened, unpacked and compared with the digests inside.

Invariant 4: nothing here trusts what the sender remembers of having sent, except as what to compare with.
"""

import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from autobackup.container.header import HEADER_BYTES, Header, decode
from autobackup.container.seal import STREAM_HEADER_BYTES
from autobackup.container.unseal import Opener, segment_count, segment_span
from autobackup.errors import ContainerDamaged
from autobackup.flows.unpack import Nowhere, Sink, Unpacked, Unpacker
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId, AttemptRecord, JobId
from autobackup.stores import KeySource, Store, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedObject:
    """One object in a store, its header read and its key fetched."""

    store: Store
    attempt: AttemptId
    size_bytes: int
    header: Header
    header_bytes: bytes
    key: bytes = field(repr=False)

    async def stream(self, progress: Callable[[int], None] = lambda _count: None) -> AsyncGenerator[bytes, None]:
        """Everything after the header, in order; *progress* is told how many bytes came."""
        at = HEADER_BYTES
        async with aclosing(self.store.stream(self.attempt, offset=HEADER_BYTES)) as pieces:
            async for piece in pieces:
                at += len(piece)
                if at > self.size_bytes:
                    break
                progress(len(piece))
                yield piece
        if at != self.size_bytes:
            raise ContainerDamaged(f"{self.attempt}: ends at {at}, the store said {self.size_bytes}")


async def open_sealed(
    store: Store, keys: KeySource, attempt: AttemptId, *, stored: Stored | None = None
) -> SealedObject:
    """
    Read the header of *attempt* and fetch its key. The header is not authenticated yet: a segment must open.

    *stored* is what a listing said of it, where the store's description is damaged: the bundle describes itself.
    """
    stored = stored or await store.stat(attempt)
    header_bytes = await store.read(attempt, offset=0, length=HEADER_BYTES)
    header = decode(header_bytes)
    key = await keys.fetch(header.key)
    return SealedObject(
        store=store, attempt=attempt, size_bytes=stored.size_bytes, header=header, header_bytes=header_bytes, key=key
    )


async def prove_copy(
    *, store: Store, keys: KeySource, job: JobId, sent: AttemptRecord, readback: bool, workers: Workers
) -> None:
    """Return if *store* holds attempt *sent* of *job*, whole; raise what is wrong otherwise."""
    stored = await store.stat(sent.attempt)
    if stored.size_bytes != sent.size_bytes:
        raise ContainerDamaged(
            f"{sent.attempt}: the store holds {stored.size_bytes} bytes, {sent.size_bytes} were sent"
        )
    sealed = await open_sealed(store, keys, sent.attempt)
    if (sealed.header.job, sealed.header.attempt) != (job, sent.attempt):
        raise ContainerDamaged(f"{sent.attempt}: its header is that of attempt {sealed.header.attempt}")
    by_its_word = stored.digest if stored.digest_algorithm == sent.digest_algorithm else ""
    if readback or (stored.digest and not by_its_word):  # it hashes otherwise than we did: then we read it all
        digest = hashlib.new(sent.digest_algorithm, sealed.header_bytes)
        await read_back(sealed, workers, digest=digest)
        held = digest.hexdigest()
    else:
        await _open_ends(sealed, workers)
        held = by_its_word or await store.digest(sent.attempt)
    if held != sent.digest:
        raise ContainerDamaged(f"{sent.attempt}: the store's {sent.digest_algorithm} is not that of what was sent")


async def read_back(
    sealed: SealedObject,
    workers: Workers,
    *,
    sink: Sink | None = None,
    digest: "hashlib._Hash | None" = None,
    progress: Callable[[int], None] = lambda _count: None,
) -> Unpacked:
    """
    Read, open and unpack all of *sealed* into *sink* (nowhere, if not given); returns once it proved to be whole.

    *digest* is updated with every byte of the stream; *progress* is told how many bytes came.
    """
    unpacker = Unpacker(header_bytes=sealed.header_bytes, key=sealed.key, sink=sink or Nowhere())

    def take(piece: bytes) -> None:
        if digest is not None:
            digest.update(piece)
        unpacker.push(piece)

    async with aclosing(sealed.stream(progress)) as pieces:
        async for piece in pieces:
            await workers.heavy(partial(take, piece))
    return await workers.heavy(unpacker.finish)


async def _open_ends(sealed: SealedObject, workers: Workers) -> None:
    """Open the first and the last segment: the key is the right one, the header unedited, the end the end."""
    stream_bytes = sealed.size_bytes - HEADER_BYTES
    last_index = segment_count(stream_bytes) - 1
    opener: Opener | None = None
    for index in dict.fromkeys((0, last_index)):
        offset, length = segment_span(index, stream_bytes)
        segment = await sealed.store.read(sealed.attempt, offset=HEADER_BYTES + offset, length=length)
        if opener is None:
            opener = Opener(
                key=sealed.key, associated_data=sealed.header_bytes, stream_header=segment[:STREAM_HEADER_BYTES]
            )
        await workers.heavy(partial(opener.open_segment, index, segment, last=index == last_index))
