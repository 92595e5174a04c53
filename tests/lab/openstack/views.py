"""
What users of the cloud can make of a backup: who sees image and key, and whether stock tools take it for a disk.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.openstack.cloud import Answer, Cloud

from autobackup.container.header import HEADER_BYTES, decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """An image in Glance and the secret that opens it."""

    cloud: Cloud
    image_id: str

    def image(self, user: str, project: str) -> Answer:
        return self.cloud.call(user, project, "GET", f"{self.cloud.glance_url}/v2/images/{self.image_id}")

    def data(self, user: str, project: str) -> Answer:
        return self.cloud.call(user, project, "GET", f"{self.cloud.glance_url}/v2/images/{self.image_id}/file")

    def key(self, user: str, project: str) -> Answer:
        url = f"{self.key_url}/payload"
        return self.cloud.call(user, project, "GET", url, headers={"Accept": "application/octet-stream"})

    @property
    def words(self) -> Mapping[str, str]:
        """The header's, of the key."""
        with self.cloud.image_file(self.image_id).open("rb") as file:
            return decode(file.read(HEADER_BYTES)).key

    @property
    def key_url(self) -> str:
        return f"{self.cloud.barbican_url}/v1/secrets/{self.words['secret']}"

    def is_opaque(self) -> bool:
        """Stock tools find neither a disk image nor compressed data nor a long text in it."""
        with tempfile.NamedTemporaryFile() as copy:
            copy.write(self.cloud.image_file(self.image_id).read_bytes())
            copy.flush()
            seen = json.loads(_run("qemu-img", "info", "--output=json", copy.name).stdout)
            is_disk = seen["format"] != "raw" or "backing-filename" in seen
            return not is_disk and _run("zstd", "-tq", copy.name).returncode != 0


def backups_in(cloud: Cloud, user: str, project: str, *, instance: str = "") -> list[dict[str, Any]]:
    """The images with our tag that *project* owns."""
    url = f"{cloud.glance_url}/v2/images?tag=autobackup&owner={cloud.projects[project]}"
    images: list[dict[str, Any]] = cloud.call(user, project, "GET", url).json()["images"]
    return [image for image in images if instance in ("", image.get("autobackup_instance"))]


def secrets_of(cloud: Cloud, project: str) -> list[str]:
    """Names of all secrets in *project*, as the agent sees them."""
    url = f"{cloud.barbican_url}/v1/secrets?limit=100"
    return [one["name"] for one in cloud.call("autobackup", project, "GET", url).json()["secrets"]]


def clouds_yaml(cloud: Cloud, folder: Path, **overrides: Mapping[str, str]) -> Path:
    """A clouds.yaml with further entries, each that of `autobackup` with other endpoints."""
    told = json.loads(cloud.clouds_file.read_text())
    for name, changes in overrides.items():
        told["clouds"][name] = {**told["clouds"]["autobackup"], **changes}
    path = folder / "clouds.yaml"
    path.touch(mode=0o600)
    path.write_text(json.dumps(told))
    return path


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
