"""
Whether an image in Glance holds the bytes of a base: without that, a protected parent would prove nothing.

A raw image has them as they are, and Glance's own hash says so. Of a qcow2 image Nova made a raw base: then what a
guest would see of it is read, once for each host and image, and compared.
"""

import hashlib
from functools import partial
from typing import Final

from autobackup.cloud.glance import Glance, Image
from autobackup.errors import Damaged, Refused
from autobackup.flows.layers import PIECE_BYTES, ImageSource, content, open_layer
from autobackup.flows.workers import Workers
from autobackup.model import BaseRecord
from autobackup.qcow2.header import parse_header

_ZEROS: Final = memoryview(bytes(PIECE_BYTES))


async def yields(glance: Glance, image: Image, base: BaseRecord, workers: Workers) -> bool:
    """Whether *image* is *base*, byte for byte, or becomes it by the conversion that Nova makes."""
    if image.hash_value and image.hash_value == {"sha256": base.sha256, "sha512": base.sha512}.get(
        image.hash_algorithm or ""
    ):
        return True
    disk_format = image.properties.get("disk_format", "")
    source = ImageSource(glance, image.id, image.size_bytes or 0)
    try:
        if disk_format == "qcow2" and parse_header(await source.read(0, 4096)).backing_path is not None:
            return False
        layer = await open_layer(source, "qcow2" if disk_format == "qcow2" else "raw", workers)
        if layer.virtual_bytes != base.identity.size_bytes:
            return False
        digest = hashlib.sha256()
        async for piece in content(layer):
            await workers.heavy(partial(digest.update, _ZEROS[:piece] if isinstance(piece, int) else piece))
    except (Damaged, Refused):
        return False  # not a format that is read here: then it is copied
    return digest.hexdigest() == base.sha256
