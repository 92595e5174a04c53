"""The laboratory keeps what it promises: tests of other rooms stand on these."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import libvirt
import pytest
from tests.lab import guest
from tests.lab.filesystem import bind_mount, loop_filesystem, scan_for, scan_tree, tmpfs
from tests.lab.guest_view import Format, guest_view, guest_view_read, guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute, Disks, Image, Instance, Step
from tests.lab.leftovers import find_leftovers
from tests.lab.listener import EventListener
from tests.lab.mounts import loop_devices, mounts_below
from tests.lab.workspace import PARENT, Workspace

DEFINED, REDEFINED, UNDEFINED = (0, 0), (0, 1), (1, 0)
STARTED, RESUMED = (2, 0), (4, 0)
GUEST_OFF, OFF = (6, 1), (5, 0)  # the guest went by itself
HOST_OFF, DESTROYED = (6, 2), (5, 1)
BOOTED = [RESUMED, STARTED]
KILLED = [HOST_OFF, DESTROYED]
WENT = [GUEST_OFF, OFF]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def listener(hypervisor: Hypervisor) -> Iterator[EventListener]:
    with EventListener(hypervisor.uri) as listening:
        yield listening


# the guest


@pytest.mark.parametrize("root_format", ["qcow2", "raw"])
def test_the_guest_writes_what_the_host_computes(compute: Compute, root_format: Format) -> None:
    instance = compute.spawn(disks=Disks(root_format=root_format))
    compute.wait_for(instance)
    compute.stop(instance)

    assert_guest_data(instance.disk, root_format, instance.image)


def test_the_marker_is_only_where_the_guest_wrote_it(compute: Compute) -> None:
    """Else a scan for it would prove nothing."""
    instance = compute.spawn(image=Image(mode=guest.Mode.IDLE))
    compute.wait_for(instance)
    compute.stop(instance)
    mark = instance.image.marker

    found = scan_tree(compute.instances_path, [mark])

    written_bytes = sum(length for _, length in guest.regions())
    assert list(found) == [instance.disk]
    assert len(found[instance.disk][mark]) == written_bytes // guest.MARKER_EVERY_BYTES


def test_the_heartbeat_goes_on_until_the_power_button(compute: Compute) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)

    first = beats(instance)
    wait_until(lambda: beats(instance) > first)
    compute.stop(instance)
    last = beats(instance)
    compute.start(instance)
    compute.wait_for(instance)

    wait_until(lambda: beats(instance) > last)


def test_an_idle_guest_writes_nothing_more(compute: Compute) -> None:
    instance = compute.spawn(image=Image(mode=guest.Mode.IDLE))
    compute.wait_for(instance)

    before = guest_view_sha256(instance.disk, "qcow2")
    time.sleep(0.3)

    assert guest_view_sha256(instance.disk, "qcow2") == before
    assert beats(instance) == 0
    compute.stop(instance)


def test_a_deaf_guest_must_be_destroyed(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn(image=Image(mode=guest.Mode.DEAF))
    compute.wait_for(instance)

    compute.stop(instance, timeout_s=0.5)

    assert codes(listener, instance, 5) == [DEFINED, *BOOTED, *KILLED]


def test_a_guest_can_power_itself_off(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn(image=Image(mode=guest.Mode.POWER_OFF))

    assert codes(listener, instance, 5) == [DEFINED, *BOOTED, *WENT]
    assert_guest_data(instance.disk, "qcow2", instance.image)


# Nova's ways with events and inodes (facts measured on a real Nova)


def test_an_early_link_outlives_the_delete(compute: Compute) -> None:
    instance = compute.spawn(disks=Disks(ephemeral=True, swap=True, config_drive=True))
    compute.wait_for(instance)
    claim = link(instance)
    assert claim.stat().st_nlink == 2
    assert claim.stat().st_uid != 0, "libvirt gives the disk to QEMU's user while it runs"
    seen = watch(compute, claim)

    compute.terminate(instance)

    assert seen == [(Step.STOPPED, 2), (Step.RENAMED, 2), (Step.UNLINKED, 1), (Step.UNDEFINED, 1)]
    assert claim.stat().st_uid == 0
    assert not [path for path in compute.instances_path.iterdir() if path.name.startswith(instance.uuid)]
    assert_guest_data(claim, "qcow2", instance.image)


def test_a_leaked_del_folder_keeps_the_name(compute: Compute) -> None:
    instance = compute.spawn()
    claim = link(instance)

    compute.terminate(instance, leak_del=True)

    assert claim.stat().st_nlink == 2
    assert [path.name for path in instance.del_folder.iterdir()] == ["disk"]
    with pytest.raises(libvirt.libvirtError, match="not found"):
        compute.domain(instance)


@pytest.mark.parametrize("after", [Step.DISKS_MADE, Step.DEFINED, Step.STARTED])
def test_a_failed_spawn_leaves_nothing(
    compute: Compute, listener: EventListener, after: Literal[Step.DISKS_MADE, Step.DEFINED, Step.STARTED]
) -> None:
    expected = {
        Step.DISKS_MADE: [],
        Step.DEFINED: [DEFINED, UNDEFINED],
        Step.STARTED: [DEFINED, *BOOTED, *KILLED, UNDEFINED],
    }[after]

    instance = compute.failed_spawn(after=after)

    assert codes(listener, instance, len(expected)) == expected
    assert [path.name for path in compute.instances_path.iterdir()] == ["_base"]


def test_starts_and_snapshots_undefine_and_keep_the_inode(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    claim = link(instance)
    expected = [DEFINED, *BOOTED]
    for operation, events in [
        (compute.hard_reboot, [*KILLED, UNDEFINED, DEFINED, *BOOTED]),
        (compute.live_snapshot, [UNDEFINED, REDEFINED]),
        (compute.soft_delete, KILLED),
        (compute.restore, [UNDEFINED, DEFINED, *BOOTED]),
    ]:
        operation(instance)
        expected += events

        assert codes(listener, instance, len(expected)) == expected
        assert claim.samefile(instance.disk)


def test_a_rescue_puts_another_disk_first(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    claim = link(instance)

    compute.rescue(instance)
    first = compute.domain(instance).XMLDesc().partition("<source file='")[2].partition("'")[0]
    compute.unrescue(instance)

    assert first == str(instance.folder / "disk.rescue")
    assert claim.samefile(instance.disk)
    assert not (instance.folder / "disk.rescue").exists()
    reboot = [REDEFINED, *BOOTED]
    assert codes(listener, instance, 13) == [DEFINED, *BOOTED, *WENT, *reboot, *KILLED, *reboot]


def test_a_rebuild_looks_like_a_delete_until_it_is_defined_again(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    claim = link(instance)
    seen = watch(compute, claim)

    rebuilt = compute.rebuild(instance, image=Image())
    compute.wait_for(rebuilt)

    assert [nlink for step, nlink in seen if step in (Step.UNLINKED, Step.UNDEFINED)] == [1, 1]
    assert not claim.samefile(rebuilt.disk)
    assert codes(listener, instance, 9) == [DEFINED, *BOOTED, *WENT, UNDEFINED, DEFINED, *BOOTED]


def test_a_resize_runs_a_copy_and_a_confirm_is_silent(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    claim = link(instance)

    compute.resize_same_host(instance)

    assert claim.samefile(instance.resize_folder / "disk")
    assert not claim.samefile(instance.disk)
    compute.confirm_resize(instance)
    assert claim.stat().st_nlink == 1
    assert codes(listener, instance, 8) == [DEFINED, *BOOTED, *WENT, REDEFINED, *BOOTED]


def test_a_revert_unlinks_after_the_undefine(compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    old = link(instance)
    compute.resize_same_host(instance)
    new = link(instance)
    seen = watch(compute, new)

    compute.revert_resize(instance)

    assert seen[:3] == [(Step.STOPPED, 2), (Step.UNDEFINED, 2), (Step.UNLINKED, 1)]
    assert old.samefile(instance.disk)
    assert codes(listener, instance, 14)[8:] == [*KILLED, UNDEFINED, DEFINED, *BOOTED]


def test_an_offload_and_its_return_name_another_root(compute: Compute) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    claim = link(instance)

    compute.shelve_offload(instance)
    assert claim.stat().st_nlink == 1
    back = compute.unshelve(instance)

    xml = compute.domain(back).XMLDesc()
    assert instance.image.base_name in xml
    assert instance.image.id not in xml


def test_metadata_is_as_nova_writes_it(compute: Compute) -> None:
    uri = "http://openstack.org/xmlns/libvirt/nova/1.1"

    plain = compute.spawn(nova_metadata=False, until=Step.DEFINED)
    nova = compute.spawn(name="web-1", until=Step.DEFINED)

    xml = compute.domain(nova).XMLDesc()
    assert "<nova:name>web-1</nova:name>" in xml
    assert f'<nova:project uuid="{nova.facts.project_id}">demo</nova:project>' in xml
    assert f'<nova:root type="image" uuid="{nova.image.id}"/>' in xml
    assert compute.domain(nova).metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, uri)
    with pytest.raises(libvirt.libvirtError, match="metadata not found"):
        compute.domain(plain).metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, uri)


# the hypervisor


def test_a_read_only_connection_is_one_on_either_socket(hypervisor: Hypervisor) -> None:
    for connection in (
        libvirt.openReadOnly(hypervisor.uri),
        libvirt.openReadOnly(hypervisor.read_only_uri),
        libvirt.open(hypervisor.read_only_uri),
    ):
        with pytest.raises(libvirt.libvirtError, match="read only access"):
            connection.defineXML("<domain/>")
        connection.close()


def test_two_hypervisors_know_nothing_of_each_other(
    hypervisor: Hypervisor, compute: Compute, workspace: Workspace
) -> None:
    instance = compute.spawn()
    pid = hypervisor.libvirtd_pid
    with Hypervisor() as other, Compute(other.uri, workspace.folder("instances")) as elsewhere:
        stranger = elsewhere.spawn()
        assert elsewhere.connection.listAllDomains()[0].UUIDString() == stranger.uuid
        assert [domain.UUIDString() for domain in compute.connection.listAllDomains()] == [instance.uuid]
        other.kill_libvirtd()
        other.start_libvirtd()
        elsewhere.terminate(stranger)
        assert not hypervisor.processes().keys() & other.processes().keys()

    assert hypervisor.libvirtd_pid == pid
    assert compute.domain(instance).isActive()


def test_domains_outlive_a_kill_of_libvirtd(hypervisor: Hypervisor, compute: Compute, listener: EventListener) -> None:
    instance = compute.spawn()
    compute.wait_for(instance)
    qemu, libvirtd = hypervisor.qemu_pid(instance.uuid), hypervisor.libvirtd_pid

    hypervisor.kill_libvirtd()

    assert hypervisor.libvirtd_pid is None
    wait_until(lambda: bool(listener.events() and listener.connection_closed))
    first = beats(instance)
    wait_until(lambda: beats(instance) > first)
    hypervisor.start_libvirtd()
    assert hypervisor.libvirtd_pid not in (None, libvirtd)
    assert hypervisor.qemu_pid(instance.uuid) == qemu
    compute.terminate(instance)


def test_a_stopped_libvirtd_hangs_and_goes_on(hypervisor: Hypervisor) -> None:
    ask = [sys.executable, "-c", f"import libvirt; libvirt.openReadOnly({hypervisor.uri!r})"]
    hypervisor.stop_libvirtd()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(ask, timeout=1)
    finally:
        hypervisor.cont_libvirtd()

    subprocess.run(ask, check=True, timeout=20)


def test_a_killed_qemu_is_seen_at_once(hypervisor: Hypervisor, compute: Compute, listener: EventListener) -> None:
    """It would be a zombie for a while if nobody reaped it."""
    instance = compute.spawn()
    compute.wait_for(instance)

    os.kill(hypervisor.qemu_pid(instance.uuid), signal.SIGKILL)

    assert codes(listener, instance, 4)[3:] == [(5, 5)]
    started_s = time.monotonic()
    compute.terminate(compute.spawn())
    assert time.monotonic() - started_s < 5


def test_an_end_leaves_nothing_even_with_everything_running(workspace: Workspace) -> None:
    hypervisor = Hypervisor()
    with hypervisor:
        compute = Compute(hypervisor.uri, workspace.folder("instances"))
        compute.wait_for(compute.spawn())
        running = hypervisor.processes()
        assert any("qemu-system" in command for command in running.values())
        hypervisor.stop_libvirtd()

    assert not hypervisor.root.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)
    assert [mount.mount_point for mount in mounts_below(workspace.root)] == [workspace.mounts]


KILLED_RUN = """
import sys, time
from tests.lab.filesystem import loop_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute
with Hypervisor() as hypervisor, loop_filesystem() as filesystem:
    compute = Compute(hypervisor.uri, filesystem.mount_point)
    compute.wait_for(compute.spawn())
    print(filesystem.image_path, *hypervisor.processes(), flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_process_and_the_next_one_sweeps(hypervisor: Hypervisor) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED_RUN], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        image, *pids = run.stdout.readline().split()
        run.kill()
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in pids))
    root = Path(image).parents[1]
    assert root.parent == PARENT
    assert Path(image) in loop_devices().values()

    subprocess.run(
        [sys.executable, "-c", "from tests.lab.workspace import workspace\nwith workspace(): pass"], check=True
    )

    assert not root.exists()
    wait_until(lambda: Path(image) not in loop_devices().values())
    assert hypervisor.libvirtd_pid is not None


