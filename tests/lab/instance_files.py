"""The files of an instances folder, made and unmade as Nova does. Knows nothing of libvirt."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.lab import guest
from tests.lab.server import Image, Instance

MakeOverlay = Callable[[Path, Path], None]

_BLANK_BYTES: Final = 1 << 20
_CONFIG_DRIVE: Final = hashlib.shake_256(b"config drive").digest(64 << 10)


def make_base(instances_path: Path, image: Image) -> Path:
    """The image in Nova's cache, `_base/<sha1 of the image id>`, raw; made at first use."""
    path = _base_folder(instances_path) / image.base_name
    if not path.exists():
        guest.build_base(path, virtual_bytes=image.virtual_bytes, seed=image.seed, mode=image.mode)
    return path


def make_disks(instance: Instance, *, make_overlay: MakeOverlay) -> None:
    """Everything but the config drive, into the instance's empty folder."""
    base = make_base(instance.folder.parent, instance.image)
    formats = {str(disk.path): disk.format for disk in instance.devices}
    (instance.folder / "disk.info").write_text(json.dumps(formats))
    if instance.disks.root_format == "qcow2":
        make_overlay(instance.disk, base)
    else:
        subprocess.run(["cp", "--sparse=always", str(base), str(instance.disk)], check=True)
    if instance.disks.ephemeral:
        make_overlay(instance.folder / "disk.eph0", _blank_base(instance, "ephemeral_1_40d1d2c"))
    make_swap(instance, make_overlay=make_overlay)


def make_swap(instance: Instance, *, make_overlay: MakeOverlay) -> None:
    if instance.disks.swap:
        make_overlay(instance.folder / "disk.swap", _blank_base(instance, "swap_1"))


def make_config_drive(instance: Instance) -> None:
    if instance.disks.config_drive:
        (instance.folder / "disk.config").write_bytes(_CONFIG_DRIVE)


def copy_for_resize(instance: Instance) -> None:
    """Nova's `cp -r` of every disk but swap, from `<uuid>_resize`: new inodes."""
    for name in ("disk", "disk.eph0", "disk.config", "disk.info"):
        source = instance.resize_folder / name
        if source.exists():
            subprocess.run(["cp", "-r", str(source), str(instance.folder)], check=True)


def remove_folder(folder: Path, *, but_the_disk: bool = False) -> None:
    """Nova's rmtree; or one that fails before it comes to the disk."""
    if but_the_disk:
        for path in folder.iterdir():
            if path.name != "disk":
                path.unlink()
    else:
        shutil.rmtree(folder)


def copy_fresh_overlay(path: Path, base: Path) -> None:
    """An overlay without the 25 ms of a qemu-img: for storms."""
    path.write_bytes(_fresh_overlay(base))


def has_direct_io(folder: Path) -> bool:
    """Nova's own test for cache=none: older tmpfs and some network filesystems refuse O_DIRECT."""
    probe = folder / ".directio.test"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _base_folder(instances_path: Path) -> Path:
    folder = instances_path / "_base"
    folder.mkdir(exist_ok=True)
    return folder


def _blank_base(instance: Instance, name: str) -> Path:
    path = _base_folder(instance.folder.parent) / name
    if not path.exists():
        with path.open("xb") as blank:
            blank.truncate(_BLANK_BYTES)
    return path


@functools.lru_cache(maxsize=256)
def _fresh_overlay(base: Path) -> bytes:
    """What qemu-img makes on *base*, once; *base* is a path that never comes again."""
    with tempfile.TemporaryDirectory(prefix="lab-overlay-") as folder:
        path = Path(folder, "disk")
        guest.make_overlay(path, base)
        return path.read_bytes()
