"""
Builds every object once, checks what must be true before a claim is made, and runs the parts.

The order of the start is the order of safety: configuration, keys and stores in words; the spool, locked; the jobs
in it; the watch and its first scan; then libvirt. Claims are held before anything is decided.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from autobackup import logs
from autobackup.cloud.nova import Nova
from autobackup.cloud.owners import Owners
from autobackup.config import DEFAULT_PATH, Config
from autobackup.configfile import load
from autobackup.errors import AutobackupError, ConfigError
from autobackup.flows.ancestry import Ancestry
from autobackup.flows.backup import Backup
from autobackup.flows.capture import Capture, Order
from autobackup.flows.evidence import Evidence
from autobackup.flows.inquiry import Inquiry
from autobackup.flows.jobs import Jobs
from autobackup.flows.learn import Learn
from autobackup.flows.links import Links
from autobackup.flows.pacing import Pace
from autobackup.flows.places import Places, Watchman
from autobackup.flows.release import Release
from autobackup.flows.requests import Requests
from autobackup.flows.runner import Runner
from autobackup.flows.seal_base import SealBase
from autobackup.flows.secure import Secure
from autobackup.flows.send import Send
from autobackup.flows.tap import FanoutLimits
from autobackup.flows.workers import Workers
from autobackup.host.libvirt_events import LibvirtLink
from autobackup.host.scrub import load_methods, method_named
from autobackup.host.spool import Spool
from autobackup.host.watch import Watch
from autobackup.metrics import Metrics
from autobackup.model import InstanceId, InstanceRecord, JobRecord, encode
from autobackup.service import supervisor
from autobackup.service.api import Api
from autobackup.service.heap import keep_buffers
from autobackup.service.systemd import Notify
from autobackup.service.witness import fingerprint, nova_host, nova_session, rulebook
from autobackup.stores import OpenDestination, open_destination

EXIT_CONFIG: Final = 2
_HOUSEKEEPING_S: Final = 60.0
_LONG_UNDECIDED_S: Final = 3600.0
_MACHINE_ID: Final = "/etc/machine-id"
_NOBODY_ELSES: Final = re.compile(
    r" \(req-[0-9a-f-]+\)|/?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)  # 500 jobs, one cause

_log = logs.get("service.app")


class Agent:
    """
    The agent of one host.

    Seams for tests: *intend* sees every job record right before it is journaled, *observe* right after; *opened* sees
    every destination as it is opened.
    """

    def __init__(
        self,
        config: Config,
        *,
        intend: Callable[[JobRecord], None] = lambda _record: None,
        observe: Callable[[JobRecord], None] = lambda _record: None,
        opened: Callable[[OpenDestination], OpenDestination] = lambda place: place,
    ) -> None:
        self._config = config
        self._notify = Notify()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self.metrics = Metrics()
        self.workers = Workers(cpu_tokens=config.sealing.cpu_tokens)
        self.spool = Spool(
            instances_path=str(config.instances_path),
            path=str(config.spool_path),
            filesystems=config.capture.filesystems,
            host_id=host_id(),
            reserve_bytes=config.reserve_bytes,
        )
        self.jobs = Jobs(spool=self.spool, metrics=self.metrics, intend=intend, observe=observe)
        self.learn = Learn(
            claims=self.spool.claims,
            spool=self.spool,
            jobs=self.jobs,
            workers=self.workers,
            swtpm_path=str(config.libvirt.swtpm_path),
        )
        self.places = Places(config.destination, lambda d: opened(open_destination(d, config.openstack)))
        pace = Pace(config.sealing.rate_bytes)
        limits = FanoutLimits(
            cpu_tokens=self.workers.cpu_tokens,
            zstd_level=config.sealing.zstd_level,
            compress_threads=config.sealing.compress_threads,
            detach_after_s=config.sealing.detach_after_s,
        )
        self.ancestry = Ancestry(
            spool=self.spool, workers=self.workers, in_use=self.learn.bases if config.destination else tuple
        )
        sealed_bases = SealBase(
            ancestry=self.ancestry, pace=pace, limits=limits, workers=self.workers, host=platform.node(),
            agent_id=lambda: self.spool.agent_id,
        )  # fmt: skip
        send = Send(
            jobs=self.jobs,
            spool=self.spool,
            places=self.places.of,
            ancestry=self.ancestry,
            secure=Secure(ancestry=self.ancestry, bases=sealed_bases, workers=self.workers),
            pace=pace,
            limits=limits,
            retry=config.retry,
            workers=self.workers,
            metrics=self.metrics,
            host=platform.node(),
        )
        asked = nova_session(config)
        nova = None if asked is None else Nova(asked, host=nova_host(config))
        owners = None if asked is None else Owners(asked)
        backup = Backup(
            jobs=self.jobs,
            spool=self.spool,
            send=send,
            scrub_methods=load_methods(),
            retry=config.retry,
            workers=self.workers,
            metrics=self.metrics,
            on_finished=self.learn.release_bases,
        )
        self.runner = Runner(jobs=self.jobs, backup=backup, parallel_jobs=config.sealing.parallel_jobs)
        self.link = LibvirtLink(
            uri=config.libvirt.uri,
            call_timeout_s=config.libvirt.call_timeout_s,
            keepalive_interval_s=config.libvirt.keepalive_interval_s,
            reconnect_longest_s=config.libvirt.reconnect_longest_s,
            metrics=self.metrics,
            on_event=lambda event: self.capture.on_domain_event(event),
            on_connected=lambda: self.watch.ask_scan(),
        )
        book = rulebook(config)
        self.requests = Requests(book=book, learn=self.learn, places=self.places, owners=owners, metrics=self.metrics)
        self.inquiry: Inquiry | None = None
        if nova is not None:
            self.inquiry = Inquiry(
                nova=nova,
                refresh_interval_s=config.nova.refresh_interval_s,
                held=lambda: frozenset(self.spool.claims.instances()),
                on_servers=self.requests.heard,
                on_word=lambda instance: self.capture.note_scan(instance),
                metrics=self.metrics,
            )
        self.capture = Capture(
            claims=self.spool.claims,
            spool=self.spool,
            link=self.link,
            jobs=self.jobs,
            learn=self.learn,
            book=book,
            inquiry=self.inquiry,
            settings=config.capture,
            evidence=Evidence(
                claims=self.spool.claims,
                settings=config.capture,
                verdict_despite_nova=config.verdict_despite_nova,
                asks_nova=nova is not None,
            ),
            workers=self.workers,
            metrics=self.metrics,
            claim_now=lambda folder, source: self.watch.claim_now(folder, source),
            on_queued=self.runner.wake,
        )
        self.watch = Watch(
            claims=self.spool.claims,
            instances_path=str(config.instances_path),
            scan_interval_s=config.capture.scan_interval_s,
            metrics=self.metrics,
            on_change=self.capture.note_change,
            on_scan=self.capture.note_scan,
            on_failure=self._watch_failed,
        )
        self.release = Release(clock=time.time)
        self.watchman = Watchman(
            places=self.places, only_asked_for=config.only_asked_for, jobs=self.jobs, spool=self.spool,
            release=self.release, metrics=self.metrics,
        )  # fmt: skip
        self.api = Api(
            path=str(config.api.socket), group=config.api.group, jobs=self.jobs, requests=self.requests,
            links=Links(places=self.places.with_requested, release=self.release), metrics=self.metrics, health=self,
            order=self.runner.order,
        )  # fmt: skip

    async def run(self) -> None:
        """Until a signal. Raises `ConfigError` where the machine is not as the configuration says."""
        # a broken lease sends SIGIO, whose default is to kill the process
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        await check(self._config, self.places)
        self.spool.open()
        try:
            self.spool.claims.load()
            self.jobs.load()
            self.learn.load()
            self.watch.start()
            await self.learn.sweep()
            for instance in self.learn.instances():
                self.capture.note_scan(instance)  # it may have ended unseen, and left nothing but its record
            claims = self.spool.claims.count()
            self.metrics.claims.set(claims)
            self._notify.ready(f"holding {claims} disks, {len(self.jobs.all())} jobs")
            _log.info("agent.started", claims=claims, jobs=len(self.jobs.all()), spool=self.spool.path)
            await supervisor.run(
                {
                    "api": self.api.run,
                    "watchdog": self._notify.feed,
                    "housekeeping": self._keep_house,
                    "destinations": self.watchman.run,
                    "runner": self.runner.run,
                    "bases": self.ancestry.run,
                    "capture": self.capture.run,
                    "libvirt": self.link.run,
                    **({} if self.inquiry is None else {"nova": self.inquiry.run}),
                },
                stop=self._stop,
            )
        finally:
            self._notify.stopping()
            self.watch.stop()
            self.ancestry.close()
            self.workers.close()
            self.spool.close()
        if self._failure is not None:
            raise self._failure
        _log.info("agent.stopped")

    # ---- service.api.Health -----------------------------------------------------------------------------

    def degraded(self) -> list[str]:
        words = [] if self.link.is_connected else [f"libvirt does not answer at {self._config.libvirt.uri}"]
        parked = sum(record.state == "parked" for record in self.jobs.all())
        words += [f"a job cannot be read and is left untouched: {error}" for error in self.spool.unreadable_jobs]
        words += self.watchman.unwell()
        if self.inquiry is not None and self.inquiry.trouble:
            words.append(f"Nova cannot be asked, and nothing is decided: {self.inquiry.trouble}")
        long = [one for one in self.capture.undecided() if float(str(one["age_s"])) > _LONG_UNDECIDED_S]
        words += [f"not decided for over an hour: {one['instance']}: {one['reason']}" for one in long]
        failing = Counter(
            _NOBODY_ELSES.sub("", copy.last_error) for record in self.jobs.all() if record.state != "parked"
            for copy in record.copies if copy.failure_count
        )  # fmt: skip
        words += [f"jobs that wait: {count}; {error}" for error, count in failing.items()]
        return words + ([f"parked jobs that wait for an operator: {parked}; autobackup queue"] if parked else [])

    def is_ready(self) -> bool:
        return self.link.is_connected

    def undecided(self) -> list[dict[str, object]]:
        return self.capture.undecided()

    def order(self, instance: InstanceId, order: Order) -> None:
        self.capture.order(instance, order)

    def status(self) -> dict[str, object]:
        states = [str(record.state) for record in self.jobs.all()]
        return {
            "host": platform.node(),
            "spool": self.spool.path,
            "libvirt": "connected" if self.link.is_connected else "unreachable",
            "claims": self.spool.claims.count(),
            "jobs": {state: states.count(state) for state in sorted(set(states))},
            "undecided": len(self.capture.undecided()),
            "verdict": self._config.verdict,
            "requests_refused": self.requests.refused(),
            "degraded": self.degraded(),
        }

    def instances(self) -> dict[str, object]:
        """What is known of the instances that are held, for `autobackup explain`."""
        return {
            "rulebook": fingerprint(rulebook(self._config)),
            "instances": [
                {
                    "record": json.loads(encode(replace(record, domain_xml="<seen/>" if record.domain_xml else ""))),
                    "disk_bytes": self._root_bytes(record),
                }
                for record in map(self.learn.known, self.learn.instances())
            ],
        }

    # ---- inside -----------------------------------------------------------------------------------------

    def _root_bytes(self, record: InstanceRecord) -> int | None:
        roots = [claim for claim in self.spool.claims.of(record.instance) if claim.is_root]
        now = next((claim for claim in roots if claim.inode == record.root_inode), roots[0] if roots else None)
        return None if now is None else self.spool.claims.occupied_bytes(now)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            await self.workers.blocking(self.spool.keep_reserve)

    def _watch_failed(self, failure: BaseException) -> None:
        """In the watch's thread: without it disks are missed, so the process ends and is started anew."""
        self._failure = failure
        os.kill(os.getpid(), signal.SIGTERM)


