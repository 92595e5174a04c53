"""
What the host, the guest and Nova do wrong, or not at all: nothing is followed, nothing live is touched, nothing lost.

Invariants 1, 2 and 5. Domains are those of libvirt's test driver in a real libvirtd; files, inodes, mounts and the
agent are real.
"""

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.evidence import (
    MiB,
    assert_captured_once,
    assert_spool_empty,
    bundles,
    knows,
    mortal,
    opened_folder,
    scribble,
    sha256_of,
    spawn_known,
    unpack,
    unseen,
    wait_for_death,
    wait_for_stop,
)
from tests.crash.scene import Scene, in_company
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.filesystem import bind_mount, loop_filesystem, scan_tree, tmpfs
from tests.lab.instances import Compute, Disks, Instance, Step

from autobackup.flows.fetch import Origins
from autobackup.flows.restore import Restored, Wanted, restore
from autobackup.flows.verify import open_sealed
from autobackup.flows.workers import Workers
from autobackup.host.filesystems import check_spool
from autobackup.model import AttemptId

SECRET = b"root:$6$this-line-must-travel-nowhere:19000:0:99999:7:::\n" * 40


# ---- a spool that must not be used ------------------------------------------------------------------------------


@in_company
def test_a_spool_on_another_filesystem_is_refused(scene: Scene) -> None:
    spool = scene.instances_path / ".autobackup"
    spool.mkdir()
    with loop_filesystem("ext4", 24 * MiB) as other, bind_mount(other.mount_point, spool):
        said = refusal(scene.agent())

    assert str(spool) in said
    assert "another mount" in said
    assert "ReadWritePaths=" in said
    assert os.listdir(scene.instances_path) == [".autobackup"], "the probe is gone"


@in_company
def test_a_spool_on_a_bind_mount_of_the_same_filesystem_is_refused(scene: Scene) -> None:
    """Same st_dev, and yet link(2) says EXDEV: what two folders in ReadWritePaths= would make."""
    spool = scene.instances_path / ".autobackup"
    spool.mkdir()
    elsewhere = scene.workspace.folder("elsewhere")
    with bind_mount(elsewhere, spool):
        assert spool.stat().st_dev == scene.instances_path.stat().st_dev
        said = refusal(scene.agent())
    shutil.rmtree(elsewhere)

    assert f"{spool}: is on another mount" in said


@in_company
def test_tmpfs_is_refused_unless_the_configuration_says_so(scene: Scene) -> None:
    with tmpfs() as folder:
        said = refusal(scene.agent(instances_path=folder))
        assert "lies on tmpfs, which was not measured" in said
        assert "capture.filesystems" in said

        willing = scene.agent(instances_path=folder, filesystems=["tmpfs"])
        willing.start()
        willing.stop()


@in_company
def test_a_spool_that_is_a_symlink_is_refused(scene: Scene) -> None:
    (scene.instances_path / ".autobackup").symlink_to(scene.home)

    assert "is a symbolic link; remove it" in refusal(scene.agent())


@in_company
def test_a_second_agent_on_one_spool_is_refused(scene: Scene) -> None:
    first = scene.agent()
    first.start()
    (scene.home / "second").mkdir()
    second = scene.agent(home=scene.home / "second")

    assert f"{first.spool}: another agent is using this spool; stop it first" in refusal(second)
    assert first.is_ready()


@in_company
def test_a_second_agent_on_one_socket_is_refused_and_leaves_it_alone(scene: Scene) -> None:
    first = scene.agent()
    first.start()
    (scene.home / "second").mkdir()
    (scene.home / "instances").mkdir()
    second = scene.agent(
        home=scene.home / "second", instances_path=scene.home / "instances", more=f'[api]\nsocket = "{first.socket}"\n'
    )

    assert "another agent listens there" in refusal(second)
    assert first.is_ready()


@in_company
def test_a_spool_of_another_host_is_refused(scene: Scene) -> None:
    spool = scene.instances_path / ".autobackup"
    spool.mkdir()
    (spool / "host").write_text("f00dcafe\n")

    said = refusal(scene.agent())

    assert f"{spool}: belongs to host f00dcafe" in said
    assert f"remove {spool / 'host'}" in said


