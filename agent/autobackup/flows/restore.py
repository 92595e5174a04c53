"""
Restore: a sealed bundle back into disks that boot, or nothing.

Everything is written into `<target>.partial`, which becomes `<target>` when the whole bundle was authenticated, its
digests agreed and the chain was put together (invariant 7). On any failure the partial folder is removed, so there
is never half a disk to mistake for one.

The overlay inside names its backing file by the path it had on the dead host. Its header is compared with the
manifest, then rewritten to the restored base with explicit formats; guest data is not touched. A header that says
something else than the hypervisor did is left as it is, and said so: nothing in it is followed (invariant 5).
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from autobackup.container.manifest import DiskEntry, Manifest
from autobackup.errors import Refused, TargetExists
from autobackup.flows.unpack import Unpacked
from autobackup.flows.verify import SealedObject, read_back
from autobackup.flows.workers import Workers
from autobackup.host import qcow2
from autobackup.host.filesystems import sync_folder
from autobackup.model import ChainLink
from autobackup.units import KiB, MiB

_HOLE_BYTES: Final = 64 * KiB  # zeros of this length, aligned, become a hole again
_ZEROS: Final = bytes(_HOLE_BYTES)
_WRITE_BEHIND_BYTES: Final = 16 * MiB  # then the kernel is told to begin; the fsync at the end finds little to do
_QEMU_IMG_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """
    What is in the target folder now.

    *reattached* are members whose header now names the restored base, so that their digest is no longer the sealed
    one; *notes* are for whoever opens the disks: what could not be done, and why.
    """

    target: str
    unpacked: Unpacked
    reattached: tuple[str, ...]
    notes: tuple[str, ...]


async def restore(
    sealed: SealedObject,
    *,
    target: str,
    workers: Workers,
    progress: Callable[[int], None] = lambda _count: None,
) -> Restored:
    """
    Restore *sealed* to the folder *target*, which must not exist.

    Raises `TargetExists`; `ContainerDamaged` if a bit of it is wrong; `Refused` if the target takes no more or the
    chain cannot be put together.
    """
    partial_path = f"{target.rstrip('/')}.partial"
    _make_partial(target, partial_path)  # here, not in a worker: nothing may come between making it and the `try`
    try:
        sink = _Files(partial_path)
        try:
            unpacked = await read_back(sealed, workers, sink=sink, progress=progress)
        finally:
            sink.close()
        reattached, notes = await workers.blocking(partial(_rebuild_chain, partial_path, unpacked.manifest))
        await workers.blocking(partial(_release, partial_path, target))
    except BaseException as exc:
        shutil.rmtree(partial_path, ignore_errors=True)
        if isinstance(exc, OSError):
            raise Refused(f"{target}: {exc.strerror or exc}; nothing was restored") from exc
        raise
    return Restored(target=target, unpacked=unpacked, reattached=tuple(reattached), notes=tuple(notes))


def _make_partial(target: str, partial_path: str) -> None:
    for path in (target, partial_path):
        if os.path.lexists(path):
            raise TargetExists(f"{path}: exists; name a folder that does not, or remove it")
    try:
        os.makedirs(partial_path, mode=0o700)
    except OSError as exc:
        raise Refused(f"{partial_path}: {exc.strerror}; nothing was restored") from exc


def _release(partial_path: str, target: str) -> None:
    sync_folder(partial_path)
    if os.path.lexists(target):
        raise TargetExists(f"{target}: appeared while restoring; nothing was put there")
    os.rename(partial_path, target)
    sync_folder(os.path.dirname(os.path.abspath(target)))


class _Files:
    """The sink that writes members as sparse files below one folder. Names were checked by the bundle reader."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._fd = -1
        self._at = 0
        self._begun_bytes = 0  # on their way to the disk already

    def start(self, name: str, size_bytes: int) -> None:
        path = os.path.join(self._folder, name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._at = self._begun_bytes = 0
        os.ftruncate(self._fd, size_bytes)

    def write(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            # cut where the file's own 64 KiB blocks are, so that holes line up whatever comes in
            block = data[at : at + _HOLE_BYTES - (self._at % _HOLE_BYTES)]
            if bytes(block) != _ZEROS[: len(block)]:  # a memoryview compares item by item: 2 s/GiB of zeros, not 0.03
                _write_all(self._fd, block, self._at)
            at += len(block)
            self._at += len(block)
        if self._at - self._begun_bytes >= _WRITE_BEHIND_BYTES:
            with contextlib.suppress(OSError):  # advice; it also keeps a whole disk out of the page cache
                os.posix_fadvise(self._fd, self._begun_bytes, self._at - self._begun_bytes, os.POSIX_FADV_DONTNEED)
            self._begun_bytes = self._at

    def end(self, name: str) -> None:
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], offset + at)


def _rebuild_chain(folder: str, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Point every restored qcow2 at its restored backing file; what was, and what was left undone and why."""
    reattached, notes = [], []
    for entry in (*manifest.bases, *manifest.disks):
        if entry.format == "unknown":
            notes.append(f"{entry.member}: its format is not known; the bytes are those of the file on the host")
        elif entry.format == "qcow2":
            obstacle = _attach(folder, entry, manifest)
            if obstacle:
                notes.append(obstacle)
            elif entry.backing is not None:
                reattached.append(entry.member)
    return reattached, notes


def _attach(folder: str, entry: DiskEntry, manifest: Manifest) -> str | None:
    """Rewrite the header of one overlay; the reason if it is left as it was captured."""
    path = os.path.join(folder, entry.member)
    with open(path, "rb") as file:
        head = qcow2.read_head(file.fileno())
    chain = (ChainLink(path=entry.backing_path, format=""),) if entry.backing_path else ()
    mistrusted = qcow2.mistrust(head, chain=chain, chain_source=entry.chain_source)
    if mistrusted:
        return f"{entry.member}: left as it was captured: {mistrusted}; open it only with its backing file switched off"
    if entry.backing is None:
        named = qcow2.parse_header(head).backing_path
        if named is None:
            return None
        return f"{entry.member}: its backing file {named!r} is not in this bundle; attach one before opening it"
    base = next(base for base in manifest.bases if base.member == entry.backing)
    relative = os.path.relpath(os.path.join(folder, base.member), os.path.dirname(path))
    if base.format == "unknown":
        return f"{entry.member}: the format of its backing file {base.member} is not known; attach it by hand"
    # -u writes the header only; the base was checked by its digest, not by opening it
    _qemu_img("rebase", "-u", "-f", "qcow2", "-F", base.format, "-b", relative, path)
    return None


def _qemu_img(*arguments: str) -> None:
    try:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, timeout=_QEMU_IMG_S, check=False)
    except FileNotFoundError:
        raise Refused("qemu-img is not installed; the chain cannot be put together (package qemu-utils)") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"qemu-img {arguments[0]}: no end after {_QEMU_IMG_S:.0f} s") from None
    if done.returncode != 0:
        raise Refused(f"qemu-img {arguments[0]}: {done.stderr.decode(errors='replace').strip()[:400]}")
