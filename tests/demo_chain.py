"""
`make demo-chain`: backups and their parents, on a real Keystone, Barbican, Glance, libvirt and QEMU.

Three instances of one public image run on two hosts and are terminated at once. Their last states go to the project
`vault`, where the image is protected for them, and to `tenant-a`, where its base is sealed beside them. Then people do
to the image what people do: its owner deletes it, somebody changes its bytes in Glance's own store, it is gone.
The last line is one JSON object; the exit status is 0 only if every promise in it held.
"""

import concurrent.futures
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
from tests.demo import say
from tests.lab import guest
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.chain import VENDOR, kept, pack, publish
from tests.lab.filesystem import loop_filesystem
from tests.lab.guest_view import guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute, Image, Instance, Step
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.views import backups_in
from tests.lab.workspace import workspace

HOME = Path("build/demo-chain").resolve()
DAMAGED = 4


@dataclass(frozen=True)
class Scene:
    """Everything that runs, and what each instance's guest saw last."""

    cloud: Cloud
    hosts: tuple[tuple[Compute, AgentProcess], ...]
    expected: dict[str, str]

    def image(self, image_id: str) -> dict[str, Any]:
        url = f"{self.cloud.glance_url}/v2/images/{image_id}"
        answer: dict[str, Any] = self.cloud.call("admin", "admin", "GET", url).json()
        return answer

    def delete(self, image_id: str, user: str, project: str) -> int:
        url = f"{self.cloud.glance_url}/v2/images/{image_id}"
        return self.cloud.call(user, project, "DELETE", url).status

    def backup(self, instance: Instance, user: str, project: str) -> str:
        found: str = backups_in(self.cloud, user, project, instance=instance.uuid)[0]["id"]
        return found

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """On a machine of the analyst's: nothing is cached there."""
        environment = {"OS_CLIENT_CONFIG_FILE": str(self.cloud.clouds_file)}
        return self.hosts[0][1].cli(*arguments, check=check, environment=environment)

    def restored(self, backup: str, user: str, *options: str) -> tuple[dict[str, Any], str]:
        """What the CLI says, and the digest of the disk as a guest sees it."""
        target = HOME / "restored"
        done = self.cli("restore", backup, "--cloud", user, "--to", str(target), "-f", "json", *options)
        said: dict[str, Any] = json.loads(done.stdout)
        [disk] = [one for one in said["disks"] if Path(one["path"]).name == "disk"]
        try:
            return said, guest_view_sha256(Path(disk["path"]), disk["format"])
        finally:
            shutil.rmtree(target)


