"""Images that instances are booted from, in the project of whoever publishes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.lab.openstack.cloud import Cloud, CloudError
from tests.lab.openstack.identity import ADMIN
from tests.lab.openstack.images import PATCH

_OCTETS: Final = {"Content-Type": "application/octet-stream"}


def parent_image(
    cloud: Cloud,
    user: str,
    project: str,
    data: Path,
    *,
    disk_format: str = "qcow2",
    visibility: str = "private",
    properties: Mapping[str, str] | None = None,
) -> str:
    """An active image with the bytes of *data*; its id. Only the admin makes one public."""
    images = f"{cloud.glance_url}/v2/images"
    fields = {"name": data.name, "disk_format": disk_format, "container_format": "bare", **(properties or {})}
    made = cloud.call(user, project, "POST", images, json={**fields, "visibility": "private"})
    if made.status != 201:
        raise CloudError(f"a parent of {user} in {project}: {made}")
    image: str = made.json()["id"]
    sent = cloud.call(user, project, "PUT", f"{images}/{image}/file", data=data.read_bytes(), headers=_OCTETS)
    if sent.status != 204:
        raise CloudError(f"the data of parent {image}: {sent}")
    if visibility != "private":
        publish = [{"op": "replace", "path": "/visibility", "value": visibility}]
        answer = cloud.call(ADMIN, ADMIN, "PATCH", f"{images}/{image}", json=publish, headers=PATCH)
        if answer.status != 200:
            raise CloudError(f"parent {image} as {visibility}: {answer}")
    return image