def test_a_probe_that_a_kill_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    """In a container the agent has the same pid at every start."""
    spool = tmp_path / ".autobackup"
    spool.mkdir()
    probe = tmp_path / f".autobackup-probe-{os.getpid()}"
    probe.touch()
    os.link(probe, spool / f"probe-{os.getpid()}")

    check_spool(instances_path=str(tmp_path), spool_path=str(spool), allowed=["ext4", "xfs", "overlay", "tmpfs"])

    assert os.listdir(tmp_path) == [".autobackup"]


@in_company
def test_a_stop_is_clean(scene: Scene) -> None:
    """SIGTERM is not a failure: exit status 0, no traceback, no socket left."""
    agent = scene.agent()
    agent.start()

    assert agent.stop() == 0
    assert not agent.socket.exists()
    assert "Traceback" not in agent.log_path.read_text()


# ---- what is not a disk -----------------------------------------------------------------------------------------


def a_symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def a_fifo(path: Path, _victim: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path, _victim: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def a_folder(path: Path, victim: Path) -> None:
    path.mkdir()
    os.link(victim, path / "disk")


@pytest.mark.parametrize("make", [a_symlink, a_fifo, a_device, a_folder])
@in_company
def test_what_is_no_regular_file_is_never_claimed(scene: Scene, make: Callable[[Path, Path], None]) -> None:
    agent = scene.agent()
    agent.start()
    victim = scene.instances_path / "victim"
    victim.write_bytes(SECRET)
    before = victim.stat()
    folder = scene.instances_path / str(uuid.uuid4())
    folder.mkdir()
    make(folder / "disk", victim)

    good = spawn_known(scene.compute, agent)
    time.sleep(1.2)  # a scan

    assert agent.claims() == [name for name in agent.claims() if name.startswith(good.uuid)]
    assert victim.stat().st_nlink == before.st_nlink + (make is a_folder)
    assert victim.stat().st_atime_ns == before.st_atime_ns
    assert agent.is_ready()


@in_company
def test_an_instance_folder_that_is_a_symlink_is_not_entered(scene: Scene) -> None:
    agent = scene.agent()
    agent.start()
    elsewhere = scene.instances_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "disk").write_bytes(SECRET)

    (scene.instances_path / str(uuid.uuid4())).symlink_to(elsewhere)
    spawn_known(scene.compute, agent)
    time.sleep(1.2)  # a scan

    assert (elsewhere / "disk").stat().st_nlink == 1
    assert len(agent.claims()) == 1
    assert agent.is_ready()


# ---- what a guest writes ----------------------------------------------------------------------------------------


@in_company
def test_a_raw_disk_that_looks_like_qcow2_travels_as_raw(scene: Scene) -> None:
    """qemu-img would take the guest's word for the format, and a file of the host for its backing file."""
    secret = a_secret(scene)
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent, disks=Disks(root_format="raw"))
    bait = scene.home / "bait"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(bait), "1M"]
    subprocess.run(create, check=True)
    with instance.disk.open("r+b") as disk:
        disk.write(bait.read_bytes())
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    receipt = assert_captured_once(agent, instance, sha256)
    target = scene.home / "restored"
    restored = bring_back(agent, attempt_of(receipt), target)

    [entry] = restored.unpacked.manifest.disks
    assert (entry.format, entry.backing, entry.backing_path) == ("raw", None, None)
    assert restored.unpacked.digests.health == ()
    assert sha256_of(target / "disks/disk") == sha256
    assert_secret_nowhere(agent, target)


