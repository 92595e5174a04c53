"""
A parent, fetched from wherever it can be had, and proven to be the one that the backup was sealed on.

Its digest is in the manifest, which is authenticated; so whoever has a file, a sealed base or an image with those bytes
will do, and nobody else. What was fetched and is something else is removed at once.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from autobackup.cloud.glance import Image
from autobackup.container.bundle import BASES
from autobackup.container.header import Header
from autobackup.container.manifest import ParentEntry
from autobackup.errors import (
    AutobackupError,
    CloudRefused,
    CloudUnavailable,
    Damaged,
    Refused,
    StoreRefused,
    StoreUnavailable,
    Transient,
)
from autobackup.flows.files import Files
from autobackup.flows.layers import PIECE_BYTES, FileSource, ImageSource, content, file_content, open_layer
from autobackup.flows.verify import open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.qcow2.header import MAGIC
from autobackup.rules.lineage import sealed_hint
from autobackup.stores import BASE, OpenDestination

Show: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_Pieces: TypeAlias = AsyncGenerator[bytes | int, None] | AsyncGenerator[bytes, None]
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_REMEDY: Final = "name a file with --parent FILE, or take the overlays alone with --no-parents"
_ZEROS: Final = memoryview(bytes(PIECE_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where parents may be: beside the backup (first), in other destinations, in *files* at hand."""

    places: Sequence[OpenDestination]
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InFile:
    path: str

    def __str__(self) -> str:
        return f"the file {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InImage:
    place: OpenDestination
    image: str

    def __str__(self) -> str:
        return f"image {self.image}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InBase:
    place: OpenDestination
    attempt: AttemptId

    def __str__(self) -> str:
        return f"sealed base {self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unasked:
    """A destination that could not be asked what bases it has."""

    place: OpenDestination
    error: AutobackupError

    def __str__(self) -> str:
        return f"destination {self.place.destination.name!r}"


Candidate: TypeAlias = InFile | InImage | InBase | Unasked


async def candidates(origins: Origins, entry: ParentEntry, number: int, header: Header) -> AsyncIterator[Candidate]:
    """Where parent *number* of the backup with *header* may be, most likely first. Nothing is proven by being named."""
    for path in origins.files:
        if entry.sha256 is not None or os.path.basename(path) == entry.name:  # nothing else tells it then
            yield InFile(path=path)
    hint = sealed_hint(header.parent, number)
    if hint is not None:
        yield InBase(place=origins.places[0], attempt=AttemptId(hint))
    for place in origins.places:
        if entry.image and place.parents is not None:
            yield InImage(place=place, image=entry.image)
    for place in origins.places:
        try:
            bases = await place.store.bases() if entry.sha256 else []
        except (Transient, Refused) as exc:
            yield Unasked(place=place, error=exc)
            continue
        for stored in bases:
            is_named_already = place is origins.places[0] and stored.attempt == hint
            if stored.properties.get(BASE, "").partition(".")[0] == entry.sha256 and not is_named_already:
                yield InBase(place=place, attempt=stored.attempt)


async def kept_at(origins: Origins, entry: ParentEntry, number: int, header: Header) -> str:
    """The first place where a parent is, by name: its bytes are not looked at. Empty: nowhere."""
    async for where in candidates(origins, entry, number, header):
        match where:
            case InFile():
                return str(where)
            case InBase():
                with contextlib.suppress(Refused, Damaged):
                    await where.place.store.stat(where.attempt)
                    return str(where)
            case InImage():
                assert where.place.parents is not None
                with contextlib.suppress(CloudRefused):
                    image = await where.place.parents.glance.get(where.image)
                    if image is not None and image.status == "active":
                        return str(where)
    return ""


def not_to_be_had(entry: ParentEntry, tried: Sequence[tuple[Candidate, AutobackupError | OSError]]) -> AutobackupError:
    """
    What it is that none of *tried* was the parent.

    `Transient` if one may be tried again, `Damaged` if something else was found under its name.
    """
    later = next((error for _, error in tried if isinstance(error, Transient)), None)
    if later is not None:
        return later
    reasons = "; ".join(f"{where}: {error}" for where, error in tried) or "nobody here has it"
    words = f"the parent {entry.path} ({_described(entry)}) is not to be had: {reasons}; {_REMEDY}"
    return Damaged(words) if any(isinstance(error, Damaged) for _, error in tried) else Refused(words)


