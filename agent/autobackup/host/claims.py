"""
Claims: hard links that keep an instance's disks alive after Nova unlinks them.

Nova deletes a disk by name. A second name for the same inode, made while the instance runs, means that the delete
removes a name and not the data. The second name is the claim. It lives in `<spool>/claims/` and carries all that
must survive a crash in itself: `<uuid>.<disk>.<inode>`. There is one claim per inode; a second name of Nova's for
a held inode is a rename.

This module owns every file under `<spool>/claims/`: nobody else links, renames or unlinks there. It decides
nothing: whether an instance is wanted is `rules.policy`, whether it has died is `rules.termination`.

Any thread may call in: claims are made in the inotify thread and in libvirt's own, with no RPC before the link,
because 17 to 37 % of the links made only at STOPPED come too late.
"""

import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from autobackup.errors import SpoolUnavailable
from autobackup.host.disks import identify
from autobackup.model import ROOT_DISK, DiskIdentity, InstanceId
from autobackup.rules.termination import Place

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_FOLDER: Final = re.compile(rf"({_UUID.pattern})(|_del|_resize)")
_DISK: Final = re.compile(r"disk|disk\.local|disk\.eph[0-9]+|disk\.swap|disk\.config|disk\.rescue|console\.log")
_OUTSIDE: Final = re.compile(r"nvram|swtpm\.[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")  # firmware state
_CLAIM: Final = re.compile(rf"({_UUID.pattern})\.({_DISK.pattern}|{_OUTSIDE.pattern})\.([1-9][0-9]*)")
_PLACES: Final = {"": Place.INSTANCE, "_resize": Place.RESIZE, "_del": Place.DELETED}  # by the folder's suffix
IsOwned: TypeAlias = Callable[[int, Callable[[], DiskIdentity | None]], bool]
_TRIES: Final = 10  # a disk that is replaced ten times between stat and link is not worth more


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One hard link of ours on one inode."""

    instance: InstanceId
    disk: str
    inode: int

    @property
    def name(self) -> str:
        return f"{self.instance}.{self.disk}.{self.inode}"

    @property
    def is_root(self) -> bool:
        return self.disk == ROOT_DISK


def parse_claim(name: str) -> Claim | None:
    """The claim that a file name in `claims/` stands for; None for a name that is not one."""
    match = _CLAIM.fullmatch(name)
    if match is None:
        return None
    return Claim(instance=InstanceId(match[1]), disk=match[2], inode=int(match[len(match.groups())]))


def parse_folder(name: str) -> tuple[InstanceId, Place] | None:
    """`<uuid>`, `<uuid>_del` or `<uuid>_resize` -> whose it is; None for anything else in `instances_path`."""
    match = _FOLDER.fullmatch(name)
    return (InstanceId(match[1]), _PLACES[match[2]]) if match else None


def is_claimable(file_name: str) -> bool:
    """True for the names of the allow-list."""
    return _DISK.fullmatch(file_name) is not None


def named_path(instances_path: str, instance: InstanceId, disk: str, inode: int) -> str | None:
    """The path under which Nova still names *inode* as this disk of this instance; None if nowhere."""
    for suffix in _PLACES:
        path = os.path.join(instances_path, instance + suffix, disk)
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == inode:
                return path
    return None


class Claims:
    """
    The claims of this host.

    *is_owned(inode, identify_it)* tells of inodes that a job holds already: those are not claimed again.
    *on_claimed(claim, path)* runs in the claiming thread, right after the link (the watch adds itself there).
    """

    def __init__(self, *, instances_path: str, folder: str, is_owned: IsOwned) -> None:
        self._instances_path = instances_path
        self._folder = folder
        self._is_owned = is_owned
        self._lock = threading.RLock()
        self._by_inode: dict[int, Claim] = {}
        self._dirty = False
        self.on_claimed: Callable[[Claim], None] = lambda _claim: None

    # ---- making them ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Take over the claims found in the folder. Two on one inode (a crash) become one again."""
        with self._lock:
            self._by_inode.clear()
            for name in sorted(os.listdir(self._folder)):
                claim = parse_claim(name)
                if claim is None or self._inode_of(name) != claim.inode:
                    continue
                if claim.inode in self._by_inode:
                    os.unlink(self._path(claim))  # our own second name; the inode keeps the first
                    self._dirty = True
                else:
                    self._by_inode[claim.inode] = claim
            self.sync()

    def claim_folder(self, folder_name: str) -> list[Claim]:
        """Claim every disk in `<instances>/<folder_name>`; returns those that were not held before."""
        owner = parse_folder(folder_name)
        if owner is None:
            return []
        made: list[Claim] = []
        with self._open_folder(folder_name) as folder_fd:
            if folder_fd is None:
                return []
            for file_name in os.listdir(folder_fd):
                if is_claimable(file_name):
                    made += self._claim(owner[0], file_name, file_name, folder_fd)
        return made

    def claim_file(self, folder_name: str, file_name: str) -> list[Claim]:
        """Claim one file of the allow-list in one folder of Nova's."""
        owner = parse_folder(folder_name)
        if owner is None or not is_claimable(file_name):
            return []
        with self._open_folder(folder_name) as folder_fd:
            return [] if folder_fd is None else self._claim(owner[0], file_name, file_name, folder_fd)

    def claim_outside(self, instance: InstanceId, disk: str, path: str) -> list[Claim]:
        """Claim NVRAM or TPM state, which libvirt names and which lies outside `instances_path`. OSError: EXDEV."""
        if _OUTSIDE.fullmatch(disk) is None:
            return []
        folder_fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return self._claim(instance, disk, os.path.basename(path), folder_fd)
        finally:
            os.close(folder_fd)

    # ---- knowing them -----------------------------------------------------------------------------------

    def instances(self) -> set[InstanceId]:
        with self._lock:
            return {claim.instance for claim in self._by_inode.values()}

    def of(self, instance: InstanceId) -> list[Claim]:
        with self._lock:
            return [claim for claim in self._by_inode.values() if claim.instance == instance]

    def count(self) -> int:
        with self._lock:
            return len(self._by_inode)

    def link_count(self, claim: Claim) -> int:
        """st_nlink of the inode; 1 means that ours is the last name, 0 that somebody removed even that."""
        try:
            return os.lstat(self._path(claim)).st_nlink
        except FileNotFoundError:
            return 0

    def occupied_bytes(self, claim: Claim) -> int | None:
        """What the file takes of its filesystem; None if it is gone."""
        try:
            return os.lstat(self._path(claim)).st_blocks * 512
        except FileNotFoundError:
            return None

    def changed_at_ns(self, claim: Claim) -> int:
        """st_ctime of the inode: of a file that was unlinked, when that was; 0 if it is gone."""
        try:
            return os.lstat(self._path(claim)).st_ctime_ns
        except FileNotFoundError:
            return 0

    def place(self, claim: Claim) -> Place:
        """Which folder of Nova's names the held inode now."""
        path = named_path(self._instances_path, claim.instance, claim.disk, claim.inode)
        owner = parse_folder(os.path.basename(os.path.dirname(path))) if path else None
        return owner[1] if owner else Place.NOWHERE

    def path(self, claim: Claim) -> str:
        """Our link, for whoever must open or watch it. It may be gone at any time."""
        return self._path(claim)

    # ---- ending them ------------------------------------------------------------------------------------

    def release(self, claim: Claim) -> None:
        """Unlink our name: the instance lives on, or nobody wants it."""
        with self._lock:
            if self._by_inode.pop(claim.inode, None) is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(claim))
                self._dirty = True

    def hand_over(self, claim_name: str, folder: str) -> bool:
        """
        Rename a claim into the folder of the job that owns it. False when it is no longer here.

        Idempotent: after a crash the job's record names its claims and this is called for each again.
        """
        claim = parse_claim(claim_name)
        if claim is None:
            return False
        with self._lock:
            try:
                os.rename(self._path(claim), os.path.join(folder, claim_name))
            except FileNotFoundError:
                return False
            self._by_inode.pop(claim.inode, None)
            self._dirty = True
            return True

    def sync(self) -> None:
        """Make the links durable; called in batches, since a link without it costs 10 us and with it 80."""
        with self._lock:
            if not self._dirty:
                return
            self._dirty = False
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ---- inside -----------------------------------------------------------------------------------------

    def _claim(self, instance: InstanceId, disk: str, file_name: str, folder_fd: int) -> list[Claim]:
        for _ in range(_TRIES):
            try:
                found = os.stat(file_name, dir_fd=folder_fd, follow_symlinks=False)
            except FileNotFoundError:
                return []
            if not stat.S_ISREG(found.st_mode):
                return []  # a symlink, FIFO or device under an allowed name is not a disk
            claim = Claim(instance=instance, disk=disk, inode=found.st_ino)
            with self._lock:
                if claim.inode in self._by_inode or self._is_owned(
                    claim.inode, lambda: _identity_at(file_name, folder_fd)
                ):
                    return []
                if self._link(claim, file_name, folder_fd):
                    self._by_inode[claim.inode] = claim
                    self._dirty = True
                    break
        else:
            return []
        self.on_claimed(claim)
        return [claim]

    def _link(self, claim: Claim, file_name: str, folder_fd: int) -> bool:
        """One link(2). False when the file was replaced or removed between stat and link."""
        target = self._path(claim)
        try:
            os.link(file_name, target, src_dir_fd=folder_fd, follow_symlinks=False)
        except FileExistsError:
            pass  # a crash before the index knew it; checked like a new one
        except FileNotFoundError:
            return False
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMLINK):
                raise SpoolUnavailable(
                    f"link {target}: {exc.strerror}; the disk of {claim.instance} is not held"
                ) from exc
            raise
        if self._inode_of(claim.name) == claim.inode:
            return True
        os.unlink(target)
        return False

    def _inode_of(self, name: str) -> int | None:
        try:
            found = os.lstat(os.path.join(self._folder, name))
        except FileNotFoundError:
            return None
        return found.st_ino if stat.S_ISREG(found.st_mode) else None

    def _path(self, claim: Claim) -> str:
        return os.path.join(self._folder, claim.name)

    @contextlib.contextmanager
    def _open_folder(self, folder_name: str) -> Iterator[int | None]:
        """The folder itself, never through a symlink; None when it is gone or is not a folder."""
        try:
            fd = os.open(
                os.path.join(self._instances_path, folder_name),
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            )
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                yield None
                return
            raise
        try:
            yield fd
        finally:
            os.close(fd)


def _identity_at(file_name: str, folder_fd: int) -> DiskIdentity | None:
    try:
        fd = os.open(file_name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
    except OSError:
        return None
    try:
        return identify(fd)
    finally:
        os.close(fd)
