"""Reads one sealed bundle back: `STORE ATTEMPT TARGET|verify`. Counts what it asks of the store."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import keys

from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Wanted, restore
from autobackup.flows.verify import open_sealed, read_back
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.service.heap import keep_buffers
from autobackup.stores.directory import DirectoryStore


class CountingStore(DirectoryStore):
    read_bytes = 0

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        piece = await super().read(attempt, offset=offset, length=length)
        self.read_bytes += len(piece)
        return piece


async def main(folder: str, attempt: str, target: str) -> None:
    store, workers = CountingStore(folder), Workers(cpu_tokens=os.cpu_count() or 1)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    sealed = await open_sealed(store, keys(), AttemptId(attempt))
    if target == "verify":
        await read_back(sealed, workers)
    else:
        await restore(sealed, target=target, wanted=Wanted(), origins=Origins(places=[]), workers=workers, show=_unseen)
    print(json.dumps({
        "wall_s": time.perf_counter() - started_s,
        "cpu_s": time.process_time() - started_cpu_s,
        "read_bytes": store.read_bytes,
        "sealed_bytes": sealed.size_bytes,
        "written_bytes": 0 if target == "verify" else Path(target, "disks/disk").stat().st_blocks * 512,
        "peak_rss_bytes": peak_rss_bytes(),
    }))  # fmt: skip
    workers.close()


def _unseen(_words: str, _total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _count: None)


if __name__ == "__main__":
    keep_buffers()  # as the command line does
    asyncio.run(main(*sys.argv[1:]))
