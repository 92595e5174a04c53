"""
Restores one backup and the base that it stands on, as the command does: `STORE BACKUP TARGET chain|raw|qcow2`.

Counts what it asks of the store, and how. What it wrote is durable at the end: what is measured here and at a rival
has to be the same, whoever leaves it to the kernel.
"""

import asyncio
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Final, Literal, cast

from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import KEYFILE, keys

from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Wanted, restore
from autobackup.flows.verify import open_sealed
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.service.heap import keep_buffers
from autobackup.stores import OpenDestination
from autobackup.stores.directory import DirectoryStore
from autobackup.terms import Destination

_SECTOR_BYTES: Final = 512


class CountingStore(DirectoryStore):
    """How much of each object was read from front to back, and how much by ranges."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.streamed: Counter[AttemptId] = Counter()
        self.all_read: Counter[AttemptId] = Counter()
        self._calls_count = 0
        self._pieces_count = 0

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        piece = await super().read(attempt, offset=offset, length=length)
        self.all_read[attempt] += len(piece)
        self._calls_count += 1
        return piece

    async def stream(self, attempt: AttemptId, *, offset: int) -> AsyncGenerator[bytes, None]:
        async with aclosing(super().stream(attempt, offset=offset)) as pieces:
            async for piece in pieces:
                self.streamed[attempt] += len(piece)
                self._pieces_count += 1
                yield piece

    def said(self) -> dict[str, object]:
        return {
            "streamed_bytes": self.streamed,
            "ranges_bytes": self.all_read - self.streamed,
            "ranges_count": self._calls_count - self._pieces_count,
        }


def opened(folder: str) -> tuple[OpenDestination, CountingStore]:
    """The folder as the command opens it."""
    store = CountingStore(folder)
    terms = Destination(name="vault", store="directory", path=Path(folder), key="keyfile", keyfile=KEYFILE)
    return OpenDestination(destination=terms, store=store, keys=keys()), store


@contextmanager
def silent(_words: str, _size_bytes: int) -> Iterator[Callable[[int], None]]:
    """For flows that show how far they are."""
    yield lambda _count: None


async def main(folder: str, backup: str, target: str, flat: str) -> None:
    (place, store), workers = opened(folder), Workers()
    wanted = Wanted(flat=None if flat == "chain" else cast(Literal["qcow2", "raw"], flat))
    started_s, started_cpu_s = time.perf_counter(), _cpu_s()
    sealed = await open_sealed(store, keys(), AttemptId(backup))
    restored = await restore(
        sealed, target=target, wanted=wanted, origins=Origins(places=[place]), workers=workers, show=silent
    )
    restored_s = time.perf_counter()
    [disk] = restored.disks
    for path in disk.chain:
        _sync(path)
    print(json.dumps({
        "wall_s": time.perf_counter() - started_s,
        "late_sync_s": time.perf_counter() - restored_s,
        "cpu_s": _cpu_s() - started_cpu_s,
        **store.said(),
        "disk": disk.path,
        "written_bytes": sum(os.stat(path).st_blocks * _SECTOR_BYTES for path in disk.chain),
        "notes": restored.notes,
        "peak_rss_bytes": peak_rss_bytes(),
        "qemu_img_peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }))  # fmt: skip
    workers.close()


def _cpu_s() -> float:
    """With what qemu-img took."""
    return sum(os.times()[:4])


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    keep_buffers()  # as the command line does
    asyncio.run(main(*sys.argv[1:]))