def test_a_storm_of_cycles_is_heard_in_full(hypervisor: Hypervisor, instances_path: Path) -> None:
    """The test driver in the same libvirtd: 400 events over the socket, none lost or swapped."""
    image = Image()
    with EventListener(hypervisor.test_uri) as listener, Compute(hypervisor.test_uri, instances_path) as compute:
        uuids = [compute.cycle(image=image).uuid for _ in range(100)]
        listener.wait_for(400)

        for uuid in uuids:
            seen = [(event.event, event.detail) for event in listener.events(uuid=uuid)]
            assert seen == [DEFINED, STARTED, DESTROYED, UNDEFINED]


# filesystems


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_deleted_disk_is_still_on_the_raw_device(hypervisor: Hypervisor, kind: Literal["ext4", "xfs"]) -> None:
    """What the scrub must prevent, and the scanner must be able to see."""
    with loop_filesystem(kind) as filesystem:
        with Compute(hypervisor.uri, filesystem.mount_point) as compute:
            instance = compute.spawn()
            compute.wait_for(instance)
            compute.terminate(instance)
        mark = instance.image.marker
        assert scan_for(filesystem.mount_point, [mark]) == {mark: []}
        filesystem.unmount()
        assert len(scan_for(filesystem.image_path, [mark])[mark]) >= 1000

    assert filesystem.image_path not in loop_devices().values(), "the running hypervisor pins it"
    assert not filesystem.image_path.exists()


