"""
The one folder below which the lab keeps everything: sockets, disks, images, mounts.

It lies in /var/tmp: on the machine's own disk, with a path short enough for a socket
(108 bytes), open (0755) to QEMU's user, which pytest's own tmp_path (0700) is not.

`mounts` is a bind mount of itself and shared. A hypervisor lives in a mount namespace of
its own that is a slave of it: what is mounted below `mounts` later appears there, and what
is unmounted disappears. Elsewhere a private copy of a mount would stay in that namespace
and keep its loop device attached for as long as the hypervisor runs.

A run that was killed cannot clean up. The next one does: it takes away each workspace
whose owner no longer holds the lock.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab.mounts import UNMOUNT_TIMEOUT_S, StillBusy, mount, mounts_below, unmount

PARENT: Final = Path("/var/tmp").resolve()
_PREFIX: Final = "autobackup-lab-"
_OWNER: Final = ".owner"


class Workspace:
    """A folder with a lock on it, gone after `close`. Use `workspace()` to get the shared one."""

    def __init__(self) -> None:
        with _parent_locked():
            _sweep()
            self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=PARENT))
            self._owner = os.open(self.root / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._owner, fcntl.LOCK_EX)
        self.root.chmod(0o755)
        self.mounts = self.root / "mounts"
        self.mounts.mkdir()
        if os.geteuid() == 0:
            mount("--bind", self.mounts, self.mounts)
            mount("--make-shared", self.mounts)

    def folder(self, kind: str) -> Path:
        """Make a new folder, on the machine's own disk and in the same mount as every other."""
        return _opened(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.root))

    def mount_point(self, kind: str) -> Path:
        """Make a new folder to mount on: every hypervisor will see what is mounted there."""
        return _opened(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.mounts))

    def close(self) -> None:
        with _parent_locked():
            left = [mount.mount_point for mount in mounts_below(self.root)]
            try:
                busy = _remove(self.root)
            finally:
                os.close(self._owner)
        if busy:
            raise ExceptionGroup("the lab's mounts are held", busy)
        if forgotten := [str(mount_point) for mount_point in left if mount_point != self.mounts]:
            raise RuntimeError(f"still mounted at the end of the lab: {', '.join(forgotten)}")


_lock = threading.Lock()
_users = 0
_shared: Workspace | None = None
opened: list[Path] = []
"""The root of every workspace of this process, closed ones too: where to look for leftovers."""


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    """Give the workspace of this process: made for the first user, removed after the last."""
    global _shared, _users  # one per process, whoever comes first
    with _lock:
        if _shared is None:
            _shared = Workspace()
            opened.append(_shared.root)
        _users += 1
        given = _shared
    try:
        yield given
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _shared = None
                given.close()


@contextlib.contextmanager
def _parent_locked() -> Iterator[None]:
    """No workspace is half made or half swept while this is held."""
    parent = os.open(PARENT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(parent)


def _sweep() -> None:
    for root in PARENT.glob(f"{_PREFIX}*"):
        if root.is_symlink() or root.stat().st_uid != os.geteuid():
            continue
        with contextlib.ExitStack() as stack:
            try:
                owner = os.open(root / _OWNER, os.O_RDWR)
                stack.callback(os.close, owner)
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # killed before it could lock
                pass
            except BlockingIOError:
                continue
            _remove(root, unmount_timeout_s=0)  # whoever is busy there is not ours to wait for


def _remove(root: Path, *, unmount_timeout_s: float = UNMOUNT_TIMEOUT_S) -> list[StillBusy]:
    """Unmount all below *root* and delete it; what was busy is detached lazily and told."""
    busy = []
    for below in mounts_below(root):
        try:
            unmount(below.mount_point, timeout_s=unmount_timeout_s)
        except StillBusy as exc:
            busy.append(exc)
    shutil.rmtree(root)
    return busy


def _opened(folder: str) -> Path:
    path = Path(folder)
    path.chmod(0o755)
    return path