def main() -> int:
    """Run the demo; leave `build/demo-chain` behind, and nothing running."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(workspace())
        cloud = stack.enter_context(Cloud(HOME / "cloud"))
        expected: dict[str, str] = {}
        hosts = tuple(new_host(name, cloud, place.folder(name), expected, stack) for name in "ab")
        say("Keystone, Barbican, Glance, libvirtd, QEMU (TCG) and the agents of two hosts are up")
        facts = play(Scene(cloud=cloud, hosts=hosts, expected=expected))
    print(f"\nLook into {HOME.relative_to(Path.cwd())}: a/agent.log, b/agent.log, cloud/logs\n")
    print(json.dumps(facts))
    return 0 if facts.pop("left_protected") == 0 and all(facts.values()) else 1


def new_host(
    name: str, cloud: Cloud, run_folder: Path, expected: dict[str, str], stack: contextlib.ExitStack
) -> tuple[Compute, AgentProcess]:
    """A compute node: libvirt, its instances folder, its agent, and somebody who plays Nova there."""

    def at_step(step: Step, one: Instance) -> None:
        if step is Step.STOPPED:  # the last state: nobody writes any more
            expected[one.uuid] = guest_view_sha256(one.disk, "qcow2")

    hypervisor = stack.enter_context(Hypervisor())
    (HOME / name).mkdir()
    instances = stack.enter_context(loop_filesystem("ext4", 1 << 29)).mount_point
    terms = {"store": "glance", "cloud": "autobackup", "key": "barbican"}
    agent = AgentProcess(
        HOME / name, instances, uri=hypervisor.uri, stores=(), run_folder=run_folder,
        destinations={
            "vault": {**terms, "project": "vault", "readers": [cloud.users["vera"]]},
            "copies": {**terms, "project": "tenant-a", "readers": [cloud.users["erin"]], "parents": "copy"},
        },
    )  # fmt: skip
    with agent.config.open("a") as file:
        file.write(f'\n[openstack]\nclouds_yaml = "{cloud.clouds_file}"\n')
    compute = stack.enter_context(Compute(hypervisor.uri, instances, on_step=at_step))
    return compute, stack.enter_context(agent)


def play(scene: Scene) -> dict[str, Any]:
    image = publish(scene.cloud)
    say(f"{VENDOR[0]} publishes image {image.id}, a compressed qcow2; Nova makes a raw base of it on each host")
    instances = three(scene, image)
    first = instances[0]
    backups = {one.uuid: scene.backup(one, "vera", "vault") for one in instances}
    facts: dict[str, Any] = {}

    parent = scene.image(image.id)
    status = scene.delete(image.id, *VENDOR)
    facts["parent_delete_refused"] = status == 403 and parent["protected"]
    say(f"three children by two agents; its owner deletes the parent: {status}")

    said, seen = scene.restored(backups[first.uuid], "vera", "--boot", "--boot-for", "8", "--tcg")
    facts["restored_without_caches"] = seen == scene.expected[first.uuid]
    facts["booted"] = guest.TEXT_WROTE.decode() in said["console"] and guest.TEXT_FAILED.decode() not in said["console"]
    say(f"restored by vera, who has neither base nor parent: identical {facts['restored_without_caches']}; under QEMU "
        f"it says {said['console'].split()[-2:]}")  # fmt: skip

    facts["promoted_identical"] = promoted(scene, backups[first.uuid]) == scene.expected[first.uuid]
    without = scene.cli("promote", backups[first.uuid], "--cloud", "vera", "--project", "tenant-b", check=False)
    say(f"promoted to a flat image in vault: identical {facts['promoted_identical']}; without a role in tenant-b: exit "
        f"{without.returncode}, {without.stderr.strip()[:60]}...")  # fmt: skip
    facts["promoted_identical"] &= without.returncode == 3

    facts["tampered_parent_refused"] = tampered(scene, image, backups[first.uuid])
    say(f"somebody changed its bytes in Glance's store: refused, evidence kept: {facts['tampered_parent_refused']}")

    facts["left_protected"] = last_child(scene, image, backups)
    status = scene.delete(image.id, *VENDOR)
    say(f"after the last child: {facts['left_protected']} protected, and its owner's delete says {status}")

    copies = [scene.backup(one, "erin", "tenant-a") for one in instances]
    bases = [one for one in backups_in(scene.cloud, "erin", "tenant-a") if one.get("autobackup_kind") == "base"]
    _, seen = scene.restored(copies[2], "erin", "--flatten")
    facts["restored_without_parent"] = (
        status == 204 and len(bases) == 1 and seen == scene.expected[instances[2].uuid] and orphan(scene)
    )
    say(f"the image is gone; tenant-a holds its base once: {len(bases)}; restored by erin, flattened: identical "
        f"{facts['restored_without_parent']}")  # fmt: skip
    return facts


def three(scene: Scene, image: Image) -> list[Instance]:
    """Two on one host, one on the other; all terminated at once, sealed, proven."""
    (compute_a, agent_a), (compute_b, agent_b) = scene.hosts
    where = [(compute_a, agent_a), (compute_a, agent_a), (compute_b, agent_b)]
    instances = [compute.spawn(image=image, nova_metadata=False) for compute, _ in where]
    for (compute, _), one in zip(where, instances, strict=True):
        compute.wait_for(one)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        jobs = [
            threads.submit(lambda: [compute_a.terminate(one) for one in instances[:2]]),
            threads.submit(compute_b.terminate, instances[2]),
        ]
        for job in jobs:
            job.result()
    for (_, agent), one in zip(where, instances, strict=True):
        receipt = agent.receipt_of(one.uuid)
        assert kept(receipt) == {"vault": ["protected"], "copies": ["copy"]}, receipt
    for _, agent in scene.hosts:
        wait_until(lambda agent=agent: not agent.jobs(), words="the jobs are done")  # type: ignore[misc]
    return instances


def promoted(scene: Scene, backup: str) -> str:
    """What a guest sees of the promoted image, as it comes out of Glance."""
    done = scene.cli("promote", backup, "--cloud", "vera", "--project", "vault", "--name", "evidence", "-f", "json")
    image = json.loads(done.stdout)
    assert scene.image(image["image"])["autobackup_origin"] == backup
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "promoted.qcow2")
        url = f"{scene.cloud.glance_url}/v2/images/{image['image']}/file"
        path.write_bytes(scene.cloud.call("vera", "vault", "GET", url).body)
        info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
        assert "backing-filename" not in info, info
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
        return guest_view_sha256(path, "qcow2")


def tampered(scene: Scene, image: Image, backup: str) -> bool:
    """Change a byte that a guest would see, under the image's id; what a restore says; then as it was."""
    path = scene.cloud.image_file(image.id)
    whole = path.read_bytes()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        raw, packed = Path(folder, "raw"), Path(folder, "other.qcow2")
        guest.build_base(raw, seed=image.seed)
        with raw.open("r+b") as file:
            file.seek((1 << 20) + 4711)
            file.write(b"backdoor")
        pack(raw, packed)
        path.write_bytes(packed.read_bytes().ljust(len(whole), b"\0")[: max(len(whole), packed.stat().st_size)])
    try:
        target = HOME / "tampered"
        done = scene.cli("restore", backup, "--cloud", "vera", "--to", str(target), check=False)
        print(f"         {done.stderr.strip()[:200]}")
        is_refused = done.returncode == DAMAGED and not list(HOME.glob("tampered*"))
        refused_to_promote = scene.cli("promote", backup, "--cloud", "vera", "--project", "vault", check=False)
        is_kept = scene.image(image.id)["protected"] and scene.image(backup)["status"] == "active"
        return is_refused and refused_to_promote.returncode == DAMAGED and is_kept
    finally:
        path.write_bytes(whole)


