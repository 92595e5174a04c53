"""
Where one Nova is, and what it is told: `<cloud>/nova/` with nova.conf, its databases and policy.yaml.

As upstream has it but for paths and passwords, unless a comment says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab.openstack.config import Site, database_url, write
from tests.lab.openstack.services import Program, venv

CELLS: Final = ("cell1", "cell2")
DATABASES: Final = ("api", "cell0", *CELLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class NovaSite:
    """The files of one Nova, below *folder*."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "nova.conf"

    @property
    def policy(self) -> Path:
        return self.folder / "policy.yaml"

    def database(self, name: str) -> Path:
        return self.folder / f"{name}.db"

    def make(self) -> None:
        for name in ("instances", "lock"):
            (self.folder / name).mkdir(parents=True)
        self.policy.write_text("{}\n")

    def configure(self, site: Site, *, ports_url: str = "", default: Mapping[str, str] | None = None) -> None:
        token = site.authtoken("nova", service_type="compute")
        login = ("auth_type", "auth_url", "username", "password", "project_name", "user_domain_id", "project_domain_id")
        write(
            self.config,
            {
                "DEFAULT": {
                    "log_file": site.logs / "nova.log",
                    "host": "api",
                    "state_path": self.folder,
                    "instances_path": self.folder / "instances",
                    "transport_url": "fake://",  # nobody listens: what would be cast to a nova-compute is lost
                    **(default or {}),
                },
                "api_database": self._options("api"),
                "database": self._options("cell0"),
                "oslo_policy": {"policy_file": self.policy},
                "oslo_concurrency": {"lock_path": self.folder / "lock"},
                "keystone_authtoken": token,
                # Asked for the ports of every server shown, as the caller.
                "neutron": {
                    "endpoint_override": ports_url,
                    "http_retries": 0,
                    **{name: token[name] for name in login},
                },
            },
        )

    @property
    def program(self) -> Program:
        files = (venv() / "etc/nova/api-paste.ini", self.config)
        return Program(app="nova", environment={"OS_NOVA_CONFIG_FILES": ";".join(map(str, files))})

    def _options(self, name: str) -> dict[str, object]:
        return {"connection": database_url(self.database(name)), "sqlite_synchronous": "false"}


def missing_nova() -> str:
    """Why no `Nova` can be started here; empty if it can."""
    if (venv() / "bin/nova-manage").exists():
        return ""
    return f"no Nova in {venv()}: make build/openstack/.installed"
