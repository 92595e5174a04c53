"""
Sends one disk to projects of a cloud as the agent does: `DISK COMPRESSION CLOUDS PROJECT...`. Then proves, deletes it.

The whole way of a job but its scrub: claim, journal, keys in Barbican, one read, an image in each project. A copy that
was detached from the shared read is sent by another one, as in the agent, but without the pause before.
"""

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.bench.harness import HOME, MiB
from tests.bench.peak import peak_rss_bytes
from tests.bench.sealed import thread_times

from autobackup import logs
from autobackup.config import OpenstackSection, RetrySection, SealingSection
from autobackup.flows.ancestry import Ancestry
from autobackup.flows.fanout import FanoutLimits
from autobackup.flows.jobs import Jobs
from autobackup.flows.pacing import Pace
from autobackup.flows.places import Places
from autobackup.flows.queueing import new_job
from autobackup.flows.seal_base import SealBase
from autobackup.flows.secure import Secure
from autobackup.flows.send import Send
from autobackup.flows.workers import Workers
from autobackup.host.filesystems import kind_of
from autobackup.host.spool import Spool
from autobackup.metrics import Metrics
from autobackup.model import (
    CopyState,
    DestinationName,
    DiskSource,
    InstanceId,
    InstanceRecord,
    JobRecord,
    VerdictKind,
)
from autobackup.rules.lifecycle import JobEvent
from autobackup.rules.policy import Plan, PlannedCopy
from autobackup.rules.termination import Verdict
from autobackup.service import app  # noqa: F401  # what the agent has in memory beside
from autobackup.service.heap import keep_buffers
from autobackup.stores.opening import open_destination
from autobackup.terms import Destination

_CLOUD: Final = "autobackup"
_LOOK_EVERY_S: Final = 0.1  # at its threads; more often is a load of its own
_RETRY_S: Final = 0.01
_MOST_READS: Final = 4
_SENT: Final = 'autobackup_stage_duration_seconds_sum{stage="send"}'  # of fan-outs: the first read to the last put


async def main(disk: Path, compression: str, clouds_yaml: Path, projects: Sequence[str]) -> None:
    home = HOME / f"upload-{os.getpid()}"
    spool, metrics, workers = _spool(home / "instances"), Metrics(), Workers()
    openstack = OpenstackSection(clouds_yaml=clouds_yaml)
    places = Places(
        [Destination(name=one, store="glance", cloud=_CLOUD, project=one, key="barbican") for one in projects],
        lambda one: open_destination(one, openstack),
    )
    jobs = Jobs(spool=spool, metrics=metrics)
    pace = Pace()
    limits = FanoutLimits(cpu_tokens=workers.cpu_tokens, zstd_level=SealingSection(compression=compression).zstd_level)
    ancestry = Ancestry(spool=spool, workers=workers, in_use=lambda: ())
    bases = SealBase(
        ancestry=ancestry, pace=pace, limits=limits, workers=workers, host="bench", agent_id=lambda: spool.agent_id
    )
    send = Send(
        jobs=jobs,
        spool=spool,
        places=places.of,
        ancestry=ancestry,
        secure=Secure(ancestry=ancestry, bases=bases, workers=workers),
        pace=pace,
        limits=limits,
        retry=RetrySection(first_s=_RETRY_S, longest_s=_RETRY_S),
        workers=workers,
        metrics=metrics,
        host="bench",
    )
    record, reads = await _job(disk, spool, jobs, projects), 0

    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with thread_times(every_s=_LOOK_EVERY_S) as threads:
        while due := [copy.destination for copy in record.copies if copy.state is CopyState.QUEUED]:
            record = await send.send(record, due)
            reads += 1
            if reads > _MOST_READS:
                sys.exit(f"not sent: {record.copies}")
            await asyncio.sleep(2 * _RETRY_S)
    sent_s, sent_cpu_s = time.perf_counter(), time.process_time()
    record = await send.prove(record)
    proven_s, proven_cpu_s = time.perf_counter(), time.process_time()
    peak_bytes = peak_rss_bytes()

    for copy in record.copies:
        if copy.state is not CopyState.VERIFIED or copy.attempt is None:
            sys.exit(f"not proven: {copy}")
        place = places.of(copy)
        await place.store.delete(copy.attempt.attempt)
        await place.keys.destroy(copy.attempt.attempt)
    print(json.dumps({
        "wall_s": _sent_s(metrics),
        "send_s": sent_s - started_s,  # with the checks before the first read and the journal
        "proven_s": proven_s - started_s,
        "cpu_s": sent_cpu_s - started_cpu_s,
        "proof_cpu_s": proven_cpu_s - sent_cpu_s,
        "reads": reads,
        "sealed_bytes": sum(copy.attempt.size_bytes or 0 for copy in record.copies if copy.attempt),
        "peak_rss_bytes": peak_bytes,
        "threads": {name: asdict(spent) for name, spent in threads.items()},
    }))  # fmt: skip
    workers.close()
    spool.close()


def _spool(instances: Path) -> Spool:
    instances.mkdir(parents=True)
    spool = Spool(
        instances_path=str(instances), path=str(instances / ".autobackup"), filesystems=(kind_of(str(instances)),),
        host_id="bench", reserve_bytes=MiB,
    )  # fmt: skip
    spool.open()
    spool.claims.load()
    return spool


async def _job(disk: Path, spool: Spool, jobs: Jobs, projects: Sequence[str]) -> JobRecord:
    """*disk* as the root disk of an instance that was claimed and then terminated; its own name stays where it is."""
    instance = InstanceId(str(uuid.uuid4()))
    path = Path(spool.instances_path, instance, "disk")
    path.parent.mkdir()
    path.hardlink_to(disk)
    claims = spool.claims.claim_folder(instance)
    path.unlink()
    path.parent.rmdir()
    record = new_job(
        InstanceRecord(
            instance=instance, libvirt_name="instance-1", display_name="bench", domain_xml="<domain/>",
            disks=(DiskSource(path=str(path), format="raw", chain=(), chain_source="none"),),
        ),
        claims,
        spool.claims,
        Verdict(kind=VerdictKind.TERMINATED, reason="bench"),
        Plan(
            rule="bench", copies=tuple(PlannedCopy(destination=DestinationName(one)) for one in projects),
            scrub_method="unlink",
        ),
        spool.instances_path,
        time.time(),
    )  # fmt: skip
    await jobs.create(record)
    spool.take_over(record)
    return await jobs.move(record.job, JobEvent.STARTED)


def _sent_s(metrics: Metrics) -> float:
    lines: Mapping[str, str] = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines())
    return float(lines[_SENT])


if __name__ == "__main__":
    keep_buffers()  # as the agent does
    logs.configure(level=int(os.environ.get("AUTOBACKUP_BENCH_LOG", "30")))
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
