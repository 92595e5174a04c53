"""
Restore: a sealed bundle, and what it stands on, back into disks that boot; or nothing.

The overlay inside names its backing file by the path it had on the dead host. Its header is compared with the
manifest, then rewritten to the restored base with explicit formats; guest data is not touched. A header that says
something else than the hypervisor did is left as it is, and said so: nothing in it is followed (invariant 5).

Everything comes together in a folder that appears at the end (`flows.files`), each parent once for all disks on it.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from autobackup.container.bundle import BASES, DISKS
from autobackup.container.manifest import Digests, DiskEntry, Manifest, ParentEntry
from autobackup.errors import ContainerDamaged, Refused
from autobackup.flows.fetch import Fetch, Origins, Show
from autobackup.flows.files import Files, appearing
from autobackup.flows.sealed_file import open_file
from autobackup.flows.unpack import Unpacked
from autobackup.flows.verify import SealedObject, read_back
from autobackup.flows.workers import Workers
from autobackup.host import qcow2, qemu_img
from autobackup.host.bases import short_name
from autobackup.model import ChainLink
from autobackup.qcow2.header import parse_header

_CORRUPT: Final = "corrupt"
_CONFIG_DRIVE: Final = "disk.config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """
    Which disks, by their names on the host (none: all), and whether as chains or each as one file, in *flat*.

    Not *with_parents*: the overlays alone, as they were captured.
    """

    disks: Sequence[str] = ()
    flat: Literal["qcow2", "raw"] | None = None
    with_parents: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """One disk, and its way down to the root: *path* first."""

    name: str
    path: str
    format: str
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """
    What is in the target folder now.

    *reattached* are members whose header now names the restored base, so that their digest is no longer the sealed
    one; *notes* are for whoever opens the disks: what could not be done, and why.
    """

    target: str
    unpacked: Unpacked
    disks: tuple[RestoredDisk, ...]
    reattached: tuple[str, ...]
    notes: tuple[str, ...]


async def restore(
    sealed: SealedObject, *, target: str, wanted: Wanted, origins: Origins, workers: Workers, show: Show
) -> Restored:
    """
    Restore *sealed* to the folder *target*, which must not exist.

    Raises `TargetExists`; `Damaged` if a bit of it, or of a parent, is wrong; `Refused` if the target takes no more, a
    parent is not to be had, or the chain cannot be put together.
    """
    names: set[str] = set()
    if wanted.disks:  # before all of it is read
        chosen = _chosen(await (await open_file(sealed, workers)).manifest(), wanted.disks)
        names = {entry.member for entry in chosen}
    async with appearing(target, workers) as folder:
        sink = Files(
            folder, place=lambda name: None if names and name.startswith(DISKS) and name not in names else name
        )
        try:
            with show("backup", sealed.size_bytes) as advance:
                unpacked = await read_back(sealed, workers, sink=sink, progress=advance)
        finally:
            sink.close()
        manifest = unpacked.manifest
        entries = _chosen(manifest, wanted.disks)
        fetch = Fetch(origins, workers, show)
        notes = []
        needed = _needed(entries, manifest) if wanted.with_parents else set()
        for number, parent in enumerate(manifest.parents):
            if parent.path in needed:
                notes.append(await fetch.fetch(parent, number, sealed.header, folder, _member(parent)))
        built = await workers.blocking(partial(_Chain(folder, manifest, unpacked.digests, needed).build, entries))
        if wanted.flat is not None:
            built = await workers.interruptible(partial(_flattened, folder, built, wanted.flat))
    return Restored(
        target=target,
        unpacked=unpacked,
        disks=tuple(_at(target, disk) for disk in built.disks),
        reattached=built.reattached,
        notes=(*filter(None, notes), *built.notes),
    )


def _chosen(manifest: Manifest, names: Sequence[str]) -> tuple[DiskEntry, ...]:
    known = {disk.name for disk in manifest.disks}
    for name in names:
        if name not in known:
            raise Refused(f"there is no disk {name!r} in this backup; it has: {', '.join(sorted(known))}")
    return tuple(disk for disk in manifest.disks if not names or disk.name in names)


def _needed(entries: Sequence[DiskEntry], manifest: Manifest) -> set[str]:
    """The paths of all parents on the way from *entries* to their roots."""
    below = {parent.path: parent.backing_path for parent in manifest.parents}
    paths: set[str] = set()
    for entry in entries:
        path = entry.backing_path if entry.backing is None else None
        while path in below and path not in paths:
            paths.add(path)
            path = below[path]
    return paths


def _member(parent: ParentEntry) -> str:
    return BASES + short_name(parent.path)


def _at(target: str, disk: RestoredDisk) -> RestoredDisk:
    return replace(
        disk, path=os.path.join(target, disk.path), chain=tuple(os.path.join(target, one) for one in disk.chain)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """Paths are relative to the folder. *obstacles* are what keeps chains from being whole, and notes, too."""

    disks: tuple[RestoredDisk, ...]
    reattached: tuple[str, ...]
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """One file of a chain: a disk, a base in the bundle, a parent from elsewhere."""

    member: str
    format: str
    backing_path: str | None
    below: str | None  # member
    chain_source: str


class _Chain:
    """Points every restored qcow2 at its restored backing file. Blocks."""

    def __init__(self, folder: str, manifest: Manifest, digests: Digests, fetched: Collection[str]) -> None:
        self._folder = folder
        self._health = {one.member: one.result for one in digests.health}
        members = {parent.path: _member(parent) for parent in manifest.parents if parent.path in fetched}
        self._links: Mapping[str, _Link] = {
            link.member: link
            for link in (
                *(_of_entry(entry, members) for entry in (*manifest.bases, *manifest.disks)),
                *(_of_parent(parent, members) for parent in manifest.parents if parent.path in fetched),
            )
        }
        self._reattached: list[str] = []
        self._obstacles: list[str] = []
        self._notes: list[str] = []

    def build(self, entries: Sequence[DiskEntry]) -> _Built:
        chains = {entry.member: self._chain(entry.member) for entry in entries}
        for member in dict.fromkeys(member for chain in chains.values() for member in reversed(chain)):
            self._join(self._links[member])
        return _Built(
            disks=tuple(
                RestoredDisk(name=entry.name, path=entry.member, format=entry.format, chain=chains[entry.member])
                for entry in entries
            ),
            reattached=tuple(self._reattached),
            obstacles=tuple(self._obstacles),
            notes=(*self._obstacles, *self._notes),
        )

    def _chain(self, member: str) -> tuple[str, ...]:
        chain: list[str] = []
        at: str | None = member
        while at is not None and at not in chain:
            chain.append(at)
            at = self._links[at].below
        return tuple(chain)

    def _join(self, link: _Link) -> None:
        if link.format == "unknown":
            words = "its format is not known; the bytes are those of the file on the host"
            self._obstacles.append(f"{link.member}: {words}")
        elif link.format == "qcow2":
            obstacle = self._attach(link)
            if obstacle:
                self._obstacles.append(obstacle)
            else:
                self._check(link)

    def _attach(self, link: _Link) -> str | None:
        """Rewrite the header of one overlay; the reason if it is left as it was captured."""
        path = os.path.join(self._folder, link.member)
        with open(path, "rb") as file:
            head = qcow2.read_head(file.fileno())
        chain = (ChainLink(path=link.backing_path, format=""),) if link.backing_path else ()
        mistrusted = qcow2.mistrust(head, chain=chain, chain_source=link.chain_source)
        if mistrusted:
            words = "open it only with its backing file switched off"
            return f"{link.member}: left as it was captured: {mistrusted}; {words}"
        if link.below is None:
            named = parse_header(head).backing_path
            if named is None:
                return None
            return f"{link.member}: its backing file {named!r} is not in this bundle; attach one before opening it"
        base = self._links[link.below]
        if base.format == "unknown":
            return f"{link.member}: the format of its backing file {base.member} is not known; attach it by hand"
        relative = os.path.relpath(os.path.join(self._folder, base.member), os.path.dirname(path))
        qemu_img.attach(path, backing=relative, backing_format=base.format)
        self._reattached.append(link.member)
        return None

    def _check(self, link: _Link) -> None:
        health = qemu_img.check(os.path.join(self._folder, link.member), member=link.member, mistrusted=None)
        before = self._health.get(link.member, "clean")
        if health.result == _CORRUPT and before != _CORRUPT:
            raise ContainerDamaged(f"{link.member}: qemu-img check: {health.detail or 'corrupt'}; it was {before}")
        if health.result != "clean":
            was = f" (at its capture: {before})" if link.member in self._health else ""
            self._notes.append(f"{link.member}: qemu-img check says {health.result}{was}")


def _of_entry(entry: DiskEntry, parents: Mapping[str, str]) -> _Link:
    return _Link(
        member=entry.member,
        format=entry.format,
        backing_path=entry.backing_path,
        below=entry.backing or parents.get(entry.backing_path or ""),
        chain_source=entry.chain_source,
    )


def _of_parent(parent: ParentEntry, parents: Mapping[str, str]) -> _Link:
    return _Link(
        member=_member(parent),
        format=parent.format,
        backing_path=parent.backing_path,
        below=parents.get(parent.backing_path or ""),
        chain_source="libvirt",
    )


def _flattened(folder: str, built: _Built, target_format: str, is_given_up: Callable[[], bool]) -> _Built:
    """Every disk as one file; the chains go. Blocks for as long as the disks are copied."""
    if built.obstacles:
        raise Refused(f"cannot be flattened: {'; '.join(built.obstacles)}; restore it as it is, without --flatten")
    disks = []
    for disk in built.disks:
        path = os.path.join(folder, disk.path)
        if disk.name == _CONFIG_DRIVE:  # an ISO image, and nobody expects anything else
            disks.append(disk)
            continue
        if len(disk.chain) > 1 or disk.format != target_format:
            qemu_img.flatten(
                path, f"{path}.flat", format_name=disk.format, target_format=target_format, is_given_up=is_given_up
            )
            os.rename(f"{path}.flat", path)
        disks.append(replace(disk, format=target_format, chain=(disk.path,)))
    shutil.rmtree(os.path.join(folder, BASES), ignore_errors=True)
    return replace(built, disks=tuple(disks), reattached=())
