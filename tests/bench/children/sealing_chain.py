"""
A terminated instance with one overlay on one base, on its way into a folder by the agent's own parts.

`CHAIN STORE`: a folder that `making_chain` made, and one that may not be there yet. As every job does it: the base is
measured, sealed on its own and proven, then the backup that stands on it.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.bench.children.restoring_chain import CountingStore
from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import KEYFILE

from autobackup import logs
from autobackup.configfile import load
from autobackup.flows.queueing import new_job
from autobackup.host.spool import Spool
from autobackup.model import (
    ChainLink,
    CopyState,
    DestinationName,
    DiskSource,
    InstanceId,
    InstanceRecord,
    JobRecord,
    VerdictKind,
)
from autobackup.rules.policy import Plan, PlannedCopy
from autobackup.rules.termination import Verdict
from autobackup.service.app import Agent
from autobackup.service.heap import keep_buffers
from autobackup.stores.keyfile import write_kek

_DESTINATION: Final = "vault"
_CONFIG: Final = """
instances_path = "{instances}"
verdict = "libvirt"
verdict_despite_nova = true
[[destination]]
name = "{name}"
store = "directory"
path = "{store}"
key = "keyfile"
keyfile = "{keyfile}"
reserve = "0B"
[[rule]]
name = "bench"
destinations = ["{name}"]
"""


async def main(chain: Path, store: Path) -> None:
    instances = chain / "instances"
    instances.mkdir()
    store.mkdir(mode=0o700)
    if not KEYFILE.exists():
        write_kek(str(KEYFILE))
    config = chain / "autobackup.toml"
    config.write_text(_CONFIG.format(instances=instances, name=_DESTINATION, store=store, keyfile=KEYFILE))
    journal: list[JobRecord] = []
    counting = CountingStore(str(store))
    agent = Agent(load(config), observe=journal.append, opened=lambda place: replace(place, store=counting))
    agent.spool.open()
    agent.spool.claims.load()
    job = _job(chain, agent.spool, instances)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    await agent.jobs.create(job)
    running = asyncio.create_task(agent.runner.run())
    while any(one.job == job.job for one in agent.jobs.all()) and not running.done():
        if journal[-1].last_error:
            sys.exit(f"not sealed: {journal[-1].last_error}")
        await asyncio.sleep(0.05)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    proven = next(record for record in reversed(journal) if record.copies[0].state is CopyState.VERIFIED)
    [copy] = proven.copies
    assert copy.attempt is not None
    [base] = await counting.bases()
    print(json.dumps({
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "backup": copy.attempt.attempt,
        "base": base.attempt,
        "sealed_bytes": {copy.attempt.attempt: copy.attempt.size_bytes, base.attempt: base.size_bytes},
        **counting.said(),
        "peak_rss_bytes": peak_rss_bytes(),
    }))  # fmt: skip
    agent.workers.close()
    agent.spool.close()


def _job(chain: Path, spool: Spool, instances: Path) -> JobRecord:
    """The overlay as the root disk of an instance that was claimed and then terminated; its own name stays."""
    instance = InstanceId(str(uuid.uuid4()))
    path = instances / instance / "disk"
    path.parent.mkdir()
    path.hardlink_to(chain / "overlay.qcow2")
    claims = spool.claims.claim_folder(instance)
    path.unlink()
    path.parent.rmdir()
    base = ChainLink(path=str(chain / "base"), format="raw")
    return new_job(
        InstanceRecord(
            instance=instance, libvirt_name="instance-1", display_name="bench", domain_xml="<domain/>",
            disks=(DiskSource(path=str(path), format="qcow2", chain=(base,), chain_source="libvirt"),),
        ),
        claims,
        spool.claims,
        Verdict(kind=VerdictKind.TERMINATED, reason="bench"),
        Plan(
            rule="bench", copies=(PlannedCopy(destination=DestinationName(_DESTINATION)),), scrub_method="unlink",
        ),
        str(instances),
        time.time(),
    )  # fmt: skip


if __name__ == "__main__":
    keep_buffers()  # as the agent does
    logs.configure(level=int(os.environ.get("AUTOBACKUP_BENCH_LOG", "30")))
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
