"""Seals one file, once, and says what it took: `FILE COMPRESSION DESTINATIONS FOLDER|null`."""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import NullStore, directory_store, seal

from autobackup.config import SealingSection
from autobackup.flows.fanout import Sent
from autobackup.service.heap import keep_buffers
from autobackup.stores import Store


async def main(path: Path, compression: str, destinations: int, sink: str) -> None:
    stores: list[Store] = [
        NullStore() if sink == "null" else directory_store(Path(sink) / str(n)) for n in range(destinations)
    ]
    level = SealingSection(compression=compression).zstd_level
    sealing = await seal(path, stores, zstd_level=level, cpus=os.cpu_count() or 1)
    sent = [outcome for outcome in sealing.outcomes if isinstance(outcome, Sent)]
    if len(sent) < destinations:
        sys.exit(f"not sent: {sealing.outcomes}")
    print(json.dumps({
        "wall_s": sealing.wall_s,
        "cpu_s": sealing.cpu_s,
        "sealed_bytes": sent[0].size_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "attempt": sealing.attempts[0],
        "threads": {name: asdict(spent) for name, spent in sealing.threads.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    keep_buffers()  # as the agent does
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))
