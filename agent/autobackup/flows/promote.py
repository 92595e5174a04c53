"""
Promote: the dead disk as an image that boots, in the project of who may boot it. Cleartext, because it was asked for.

Nothing of it is written here: the backup and its parents are read twice where they lie, first whole, to prove them to
the root, then in the order of the file that Glance is sent. The image is made before anything is read, so that whoever
may not make one is told at once; it is deleted unless Glance holds, by its own hash, what was sent (invariant 7).
"""

import hashlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final

from autobackup.cloud.glance import Glance, Image
from autobackup.cloud.upload import Upload
from autobackup.container.bundle import BASES
from autobackup.container.manifest import DiskEntry, Manifest, ParentEntry
from autobackup.errors import (
    AutobackupError,
    CloudRefused,
    CloudUnavailable,
    Damaged,
    Refused,
    StoreRefused,
    StoreUnavailable,
    Transient,
)  # fmt: skip
from autobackup.flows.fetch import Candidate, InBase, InFile, InImage, Origins, Show, Unasked, candidates, not_to_be_had
from autobackup.flows.flat import BLOCK_BYTES, Part, flattened
from autobackup.flows.layers import FileSource, ImageSource, Layer, Source, content, file_content, open_layer
from autobackup.flows.sealed_file import MemberSource, SealedFile, open_file
from autobackup.flows.verify import SealedObject, open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.host import qcow2
from autobackup.model import ChainLink
from autobackup.qcow2.header import MAGIC
from autobackup.stores.image_words import plain
from autobackup.units import MiB

