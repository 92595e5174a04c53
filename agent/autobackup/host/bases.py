"""
Bases: hard links on backing files, so that Nova's image cache cannot age them away under an overlay.

The cache drops a base about 24 hours after its last instance; spooled overlays count for nothing there. A link
lives in `<spool>/bases/` as `<file name>.<hash of its path>.<inode>`, is never a candidate, never scrubbed, and is
let go after the last instance and job that stand on it.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from autobackup.errors import SpoolUnavailable
from autobackup.model import ChainLink

_NOT_HELD: Final = (errno.EXDEV, errno.EPERM, errno.ENOENT, errno.ELOOP)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_CHARS: Final = 40


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
        held = [entry for entry in os.listdir(self._folder) if entry.rpartition(".")[0] == short_name(link.path)]
        if held:
            return max(
                (os.path.join(self._folder, entry) for entry in held), key=lambda path: os.lstat(path).st_mtime_ns
            )
        return link.path if os.path.isfile(link.path) and not os.path.islink(link.path) else None

    def release_all_but(self, wanted: Iterable[ChainLink]) -> None:
        """Let go of every base that none of *wanted* stands on."""
        names = {short_name(link.path) for link in wanted}
        for entry in os.listdir(self._folder):
            if entry.rpartition(".")[0] not in names:
                with suppress(FileNotFoundError):  # another release was faster
                    os.unlink(os.path.join(self._folder, entry))


def short_name(path: str) -> str:
    """A name for a backing file that is safe in a folder and in a bundle, and differs where the path differs."""
    name = _UNSAFE.sub("_", os.path.basename(path)).lstrip("._-")[:_NAME_CHARS] or "base"
    return f"{name}.{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