@pytest.mark.parametrize("names", ["another backing file", "a data file"])
@in_company
def test_an_overlay_whose_header_was_rewritten_is_captured_and_not_trusted(scene: Scene, names: str) -> None:
    secret = a_secret(scene)
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    wait_until(lambda: chain_known(agent, instance))
    if names == "a data file":
        with instance.disk.open("r+b") as disk:  # incompatible feature bit 2
            disk.seek(72)
            bits = int.from_bytes(disk.read(8), "big") | 4
            disk.seek(72)
            disk.write(bits.to_bytes(8, "big"))
    else:
        rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(instance.disk)]
        subprocess.run(rebase, check=True)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    receipt = assert_captured_once(agent, instance, sha256)
    target = scene.home / "restored"
    restored = bring_back(agent, attempt_of(receipt), target)

    [health] = restored.unpacked.digests.health
    assert (health.tool, health.result) == ("header", "not trusted")
    assert [note for note in restored.notes if "left as it was captured" in note]
    assert sha256_of(target / "disks/disk") == sha256, "not even its header was touched"
    assert_secret_nowhere(agent, target)


@in_company
def test_a_backing_file_that_nobody_vouched_for_is_not_trusted(scene: Scene) -> None:
    """The header named it before anybody else could say a word: it is neither captured nor followed."""
    secret = a_secret(scene)
    agent = scene.agent()
    agent.start()
    instance = scene.compute.spawn(until=Step.DISKS_MADE)
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(instance.disk)]
    subprocess.run(rebase, check=True)
    scene.compute._define(instance)
    scene.compute._create(instance)
    wait_until(lambda: knows(agent, instance))
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    receipt = assert_captured_once(agent, instance, sha256)
    restored = bring_back(agent, attempt_of(receipt), scene.home / "restored")

    assert [one.result for one in restored.unpacked.digests.health] == ["not trusted"]
    assert [note for note in restored.notes if "left as it was captured" in note]
    assert_secret_nowhere(agent, scene.home / "restored")


def truncate(disk: Path) -> None:
    os.truncate(disk, 200_000)