_STALL_S: Final = 120.0
_NAME_CHARS: Final = 255
_ALGORITHM: Final = "sha512"
_TAG: Final = "autobackup:promoted"
_ZEROS: Final = bytes(1 * MiB)
_INHERITED: Final = ("hw_", "os_type", "os_distro", "os_version", "os_admin_user", "os_require_quiesce", "architecture")
_UNREADABLE: Final = (Damaged, Refused, Transient, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The image in Glance, as Glance has it."""

    image: Image
    disk: str
    virtual_bytes: int


async def promote(
    sealed: SealedObject, *, disk: str, target: Glance, name: str, origins: Origins, workers: Workers, show: Show
) -> Promoted:
    """
    Make an image of *disk* (its name on the host) of *sealed* by *target*: Glance, with the right project's eyes.

    Raises `Refused` where we may not make images there or the disk cannot be read in place, `Damaged` where a bit of
    the backup or of a parent is wrong.
    """
    try:
        file = await open_file(sealed, workers)
        manifest = await file.manifest()
        entry = _disk(manifest, disk)
        image = await target.create(
            str(uuid.uuid4()), tags=(_TAG,),
            name=plain(name or f"{manifest.instance_name or manifest.instance} {disk}")[:_NAME_CHARS],
            visibility="private", disk_format="qcow2",
            properties=await _properties(sealed, manifest, entry, origins),
        )  # fmt: skip
        assert image is not None
        try:
            parts = await _Chain(file, manifest, origins, workers, show).proven(entry)
            found = await _sent(target, image, parts, workers, show)
        except BaseException as exc:
            try:
                await target.delete(image.id)
            except AutobackupError as left:
                raise Refused(f"{exc}; image {image.id} may hold the disk IN CLEAR, and: {left}; delete it") from exc
            raise
    except CloudUnavailable as exc:
        if exc.status == HTTPStatus.FORBIDDEN:
            raise Refused(str(exc)) from exc
        raise StoreUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
    except CloudRefused as exc:
        raise StoreRefused(str(exc)) from exc
    return Promoted(image=found, disk=disk, virtual_bytes=parts[0].layer.virtual_bytes)


def _disk(manifest: Manifest, name: str) -> DiskEntry:
    entry = next((one for one in manifest.disks if one.name == name), None)
    if entry is None:
        known = ", ".join(one.name for one in manifest.disks)
        raise Refused(f"there is no disk {name!r} in this backup; it has: {known}")
    return entry


async def _properties(
    sealed: SealedObject, manifest: Manifest, entry: DiskEntry, origins: Origins
) -> Mapping[str, object]:
    """Where it is from, and what its parent says of how it wants to be booted."""
    words: dict[str, object] = {
        "autobackup_origin": sealed.attempt,
        "autobackup_origin_instance": manifest.instance,
        "autobackup_origin_disk": entry.name,
    }
    parents = {parent.path: parent.image for parent in manifest.parents}
    image_id, place = parents.get(entry.backing_path or "") or manifest.facts.get("image", ""), origins.places[0]
    parent = await place.parents.glance.get(image_id) if place.parents is not None and image_id else None
    if parent is not None:
        words |= {key: value for key, value in parent.properties.items() if key.startswith(_INHERITED)}
    return words


class _Chain:
    """Opens each file of one disk's chain where it lies, and proves it."""

    def __init__(self, file: SealedFile, manifest: Manifest, origins: Origins, workers: Workers, show: Show) -> None:
        self._file = file
        self._manifest = manifest
        self._origins = origins
        self._workers = workers
        self._show = show

    async def proven(self, entry: DiskEntry) -> list[Part]:
        """The layers of *entry*, top first."""
        bases = {base.member: base for base in self._manifest.bases}
        parents = {parent.path: n for n, parent in enumerate(self._manifest.parents)}
        layers = [await self._in_bundle(entry)]
        lowest = entry
        while lowest.backing is not None:
            lowest = bases[lowest.backing]
            layers.append(await self._in_bundle(lowest))
        with self._show("proving the backup", self._file.sealed.size_bytes) as advance:
            unpacked = await read_back(self._file.sealed, self._workers, progress=advance)
        if unpacked.manifest != self._manifest:
            raise Damaged(f"{self._file.sealed.attempt}: two readings of its manifest differ")
        parts = [Part(layer=layer) for layer in layers]
        path = lowest.backing_path
        while path is not None:
            if path not in parents:
                raise Refused(f"its backing file {path} is not in this bundle, and nobody knows its digest")
            number = parents[path]
            parts.append(await self._parent(self._manifest.parents[number], number))
            path = self._manifest.parents[number].backing_path
        return parts

    async def _in_bundle(self, entry: DiskEntry) -> Layer:
        source = MemberSource(self._file, *await self._file.member(entry.member))
        chain = (ChainLink(path=entry.backing_path, format=""),) if entry.backing_path else ()
        return await self._layer(source, entry.format, chain, entry.chain_source)

    async def _layer(self, source: Source, format_name: str, chain: tuple[ChainLink, ...], chain_source: str) -> Layer:
        if format_name == "qcow2":
            head = await source.read(0, min(4096, source.size_bytes))
            mistrusted = qcow2.mistrust(head, chain=chain, chain_source=chain_source)
            if mistrusted:
                raise Refused(f"{mistrusted}; its content cannot be told; restore it, and look")
        return await open_layer(source, format_name, self._workers)

    async def _parent(self, entry: ParentEntry, number: int) -> Part:
        """The first of the candidates that holds the bytes that *entry* names."""
        if entry.sha256 is None:
            raise Refused(f"the digest of its parent {entry.path} is not known; restore it, and look")
        tried: list[tuple[Candidate, AutobackupError | OSError]] = []
        async for where in candidates(self._origins, entry, number, self._file.sealed.header):
            try:
                layer, is_guest_view = await self._opened(where, entry)
                return await self._compared(entry, layer, is_guest_view=is_guest_view)
            except _UNREADABLE as exc:
                tried.append((where, exc))
        raise not_to_be_had(entry, tried)

    async def _opened(self, where: Candidate, entry: ParentEntry) -> tuple[Layer, bool]:
        """The layer there; and whether the base's bytes are what a guest sees of it, rather than the file's own."""
        chain = (ChainLink(path=entry.backing_path, format=""),) if entry.backing_path else ()
        source: Source
        match where:
            case Unasked():
                raise where.error
            case InFile():
                source = FileSource(where.path, self._workers)
                is_image = source.size_bytes != entry.size_bytes and await source.read(0, len(MAGIC)) == MAGIC
                if entry.format == "raw" and is_image:
                    return await self._layer(source, "qcow2", (), "none"), True
            case InBase():
                sealed = await open_sealed(where.place.store, where.place.keys, where.attempt)
                file = await open_file(sealed, self._workers)
                source = MemberSource(file, *await file.member(f"{BASES}{entry.sha256}"))
            case InImage():
                assert where.place.parents is not None
                image = await where.place.parents.glance.get(where.image)
                if image is None:
                    raise StoreRefused("is gone, or not ours to see")
                source = ImageSource(where.place.parents.glance, image.id, image.size_bytes or 0)
                if entry.format == "raw" and image.properties.get("disk_format") == "qcow2":
                    return await self._layer(source, "qcow2", (), "none"), True
        return await self._layer(source, entry.format, chain, "libvirt"), entry.format == "raw"

    async def _compared(self, entry: ParentEntry, layer: Layer, *, is_guest_view: bool) -> Part:
        """Read all of it; `Damaged` unless its digest is the one in the manifest."""
        promised_bytes = layer.virtual_bytes if is_guest_view else layer.source.size_bytes
        if promised_bytes != entry.size_bytes:
            raise Damaged(f"has {promised_bytes} bytes, the parent {entry.size_bytes}")
        digest, size_bytes = hashlib.sha256(), 0
        not_zero = bytearray(-(-layer.virtual_bytes // BLOCK_BYTES))

        def take(data: memoryview) -> None:
            digest.update(data)
            at = 0
            while is_guest_view and at < len(data):
                block = data[at : at + BLOCK_BYTES - (size_bytes + at) % BLOCK_BYTES]
                if bytes(block) != _ZEROS[: len(block)]:
                    not_zero[(size_bytes + at) // BLOCK_BYTES] = 1
                at += len(block)

        pieces = content(layer) if is_guest_view else file_content(layer.source)
        with self._show(f"proving parent {entry.name}", entry.size_bytes) as advance:
            async with aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, int):
                        await self._workers.heavy(partial(digest.update, _ZEROS[:piece]))
                        size_bytes += piece
                    else:
                        await self._workers.heavy(partial(take, memoryview(piece)))
                        size_bytes += len(piece)
                    advance(piece if isinstance(piece, int) else len(piece))
        if (size_bytes, digest.hexdigest()) != (entry.size_bytes, entry.sha256):
            raise Damaged(f"holds other bytes: sha256 {digest.hexdigest()}")
        return Part(layer=layer, not_zero=not_zero if is_guest_view else None)


class _Body:
    """What Glance is sent, hashed on the way."""

    def __init__(self, pieces: AsyncIterator[bytes], workers: Workers, algorithm: str) -> None:
        self._pieces = pieces
        self._workers = workers
        self.hash = hashlib.new(algorithm)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            await self._workers.heavy(partial(self.hash.update, piece))
            yield piece


async def _sent(target: Glance, image: Image, parts: list[Part], workers: Workers, show: Show) -> Image:
    flat = await flattened(parts)
    newest = await target.newest_active()
    algorithm = newest.hash_algorithm if newest is not None and newest.hash_algorithm else _ALGORITHM
    with show("sending", flat.plan.file_bytes) as advance:

        async def pieces() -> AsyncGenerator[bytes, None]:
            async with aclosing(flat.pieces()) as made:
                async for piece in made:
                    advance(len(piece))
                    yield piece

        body = _Body(pieces(), workers, algorithm)
        await target.upload(image.id, Upload(body, stall_timeout_s=_STALL_S), size_bytes=flat.plan.file_bytes)
    found = await target.get(image.id)
    if found is None or found.status != "active":
        raise StoreRefused(f"image {image.id} is {found.status if found else 'gone'} after it was sent")
    said = (found.size_bytes, found.hash_algorithm, found.hash_value)
    if said != (flat.plan.file_bytes, algorithm, body.hash.hexdigest()):
        raise Damaged(f"image {image.id}: Glance holds other bytes than it was sent; it was deleted")
    return found