def test_a_guest_runs_on_tmpfs(hypervisor: Hypervisor) -> None:
    with tmpfs() as folder, Compute(hypervisor.uri, folder) as compute:
        instance = compute.spawn()
        compute.wait_for(instance)
        compute.stop(instance)
        assert_guest_data(instance.disk, "qcow2", instance.image)


@needs_root
def test_a_bind_mount_of_the_same_filesystem_refuses_links(workspace: Workspace, instances_path: Path) -> None:
    there = workspace.mount_point("bind")
    (instances_path / "disk").touch()
    with bind_mount(instances_path, there), pytest.raises(OSError, match="cross-device") as refused:
        os.link(there / "disk", instances_path / "claim")

    assert refused.value.errno == errno.EXDEV
    there.rmdir()


def test_the_scanner_finds_needles_wherever_they_lie(tmp_path: Path) -> None:
    """Across its own chunks, beside and into holes, overlapping, at both ends."""
    needle, tail_in_hole = b"needle", b"end\0\0\0"
    file = tmp_path / "sparse"
    places = [0, (4 << 20) - 3, (8 << 20) - 5, (12 << 20) - 1, 20 << 20, (32 << 20) - 6]
    with file.open("wb") as sparse:
        sparse.truncate(32 << 20)
        sparse.write(b"x" * (13 << 20))
        for place in places:
            sparse.seek(place)
            sparse.write(needle)
        sparse.seek((24 << 20) + 4093)
        sparse.write(b"end")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/aaaa").write_bytes(b"aaaa")
    (tmp_path / "link").symlink_to(file)

    assert scan_for(file, [needle, tail_in_hole]) == {needle: places, tail_in_hole: [(24 << 20) + 4093]}
    assert scan_tree(tmp_path, [b"aa", needle]) == {
        tmp_path / "folder/aaaa": {b"aa": [0, 1, 2], needle: []},
        file: {b"aa": [], needle: places},
    }
    with pytest.raises(ValueError, match="not zero"):
        scan_for(file, [bytes(8)])


