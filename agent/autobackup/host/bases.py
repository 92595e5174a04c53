"""
Bases: hard links on backing files, so that Nova's image cache cannot age them away under an overlay.

The cache drops a base about 24 hours after its last instance; spooled overlays count for nothing there. A link
lives in `<spool>/bases/` as `<file name>.<hash of its path>.<inode>`, is never a candidate, never scrubbed, and is
let go after the last instance and job that stand on it. Beside it lies, as `….json`, what its content is: read once for
each inode, since it is the same for every instance on it, and may be tens of GiB.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Final

from autobackup.errors import RecordDamaged, SpoolUnavailable
from autobackup.host.disks import HeldDisk
from autobackup.model import BaseRecord, ChainLink, decode, encode
from autobackup.units import MiB

_NOT_HELD: Final = (errno.EXDEV, errno.EPERM, errno.ENOENT, errno.ELOOP)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_CHARS: Final = 40
_RECORD: Final = ".json"
_ZEROS: Final = bytes(1 * MiB)


class Bases:
    """Owns every file in *folder*."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def hold(self, path: str) -> bool:
        """Link the backing file *path*. False if it cannot be held: it lies on another mount, or is gone."""
        try:
            inode = os.lstat(path).st_ino
            os.link(path, os.path.join(self._folder, f"{short_name(path)}.{inode}"), follow_symlinks=False)
        except FileExistsError:
            return True
        except OSError as exc:
            if exc.errno in _NOT_HELD:
                return False
            raise SpoolUnavailable(f"{path}: {exc.strerror}") from exc
        return True

    def readable_path(self, link: ChainLink) -> str | None:
        """Where a backing file can be read: our link of it (the latest, if it was replaced), else its own path."""
        held = self.held(link)
        if held:
            return max(held, key=lambda path: os.lstat(path).st_mtime_ns)
        return link.path if os.path.isfile(link.path) and not os.path.islink(link.path) else None

    def held(self, link: ChainLink) -> list[str]:
        """Our links of a backing file: several if it was replaced; which disk stands on which cannot be told."""
        names = [entry for entry in os.listdir(self._folder) if entry.rpartition(".")[0] == short_name(link.path)]
        return sorted(os.path.join(self._folder, name) for name in names)

    def recorded(self, disk: HeldDisk, link: ChainLink) -> BaseRecord | None:
        """What is known of the content of *disk*, which is *link* opened; None if it was not read yet."""
        path = self._record_path(disk, link)
        try:
            with open(path, "rb") as file:
                record = decode(BaseRecord, file.read(), where=path)
        except (FileNotFoundError, RecordDamaged):
            return None
        return record if record.identity.same_content(disk.identity) else None

    def keep(self, disk: HeldDisk, link: ChainLink, record: BaseRecord) -> None:
        """Remember *record*. What a crash leaves half written is read as nothing, and made anew."""
        path = self._record_path(disk, link)
        with contextlib.suppress(OSError):  # a full spool: then it is read again
            with open(path + ".new", "wb") as file:
                file.write(encode(record))
            os.replace(path + ".new", path)

    def release_all_but(self, wanted: Iterable[ChainLink]) -> None:
        """Let go of every base that none of *wanted* stands on."""
        names = {short_name(link.path) for link in wanted}
        for entry in os.listdir(self._folder):
            if entry.removesuffix(".new").removesuffix(_RECORD).rpartition(".")[0] not in names:
                with suppress(FileNotFoundError):  # another release was faster
                    os.unlink(os.path.join(self._folder, entry))

    def _record_path(self, disk: HeldDisk, link: ChainLink) -> str:
        return os.path.join(self._folder, f"{short_name(link.path)}.{disk.identity.inode}{_RECORD}")


def measure(
    disk: HeldDisk, *, token: AbstractContextManager[object], is_given_up: Callable[[], bool] = lambda: False
) -> BaseRecord:
    """
    Read all of *disk* for its digests, holes as zeros, and what cannot be read, too. Blocks.

    *token* is entered round the heavy part of each MiB, *is_given_up* asked before it: then `SpoolUnavailable`.
    Raises `OverlayChanged` if the disk is not what it was at the end.
    """
    sha256, sha512 = hashlib.sha256(), hashlib.sha512()
    buffer = bytearray(1 * MiB)
    size_bytes, is_damaged = disk.identity.size_bytes, False
    marks = disk.data_marks(len(buffer))
    for number, at in enumerate(range(0, size_bytes, len(buffer))):
        piece = memoryview(buffer)[: min(len(buffer), size_bytes - at)]
        if is_given_up():
            raise SpoolUnavailable(f"{disk.path}: reading it was given up")
        if not marks[number]:
            piece = memoryview(_ZEROS)[: len(piece)]
        elif disk.read_into(piece, at):
            is_damaged = True
        with token:
            sha256.update(piece)
            sha512.update(piece)
    disk.require_unchanged(disk.identity)
    return BaseRecord(
        identity=disk.identity, sha256=sha256.hexdigest(), sha512=sha512.hexdigest(), is_damaged=is_damaged
    )


def short_name(path: str) -> str:
    """A name for a backing file that is safe in a folder and in a bundle, and differs where the path differs."""
    name = _UNSAFE.sub("_", os.path.basename(path)).lstrip("._-")[:_NAME_CHARS] or "base"
    return f"{name}.{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
