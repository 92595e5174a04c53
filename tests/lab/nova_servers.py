"""
The servers of a fake Nova: what its database would hold of one, and the JSON that its API makes of it.

The forms are those of Nova 34.0.0's api/openstack/compute/views/servers.py at each microversion, to the key, and
compared with a real nova-api's answers at 2.68.
"""

import hashlib
import time
import uuid as uuid_module
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

HOST: Final = "compute-1"
PROJECT_ID: Final = "5c1d7e3a0a8f4f0e9b6e2d4c8a7b9f10"  # as in `domain_xml.Facts`
USER_ID: Final = "9e8d7c6b5a49483726150f1e2d3c4b5a"
SOFT_DELETED: Final = "soft-delete"

_STATUS: Final = {
    "active": "ACTIVE", "building": "BUILD", "stopped": "SHUTOFF", "resized": "VERIFY_RESIZE", "paused": "PAUSED",
    "suspended": "SUSPENDED", "rescued": "RESCUE", "error": "ERROR", "deleted": "DELETED",
    SOFT_DELETED: "SOFT_DELETED", "shelved": "SHELVED", "shelved_offloaded": "SHELVED_OFFLOADED",
}  # fmt: skip
_STATUS_BY_TASK: Final = {
    "reboot": "REBOOT", "reboot_pending": "REBOOT", "reboot_started": "REBOOT", "rebooting_hard": "HARD_REBOOT",
    "reboot_pending_hard": "HARD_REBOOT", "reboot_started_hard": "HARD_REBOOT", "rebuilding": "REBUILD",
    "rebuild_block_device_mapping": "REBUILD", "rebuild_spawning": "REBUILD", "migrating": "MIGRATING",
    "resize_prep": "RESIZE", "resize_migrating": "RESIZE", "resize_migrated": "RESIZE", "resize_finish": "RESIZE",
    "resize_reverting": "REVERT_RESIZE",
}  # fmt: skip
_PROGRESS: Final = frozenset({"ACTIVE", "BUILD", "REBUILD", "RESIZE", "VERIFY_RESIZE", "MIGRATING"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One row, and of which cell. *updated_at_s* is None for one that was never saved since it was made."""

    uuid: str = field(default_factory=lambda: str(uuid_module.uuid4()))
    name: str = "vm"
    project_id: str = PROJECT_ID
    user_id: str = USER_ID
    host: str | None = HOST
    vm_state: str = "active"
    task_state: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    flavor: str = "m1.nano"
    extra_specs: Mapping[str, str] = field(default_factory=dict)
    image: str = ""  # its id; empty: booted from a volume
    instance_name: str = "instance-00000001"
    created_at_s: float = field(default_factory=time.time)
    updated_at_s: float | None = field(default_factory=time.time)
    launched_at_s: float | None = field(default_factory=time.time)
    terminated_at_s: float | None = None
    is_deleted: bool = False
    cell: str = "cell1"
    queued_for_delete: bool = False  # of its mapping, which a cell that is down does not take along

    @property
    def power_state(self) -> int:
        """Running, shut down, or none."""
        return {"active": 1, "stopped": 4, "paused": 3, "suspended": 4, SOFT_DELETED: 4}.get(self.vm_state, 0)

    @property
    def status(self) -> str:
        if self.is_deleted:
            return "DELETED"
        known = _STATUS.get(self.vm_state, "UNKNOWN")
        if self.vm_state in ("active", "stopped", "resized", "paused", "error"):
            return _STATUS_BY_TASK.get(self.task_state or "", known)
        return known


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How one request sees servers: its microversion, its policy, its URLs."""

    version: tuple[int, int]
    url: str  # of the service, without a version in its path
    has_extended_attributes: bool = True
    has_extra_specs: bool = True
    has_host_status: bool = True
    is_list: bool = False

    def basic(self, server: Server) -> dict[str, Any]:
        return {"id": server.uuid, "name": server.name, "links": self._links(server)}

    def detailed(self, server: Server) -> dict[str, Any]:
        said: dict[str, Any] = {
            "accessIPv4": "",
            "accessIPv6": "",
            "addresses": {},
            "created": _iso(server.created_at_s),
            "flavor": self._flavor(server),
            "hostId": _host_id(server),
            "id": server.uuid,
            "image": self._image(server),
            "links": self._links(server),
            "metadata": dict(server.metadata),
            "name": server.name,
            "status": server.status,
            "tenant_id": server.project_id,
            "user_id": server.user_id,
            "updated": _iso(time.time() if server.updated_at_s is None else server.updated_at_s),
            "OS-DCF:diskConfig": "MANUAL",
        }
        if server.status in _PROGRESS:
            said["progress"] = 0
        said |= {
            "OS-EXT-AZ:availability_zone": "nova" if server.host else "",
            "config_drive": "",
            "key_name": None,
            "OS-SRV-USG:launched_at": _stamp(server.launched_at_s),
            "OS-SRV-USG:terminated_at": _stamp(server.terminated_at_s),
        }
        if self.has_extended_attributes:
            said |= self._extended(server)
        said |= {
            "OS-EXT-STS:task_state": server.task_state,
            "OS-EXT-STS:vm_state": server.vm_state,
            "OS-EXT-STS:power_state": server.power_state,
            "os-extended-volumes:volumes_attached": [],
        }
        return said | self._newer(server)

    def from_down_cell(self, server: Server) -> dict[str, Any]:
        """All that the API's own database has, from 2.69 on."""
        said: dict[str, Any] = {
            "id": server.uuid,
            "status": "UNKNOWN",
            "tenant_id": server.project_id,
            "created": _iso(server.created_at_s),
            "links": self._links(server),
        }
        if not self.is_list:
            said |= {
                "image": self._image(server),
                "flavor": self._flavor(server),
                "OS-EXT-AZ:availability_zone": "UNKNOWN",
                "OS-EXT-STS:power_state": 0,
                "user_id": server.user_id,
            }
            if self.version >= (2, 71):
                said["server_groups"] = []
        return said

    def _newer(self, server: Server) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self.version >= (2, 9):
            said["locked"] = False
        if self.version >= (2, 16) and self.has_host_status:
            said["host_status"] = "UP" if server.host else ""
        if self.version >= (2, 19):
            said["description"] = None
        if self.version >= (2, 26):
            said["tags"] = list(server.tags)
        if self.version >= (2, 63):
            said["trusted_image_certificates"] = None
        if self.version >= (2, 71) and not self.is_list:
            said["server_groups"] = []
        if self.version >= (2, 73):
            said["locked_reason"] = None
        if self.version >= (2, 90) and not self.has_extended_attributes:
            said["OS-EXT-SRV-ATTR:hostname"] = server.name
        if self.version >= (2, 96):
            said["pinned_availability_zone"] = None
        if self.version >= (2, 100):
            said["scheduler_hints"] = {}
        return said

    def _extended(self, server: Server) -> dict[str, Any]:
        said: dict[str, Any] = {
            "OS-EXT-SRV-ATTR:host": server.host,
            "OS-EXT-SRV-ATTR:instance_name": server.instance_name,
            "OS-EXT-SRV-ATTR:hypervisor_hostname": server.host,
        }
        if self.version >= (2, 3):
            said |= {
                "OS-EXT-SRV-ATTR:hostname": server.name,
                "OS-EXT-SRV-ATTR:kernel_id": None,
                "OS-EXT-SRV-ATTR:launch_index": 0,
                "OS-EXT-SRV-ATTR:ramdisk_id": None,
                "OS-EXT-SRV-ATTR:reservation_id": f"r-{server.uuid[:8]}",
                "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda",
                "OS-EXT-SRV-ATTR:user_data": None,
            }
        return said

    def _image(self, server: Server) -> Any:
        if not server.image:
            return ""
        image: dict[str, Any] = {
            "id": server.image,
            "links": [{"rel": "bookmark", "href": f"{self.url}/images/{server.image}"}],
        }
        if self.version >= (2, 98):
            image["properties"] = {}
        return image

    def _flavor(self, server: Server) -> dict[str, Any]:
        if self.version < (2, 47):
            return {"id": "1", "links": [{"rel": "bookmark", "href": f"{self.url}/flavors/1"}]}
        flavor = {"vcpus": 1, "ram": 64, "disk": 1, "ephemeral": 0, "swap": 0, "original_name": server.flavor}
        return flavor | ({"extra_specs": dict(server.extra_specs)} if self.has_extra_specs else {})

    def _links(self, server: Server) -> list[dict[str, str]]:
        return [
            {"rel": "self", "href": f"{self.url}/v2.1/servers/{server.uuid}"},
            {"rel": "bookmark", "href": f"{self.url}/servers/{server.uuid}"},
        ]


def _host_id(server: Server) -> str:
    if not server.host:
        return ""
    return hashlib.sha224((server.project_id + server.host).encode()).hexdigest()


def _iso(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


def _stamp(at_s: float | None) -> str | None:
    """Naive UTC, with microseconds and without a Z."""
    return None if at_s is None else datetime.fromtimestamp(at_s, UTC).replace(tzinfo=None).isoformat()
