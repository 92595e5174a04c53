"""
Watches disks that live: whoever touches one of them is written down.

A disk lives while Nova names it or a QEMU has it open. From `guard` to `release` its content may not change, but for
its own guest, of which the test says when it may write; and it may not lose Nova's name, but when the test says that
Nova takes it. Times, sizes and link counts are looked at all the time, without opening anything: an open would stand
in the way of the agent's lease. The content is hashed where a guest has come to rest, and at the end.
"""

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_EVERY_S: Final = 0.1
_MISSES: Final = 3  # a rename under way hides a name from a look for a moment


@dataclass(slots=True, kw_only=True)
class Guarded:
    """One inode, by the names that Nova may give it and the one that the agent may hold it by."""

    inode: int
    named: tuple[str, ...]
    held: tuple[str, ...]
    sha256: str
    size_bytes: int
    mtime_ns: int
    guest_writes: bool = False
    nova_takes_it: bool = False
    misses: int = 0
    told: set[str] = field(default_factory=set)


class LiveWatch:
    """Use it as a context manager; `touched` is what it saw. Any thread may call."""

    def __init__(self) -> None:
        self._guarded: dict[int, Guarded] = {}
        self._lock = threading.RLock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live watch", daemon=True)
        self.touched: list[str] = []
        self.guarded_count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def guard(self, path: Path, *, named: tuple[Path, ...] = (), held: tuple[Path, ...] = ()) -> Guarded:
        """From now on. *path* is where it is; *named* and *held* are where else it may come to be."""
        with self._lock:
            seen = path.lstat()
            one = Guarded(
                inode=seen.st_ino,
                named=tuple(str(one) for one in (path, *named)),
                held=tuple(str(one) for one in held),
                sha256=sha256_of(path),
                size_bytes=seen.st_size,
                mtime_ns=seen.st_mtime_ns,
            )
            self.guarded_count += one.inode not in self._guarded
            self._guarded[one.inode] = one
            return one

    def is_guarded(self, inode: int) -> bool:
        return inode in self._guarded

    def guest_writes(self, inode: int) -> None:
        """Its guest boots, and will write again what it has written before."""
        with self._lock:
            self._look(self._guarded[inode])
            self._guarded[inode].guest_writes = True

    def guest_rests(self, inode: int) -> None:
        """It has written: the content is what it was."""
        with self._lock:
            one = self._guarded[inode]
            found = _find(one.inode, one.named)
            if found is not None:
                one.mtime_ns = found[1].st_mtime_ns
            one.guest_writes = False
            self._look(one)
            self._hash(one)

    def nova_takes(self, inode: int) -> None:
        """Nova is about to unlink it."""
        with self._lock:
            self._guarded[inode].nova_takes_it = True

    def release(self, inode: int) -> Guarded:
        """Nova does not name it any more and nobody has it open: after a last look it is the agent's."""
        with self._lock:
            self._look(self._guarded[inode])
            return self._guarded.pop(inode)

    def give_up(self, inode: int) -> None:
        """Whoever was to release it failed on the way: if Nova was taking it, what comes now is no touch."""
        with self._lock:
            one = self._guarded.get(inode)
            if one is not None and one.nova_takes_it:
                self._look(self._guarded.pop(inode))

    def look(self, *, hashed: bool = False) -> None:
        """At all of them, now."""
        with self._lock:
            for one in list(self._guarded.values()):
                self._look(one)
                if hashed and not one.guest_writes:
                    self._hash(one)

    def _run(self) -> None:
        while not self._end.wait(_EVERY_S):
            self.look()

    def _look(self, one: Guarded) -> None:
        found = _find(one.inode, one.named)
        has_name = found is not None
        found = found or _find(one.inode, one.held)
        if found is None or not (has_name or one.nova_takes_it):
            one.misses += 1
            if one.misses >= _MISSES:
                self._tell(one, "lost its last name" if found is None else "lost the name that Nova gave it")
            return
        one.misses = 0
        seen = found[1]
        if one.guest_writes:
            return
        if seen.st_size != one.size_bytes:
            self._tell(one, f"has {seen.st_size} bytes and had {one.size_bytes}")
        if seen.st_mtime_ns != one.mtime_ns:
            self._tell(one, f"was written to at {seen.st_mtime_ns}")

    def _hash(self, one: Guarded) -> None:
        found = _find(one.inode, (*one.named, *one.held))
        if found is not None and sha256_of(Path(found[0])) != one.sha256:
            self._tell(one, "has another content")

    def _tell(self, one: Guarded, words: str) -> None:
        kind = words.split(" at ")[0]
        if kind not in one.told:
            one.told.add(kind)
            self.touched.append(f"{one.named[0]}, inode {one.inode}: {words}")


def _find(inode: int, paths: tuple[str, ...]) -> tuple[str, os.stat_result] | None:
    """The first of *paths* that names it. Without an open: that would stand in the way of a lease."""
    for path in paths:
        try:
            seen = os.lstat(path)
        except OSError:
            continue
        if seen.st_ino == inode:
            return path, seen
    return None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