async def check(config: Config, places: Places) -> None:
    """
    Raise `ConfigError` for what the text alone could not show: Nova's presence, methods, key files, clouds.yaml.

    Nothing that only a cloud could answer: disks must be claimed while it is down. `Watchman` looks at it later.
    """
    if config.verdict == "libvirt" and not config.verdict_despite_nova and config.nova_conf.exists():
        raise ConfigError(
            f"verdict = \"libvirt\": {config.nova_conf} exists, so this host is Nova's, and libvirt's word cannot tell "
            f'a termination from a rebuild or a shelve; write verdict = "nova" and [nova] cloud = "..."'
        )
    wrong = []
    if (session := nova_session(config)) is not None:
        try:
            await session.check_entry()
        except AutobackupError as exc:
            wrong.append(f"nova.cloud: {exc}")
    methods = load_methods()
    for where, method in (("request", config.request.scrub), *((f"rule {r.name!r}", r.scrub) for r in config.rule)):
        try:
            method_named(method, methods)
        except ConfigError as exc:
            wrong.append(f"{where}: {exc}")
    for name, place in places.all().items():
        try:
            if place.session is not None:
                await place.session.check_entry()
            if place.destination.key != "barbican":
                await place.keys.check()
        except AutobackupError as exc:
            wrong.append(f"destination {name!r}: {exc}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def host_id() -> str:
    """What tells this host from another on shared storage."""
    try:
        return Path(_MACHINE_ID).read_text("ascii").strip() or platform.node()
    except OSError:
        return platform.node()


def main() -> None:
    """`autobackup-agent --config FILE`."""
    parser = argparse.ArgumentParser(
        prog="autobackup-agent",
        description="Holds the disks of this host's instances, seals what terminates, proves it, scrubs it.",
        epilog="Exit status: 0 after a stop signal, 2 for a configuration to mend, 1 for anything else.",
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    logs.configure()
    keep_buffers()
    try:
        config = load(arguments.config)
        asyncio.run(_run(config))
    except ConfigError as exc:
        print(f"autobackup-agent: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_CONFIG)


async def _run(config: Config) -> None:
    await Agent(config).run()
