"""
A compute host in a real cloud: an agent that asks nova-api, libvirt's test driver, and Nova's records of its servers.

Several tests may share one, each in a thread of its own. What nova-compute does on the host and what it saves in Nova
are told apart: `end_on_host` is one, `nova.delete` the other, `terminate` both, in Nova's order.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import pytest
from tests.crash.evidence import knows, scribble, sha256_of
from tests.crash.scene import Scene
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Facts, Image, Instance
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.compute.nova import Nova
from tests.lab.openstack.identity import INSPECTOR
from tests.lab.openstack.views import Backup, backups_in
from tests.lab.workspace import Workspace

ARRIVED_S: Final = 90.0
HEARD_S: Final = 30.0
CAP_DAYS: Final = 30
POLICY_FILE: Final = Path(__file__).parents[2] / "packaging/openstack/nova-policy.yaml"

_MEMBERS: Final = {"tenant-a": "alice", "tenant-b": "bob", "vault": "vera", "elsewhere": "mallory"}
"""Who looks at a project's images, and makes servers there."""

_CONFIG: Final = """
verdict = "nova"
[nova]
cloud = "{entry}"
project = "{project}"
host = "{host}"
refresh_interval = "1s"
[openstack]
clouds_yaml = "{clouds}"
call_timeout = "{call_timeout}"
[request]
destination = "owners"
retention_longest = "{cap}d"
[[rule]]
name = "closed"
match = {{ name = "closed-*" }}
exclude = true
requests = "forbid"
[[rule]]
name = "ours alone"
match = {{ name = "alone-*" }}
destinations = ["vault"]
requests = "forbid"
[[rule]]
name = "declinable"
match = {{ name = "declinable-*" }}
destinations = ["vault"]
may_decline = true
[[rule]]
name = "firm"
match = {{ name = "firm-*" }}
destinations = ["vault"]
[[rule]]
name = "by domain"
match = {{ name = "domain-*", domain = "default" }}
destinations = ["vault"]
"""
_NOBODY: Final = 'name = "nobody"\nmatch = { name = "none of them" }'


