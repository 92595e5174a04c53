"""
libvirt is absent, dead, or hangs: claims go on by inotify, and no verdict is reached without its word.

These hurt the libvirtd that other tests share, so they run one at a time.
"""

import os
import time
import uuid

import pytest
from tests.crash.evidence import assert_captured_once, knows, sha256_of, spawn_known
from tests.crash.scene import Scene
from tests.lab import guest
from tests.lab.agent import wait_until
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Image, Instance, Step, guest_view_sha256
from tests.lab.workspace import Workspace


def test_libvirtd_is_absent_at_the_start(scene: Scene) -> None:
    """What is claimed by inotify alone waits until libvirt can be asked."""
    scene.hypervisor.kill_libvirtd()
    agent = scene.agent()
    agent.start(ready=False)
    wait_until(lambda: agent.events("agent.started"))
    folder = scene.instances_path / str(uuid.uuid4())
    folder.mkdir()
    (folder / "disk").write_bytes(os.urandom(1 << 20))
    sha256 = sha256_of(folder / "disk")
    wait_until(lambda: agent.claims(folder.name))
    (folder / "disk").unlink()
    folder.rmdir()
    time.sleep(3)

    assert not agent.events("verdict.reached")
    assert agent.ask("/readyz")[0] == 503
    [waiting] = agent.ask("/v1/queue")[1]["undecided"]
    assert waiting["reason"] == "libvirt did not answer"

    scene.hypervisor.start_libvirtd()

    receipt = agent.receipt_of(folder.name)
    assert receipt["member_sha256"]["disks/disk"] == sha256
    assert agent.is_ready()


def test_libvirtd_is_killed_and_restarted_over_a_running_guest(hypervisor: Hypervisor, workspace: Workspace) -> None:
    """A real guest on a real QEMU lives through it; its last state is what comes back."""
    with Scene.open(hypervisor, workspace, qemu=True) as scene:
        stopped: dict[Step, str] = {}
        scene.compute.on_step = lambda step, one: note(stopped, step, one)
        agent = scene.agent(qemu=True)
        agent.start()
        instance = scene.compute.spawn(image=Image(mode=guest.Mode.IDLE))
        scene.compute.wait_for(instance)
        wait_until(lambda: knows(agent, instance))
        hypervisor.kill_libvirtd()
        wait_until(lambda: agent.ask("/readyz")[0] == 503)
        time.sleep(1.5)
        assert not agent.events("verdict.reached")
        assert instance.disk.stat().st_nlink == 2

        hypervisor.start_libvirtd()
        wait_until(agent.is_ready)
        time.sleep(1.5)
        assert not agent.events("verdict.reached")
        view = guest_view_sha256(instance.disk, "qcow2")
        scene.compute.terminate(instance)

        receipt = assert_captured_once(agent, instance, stopped[Step.STOPPED])
        target = scene.home / "restored"
        restored = agent.restore(receipt["copies"][0]["attempt"]["attempt"], target)
        assert restored["notes"] == []
        assert guest_view_sha256(target / "disks/disk", "qcow2") == view


@pytest.mark.parametrize("terminated", ["before", "during"])
def test_libvirtd_hangs(scene: Scene, terminated: str) -> None:
    """No answer is not a no: nothing is decided until it comes back."""
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute._destroy(instance)
    if terminated == "before":
        scene.compute._delete_files(instance)
        scene.compute._undefine(instance)
        scene.hypervisor.stop_libvirtd()
    else:
        scene.compute._undefine(instance)
        scene.hypervisor.stop_libvirtd()
        scene.compute._delete_files(instance)
    time.sleep(4)
    assert not agent.events("verdict.reached")
    assert agent.claims(instance.uuid)

    scene.hypervisor.cont_libvirtd()

    assert_captured_once(agent, instance, sha256)


def note(stopped: dict[Step, str], step: Step, instance: Instance) -> None:
    if step is Step.STOPPED:
        stopped[step] = sha256_of(instance.disk)
