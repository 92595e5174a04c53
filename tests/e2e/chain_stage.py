"""
A stage for backups that stand on parents: an agent, instances of published images, and one cloud for a whole module.

The domains are the test driver's, so no guest runs: what is written to a disk before its instance ends is its last
state. Tests run beside each other (`tests.crash.scene`), and share projects: each has its own images.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from tests.crash.evidence import knows, mortal, scribble, wait_for_stop
from tests.crash.scene import Company, Scene
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.chain import VENDOR, disguise
from tests.lab.guest_view import guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Disks, Image, Instance
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.images import PATCH, Images, User
from tests.lab.openstack.views import clouds_yaml
from tests.lab.workspace import Workspace

from autobackup.configfile import load
from autobackup.flows.release import Release
from autobackup.stores.opening import open_destination

KiB: Final = 1 << 10
MiB: Final = 1 << 20
ARRIVED_S: Final = 60.0
"""Everything of a test's, with three others beside it."""
ADMIN: Final = ("admin", "admin")


def glance(project: str, **keys: object) -> dict[str, object]:
    return {"store": "glance", "cloud": "autobackup", "project": project, "key": "barbican", **keys}


@dataclass
class Stage:
    """One test's. *guarded_url*: a Glance with the policy that keeps parents, on the same images."""

    scene: Scene
    cloud: Cloud
    guarded_url: str
    last_seen: dict[Path, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.scene.home

    @property
    def images(self) -> Images:
        """Glance, without the policy."""
        return Images(cloud=self.cloud, url=self.cloud.glance_url)

    @property
    def agent(self) -> AgentProcess:
        return self.scene.agents[-1]

    def spawn(self, image: Image, *, disks: Disks | None = None) -> Instance:
        instance = self.scene.compute.spawn(image=image, disks=disks)
        self.write(instance)
        return instance

    def base(self, image: Image, disk_format: str) -> Path:
        """As Nova makes it of an image that is said to be *disk_format*."""
        path = self.scene.compute.base(image)
        disguise(path, disk_format)
        return path

    def write(self, instance: Instance) -> None:
        """Where the image has nothing, so that it boots."""
        for device in instance.devices:
            scribble(device.path, size_bytes=MiB // 2, at_bytes=(8 * MiB if device.path == instance.disk else 0))

    def start(
        self, destinations: Mapping[str, Mapping[str, object]], *, fates: Sequence[str] = (), guarded: bool = False
    ) -> AgentProcess:
        """The agent, which learns of every instance that is there."""
        clouds = self.cloud.clouds_file
        if guarded:
            clouds = clouds_yaml(self.cloud, self.home, autobackup={"image_endpoint_override": self.guarded_url})
        options: dict[str, Any] = {"command": mortal(*fates)} if fates else {}
        agent = self.scene.agent(
            stores=(), destinations=destinations, more=f'[openstack]\nclouds_yaml = "{clouds}"\n', **options
        )
        agent.start()
        return agent

    def terminate(self, *instances: Instance) -> None:
        """Once the agent knows them. What their guests would have seen last is remembered."""
        for one in instances:
            wait_until(lambda one=one: knows(self.agent, one), words=f"a record; log: {self.agent.log_path}")  # type: ignore[misc]
            for device in one.devices:
                self.last_seen[device.path] = guest_view_sha256(device.path, device.format)
        for one in instances:
            self.scene.compute.terminate(one)

    def receipt(self, instance: Instance) -> dict[str, Any]:
        receipt = self.agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
        assert receipt["scrub"]["scrubbed"], receipt
        return receipt

    def attempt(self, receipt: Mapping[str, Any], destination: str) -> str:
        [found] = [copy["attempt"]["attempt"] for copy in receipt["copies"] if copy["destination"] == destination]
        return str(found)

    # ---- restored -----------------------------------------------------------------------------------------

    def cli(
        self, *arguments: str, guarded: bool = False, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """On a machine of somebody's where nothing is cached, with her own rights."""
        clouds = self.cloud.clouds_file
        if guarded:
            (self.home / "guarded").mkdir(exist_ok=True)
            clouds = self.cloud.clouds_with(self.home / "guarded", image=self.guarded_url)
        where = environment or {"OS_CLIENT_CONFIG_FILE": str(clouds)}
        return self.agent.cli(*arguments, check=check, environment=where)

    def assert_restored(self, backup: str, instance: Instance, *where: str, **how: Any) -> dict[str, Any]:
        """Every disk of *instance*, as its guest saw it last; what the command line says. The disks are gone again."""
        target = self.home / f"restored-{uuid.uuid4()}"
        done = self.cli("restore", backup, *where, "--to", str(target), "-f", "json", **how)
        said: dict[str, Any] = json.loads(done.stdout)
        seen = {Path(one["path"]).name: guest_view_sha256(Path(one["path"]), one["format"]) for one in said["disks"]}
        shutil.rmtree(target)
        assert seen == {device.path.name: self.last_seen[device.path] for device in instance.devices}, said
        return said

    # ---- what people and crashes do -----------------------------------------------------------------------

    def image(self, image_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.images.ask(ADMIN, "GET", f"/{image_id}").json()
        return answer

    def is_kept(self, image_id: str) -> bool:
        image = self.image(image_id)
        return bool(image["protected"]) and any(tag.startswith("autobackup:children:") for tag in image["tags"])

    def is_free(self, image_id: str) -> bool:
        return is_nobodys(self.image(image_id))

    def unprotect_and_delete(self, image_id: str, *, user: User = VENDOR) -> None:
        """An agent's look may protect it again between the two."""

        def gone() -> bool:
            self.images.change(user, image_id, "replace", "protected", False)
            return self.images.delete(user, image_id) == 204

        wait_until(gone, words="the owner deletes it")

    def strip(self, user: User, image_id: str) -> None:
        """Take every tag and property of ours from an image."""
        image = self.images.ask(user, "GET", f"/{image_id}").json()
        changes: list[dict[str, object]] = [{"op": "replace", "path": "/tags", "value": []}]
        changes += [{"op": "remove", "path": f"/{key}"} for key in image if key.startswith("autobackup")]
        answer = self.images.ask(user, "PATCH", f"/{image_id}", json=changes, headers=PATCH)
        assert answer.status == 200, str(answer)

    def made_by(self, agent: AgentProcess, project: str) -> set[str]:
        """The images of *agent* in *project*, whatever their state."""
        made = (agent.spool / "agent").read_text().strip()
        query = f"?limit=1000&owner={self.cloud.projects[project]}&autobackup_agent={made}"
        return {one["id"] for one in self.images.ask(("autobackup", project), "GET", query).json()["images"]}

    def let_go(self, parent: str, child: str) -> None:
        """Undo the link to a child that is gone; its parent is released by that, or by a look of another agent."""

        def is_released() -> bool:
            self.agent.ask(f"/v1/link/{parent}/{child}", method="DELETE")
            image = self.images.ask(ADMIN, "GET", f"/{parent}")
            return image.status == 404 or is_nobodys(image.json())

        wait_until(is_released, words=f"{parent} is released; log: {self.agent.log_path}")

    @contextlib.contextmanager
    def while_stopped(self) -> Iterator[None]:
        """The agent stops by its fate; it goes on afterwards."""
        pid = wait_for_stop(self.agent)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def look_until(self, what: Callable[[], object], *, words: str) -> None:
        """A start begins with a look at every destination; one that meets the deletions of other tests does nothing."""
        for _ in range(4):
            if what():
                return
            self.agent.stop()
            self.agent.start()
            with contextlib.suppress(AssertionError):
                wait_until(what, within_s=10)
        raise AssertionError(f"{words}; log: {self.agent.log_path}")

    def look(self, destination: str, *, again_after_s: float) -> None:
        """What an agent does from time to time; and so much later once more."""
        now_s = time.time()

        async def look() -> None:
            nonlocal now_s
            config = load(self.agent.config)
            [terms] = [one for one in config.destination if one.name == destination]
            place, release = open_destination(terms, config.openstack), Release(clock=lambda: now_s)
            await release.look(place)
            now_s += again_after_s
            await release.look(place)

        asyncio.run(look())


def is_nobodys(image: Mapping[str, Any]) -> bool:
    """Neither protected nor tagged for anybody."""
    return not image["protected"] and not any(tag.startswith("autobackup") for tag in image["tags"])


class ChainCompany(Company):
    """Bodies get a `Stage`."""

    def __init__(
        self, hypervisor: Hypervisor, workspace: Workspace, items: list[pytest.Item], *, cloud: Cloud, guarded_url: str
    ) -> None:
        self._cloud = cloud
        self._guarded_url = guarded_url
        super().__init__(hypervisor, workspace, items)

    def _act(self, body: Callable[..., None], parameters: dict[str, Any]) -> None:
        with Scene.open(self._hypervisor, self._workspace) as scene:
            body(Stage(scene, self._cloud, self._guarded_url), **parameters)