class Host:
    """One host, to be opened with `open`; its agent runs. A server whose name no rule knows is wanted by none."""

    def __init__(self, scene: Scene, cloud: Cloud, nova: Nova, agent: AgentProcess, *, name: str, cell: str) -> None:
        self.cloud = cloud
        self.nova = nova
        self.agent = agent
        self._scene = scene
        self._name = name
        self._cell = cell
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def open(
        cls,
        hypervisor: Hypervisor,
        workspace: Workspace,
        cloud: Cloud,
        nova: Nova,
        *,
        cell: str = "cell1",
        entry: str = "autobackup",
        project: str = "service",
        call_timeout: str = "10s",
    ) -> Iterator[Self]:
        """*entry* of clouds.yaml asks Nova; *cell* is where Nova keeps the host."""
        name = f"host-{uuid.uuid4().hex[:8]}"
        terms = {"store": "glance", "cloud": "autobackup", "project": "vault", "key": "barbican"}
        with Scene.open(hypervisor, workspace) as scene:
            agent = scene.agent(
                stores=(),
                destinations={"vault": terms, "owners": terms},
                rule=_NOBODY,
                more=_CONFIG.format(
                    entry=entry, project=project, host=name, clouds=cloud.clouds_file, call_timeout=call_timeout,
                    cap=CAP_DAYS,
                ),
            )  # fmt: skip
            agent.start()
            yield cls(scene, cloud, nova, agent, name=name, cell=cell)

    @contextmanager
    def sibling(self, *, entry: str = "autobackup", project: str = "service") -> Iterator["Host"]:
        """Another host of the same cloud."""
        place = (self._scene.hypervisor, self._scene.workspace, self.cloud, self.nova)
        with Host.open(*place, entry=entry, project=project) as host:
            yield host

    # ---- servers ------------------------------------------------------------------------------------------

    def boot(
        self,
        name: str,
        *,
        project: str = "tenant-a",
        properties: Mapping[str, str] | None = None,
        extra_specs: Mapping[str, str] | None = None,
        image: str = "",
    ) -> Instance:
        """A server that runs, with data on its disk; its agent holds the disk and has heard of its owner's words."""
        user, server, made_from = (
            _MEMBERS.get(project, "alice"),
            str(uuid.uuid4()),
            Image(id=image) if image else Image(),
        )
        facts = Facts(
            project_id=self.cloud.projects[project], project_name=project,
            user_id=self.cloud.users[user], user_name=user,
        )  # fmt: skip
        self.nova.put(
            server, project=project, user=user, host=self._name, cell=self._cell, name=name, image=made_from.id,
            metadata=properties, extra_specs=extra_specs,
        )  # fmt: skip
        with self._lock:  # one connection to libvirt
            instance = self._scene.compute.spawn(name=name, uuid=server, facts=facts, image=made_from)
        scribble(instance.disk, size_bytes=1 << 20)
        wait_until(lambda: self.agent.claims(server), words=f"a claim; log: {self.agent.log_path}")
        wait_until(lambda: knows(self.agent, instance), words=f"a record; log: {self.agent.log_path}")
        wait_until(
            lambda: self._has_heard(instance), within_s=HEARD_S, words=f"Nova's list; log: {self.agent.log_path}"
        )
        return instance

    def end_on_host(self, instance: Instance) -> None:
        """Destroyed, its files gone, undefined."""
        with self._lock:
            self._scene.compute.terminate(instance)

    def terminate(self, instance: Instance) -> None:
        self.nova.change(instance.uuid, task_state="deleting")
        self.end_on_host(instance)
        self.nova.delete(instance.uuid)

    @contextmanager
    def agent_away(self) -> Iterator[None]:
        """Killed, and started again by the end."""
        self.agent.kill()
        try:
            yield
        finally:
            self.agent.start()

    # ---- what its owner asked for -------------------------------------------------------------------------

    def request(self, instance: Instance) -> dict[str, Any]:
        status, said = self.agent.ask(f"/v1/instances/{instance.uuid}/terminate_backup")
        assert status == 200, said
        return dict(said)

    def heard(self, instance: Instance) -> dict[str, Any]:
        """The wish, as soon as there is one."""
        words = f"a wish; log: {self.agent.log_path}"
        return wait_until(
            lambda: said if "source" in (said := self.request(instance)) else {}, within_s=HEARD_S, words=words
        )

    def refusal(self, instance: Instance) -> str:
        """Why its wish is not granted, as soon as its project has been asked."""
        words = f"a refusal; log: {self.agent.log_path}"
        return str(wait_until(lambda: self.request(instance).get("refused"), within_s=HEARD_S, words=words))

    def explain(self, instance: Instance) -> str:
        return self.agent.cli("explain", instance.uuid, "--config", str(self.agent.config)).stdout

    def metric(self, name: str) -> float:
        lines = self.agent.ask("/metrics")[1].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def _has_heard(self, instance: Instance) -> bool:
        return record_of(self, instance)["server"]["properties"] is not None

    # ---- what became of it --------------------------------------------------------------------------------

    def receipt(self, instance: Instance) -> dict[str, Any]:
        return self.agent.receipt_of(instance.uuid, within_s=ARRIVED_S)

    def scrubbed(self, instance: Instance) -> dict[str, Any]:
        """The receipt of what Nova had said was terminated, captured whole."""
        receipt = self.receipt(instance)
        assert receipt["verdict"] == "terminated"
        assert receipt["outcome"] == "verified in every destination, then scrubbed (zero)"
        return receipt

    def backup(self, instance: Instance, project: str) -> Backup:
        """Its one whole image there."""
        held = self.images(instance, project)
        assert [image["status"] for image in held] == ["active"], held
        assert held[0]["owner"] == self.cloud.projects[project]
        backup = Backup(cloud=self.cloud, image_id=held[0]["id"])
        assert backup.words["project"] == self.cloud.projects[project], "the key's project"
        return backup

    def images(self, instance: Instance, project: str) -> list[dict[str, Any]]:
        return backups_in(self.cloud, _MEMBERS.get(project, "autobackup"), project, instance=instance.uuid)

    def job(self, instance: Instance) -> dict[str, Any]:
        """Empty if there is none."""
        return next((one for one in self.agent.jobs() if one["instance"] == instance.uuid), {})

    def is_let_go(self, instance: Instance) -> bool:
        """Nothing of it is held, and nothing was captured."""
        is_captured = self.job(instance) or any(one["instance"] == instance.uuid for one in self.agent.receipts())
        assert not is_captured, f"it was captured; log: {self.agent.log_path}"
        return not self.agent.claims(instance.uuid)

    # ---- what waits ---------------------------------------------------------------------------------------

    def waiting(self, instance: Instance) -> dict[str, Any]:
        """Its entry among what is undecided; empty if it does not wait."""
        waits = self.agent.ask("/v1/queue")[1]["undecided"]
        return next((dict(one) for one in waits if one["instance"] == instance.uuid), {})

    def waits_for(self, instance: Instance, reason: str) -> dict[str, Any]:
        """Its entry, once it waits undecided because of *reason*."""

        def there() -> dict[str, Any]:
            entry = self.waiting(instance)
            return entry if reason in entry.get("reason", "") else {}

        return wait_until(there, within_s=HEARD_S, words=f"{reason!r}; log: {self.agent.log_path}")

    def goes_on_waiting(self, instance: Instance, sha256: str) -> None:
        """It gets older, in the queue and in the metric, and neither is anything made of it nor its disk written to."""
        first = self.waiting(instance)
        assert first
        wait_until(lambda: self.waiting(instance)["age_s"] > first["age_s"] + 1)
        assert self.metric("autobackup_undecided_oldest_age_seconds") > first["age_s"]
        assert not self.job(instance)
        (claim,) = [name for name in self.agent.claims(instance.uuid) if ".disk." in name]
        assert sha256_of(self.agent.spool / "claims" / claim) == sha256


