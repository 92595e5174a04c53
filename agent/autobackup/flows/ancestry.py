"""
What a job's disks stand on: each backing file once, whether it can still be read, and what its bytes are.

A base is read once for its inode, for all instances on it: by a thread of idle priority before it is needed, where
there is time for that. One that cannot be read now keeps its jobs waiting; only one that is gone is done without.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, cast

from autobackup import logs
from autobackup.container.manifest import ParentEntry
from autobackup.errors import AutobackupError, Refused, SpoolUnavailable
from autobackup.flows.workers import Workers
from autobackup.host.bases import measure
from autobackup.host.disks import HeldDisk
from autobackup.host.priority import be_idle
from autobackup.host.spool import Spool
from autobackup.model import BaseRecord, ChainLink, JobRecord

_log = logs.get("flows.ancestry")
_LOOK_EVERY_S: Final = 60.0
_FORMATS: Final = frozenset({"qcow2", "raw"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """One backing file of a job. *record* is None if it cannot be read any more; *why* says so then."""

    link: ChainLink
    below: ChainLink | None
    record: BaseRecord | None
    why: str = ""

    @property
    def is_damaged(self) -> bool:
        """Whether parts of it could not be read."""
        return self.record is not None and self.record.is_damaged

    def entry(self, *, image: str, image_hash: str) -> ParentEntry:
        """As the manifest has it. *image*: the one that it was made from, if that is known."""
        return ParentEntry(
            name=self.link.path.rpartition("/")[2],
            path=self.link.path,
            format=cast(Literal["qcow2", "raw"], self.link.format) if self.link.format in _FORMATS else "unknown",
            size_bytes=0 if self.record is None else self.record.identity.size_bytes,
            sha256=None if self.record is None else self.record.sha256,
            backing_path=None if self.below is None else self.below.path,
            image=image,
            image_hash=image_hash,
        )


class Ancestry:
    """Reads bases. *in_use* tells those of living instances, which are read ahead of time."""

    def __init__(self, *, spool: Spool, workers: Workers, in_use: Callable[[], Iterable[ChainLink]]) -> None:
        self._spool = spool
        self._workers = workers
        self._in_use = in_use
        self._thread = ThreadPoolExecutor(1, "bases", initializer=be_idle)
        self._is_closed = threading.Event()

    async def run(self) -> None:
        """For ever: read what nobody has asked for yet."""
        while True:
            for link in dict.fromkeys(self._in_use()):
                try:
                    await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._known, link, self._is_closed.is_set
                    )
                except (AutobackupError, OSError) as exc:
                    _log.debug("base.unread", base=link.path, error=str(exc))
            await asyncio.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """Let go of what is being read: nobody waits for it any more."""
        self._is_closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of(self, record: JobRecord) -> tuple[Base, ...]:
        """Every base of *record*, the root disk's first. `SpoolUnavailable`: one is there and cannot be read now."""
        below = {
            above: under for held in record.files for above, under in zip(held.chain, held.chain[1:], strict=False)
        }
        return tuple([await self._base(link, below.get(link)) for link in record.bases])

    async def remember(self, base: Base, *, same_as: str = "", copy: str = "") -> None:
        """An image that was found to hold the bytes of *base*, or a sealed base that does."""

        def keep() -> None:
            with self._open(base.link) as disk:
                known = self._spool.bases.recorded(disk, base.link)
                if known is not None:
                    same = dict.fromkeys((*known.same_as, *((same_as,) if same_as else ())))
                    copies = dict.fromkeys((*known.copies, *((copy,) if copy else ())))
                    self._spool.bases.keep(disk, base.link, replace(known, same_as=tuple(same), copies=tuple(copies)))

        try:
            await self._workers.blocking(keep)
        except AutobackupError as exc:
            _log.debug("base.gone", base=base.link.path, error=str(exc))  # it is only a memory

    def open(self, base: Base) -> HeldDisk:
        """The base itself, to be read again. Blocks. `OverlayChanged` if it is not the one that was measured."""
        disk = self._open(base.link)
        try:
            assert base.record is not None
            disk.require_unchanged(base.record.identity)
        except BaseException:
            disk.close()
            raise
        return disk

    # ---- inside -----------------------------------------------------------------------------------------

    async def _base(self, link: ChainLink, below: ChainLink | None) -> Base:
        try:
            record = await self._workers.interruptible(partial(self._known, link))
        except Refused:
            raise
        except (AutobackupError, OSError) as exc:
            raise SpoolUnavailable(f"the backing file {link.path}: {exc}") from exc
        why = "" if record is not None else f"the backing file {link.path} is gone and was not held"
        return Base(link=link, below=below, record=record, why=why)

    def _known(self, link: ChainLink, is_given_up: Callable[[], bool]) -> BaseRecord | None:
        """Blocks: for as long as it takes to read it, the first time. None: it is gone."""
        path = self._spool.bases.readable_path(link)
        if path is None:
            return None
        record = self._measured(path, link, is_given_up)
        for other in self._spool.bases.held(link):
            if self._measured(other, link, is_given_up).sha256 != record.sha256:
                raise Refused(
                    f"{link.path}: was replaced by a file of other content while instances stood on it; which of "
                    f"{', '.join(self._spool.bases.held(link))} is the disk's cannot be told; remove the wrong one"
                )
        return record

    def _measured(self, path: str, link: ChainLink, is_given_up: Callable[[], bool]) -> BaseRecord:
        with HeldDisk(path) as disk:
            record = self._spool.bases.recorded(disk, link)
            if record is None:
                record = measure(disk, token=self._workers.cpu_tokens, is_given_up=is_given_up)
                self._spool.bases.keep(disk, link, record)
                _log.info("base.measured", base=link.path, size_bytes=record.identity.size_bytes, sha256=record.sha256)
        return record

    def _open(self, link: ChainLink) -> HeldDisk:
        return HeldDisk(self._spool.bases.readable_path(link) or link.path)
