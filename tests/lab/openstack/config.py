"""
What the services are told: their configuration files and secrets, below one folder.

    <folder>/keystone/   keystone.conf  keystone.db  fernet/  credential/  policy.yaml
            /barbican/   home/.barbican/barbican.conf  barbican.db  policy.yaml
            /glance/     glance-api.conf  glance.db  images/  staging/  tasks/  policy.yaml
            /logs/

Everything that is not a path or a password is as upstream has it, unless a comment says why.
Policies are read anew when their file changes.
"""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab.openstack.services import ROOT, Program, venv

APPS: Final = ("keystone", "barbican", "glance")

GLANCE_POLICY: Final = ROOT / "packaging/openstack/glance-policy.yaml"
PROPERTY_PROTECTIONS: Final = ROOT / "packaging/openstack/glance-property-protections.conf"

Sections = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where one cloud is, and how its services log in to Keystone."""

    folder: Path
    keystone_url: str
    """Without /v3."""
    service_passwords: Mapping[str, str]

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def images(self) -> Path:
        return self.folder / "glance/images"

    def database(self, app: str) -> Path:
        return self.folder / app / f"{app}.db"

    def make_folders(self) -> None:
        for name in (
            *("logs", "keystone/fernet", "keystone/credential", "barbican/home/.barbican"),
            *("glance/images", "glance/staging", "glance/tasks", "glance/lock"),
        ):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        for app in APPS:
            (self.folder / app / "policy.yaml").write_text("{}\n")

    def make_keys(self) -> None:
        """What `keystone-manage fernet_setup` and `credential_setup` make, without their seconds of imports."""
        for number, kind in ((0, "fernet"), (1, "fernet"), (0, "credential"), (1, "credential")):
            (self.folder / "keystone" / kind / str(number)).write_text(_random_key())

    def keystone(self, *, name: str = "keystone", url: str, token_lifetime_s: int = 3600, cached: bool = True) -> Path:
        """
        Write `<name>.conf`, which may be for a second Keystone on the same database and keys.

        Without a cache a token costs 96 ms of CPU and a validation 150 ms; with one, 41 ms and some. It is in
        the process, so only one of the Keystones may have it, and that one must have one process.
        """
        home = self.folder / "keystone"
        keys = {"key_repository": home / "fernet"}
        return write(
            home / f"{name}.conf",
            {
                "DEFAULT": {"public_endpoint": url, "log_file": self.logs / f"{name}.log"},
                "database": self._database("keystone"),
                "token": {"expiration": token_lifetime_s},
                "fernet_tokens": keys,
                "fernet_receipts": keys,
                "credential": {"key_repository": home / "credential"},
                "identity": {"password_hash_rounds": 4},  # bcrypt's cheapest
                "oslo_policy": {"policy_file": home / "policy.yaml"},
                "cache": {"enabled": str(cached).lower(), "backend": "oslo_cache.dict"},
            },
        )

    def barbican(self, *, url: str = "") -> Path:
        home = self.folder / "barbican"
        return write(
            home / "home/.barbican/barbican.conf",
            {
                "DEFAULT": {"host_href": url, "log_file": self.logs / "barbican.log"},
                "database": {**self._database("barbican"), "db_auto_create": "false"},
                "oslo_policy": {"policy_file": home / "policy.yaml"},
                "secretstore": {"enabled_secretstore_plugins": "store_crypto"},
                "crypto": {"enabled_crypto_plugins": "simple_crypto"},
                "simple_crypto_plugin": {"kek": _random_key()},
                "queue": {"enable": "false"},
                "keystone_authtoken": self.authtoken("barbican", service_type="key-manager"),
            },
        )

    def glance(
        self,
        *,
        name: str = "glance",
        url: str = "",
        policy: Path | None = None,
        default: Mapping[str, str] | None = None,
    ) -> Path:
        """
        Write `<name>/glance-api.conf`, which may be for a second Glance on the same database and file store.

        Without a *policy* of its own it has the first one's.
        """
        home = self.folder / "glance"
        return write(
            self.folder / name / "glance-api.conf",
            {
                "DEFAULT": {
                    "log_file": self.logs / f"{name}.log",
                    "enabled_backends": "files:file",
                    "public_endpoint": url,
                    "use_keystone_limits": "false",
                    **(default or {}),
                },
                "database": self._database("glance"),
                "glance_store": {"default_backend": "files"},
                "files": {"filesystem_store_datadir": self.images},
                "os_glance_staging_store": {"filesystem_store_datadir": home / "staging"},
                "os_glance_tasks_store": {"filesystem_store_datadir": home / "tasks"},
                "oslo_policy": {"policy_file": policy or home / "policy.yaml"},
                "oslo_concurrency": {"lock_path": home / "lock"},
                "paste_deploy": {"flavor": "keystone", "config_file": venv() / "etc/glance/glance-api-paste.ini"},
                "keystone_authtoken": self.authtoken("glance", service_type="image"),
                # For the deletion of an image that names the secret it was encrypted with.
                "key_manager": {"backend": "barbican"},
                "barbican": {"auth_endpoint": f"{self.keystone_url}/v3"},
            },
        )

    def keystone_program(self, config: Path) -> Program:
        return Program(
            app="keystone",
            environment={"OS_KEYSTONE_CONFIG_DIR": str(config.parent), "OS_KEYSTONE_CONFIG_FILES": str(config)},
        )

    def barbican_program(self) -> Program:
        paste = venv() / "etc/barbican/barbican-api-paste.ini"
        return Program(app="barbican", environment={**self.barbican_home, "LAB_BARBICAN_PASTE": str(paste)})

    @property
    def barbican_home(self) -> Mapping[str, str]:
        """Barbican has no variable for its configuration; it looks into the home folder first."""
        return {"HOME": str(self.folder / "barbican/home")}

    def _database(self, app: str) -> Mapping[str, object]:
        return {"connection": database_url(self.database(app)), "sqlite_synchronous": "false"}

    def authtoken(self, user: str, *, service_type: str) -> Mapping[str, object]:
        return {
            "www_authenticate_uri": f"{self.keystone_url}/v3",
            "auth_url": f"{self.keystone_url}/v3",
            "auth_type": "password",
            "username": user,
            "password": self.service_passwords[user],
            "project_name": "service",
            "user_domain_id": "default",
            "project_domain_id": "default",
            "service_type": service_type,  # else an application credential with access rules gets 401 everywhere
            "service_token_roles": "service",
            "service_token_roles_required": "true",
            # Without memcached it caches in the process for 5 minutes: a revoked token or role would live on.
            "token_cache_time": -1,
        }


def glance_program(config: Path, *, process_count: int, socket_timeout_s: int) -> Program:
    return Program(
        app="glance",
        process_count=process_count,
        socket_timeout_s=socket_timeout_s,
        environment={"OS_GLANCE_CONFIG_DIR": str(config.parent)},
    )


def database_url(path: Path) -> str:
    return f"sqlite:///{path}?timeout=60"


def use_policy(path: Path, text: str) -> None:
    """From the next request on, of whichever service reads *path*."""
    new = path.with_suffix(".new")
    new.write_text(text)
    # It is read again when it is younger than what was read, and the clock of files ticks every 4 ms.
    if path.exists() and new.stat().st_mtime_ns < (latest_ns := path.stat().st_mtime_ns + 1_000_000):
        os.utime(new, ns=(latest_ns, latest_ns))
    new.rename(path)


def write(path: Path, sections: Sections) -> Path:
    path.parent.mkdir(exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        for section, options in sections.items():
            file.write(f"[{section}]\n" + "".join(f"{name} = {value}\n" for name, value in options.items()) + "\n")
    return path


def _random_key() -> str:
    return base64.urlsafe_b64encode(os.urandom(32)).decode()
