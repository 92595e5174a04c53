"""What the lab knows of one server: its image, its disks, where its files are."""

import hashlib
import uuid as uuid_module
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.lab import guest
from tests.lab.domain_xml import DiskDevice, Facts
from tests.lab.guest_view import Format


class Step(StrEnum):
    """What has just been done when `Compute.on_step` is called."""

    FOLDER_MADE = "folder made"
    DISKS_MADE = "disks made"
    DEFINED = "defined"
    STARTED = "started"
    STOPPED = "stopped"
    UNDEFINED = "undefined"
    RENAMED = "renamed"  # <uuid> to <uuid>_del or _resize, or back
    UNLINKED = "unlinked"  # the folder and every name in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A Glance image that Nova keeps as `_base/<sha1 of its id>`; what it boots, and how big."""

    id: str = field(default_factory=lambda: str(uuid_module.uuid4()))
    seed: bytes = field(default_factory=guest.new_seed)
    mode: guest.Mode = guest.Mode.HEARTBEAT
    virtual_bytes: int = guest.VIRTUAL_BYTES

    @property
    def base_name(self) -> str:
        return hashlib.sha1(self.id.encode(), usedforsecurity=False).hexdigest()

    @property
    def marker(self) -> bytes:
        return guest.marker(self.seed)

    def expected_regions(self) -> tuple[tuple[int, bytes], ...]:
        """What a guest of this image has on its disk: what it wrote, and what the base brought."""
        return (*guest.expected_regions(self.seed, virtual_bytes=self.virtual_bytes), *guest.base_regions())


@dataclass(frozen=True, slots=True, kw_only=True)
class Disks:
    """Which disks an instance has beside its root disk, and the root disk's format."""

    root_format: Format = "qcow2"
    ephemeral: bool = False
    swap: bool = False
    config_drive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One server on this host. A resize leaves it valid: its files change, not its names."""

    uuid: str
    domain_name: str
    folder: Path
    image: Image
    disks: Disks
    facts: Facts
    memory_mib: int
    root_id: str
    nova_metadata: bool

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    @property
    def del_folder(self) -> Path:
        return self.folder.with_name(f"{self.uuid}_del")

    @property
    def resize_folder(self) -> Path:
        return self.folder.with_name(f"{self.uuid}_resize")

    @property
    def devices(self) -> list[DiskDevice]:
        devices = [DiskDevice(path=self.disk, format=self.disks.root_format)]
        if self.disks.ephemeral:
            devices.append(DiskDevice(path=self.folder / "disk.eph0", format="qcow2"))
        if self.disks.swap:
            devices.append(DiskDevice(path=self.folder / "disk.swap", format="qcow2"))
        if self.disks.config_drive:
            devices.append(DiskDevice(path=self.folder / "disk.config", format="raw", device="cdrom"))
        return devices