def last_child(scene: Scene, image: Image, backups: dict[str, str]) -> int:
    """The children go one after the other; how many images are protected or tagged for them at the end."""
    ((_, agent_a), (_, agent_b)) = scene.hosts
    for n, backup in enumerate(backups.values()):
        assert scene.image(image.id)["protected"]
        early = scene.cli("link", image.id, backup, "--delete", "--socket", str(agent_b.socket), check=False)
        assert early.returncode == 3, early.stderr  # it stands on it
        assert scene.delete(backup, "vera", "vault") == 204
        agent = (agent_a, agent_b)[n % 2]
        said = json.loads(
            scene.cli("link", image.id, backup, "--delete", "--socket", str(agent.socket), "-f", "json").stdout
        )
        assert said["parent_released"] is (n == len(backups) - 1), (n, said)
    url = f"{scene.cloud.glance_url}/v2/images?limit=1000"
    images = scene.cloud.call("admin", "admin", "GET", url).json()["images"]
    return sum(
        one["protected"] or any(tag.startswith(("autobackup:children:", "autobackup:protected")) for tag in one["tags"])
        for one in images
    )


def orphan(scene: Scene) -> bool:
    """One whose image was deleted while it ran: its base travels as a copy wherever it goes, and comes back."""
    image = publish(scene.cloud)
    compute, agent = scene.hosts[0]
    instance = compute.spawn(image=image, nova_metadata=False)
    compute.wait_for(instance)
    assert scene.delete(image.id, *VENDOR) == 204
    compute.terminate(instance)
    receipt = agent.receipt_of(instance.uuid)
    _, seen = scene.restored(scene.backup(instance, "vera", "vault"), "vera")
    return kept(receipt) == {"vault": ["copy"], "copies": ["copy"]} and seen == scene.expected[instance.uuid]


if __name__ == "__main__":
    sys.exit(main())