@needs_root
def test_the_leftover_check_sees_processes_mounts_and_loop_devices() -> None:
    token = os.environ["AUTOBACKUP_LAB_SESSION"]
    with (
        loop_filesystem() as filesystem,
        subprocess.Popen(["sleep", "600"]) as sleeper,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(sleeper.kill)
        wait_until(lambda: Path(f"/proc/{sleeper.pid}/environ").read_bytes())  # empty while it execs
        left = "\n".join(find_leftovers(token, [filesystem.mount_point, filesystem.image_path], grace_s=0))

    assert f"process {sleeper.pid}: sleep 600" in left
    assert f"mount {filesystem.mount_point} (ext4" in left
    assert f"on {filesystem.image_path}" in left


def assert_guest_data(disk: Path, disk_format: Format, image: Image) -> None:
    """Every byte that the guest of *image* wrote is there, and so is what its base holds."""
    with guest_view(disk, disk_format) as view:
        assert view.size_bytes == image.virtual_bytes
        for offset, data in image.expected_regions():
            assert view.read(offset, len(data)) == data, f"at {offset}"


def beats(instance: Instance) -> int:
    sector = guest_view_read(instance.disk, "qcow2", guest.HEARTBEAT_OFFSET, guest.SECTOR_BYTES)
    return guest.heartbeat(sector, instance.image.seed)


def link(instance: Instance) -> Path:
    """A hard link beside the instance's folder, as a claim is one."""
    claim = instance.folder.with_name(f".claim-{instance.disk.stat().st_ino}")
    os.link(instance.disk, claim, follow_symlinks=False)
    return claim


def watch(compute: Compute, claim: Path) -> list[tuple[Step, int]]:
    seen: list[tuple[Step, int]] = []
    compute.on_step = lambda step, _instance: seen.append((step, claim.stat().st_nlink))
    return seen


def codes(listener: EventListener, instance: Instance, count: int) -> list[tuple[int, int]]:
    """The first *count* events of the instance; more than that is an error."""
    events = listener.wait_for(count, uuid=instance.uuid)
    return [(event.event, event.detail) for event in events]


def wait_until(condition: Any, *, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)
