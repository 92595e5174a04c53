"""
A compute host on which Nova's operations are played: libvirtd and QEMU, an agent that asks Nova, Nova's records.

Several scenarios may share one. Whatever they do to it, a `LiveWatch` looks at every disk that lives. The agent is seen
from outside: by its log, its queue, its claims and its receipts.
"""

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from tests.lab.agent import AgentProcess
from tests.lab.fake_keystone import FakeKeystone
from tests.lab.fake_nova import FakeNova
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute
from tests.lab.live_watch import LiveWatch
from tests.lab.nova_servers import HOST
from tests.lab.workspace import Workspace

from autobackup.stores.keyfile import write_kek

EVIDENCE: Final = "evidence-"
"""A server whose name begins so is captured at a rebuild and at an offload, too."""
QUIET_S: Final = 1.0
LEAKED_S: Final = 3.0
LONGER_THAN_QUIET_S: Final = QUIET_S + 1.0
LINGER_S: Final = LEAKED_S + 2.0
"""Nothing was decided in so long: longer than the agent has a reason to wait."""

_CONFIG: Final = """
instances_path = "{instances}"
verdict = "nova"
[nova]
cloud = "nova"
host = "{host}"
refresh_interval = "2s"
[openstack]
clouds_yaml = "{clouds}"
call_timeout = "3s"
[libvirt]
uri = "{uri}"
keepalive_interval = "1s"
call_timeout = "5s"
reconnect_longest = "1s"
[capture]
quiet_period = "{quiet:g}s"
leaked_after = "{leaked:g}s"
scan_interval = "2s"
undecided_longest = "2s"
[retry]
first = "200ms"
longest = "1s"
[api]
socket = "{socket}"
[[destination]]
name = "vault"
store = "directory"
path = "{vault}"
key = "keyfile"
keyfile = "{keyfile}"
retention = "30d"
reserve = "0B"
[[rule]]
name = "evidence"
match = {{name = "{evidence}*"}}
on = ["terminate", "rebuild", "shelve-offload"]
destinations = ["vault"]
[[rule]]
name = "everything"
destinations = ["vault"]
"""

_Answer = TypeVar("_Answer")
_number = itertools.count(1)
_start_one_by_one = threading.Lock()  # a start is a second of one CPU


class _Compute(Compute):
    """Several share one libvirtd, and a domain's name is taken once."""

    def _next_domain_name(self) -> str:
        return f"instance-{next(_number):08x}"


class LogTail:
    """The agent's log, read as it grows: many ask, and each line is parsed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self._lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def events(self, event: str, instance: str) -> list[dict[str, Any]]:
        with self._lock:
            with self._path.open("rb") as file:
                file.seek(self._at)
                fresh, newline, _ = file.read().rpartition(b"\n")
            self._at += len(fresh) + len(newline)
            for line in fresh.splitlines():
                if line.startswith(b"{"):
                    said = json.loads(line)
                    self._lines.setdefault((said["event"], said.get("instance", "")), []).append(said)
            return list(self._lines.get((event, instance), ()))


def wait_slowly(what: Callable[[], _Answer], *, within_s: float = 30.0) -> _Answer:
    """Until *what* is true, or the time is up; its last answer. Many wait at once, and each look costs the agent."""
    deadline_s = time.monotonic() + within_s
    while not (answer := what()) and time.monotonic() < deadline_s:
        time.sleep(0.25)
    return answer


@dataclass
class Host:
    """
    One host, to be opened with `open`. Its folders are gone afterwards, and what runs in them is ended.
    """

    hypervisor: Hypervisor
    nova: FakeNova
    agent: AgentProcess
    watch: LiveWatch
    log: LogTail
    computes: list[Compute] = field(default_factory=list)

    @classmethod
    @contextmanager
    def open(cls, hypervisor: Hypervisor, keystone: FakeKeystone, place: Workspace) -> Iterator[Self]:
        home, instances = place.folder("home"), place.folder("instances")
        try:
            with FakeNova(keystone) as nova, LiveWatch() as watch:
                agent = _agent(hypervisor, home, instances, keystone.write_clouds(home / "clouds.yaml", nova=nova.url))
                host = cls(hypervisor, nova, agent, watch, LogTail(agent.log_path))
                with _start_one_by_one:
                    agent.start()
                try:
                    yield host
                    watch.look(hashed=True)
                finally:
                    agent.stop()
                    watch.look()
                    with ThreadPoolExecutor(4) as pool:
                        list(pool.map(Compute.close, host.computes))
        finally:
            shutil.rmtree(home)
            shutil.rmtree(instances)

    def undecided(self) -> list[dict[str, Any]]:
        """What the agent's queue says of candidates that wait."""
        try:
            waiting: list[dict[str, Any]] = self.agent.ask("/v1/queue")[1]["undecided"]
        except OSError as exc:
            raise AssertionError(
                f"the agent does not answer ({exc}): {self.agent.log_path.read_text()[-2000:]}"
            ) from exc
        return waiting

    def compute(self) -> Compute:
        """A nova-compute, whose domains end with the host."""
        self.computes.append(_Compute(self.hypervisor.uri, self.agent.instances_path))
        return self.computes[-1]


def _agent(hypervisor: Hypervisor, home: Path, instances: Path, clouds: Path) -> AgentProcess:
    write_kek(str(home / "kek"))
    agent = AgentProcess(home, instances, uri=hypervisor.uri)
    agent.config.write_text(
        _CONFIG.format(
            instances=instances, host=HOST, clouds=clouds, uri=hypervisor.uri, quiet=QUIET_S, leaked=LEAKED_S,
            socket=agent.socket, vault=agent.stores["vault"], keyfile=agent.keyfile, evidence=EVIDENCE,
        )
    )  # fmt: skip
    return agent
