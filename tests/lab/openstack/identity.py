"""
Who there is in the cloud, and who may do what where.

`provision` makes them over Keystone's API, once, for the seed, with placeholders for what
every cloud has of its own; `personalise` fills these in, in the database of a Keystone that
does not run yet: over the API it would take a second of every start.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.lab.openstack.rest import Answer, request
from tests.lab.openstack.services import CloudError

REGION: Final = "RegionOne"
DOMAIN: Final = "default"
ADMIN: Final = "admin"

INSPECTOR: Final = "autobackup_inspector"
"""Role and, with this role alone, user: packaging/openstack/nova-policy.yaml says what it may see in Nova."""

ROLES: Final = (
    *("autobackup", "creator", "observer", "audit", "key-manager:service-admin", "autobackup-restore"),
    INSPECTOR,
)
PROJECTS: Final = ("service", "tenant-a", "tenant-b", "vault", "no-consent", "elsewhere", "images")
"""`images` owns the public ones that others boot from."""

_AGENT: Final = ("member", "creator", "autobackup")  # old Barbican policies ask for creator, new ones for member
USERS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "glance": {"service": ("admin", "service")},
    "barbican": {"service": ("admin", "service")},
    "nova": {"service": ("admin", "service")},
    "autobackup": {
        "service": ("service", "member"),
        **dict.fromkeys(("tenant-a", "tenant-b", "vault", "images"), _AGENT),
    },
    "alice": {"tenant-a": ("member",)},
    "bob": {"tenant-b": ("member",)},
    "carol": {"tenant-a": ("reader",)},
    "erin": {"tenant-a": ("member", "autobackup-restore")},
    INSPECTOR: {"service": (INSPECTOR,)},
    "ivy": {"images": ("member",)},
    "legacy": {"tenant-a": ("creator",)},  # Barbican's old role alone
    "mallory": {"elsewhere": ("member",)},
    "rita": {"tenant-a": ("reader",)},  # to be named as a reader of keys
    "rory": {"tenant-a": ("autobackup-restore",), "vault": ("autobackup-restore",)},  # and no other
    "vera": {"vault": ("member",)},
}
"""user -> project -> roles. In `no-consent` nobody has one."""

HOMELESS: Final = "autobackup"
"""Has no default project: what it gets without naming one is an unscoped token, without a catalogue."""

_SERVICES: Final = {"keystone": ("identity", "/v3"), "barbican": ("key-manager", ""), "glance": ("image", "")}
_PASSWORD_ROUNDS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """name -> id"""

    roles: Mapping[str, str]
    projects: Mapping[str, str]
    users: Mapping[str, str]


def placeholder(app: str) -> str:
    return f"http://{app}.placeholder"


def new_passwords() -> dict[str, str]:
    return {user: secrets.token_urlsafe(18) for user in (ADMIN, *USERS)}


def authenticate(keystone_url: str, *, user: str, password: str, project: str) -> Answer:
    """Keystone's answer; the token is its header X-Subject-Token. No *project*: whatever Keystone then gives."""
    domain = {"id": DOMAIN}
    identity = {"methods": ["password"], "password": {"user": {"name": user, "domain": domain, "password": password}}}
    auth: dict[str, Any] = {"identity": identity}
    if project:
        auth["scope"] = {"project": {"name": project, "domain": domain}}
    return request("POST", f"{keystone_url}/v3/auth/tokens", json={"auth": auth})


def provision(keystone_url: str, *, admin_password: str) -> Ids:
    """Fill a Keystone that has been bootstrapped."""
    answer = authenticate(keystone_url, user=ADMIN, password=admin_password, project=ADMIN)
    keystone = _Keystone(url=f"{keystone_url}/v3", token=answer.headers["X-Subject-Token"])
    for role in ROLES:
        keystone.create("role", name=role)
    for project in PROJECTS:
        keystone.create("project", name=project, domain_id=DOMAIN)
    ids = {kind: keystone.ids(f"{kind}s") for kind in ("role", "project")}
    for user, grants in USERS.items():
        home = {} if user == HOMELESS else {"default_project_id": ids["project"][next(iter(grants))]}
        user_id = keystone.create("user", name=user, domain_id=DOMAIN, **home)
        for project, roles in grants.items():
            for role in roles:
                keystone.ask("PUT", grant_path(ids["project"][project], user_id, ids["role"][role]))
    for app, (kind, path) in _SERVICES.items():
        service_id = keystone.create("service", name=app, type=kind)
        for interface in ("public", "internal", "admin"):
            keystone.create(
                "endpoint",
                interface=interface,
                service_id=service_id,
                region_id=REGION,
                url=placeholder(app) + path,
            )
    return Ids(roles=ids["role"], projects=ids["project"], users=keystone.ids("users"))


def grant_path(project_id: str, user_id: str, role_id: str) -> str:
    return f"/projects/{project_id}/users/{user_id}/roles/{role_id}"


def personalise(database: Path, *, urls: Mapping[str, str], passwords: Mapping[str, str]) -> None:
    """Put real URLs and passwords where the seed has placeholders and none."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for app, url in urls.items():
            connection.execute("UPDATE endpoint SET url = replace(url, ?, ?)", (placeholder(app), url))
        for user, password in passwords.items():
            (local_id,) = connection.execute("SELECT id FROM local_user WHERE name = ?", (user,)).fetchone()
            connection.execute("DELETE FROM password WHERE local_user_id = ?", (local_id,))
            connection.execute(
                "INSERT INTO password (local_user_id, self_service, password_hash, created_at, created_at_int)"
                " VALUES (?, 0, ?, datetime('now'), ?)",
                (local_id, _password_hash(password), time.time_ns() // 1000),
            )


def clouds(keystone_url: str, *, passwords: Mapping[str, str]) -> dict[str, Any]:
    """What a clouds.yaml says: an entry for each user, and one for each project where it has a role."""
    entries = {}
    for user, grants in {ADMIN: {ADMIN: ()}, **USERS}.items():
        for name, project in ((user, "" if user == HOMELESS else next(iter(grants))), *_by_project(user, grants)):
            auth = {
                "auth_url": f"{keystone_url}/v3",
                "username": user,
                "password": passwords[user],
                "user_domain_id": DOMAIN,
                "project_domain_id": DOMAIN,  # without a project too: `connect_as_project` takes it from here
            }
            if project:
                auth["project_name"] = project
            entries[name] = {"auth": auth, "region_name": REGION, "identity_api_version": 3}
    return {"clouds": entries}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keystone:
    url: str
    token: str

    def create(self, kind: str, **fields: str) -> str:
        made: str = self.ask("POST", f"/{kind}s", {kind: fields}).json()[kind]["id"]
        return made

    def ids(self, collection: str) -> dict[str, str]:
        return {one["name"]: one["id"] for one in self.ask("GET", f"/{collection}").json()[collection]}

    def ask(self, method: str, path: str, json: object = None) -> Answer:
        answer = request(method, self.url + path, headers={"X-Auth-Token": self.token}, json=json)
        if answer.status >= 300:
            raise CloudError(f"{method} {path}: {answer}")
        return answer


def _password_hash(password: str) -> str:
    """One of the formats that Keystone checks, and the only one that the standard library can make."""
    salt = os.urandom(16)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _PASSWORD_ROUNDS)
    encoded = [base64.b64encode(part).rstrip(b"=").decode() for part in (salt, digest)]
    return f"$pbkdf2-sha512${_PASSWORD_ROUNDS}${encoded[0]}${encoded[1]}"


def _by_project(user: str, grants: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(f"{user}@{project}", project) for project in grants]
