"""One Glance, asked for images as any user; and what its policy is before anybody writes one."""

import functools
import json
import subprocess
from dataclasses import dataclass
from typing import Any, Final

from tests.lab.openstack.cloud import Answer, Cloud
from tests.lab.openstack.services import venv

PATCH: Final = {"Content-Type": "application/openstack-images-v2.1-json-patch"}

User = tuple[str, str]
"""Who, and in which project."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """One Glance, asked as any user."""

    cloud: Cloud
    url: str

    def ask(self, user: User, method: str, path: str = "", **more: Any) -> Answer:
        return self.cloud.call(*user, method, f"{self.url}/v2/images{path}", **more)

    def create(self, user: User, **properties: object) -> Answer:
        fields = {"name": "one", "disk_format": "raw", "container_format": "bare", "visibility": "private"}
        return self.ask(user, "POST", json={**fields, **properties})

    def created(self, user: User, **properties: object) -> str:
        answer = self.create(user, **properties)
        assert answer.status == 201, str(answer)
        image: str = answer.json()["id"]
        return image

    def change(self, user: User, image: str, op: str, key: str, value: object = "yes") -> Answer:
        change = {"op": op, "path": f"/{key}"} | ({} if op == "remove" else {"value": value})
        return self.ask(user, "PATCH", f"/{image}", json=[change], headers=PATCH)

    def delete(self, user: User, image: str) -> int:
        return self.ask(user, "DELETE", f"/{image}").status

    def properties(self, user: User, image: str) -> dict[str, str]:
        """Those that are no words of Glance's own: ours, and `color`."""
        answer = self.ask(user, "GET", f"/{image}")
        assert answer.status == 200, str(answer)
        return {key: value for key, value in answer.json().items() if key.startswith("autobackup") or key == "color"}


@functools.cache
def default_rules() -> dict[str, str]:
    """Glance's own rules for images."""
    script = "import json; from glance.policies.image import list_rules as all\n"
    script += "print(json.dumps({rule.name: rule.check_str for rule in all()}))"
    said = subprocess.run([venv() / "bin/python", "-c", script], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found