class Fetch:
    """Fetches the parents of one backup. *show* is told what comes, and how many bytes of it."""

    def __init__(self, origins: Origins, workers: Workers, show: Show) -> None:
        self._origins = origins
        self._workers = workers
        self._show = show

    async def fetch(self, entry: ParentEntry, number: int, header: Header, folder: str, member: str) -> str:
        """
        Put parent *number* of the backup with *header* at *member* below *folder*; a note for whoever restores, or "".

        Raises `Damaged` if what is under its name is something else, `Refused` if it is not to be had.
        """
        tried: list[tuple[Candidate, AutobackupError | OSError]] = []
        async for where in candidates(self._origins, entry, number, header):
            try:
                match where:
                    case InFile():
                        return await self._from_file(entry, where.path, folder, member)
                    case InBase():
                        return await self._from_base(entry, where, folder, member)
                    case InImage():
                        return await self._from_image(entry, where, folder, member)
                    case Unasked():
                        raise where.error
            except (Damaged, Refused, Transient, OSError) as exc:
                if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
                    raise  # the target's fault, and no other candidate's
                tried.append((where, exc))
                _remove(os.path.join(folder, member))
        raise not_to_be_had(entry, tried)

    # ---- inside -----------------------------------------------------------------------------------------

    async def _from_file(self, entry: ParentEntry, path: str, folder: str, member: str) -> str:
        source = await self._workers.blocking(partial(FileSource, path, self._workers))
        is_image = source.size_bytes != entry.size_bytes and await source.read(0, len(MAGIC)) == MAGIC
        if entry.format == "raw" and is_image:  # as it was downloaded
            pieces = content(await open_layer(source, "qcow2", self._workers))
        elif entry.sha256 is not None and source.size_bytes != entry.size_bytes:
            raise Refused(f"has {source.size_bytes} bytes, the parent {entry.size_bytes}")
        else:
            pieces = file_content(source)
        return await self._written(entry, pieces, folder, member, f"copying {path}")

    async def _from_base(self, entry: ParentEntry, where: InBase, folder: str, member: str) -> str:
        sealed = await open_sealed(where.place.store, where.place.keys, where.attempt)
        sink = Files(folder, place=lambda name: member if name.startswith(BASES) else None, size_bytes=entry.size_bytes)
        try:
            with self._show(f"parent {entry.name}", sealed.size_bytes) as advance:
                unpacked = await read_back(sealed, self._workers, sink=sink, progress=advance)
        finally:
            sink.close()
        held = [unpacked.digests.members[base.member].sha256 for base in unpacked.manifest.bases]
        if held != [entry.sha256]:
            raise Damaged(f"holds other bytes: sha256 {', '.join(held) or 'of nothing'}")
        return ""

    async def _from_image(self, entry: ParentEntry, where: InImage, folder: str, member: str) -> str:
        assert where.place.parents is not None
        glance = where.place.parents.glance
        try:
            image = await glance.get(where.image)
            if image is None:
                raise StoreRefused("is gone, or not ours to see")
            if entry.format == "raw" and image.properties.get("disk_format") == "qcow2":
                source = ImageSource(glance, image.id, image.size_bytes or 0)
                pieces: _Pieces = content(await open_layer(source, "qcow2", self._workers))
            else:
                pieces = glance.stream(image.id, offset=0)
            note = await self._written(entry, pieces, folder, member, f"parent {image.id}")
        except CloudUnavailable as exc:
            raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
        except CloudRefused as exc:
            raise StoreRefused(str(exc)) from exc
        return note or _changed(entry, image)

    async def _written(
        self, entry: ParentEntry, pieces: _Pieces, folder: str, member: str,
        words: str,
    ) -> str:  # fmt: skip
        """Write *pieces* to *member*; refuse them at the end if they are not the parent."""
        sink, digest, size_bytes = Files(folder), hashlib.sha256(), 0
        sink.start(member, entry.size_bytes)

        def take(data: memoryview) -> None:
            digest.update(data)
            sink.write(data)

        try:
            with self._show(words, entry.size_bytes) as advance:
                async with aclosing(pieces):
                    async for piece in pieces:
                        data = _ZEROS[:piece] if isinstance(piece, int) else memoryview(piece)
                        size_bytes += len(data)
                        if entry.sha256 is not None and size_bytes > entry.size_bytes:
                            break
                        await self._workers.heavy(partial(take, data))
                        advance(len(data))
            await self._workers.blocking(partial(sink.end, member))
        finally:
            sink.close()
        if entry.sha256 is None:
            return f"{member}: what it should be is not known: the host could not read it any more; it was not compared"
        if (size_bytes, digest.hexdigest()) != (entry.size_bytes, entry.sha256):
            raise Damaged(f"holds other bytes: sha256 {digest.hexdigest()}")
        return ""


def _described(entry: ParentEntry) -> str:
    words = [f"sha256 {entry.sha256}" if entry.sha256 else "its digest is not known"]
    return ", ".join([*words, *([f"made from image {entry.image}"] if entry.image else [])])


def _changed(entry: ParentEntry, image: Image) -> str:
    said = f"{image.hash_algorithm}:{image.hash_value}"
    if entry.image_hash and entry.image_hash != said:
        return f"image {image.id}: Glance's hash of it is another than at the capture; its content is the same"
    return ""


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)