def break_table(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(((1 << 63) | (1 << 40)).to_bytes(8, "big"))  # an L2 table far behind the end


def break_header(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.write(b"\xff" * 104)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, ("corrupt", "failed")), (break_table, ("corrupt", "failed")), (break_header, ("not trusted",))],
)
@in_company
def test_a_damaged_overlay_is_captured_as_it_is(
    scene: Scene, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    damage(instance.disk)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    receipt = assert_captured_once(agent, instance, sha256)

    [health] = unpack(agent, attempt_of(receipt)).digests.health
    assert health.result in words


# ---- who writes when nobody should ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    ["!after:sending/sending", f"!put:{MiB}", "!name", "!after:sending/sent", "!after:sending/verified",
     "!after:verified"],
)  # fmt: skip
@in_company
def test_a_disk_that_changes_after_its_first_read_is_captured_again(scene: Scene, moment: str) -> None:
    """The writer is gone again when the agent looks: only the inode's own times can tell."""
    agent = scene.agent(command=mortal(moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    [link] = (agent.spool / "jobs").glob("*/*.disk.*")
    second_name = scene.instances_path / "second-name"
    os.link(link, second_name)
    scribble(second_name)
    second_name.unlink()
    sha256 = sha256_of(link)
    os.kill(pid, signal.SIGCONT)

    assert_captured_once(agent, instance, sha256)

    if moment != "!after:sending/sending":
        assert agent.events("job.failed", kind="OverlayChanged")


@in_company
def test_a_disk_that_somebody_has_open_is_neither_read_nor_scrubbed(scene: Scene) -> None:
    agent = scene.agent(command=mortal("!after:verified"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    [link] = (agent.spool / "jobs").glob("*/*.disk.*")
    with link.open("r+b") as writer:
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: agent.events("job.failed", kind="DiskBusy"))
        writer.seek(0, os.SEEK_END)
        writer.write(b"the last word" * 1000)
        writer.flush()
        time.sleep(0.5)
        sha256 = sha256_of(link)

    receipt = assert_captured_once(agent, instance, sha256)
    assert "the last word" not in json.dumps(receipt)


# ---- inode numbers that come again ------------------------------------------------------------------------------


@pytest.mark.parametrize("same_uuid", [True, False])
@pytest.mark.parametrize("moment", ["after:queued", "after:sending/sending", "after:scrubbing"])
@in_company
def test_an_inode_number_that_comes_again_is_another_disk(scene: Scene, moment: str, *, same_uuid: bool) -> None:
    """A job lost its link, and a rebuild is given the number: the new disk is claimed, and never the job's."""
    with loop_filesystem("ext4", 48 * MiB) as volume:
        instances = volume.mount_point / "instances"
        instances.mkdir()
        with Scene.open(scene.hypervisor, scene.workspace, instances_path=instances) as inner:
            agent = inner.agent(command=mortal(moment))
            agent.start()
            old = spawn_known(inner.compute, agent)
            inner.compute.terminate(old)
            wait_for_death(agent)
            [link] = [*agent.spool.glob("jobs/*/*.disk.*"), *agent.spool.glob("claims/*.disk.*")]
            number = link.stat().st_ino

            new = inner.compute.spawn(uuid=old.uuid if same_uuid else None)
            scribble(new.disk)
            link.unlink()
            give_inode(new.disk, number)
            sha256, nlink = sha256_of(new.disk), new.disk.stat().st_nlink
            assert (new.disk.stat().st_ino, nlink) == (number, 1)
            agent.command = mortal()
            agent.start()
            wait_until(lambda: new.disk.stat().st_nlink == 2, words="the new disk is claimed")
            if moment != "after:scrubbing":
                job = wait_until(lambda: next((one for one in agent.jobs() if one["state"] == "parked"), None))
                assert "the job's link is gone" in job["last_error"]
            time.sleep(1.2)
            assert sha256_of(new.disk) == sha256
            assert new.disk.stat().st_nlink == 2
            if moment == "after:queued":
                agent.cli("queue", "--socket", str(agent.socket), "discard", job["job"], "--confirm")
                time.sleep(0.5)
                assert sha256_of(new.disk) == sha256
                assert new.disk.stat().st_nlink == 2
            inner.compute.terminate(new)

            wait_until(lambda: [one for one in captures(agent) if one == sha256], within_s=40)


# ---- what Nova leaves, makes anew, or only seems to delete ------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True])
@in_company
def test_a_leaked_del_is_sealed_once_and_kept(scene: Scene, *, torn: bool) -> None:
    agent = scene.agent(command=mortal("!after:sending/sent") if torn else mortal())
    agent.start()
    instance = spawn_known(scene.compute, agent)
    leaked = instance.del_folder / "disk"
    scene.compute.terminate(instance, leak_del=True)
    if torn:
        pid = wait_for_stop(agent)
        scribble(leaked)
        os.kill(pid, signal.SIGCONT)
    receipt = agent.receipt_of(instance.uuid)
    before = leaked.stat()
    sha256 = sha256_of(leaked)

    assert receipt["outcome"] == f"verified, not scrubbed: still named {leaked}"
    assert receipt["scrub"] == {"method": "zero", "scrubbed": False, "still_named": [str(leaked)]}
    assert receipt["member_sha256"]["disks/disk"] == sha256
    wait_until(lambda: leaked.stat().st_nlink == 1)
    time.sleep(2.5)  # scans
    agent.kill()
    agent.command = mortal()
    agent.start()
    time.sleep(2.5)  # and more of them

    assert agent.claims(instance.uuid) == []
    assert [one["state"] for one in agent.jobs()] == ["kept"]
    assert len(bundles(agent)) == 1
    assert "autobackup_jobs" in agent.ask("/metrics")[1]
    assert 'autobackup_jobs{state="kept"} 1.0' in agent.ask("/metrics")[1]
    after = leaked.stat()
    assert (after.st_ino, after.st_mtime_ns, sha256_of(leaked)) == (before.st_ino, before.st_mtime_ns, sha256)

    shutil.rmtree(instance.del_folder)
    agent.cli("queue", "--socket", str(agent.socket), "retry", agent.jobs()[0]["job"])
    assert_spool_empty(agent)


@in_company
def test_an_unwanted_instance_is_released_at_once(scene: Scene) -> None:
    agent = scene.agent(
        rule='name = "some"\nmatch = { name = "wanted-*" }',
        more='[capture]\nquiet_period = "30s"\nleaked_after = "30s"\n',
    )
    agent.start()
    unwanted = spawn_known(scene.compute, agent, name="other")
    scene.compute.terminate(unwanted)

    wait_until(lambda: not agent.claims(unwanted.uuid), within_s=15, words="released before any quiet period")

    assert_spool_empty(agent)
    assert agent.receipts() == []
    assert bundles(agent) == []


@in_company
def test_a_rebuild_releases_the_old_disk_and_holds_the_new(scene: Scene) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    old_inode = instance.disk.stat().st_ino
    rebuilt = scene.compute.rebuild(instance)
    scribble(rebuilt.disk)

    wait_until(lambda: agent.events("verdict.reached", verdict="replaced", inode=old_inode))
    wait_until(lambda: agent.claims(instance.uuid) == [f"{instance.uuid}.disk.{rebuilt.disk.stat().st_ino}"])
    assert agent.jobs() == []
    sha256 = sha256_of(rebuilt.disk)
    scene.compute.terminate(rebuilt)

    assert_captured_once(agent, rebuilt, sha256)


@pytest.mark.parametrize("confirmed", [True, False])
@in_company
def test_a_resize_on_this_host_touches_no_live_inode(scene: Scene, *, confirmed: bool) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    old = sha256_of(instance.disk)
    scene.compute.resize_same_host(instance)
    wait_until(lambda: len(agent.claims(instance.uuid)) == 2)
    time.sleep(2.2)  # longer than the quiet period and a scan
    assert sha256_of(instance.resize_folder / "disk") == old
    assert sha256_of(instance.disk) == old
    assert not agent.events("verdict.reached")

    (scene.compute.confirm_resize if confirmed else scene.compute.revert_resize)(instance)

    wait_until(lambda: len(agent.claims(instance.uuid)) == 1)
    assert agent.claims(instance.uuid) == [f"{instance.uuid}.disk.{instance.disk.stat().st_ino}"]
    assert not agent.events("verdict.reached", verdict="terminated")
    assert instance.disk.stat().st_nlink == 2
    assert sha256_of(instance.disk) == old
    scene.compute.terminate(instance)
    assert_captured_once(agent, instance, old)


def soft_delete(compute: Compute, instance: Instance) -> None:
    compute.soft_delete(instance)
    time.sleep(2.2)
    compute.restore(instance)


def rescue(compute: Compute, instance: Instance) -> None:
    compute.rescue(instance)
    time.sleep(2.2)
    compute.unrescue(instance)


@pytest.mark.parametrize("operation", [Compute.hard_reboot, Compute.live_snapshot, soft_delete, rescue])
@in_company
def test_what_only_looks_like_an_end_is_none(scene: Scene, operation: Callable[[Compute, Instance], None]) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    before, sha256 = instance.disk.stat(), sha256_of(instance.disk)

    operation(scene.compute, instance)
    time.sleep(2.2)  # longer than the quiet period and a scan

    after = instance.disk.stat()
    assert (after.st_ino, after.st_nlink, after.st_mtime_ns) == (before.st_ino, 2, before.st_mtime_ns)
    assert sha256_of(instance.disk) == sha256
    assert not agent.events("verdict.reached")
    assert agent.jobs() == []
    scene.compute.terminate(instance)
    assert_captured_once(agent, instance, sha256)


# ---- what is missing --------------------------------------------------------------------------------------------


@in_company
def test_an_agent_that_slept_through_the_whole_end_finds_it(scene: Scene) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    agent.kill()
    scene.compute.terminate(instance)
    assert agent.claims(instance.uuid)

    agent.start()

    receipt = assert_captured_once(agent, instance, sha256)
    assert receipt["not_captured"] == {}


def with_firmware(instance: Instance, nvram: Path) -> str:
    """A domain with NVRAM and an emulated TPM, which libvirt keeps outside the instances folder."""
    return (
        f"<domain type='test'><name>{instance.domain_name}</name><uuid>{instance.uuid}</uuid>"
        f"<memory unit='KiB'>65536</memory><os><type>hvm</type>"
        f"<loader readonly='yes' type='pflash'>/usr/share/OVMF.fd</loader><nvram>{nvram}</nvram></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{instance.disk}'/>"
        f"<target dev='vda' bus='virtio'/></disk><tpm model='tpm-crb'>"
        f"<backend type='emulator' version='2.0'/></tpm></devices></domain>"
    )


@in_company
def test_firmware_state_on_the_same_mount_is_held_past_the_undefine(scene: Scene) -> None:
    """NVRAM and TPM state die with the undefine; swtpm replaces its file, so the last one must be the one held."""
    swtpm = scene.home / "swtpm"
    agent = scene.agent(more=f'[libvirt]\nswtpm_path = "{swtpm}"\n')
    agent.start()
    instance = scene.compute.spawn(until=Step.DISKS_MADE)
    nvram, tpm = scene.home / "vars.fd", swtpm / instance.uuid / "tpm2" / "tpm2-00.permall"
    nvram.write_bytes(b"efi variables")
    tpm.parent.mkdir(parents=True)
    tpm.write_bytes(b"old state")
    scene.compute.connection.defineXML(with_firmware(instance, nvram))
    scene.compute.domain(instance).create()
    wait_until(lambda: len(agent.claims(instance.uuid)) >= 3)
    (tpm.parent / "new").write_bytes(b"sealed by the TPM")
    (tpm.parent / "new").rename(tpm)
    scene.compute.domain(instance).suspend()  # any event is a reason to look
    wait_until(lambda: f"{instance.uuid}.swtpm.tpm2-00.permall.{tpm.stat().st_ino}" in agent.claims(instance.uuid))

    scene.compute.terminate(instance)
    nvram.unlink()
    shutil.rmtree(swtpm)
    receipt = agent.receipt_of(instance.uuid)
    bring_back(agent, attempt_of(receipt), scene.home / "restored")

    assert (scene.home / "restored/nvram/nvram").read_bytes() == b"efi variables"
    assert (scene.home / "restored/swtpm/tpm2-00.permall").read_bytes() == b"sealed by the TPM"
    assert not {"nvram", "swtpm"} & set(receipt["not_captured"])
    assert receipt["scrub"]["scrubbed"]


@in_company
def test_firmware_state_that_cannot_be_held_is_named_with_the_reason(scene: Scene) -> None:
    agent = scene.agent()
    agent.start()
    with tmpfs() as elsewhere:
        nvram = elsewhere / "vars.fd"
        nvram.write_bytes(b"efi")
        instance = scene.compute.spawn(until=Step.DISKS_MADE)
        scene.compute.connection.defineXML(with_firmware(instance, nvram))
        scene.compute.domain(instance).create()
        wait_until(lambda: knows(agent, instance))
        sha256 = sha256_of(instance.disk)
        scene.compute.terminate(instance)

        receipt = assert_captured_once(agent, instance, sha256)

    assert receipt["not_captured"]["nvram"] == (
        f"{nvram}: it lies on another mount than the spool, so it cannot be held past the undefine"
    )
    assert "it was not there" in receipt["not_captured"]["swtpm"]
    listed = {one.what: one.why for one in unpack(agent, attempt_of(receipt)).manifest.not_captured}
    assert listed == receipt["not_captured"]


@in_company
def test_a_domain_that_was_gone_before_its_xml_could_be_read(scene: Scene) -> None:
    """A build that fails before libvirt hears of it: the bytes are captured, the format is nobody's word."""
    agent = scene.agent()
    agent.start()
    instance = scene.compute.spawn(until=Step.DISKS_MADE)
    scribble(instance.disk)
    sha256 = sha256_of(instance.disk)
    wait_until(lambda: agent.claims(instance.uuid))
    scene.compute._delete_files(instance)

    receipt = assert_captured_once(agent, instance, sha256)
    restored = bring_back(agent, attempt_of(receipt), scene.home / "restored")

    assert set(receipt["not_captured"]) == {"domain.xml", "format of disk"}
    assert [note for note in restored.notes if "its format is not known" in note]
    assert sha256_of(scene.home / "restored/disks/disk") == sha256


@in_company
def test_a_rule_that_cannot_be_told_parks_and_a_discard_ends_it(scene: Scene) -> None:
    """Nothing is known of the instance, so no rule by name can be told to match: an operator decides."""
    agent = scene.agent(rule='name = "some"\nmatch = { name = "wanted-*" }')
    agent.start()
    instance = scene.compute.spawn(until=Step.DISKS_MADE)
    wait_until(lambda: agent.claims(instance.uuid))
    scene.compute._delete_files(instance)
    job = wait_until(lambda: next((one for one in agent.jobs() if one["state"] == "parked"), None))
    assert "rule 'some' asks for name, which nobody has told" in job["last_error"]

    agent.cli("queue", "--socket", str(agent.socket), "discard", job["job"], "--confirm")

    assert agent.receipt_of(instance.uuid)["outcome"].startswith("discarded by an operator")
    assert_spool_empty(agent)
    time.sleep(1.2)
    assert agent.jobs() == []
    assert bundles(agent) == []


@in_company
def test_a_file_of_somebody_else_in_a_jobs_folder_does_not_end_the_agent(scene: Scene) -> None:
    agent = scene.agent(command=mortal("!after:scrubbed"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    [folder] = (agent.spool / "jobs").iterdir()
    (folder / "README.operator").write_text("do not touch")
    os.kill(pid, signal.SIGCONT)

    job = wait_until(lambda: next((one for one in agent.jobs() if "README.operator" in one["last_error"]), None))
    assert "remove it" in job["last_error"]
    assert agent.is_ready()
    (folder / "README.operator").unlink()
    assert_captured_once(agent, instance, sha256)


# ---- helpers ----------------------------------------------------------------------------------------------------


def refusal(agent: AgentProcess) -> str:
    """Start it; it must refuse with status 2 and words, not a traceback."""
    agent.start(ready=False)
    status = agent.wait_for_end()
    said = agent.log_path.read_text()
    assert status == 2, said
    assert "Traceback" not in said
    assert "autobackup-agent: " in said
    agent.process = None
    return said


def a_secret(scene: Scene) -> Path:
    secret = scene.home / "shadow"
    secret.write_bytes(SECRET)
    return secret


def assert_secret_nowhere(agent: AgentProcess, target: Path) -> None:
    needle = SECRET[:57]
    assert scan_tree(target, [needle]) == {}
    assert scan_tree(agent.stores["vault"], [needle]) == {}


def attempt_of(receipt: dict[str, object]) -> str:
    copies = receipt["copies"]
    assert isinstance(copies, list)
    return str(copies[0]["attempt"]["attempt"])


def captures(agent: AgentProcess) -> list[str]:
    """The digest of the root disk on every receipt of a scrub."""
    return [one["member_sha256"].get("disks/disk", "") for one in agent.receipts() if one["scrub"]["scrubbed"]]


def chain_known(agent: AgentProcess, instance: Instance) -> bool:
    record = json.loads((agent.spool / "instances" / f"{instance.uuid}.json").read_text())
    return any(disk["chain"] for disk in record["disks"])


def give_inode(disk: Path, number: int) -> None:
    """Move the content of *disk* to the freed inode *number* of its filesystem."""
    tries = []
    for count in range(20_000):
        path = disk.with_name(f"try-{count}")
        path.touch()
        tries.append(path)
        if path.stat().st_ino == number:
            path.write_bytes(disk.read_bytes())
            path.replace(disk)
            break
    for path in tries:
        path.unlink(missing_ok=True)


def bring_back(agent: AgentProcess, attempt: str, target: Path) -> Restored:
    async def run() -> Restored:
        workers = Workers()
        try:
            place = opened_folder(agent.stores["vault"], agent.keyfile)
            sealed = await open_sealed(place.store, place.keys, AttemptId(attempt))
            origins = Origins(places=[place])
            return await restore(
                sealed, target=str(target), wanted=Wanted(), origins=origins, workers=workers, show=unseen
            )
        finally:
            workers.close()

    return asyncio.run(run())
