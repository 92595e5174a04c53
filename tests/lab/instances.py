"""
Plays nova-compute: real domains on a real libvirtd, real files in a real instances folder.

Every operation does what Nova 26 to 34 do, in the order that was measured there, and tells
each step to `on_step`, where a test may look, wait, or kill something. It is synchronous,
as Nova's driver is; call it from a worker thread where an event loop runs.

With the URI of the test driver the same operations run without QEMU, for storms: the
domains are libvirt's mock, the files and their removal are real.
"""

import contextlib
import time
import uuid as uuid_module
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import libvirt
from tests.lab import guest
from tests.lab import instance_files as files
from tests.lab.domain_xml import DiskDevice, Driver, Facts, domain_xml, nova_metadata
from tests.lab.guest_view import guest_view_read, guest_view_sha256
from tests.lab.server import Disks, Image, Instance, Step

__all__ = ["Compute", "Disks", "Facts", "Image", "Instance", "Step", "guest_view_read", "guest_view_sha256"]

_CONSOLE_TIMEOUT_S: Final = 30.0
_PRESS_EVERY_S: Final = 1.0  # Nova: 10 s


class Compute:
    """
    nova-compute on one host. Use it as a context manager: its domains end with it.

    Connects anew after a libvirtd restart, as Nova does.
    """

    def __init__(
        self, uri: str, instances_path: Path, *, on_step: Callable[[Step, Instance], None] | None = None
    ) -> None:
        self.instances_path = instances_path
        self.on_step = on_step
        self._uri = uri
        self._connection: Any = None
        self._driver: Driver = "test" if uri.startswith("test") else "qemu"
        self._count = 0
        self._spawned: dict[str, Instance] = {}
        self._cache = "none" if files.has_direct_io(instances_path) else "writeback"
        self._make_overlay = files.copy_fresh_overlay if self._driver == "test" else guest.make_overlay

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connection(self) -> Any:
        """A read-write `libvirt.virConnect`, tried as Nova tries its own: isAlive() lies."""
        if self._connection is not None:
            try:
                self._connection.getLibVersion()
            except libvirt.libvirtError:
                self._connection = None
        if self._connection is None:
            self._connection = libvirt.open(self._uri)
        return self._connection

    def domain(self, instance: Instance) -> Any:
        return self.connection.lookupByUUIDString(instance.uuid)

    def base(self, image: Image) -> Path:
        """The image's file in `_base`, made at first use."""
        return files.make_base(self.instances_path, image)

    def spawn(
        self,
        *,
        name: str = "vm",
        image: Image | None = None,
        disks: Disks | None = None,
        facts: Facts | None = None,
        uuid: str | None = None,
        memory_mib: int = 64,
        nova_metadata: bool = True,
        until: Literal[Step.DISKS_MADE, Step.DEFINED, Step.STARTED] = Step.STARTED,
    ) -> Instance:
        """Boot a server. Returns when it runs, not when its guest has written: see `wait_for`."""
        image = image or Image()
        uuid = uuid or str(uuid_module.uuid4())
        instance = Instance(
            uuid=uuid,
            domain_name=self._next_domain_name(),
            folder=self.instances_path / uuid,
            image=image,
            disks=disks or Disks(),
            facts=replace(facts or Facts(), name=name),
            memory_mib=memory_mib,
            root_id=image.id,
            nova_metadata=nova_metadata,
        )
        return self._build(instance, until=until)

    def failed_spawn(
        self,
        *,
        after: Literal[Step.DISKS_MADE, Step.DEFINED, Step.STARTED] = Step.DISKS_MADE,
        uuid: str | None = None,
        image: Image | None = None,
    ) -> Instance:
        """A build that fails: by default before libvirt hears of it, so without any event."""
        instance = self.spawn(until=after, uuid=uuid, image=image)
        if after == Step.STARTED:
            self._destroy(instance)
        self._delete_files(instance)
        if after != Step.DISKS_MADE:
            self._undefine(instance)
        return instance

    def terminate(self, instance: Instance, *, leak_del: bool = False) -> None:
        """
        Delete the server: destroy, rename, rmtree, undefine. A resize is confirmed first.

        `leak_del`: the rmtree fails half-way, `<uuid>_del/disk` stays for ever; Nova
        undefines the domain all the same.
        """
        if instance.resize_folder.exists():
            self.confirm_resize(instance)
        self._destroy(instance)
        self._delete_files(instance, leak_del=leak_del)
        self._undefine(instance)

    def unlink_under_guest(self, instance: Instance) -> None:
        """`_run_pending_deletes` of a server whose guest nobody ended: the files go, the domain runs on."""
        self._delete_files(instance)

    def leave(self, instance: Instance) -> None:
        """
        The source of a block migration, for an agent that was not there to hear of it: no domain, then no files.

        Of a real one, libvirt says STOPPED/MIGRATED and no UNDEFINED; here it says DESTROYED and UNDEFINED.
        """
        self._destroy(instance)
        self._undefine(instance)
        self._delete_files(instance)

    def lose_domain(self, instance: Instance) -> None:
        """A hard reboot that fails half-way: undefined, and not defined again."""
        self._destroy(instance)
        self._undefine(instance)

    def cycle(self, *, image: Image) -> Instance:
        """The whole life of an instance as fast as it goes: spawn, then terminate."""
        instance = self.spawn(image=image)
        self.terminate(instance)
        return instance

    def stop(self, instance: Instance, *, timeout_s: float = 10.0) -> None:
        """Press the power button, again and again as Nova does; then destroy a guest that stays."""
        domain = self.domain(instance)
        if not domain.isActive():
            return
        pressed_at_s = 0.0  # a guest that has not yet booted misses the first one
        deadline_s = time.monotonic() + timeout_s
        with _gone_is_fine():
            while domain.isActive():
                now_s = time.monotonic()
                if now_s > deadline_s:
                    domain.destroy()
                elif now_s - pressed_at_s > _PRESS_EVERY_S:
                    domain.shutdown()
                    pressed_at_s = now_s
                time.sleep(0.02)
        self._tell(Step.STOPPED, instance)

    def start(self, instance: Instance) -> None:
        """Power on: to Nova that is a hard reboot, so the domain is undefined first."""
        self.hard_reboot(instance)

    def hard_reboot(self, instance: Instance) -> None:
        self._destroy(instance)
        self._undefine(instance)
        self._define(instance)
        self._create(instance)

    def soft_delete(self, instance: Instance) -> None:
        """Delete with reclaim_instance_interval set: off, everything kept. Reclaim is `terminate`."""
        self._destroy(instance)

    def restore(self, instance: Instance) -> None:
        """Undo a soft delete."""
        self.hard_reboot(instance)

    def rebuild(self, instance: Instance, *, image: Image | None = None) -> Instance:
        """To the host a delete, then a spawn of the same uuid: another inode."""
        self.stop(instance)
        self._delete_files(instance)
        self._undefine(instance)
        image = image or instance.image
        return self._build(replace(instance, image=image, root_id=image.id))

    def resize_same_host(self, instance: Instance) -> None:
        """Up to VERIFY_RESIZE: the old inode in `_resize`, a copy of it runs."""
        self.stop(instance)
        instance.folder.rename(instance.resize_folder)
        self._tell(Step.RENAMED, instance)
        instance.folder.mkdir()
        self._tell(Step.FOLDER_MADE, instance)
        files.copy_for_resize(instance)
        files.make_swap(instance, make_overlay=self._make_overlay)
        self._tell(Step.DISKS_MADE, instance)
        self._define(instance)
        self._create(instance)

    def confirm_resize(self, instance: Instance) -> None:
        """Unlinks the old inode, without any libvirt event."""
        files.remove_folder(instance.resize_folder)
        self._tell(Step.UNLINKED, instance)

    def revert_resize(self, instance: Instance) -> None:
        """The new inode is unlinked after the undefine; the old one comes back to its path."""
        self._destroy(instance)
        self._undefine(instance)
        files.remove_folder(instance.folder)
        self._tell(Step.UNLINKED, instance)
        instance.resize_folder.rename(instance.folder)
        self._tell(Step.RENAMED, instance)
        self._define(instance)
        self._create(instance)

    def resize_to_other_host(self, instance: Instance) -> None:
        """The source of a resize: off, its folder renamed; the domain stays defined, for a revert."""
        self.stop(instance)
        instance.folder.rename(instance.resize_folder)
        self._tell(Step.RENAMED, instance)

    def confirm_resize_to_other_host(self, instance: Instance) -> None:
        """Days later: files first, then the undefine, and no STOPPED."""
        self.confirm_resize(instance)
        self._undefine(instance)

    def shelve_offload(self, instance: Instance) -> None:
        """On this host the same as the delete of a stopped server."""
        self.stop(instance)
        self._delete_files(instance)
        self._undefine(instance)

    def unshelve(self, instance: Instance) -> Instance:
        """A new disk on the original base, while <nova:root> names the shelved snapshot."""
        return self._build(replace(instance, root_id=str(uuid_module.uuid4())))

    def live_snapshot(self, instance: Instance) -> None:
        """The domain is undefined while it runs, and defined again: the disk stays as it is."""
        domain = self.domain(instance)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        domain.undefine()
        self._tell(Step.UNDEFINED, instance)
        self.connection.defineXML(xml)
        self._tell(Step.DEFINED, instance)

    def rescue(self, instance: Instance) -> None:
        """Boots from `disk.rescue`, named first in the XML; the disk stays, second."""
        self.stop(instance)
        (instance.folder / "unrescue.xml").write_text(self.domain(instance).XMLDesc())
        rescue_disk = instance.folder / "disk.rescue"
        self._make_overlay(rescue_disk, self.base(instance.image))
        self._tell(Step.DISKS_MADE, instance)
        devices = [DiskDevice(path=rescue_disk, format="qcow2"), instance.devices[0]]
        self._define(instance, devices=devices)
        self._create(instance)

    def unrescue(self, instance: Instance) -> None:
        self._destroy(instance)
        self._define(instance)
        self._create(instance)
        (instance.folder / "disk.rescue").unlink()
        (instance.folder / "unrescue.xml").unlink()
        self._tell(Step.UNLINKED, instance)

    def wait_for(
        self, instance: Instance, text: bytes = guest.TEXT_WROTE, *, timeout_s: float = _CONSOLE_TIMEOUT_S
    ) -> None:
        """Return when the guest has said *text* since its last start."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                said = instance.console.read_bytes()
            except FileNotFoundError:
                said = b""
            if text in said:
                return
            if guest.TEXT_FAILED in said or time.monotonic() > deadline_s:
                raise RuntimeError(f"the guest of {instance.uuid} did not say {text!r}: {said!r}")
            time.sleep(0.01)

    def close(self) -> None:
        """End every domain of this object and disconnect. The files stay."""
        for instance in self._spawned.values():
            with contextlib.suppress(libvirt.libvirtError):
                domain = self.domain(instance)
                if domain.isActive():
                    domain.destroy()
                domain.undefine()
        self._spawned.clear()
        if self._connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None

    def _next_domain_name(self) -> str:
        self._count += 1
        return f"instance-{self._count:08x}"

    def _build(
        self, instance: Instance, *, until: Literal[Step.DISKS_MADE, Step.DEFINED, Step.STARTED] = Step.STARTED
    ) -> Instance:
        self._spawned[instance.uuid] = instance
        self.base(instance.image)
        instance.folder.mkdir()
        self._tell(Step.FOLDER_MADE, instance)
        files.make_disks(instance, make_overlay=self._make_overlay)
        self._tell(Step.DISKS_MADE, instance)
        if until != Step.DISKS_MADE:
            self._define(instance)
            files.make_config_drive(instance)  # Nova makes it 160 ms after the define
        if until == Step.STARTED:
            self._create(instance)
        return instance

    def _define(self, instance: Instance, *, devices: list[DiskDevice] | None = None) -> None:
        metadata = None
        if instance.nova_metadata:
            metadata = nova_metadata(instance.facts, memory_mib=instance.memory_mib, root_id=instance.root_id)
        xml = domain_xml(
            driver=self._driver,
            name=instance.domain_name,
            uuid=instance.uuid,
            memory_mib=instance.memory_mib,
            devices=devices or instance.devices,
            cache=self._cache,
            console=instance.console,
            metadata=metadata,
        )
        self.connection.defineXML(xml)
        self._tell(Step.DEFINED, instance)

    def _create(self, instance: Instance) -> None:
        self.domain(instance).create()
        self._tell(Step.STARTED, instance)

    def _destroy(self, instance: Instance) -> None:
        domain = self.domain(instance)
        if domain.isActive():
            with _gone_is_fine():
                domain.destroy()
            self._tell(Step.STOPPED, instance)

    def _undefine(self, instance: Instance) -> None:
        domain = self.domain(instance)
        try:
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise
            domain.undefine()  # Nova's fallback, and all the test driver knows
        self._tell(Step.UNDEFINED, instance)

    def _delete_files(self, instance: Instance, *, leak_del: bool = False) -> None:
        """nova.virt.libvirt.driver.delete_instance_files: rename, then rmtree."""
        instance.folder.rename(instance.del_folder)
        self._tell(Step.RENAMED, instance)
        files.remove_folder(instance.del_folder, but_the_disk=leak_del)
        if not leak_del:
            self._tell(Step.UNLINKED, instance)

    def _tell(self, step: Step, instance: Instance) -> None:
        if self.on_step is not None:
            self.on_step(step, instance)


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    """A domain may go off by itself between the question whether it runs and the order to end."""
    try:
        yield
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
