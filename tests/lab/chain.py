"""Parents as people publish them, and what a receipt says of how they are kept. Nova's part is `instances`."""

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from tests.lab import guest
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.images import User
from tests.lab.openstack.parents import parent_image
from tests.lab.server import Image

VENDOR: Final = ("ivy", "images")
_ISO_BLOCK_BYTES: Final = 2048


def publish(
    cloud: Cloud,
    *,
    user: User = VENDOR,
    visibility: str = "public",
    disk_format: Literal["qcow2", "raw", "iso"] = "qcow2",
) -> Image:
    """An image as a vendor makes it, and what Nova will boot of it: a qcow2 is compressed, Nova's base of it is raw."""
    seed = guest.new_seed()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        raw, packed = Path(folder, "image.raw"), Path(folder, "image.qcow2")
        guest.build_base(raw, seed=seed)
        disguise(raw, disk_format)
        pack(raw, packed)
        data = packed if disk_format == "qcow2" else raw
        return Image(id=parent_image(cloud, *user, data, disk_format=disk_format, visibility=visibility), seed=seed)


def disguise(raw: Path, disk_format: str) -> None:
    """Change a guest's image, or the base of it, so that Glance takes it for what it is said to be."""
    with raw.open("r+b") as file:
        if disk_format == "raw":  # a boot sector without a partition is refused; so it is none, and does not boot
            file.seek(510)
            file.write(bytes(2))
        if disk_format == "iso":  # a volume descriptor behind the boot sector, as hybrid ones have it
            blocks = raw.stat().st_size // _ISO_BLOCK_BYTES
            file.seek(16 * _ISO_BLOCK_BYTES)
            file.write(b"\1CD001\1".ljust(80, b"\0") + blocks.to_bytes(4, "little") + blocks.to_bytes(4, "big"))
            file.seek(16 * _ISO_BLOCK_BYTES + 128)
            file.write(_ISO_BLOCK_BYTES.to_bytes(2, "little") + _ISO_BLOCK_BYTES.to_bytes(2, "big"))


def pack(raw: Path, packed: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(packed)], check=True)


def kept(receipt: Mapping[str, Any]) -> dict[str, list[str]]:
    """How what each copy stands on is kept, by destination."""
    return {copy["destination"]: [one["protection"] for one in copy["parents"]] for copy in receipt["copies"]}
