"""
Makes an image of one backup's disk in a project of a cloud: `STORE BACKUP CLOUDS ENTRY PROJECT`. Then deletes it.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Final

from tests.bench.children.restoring_chain import opened, silent
from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import keys

from autobackup.cloud.glance import Glance
from autobackup.cloud.session import ProjectSession
from autobackup.flows.fetch import Origins
from autobackup.flows.promote import promote
from autobackup.flows.verify import open_sealed
from autobackup.flows.workers import Workers
from autobackup.model import AttemptId
from autobackup.service.heap import keep_buffers

_DISK: Final = "disk"
_DEADLINE_S: Final = 120.0


async def main(folder: str, backup: str, clouds_yaml: Path, entry: str, project: str) -> None:
    (place, store), workers = opened(folder), Workers()
    session = ProjectSession(cloud=entry, project=project, clouds_yaml=clouds_yaml)
    glance = Glance(session, stall_timeout_s=_DEADLINE_S, reply_timeout_s=_DEADLINE_S)
    await session.access()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    sealed = await open_sealed(store, keys(), AttemptId(backup))
    promoted = await promote(
        sealed, disk=_DISK, target=glance, name="bench", origins=Origins(places=[place]), workers=workers, show=silent
    )
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    peak_bytes = peak_rss_bytes()
    await glance.delete(promoted.image.id)
    print(json.dumps({
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        **store.said(),
        "image_bytes": promoted.image.size_bytes,
        "peak_rss_bytes": peak_bytes,
    }))  # fmt: skip
    workers.close()


if __name__ == "__main__":
    keep_buffers()  # as the command line does
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5]))