@contextmanager
def kept_in_sight(path: Path) -> Iterator[Callable[[], str]]:
    """
    The digest of an inode, however it is called by then, or if it has no name any more.

    O_PATH is no opening: whoever asks for a lease gets it.
    """
    fd = os.open(path, os.O_PATH)
    try:
        yield lambda: sha256_of(Path(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


@contextmanager
def keystone_policy(cloud: Cloud, **checks: str) -> Iterator[None]:
    """Keystone has these rules of `identity`; it notices by the time of the file, in ticks of its clock."""
    path = cloud.policy_file("keystone")
    before = path.read_text() if path.exists() else "{}\n"
    path.write_text(json.dumps({f"identity:{name}": check for name, check in checks.items()}))
    time.sleep(0.05)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def inspector(cloud: Cloud, nova: Nova) -> Iterator[None]:
    """The agent's user has the role, and Nova the policy that we ship."""
    nova.use_policy(POLICY_FILE.read_text())
    cloud.grant("autobackup", "service", INSPECTOR)
    try:
        yield
    finally:
        cloud.revoke("autobackup", "service", INSPECTOR)
        nova.use_policy({})


def doctor(host: Host) -> tuple[str, str, int]:
    """What `autobackup doctor` finds of Nova, the remedy, and its exit status."""
    done = host.agent.cli("doctor", str(host.agent.config), "-f", "json", check=False)
    (finding,) = [one for one in json.loads(done.stdout) if one["destination"] == "(verdicts)"]
    return finding["result"], finding["remedy"], done.returncode


def record_of(host: Host, instance: Instance) -> dict[str, Any]:
    """What its agent has written down of it."""
    return dict(json.loads((host.agent.spool / "instances" / f"{instance.uuid}.json").read_text()))


class Tenants:
    """Tests on one host at once: each waits for Nova, for a quiet period, for an upload. For `in_company`."""

    def __init__(self, host: Host, items: list[pytest.Item]) -> None:
        bodies = {item.nodeid: getattr(getattr(item, "function", None), "body", None) for item in items}
        self._pool = ThreadPoolExecutor(max(1, len(bodies)), "tenant")
        self._running: dict[str, Future[None]] = {
            nodeid: self._pool.submit(body, host) for nodeid, body in bodies.items() if body is not None
        }

    def result(self, nodeid: str) -> None:
        self._running[nodeid].result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
