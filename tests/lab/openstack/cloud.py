"""
A private cloud: Keystone, Barbican and Glance as they are released, below one folder, on free ports.

    with Cloud() as cloud:
        cloud.call("alice", "tenant-a", "GET", f"{cloud.glance_url}/v2/images").json()

Several may run at once. What it starts ends with it, and with the process that started it
even if that is killed (`keeper.py`). Who is in it says `identity.py`.
"""

import contextlib
import itertools
import json as json_module
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.lab.openstack import identity
from tests.lab.openstack.config import APPS, GLANCE_POLICY, PROPERTY_PROTECTIONS, Site, glance_program, use_policy
from tests.lab.openstack.rest import Answer, request
from tests.lab.openstack.seed import plant
from tests.lab.openstack.services import (
    CloudError,
    Listener,
    Program,
    Service,
    missing_services,
    stop_all,
    tail,
)
from tests.lab.workspace import workspace

__all__ = ["Answer", "Cloud", "CloudError", "missing_services"]

_HEALTH: Final = {"keystone": "/v3", "barbican": "/healthcheck", "glance": "/healthcheck"}


class Cloud:
    """
    Use it as a context manager. With a *folder* of yours, its files stay there for you to look at.

    *socket_timeout_s* is how long Glance's uWSGI bears a silent client. *guards_parents*: Glance has the policy and
    the property protections of packaging/openstack. Threads may share a cloud.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        socket_timeout_s: int = 10,
        glance_worker_count: int = 2,
        guards_parents: bool = False,
    ) -> None:
        self._given_folder = folder
        self._socket_timeout_s = socket_timeout_s
        self._glance_worker_count = glance_worker_count
        self._guards_parents = guards_parents
        self._resources = contextlib.ExitStack()
        self._services: dict[str, Service] = {}
        self._tokens: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._counter = itertools.count(2)
        self._passwords = identity.new_passwords()
        self.keystone_url = self.barbican_url = self.glance_url = ""
        """Without a path: /v3, /v1 and /v2 are yours to add."""

    def __enter__(self) -> Self:
        if missing := missing_services():
            raise CloudError(missing)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it all. A second call does nothing."""
        self._resources.close()

    # ---- where things are ---------------------------------------------------------------------------------

    @property
    def projects(self) -> Mapping[str, str]:
        """name -> id"""
        return self._ids.projects

    @property
    def users(self) -> Mapping[str, str]:
        """name -> id"""
        return self._ids.users

    @property
    def site(self) -> Site:
        """For a service beside these three (`compute/nova.py`)."""
        return self._site

    @property
    def folder(self) -> Path:
        return self._site.folder

    @property
    def logs(self) -> Path:
        return self._site.logs

    @property
    def clouds_file(self) -> Path:
        return self.folder / "clouds.yaml"

    def log_tail(self, *names: str) -> str:
        """The last words of the services; of all of them if none is named."""
        return tail(*[log for log in sorted(self.logs.glob("*.log")) if not names or log.stem in names])

    def image_files(self) -> list[Path]:
        """Whatever lies in Glance's file store."""
        return sorted(path for path in self._site.images.rglob("*") if path.is_file())

    def image_file(self, image_id: str) -> Path:
        return self._site.images / image_id

    def policy_file(self, service: str) -> Path:
        """Of `keystone`, `barbican` or `glance`: it is read anew when it changes."""
        return self.folder / service / "policy.yaml"

    def clouds_with(self, folder: Path, *, image: str = "", key_manager: str = "", auth: str = "") -> Path:
        """
        Write a clouds.yaml that leads elsewhere: through a proxy, or to a second service.

        URLs as the attributes above have them. Keystone's catalogue still names the first services.
        """
        told = json_module.loads(self.clouds_file.read_text())
        for entry in told["clouds"].values():
            if image:
                entry["image_endpoint_override"] = image
            if key_manager:
                entry["key_manager_endpoint_override"] = key_manager
            if auth:
                entry["auth"]["auth_url"] = auth.removesuffix("/v3") + "/v3"
        return _write_secret(folder / "clouds.yaml", told)

    # ---- as a user ----------------------------------------------------------------------------------------

    def authenticate(self, user: str, project: str, *, keystone_url: str = "") -> Answer:
        """Keystone's own answer, refusals too; the token is its header X-Subject-Token."""
        return identity.authenticate(
            (keystone_url or self.keystone_url).removesuffix("/v3"),
            user=user,
            password=self._passwords[user],
            project=project,
        )

    def token(self, user: str, project: str) -> str:
        """A token that worked when it was last used."""
        with self._lock:
            known = self._tokens.get((user, project))
        if known is not None:
            return known
        answer = self.authenticate(user, project)
        if answer.status != 201:
            raise CloudError(f"no token for {user} in {project}: {answer}")
        with self._lock:
            return self._tokens.setdefault((user, project), answer.headers["X-Subject-Token"])

    def call(
        self,
        user: str,
        project: str,
        method: str,
        url: str,
        *,
        json: object = None,
        data: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """
        Ask as *user* in *project*; the answer, whatever its status. `CloudError` if the user has no role there.

        A 401 is tried once more with a new token, unless *data* is an iterator, which is spent by then.
        With an X-Auth-Token among the *headers* that one is used, and never another.
        """
        if "X-Auth-Token" in (headers or {}):
            return request(method, url, headers=headers, json=json, data=data)
        token = self.token(user, project)
        answer = request(method, url, headers={"X-Auth-Token": token, **(headers or {})}, json=json, data=data)
        if answer.status != 401:
            return answer
        with self._lock:
            if self._tokens.get((user, project)) == token:
                del self._tokens[user, project]
        if data is not None and not isinstance(data, bytes):
            return answer
        token = self.token(user, project)
        return request(method, url, headers={"X-Auth-Token": token, **(headers or {})}, json=json, data=data)

    def grant(self, user: str, project: str, role: str) -> None:
        self._assign("PUT", user, project, role)

    def revoke(self, user: str, project: str, role: str) -> None:
        """Tokens that have the role end with it, at once."""
        self._assign("DELETE", user, project, role)

    # ---- trouble ------------------------------------------------------------------------------------------

    def glance_workers(self) -> list[int]:
        """Process ids. Killed ones are replaced by their master, under new ids."""
        return self._services["glance"].workers

    @contextlib.contextmanager
    def paused(self, service: str) -> Iterator[None]:
        """`keystone`, `barbican` or `glance` accepts connections and does not answer."""
        with self._services[service].paused():
            yield

    @contextlib.contextmanager
    def glance_with(self, *, policy: Path | None = None, **default_section: str) -> Iterator[str]:
        """A second Glance on the same database and file store with other [DEFAULT] options, or a policy; its URL."""
        name = f"glance-{next(self._counter)}"
        listener = Listener()
        config = self._site.glance(name=name, url=listener.url, policy=policy, default=default_section)
        program = glance_program(config, process_count=1, socket_timeout_s=self._socket_timeout_s)
        with self._second(name, program=program, listener=listener, health=_HEALTH["glance"]):
            yield listener.url

    @contextlib.contextmanager
    def keystone_with(self, *, token_lifetime_s: int) -> Iterator[str]:
        """
        A second Keystone on the same database and keys; its URL, with /v3. Every service takes its tokens.

        Fernet tokens expire on a whole second: one may live up to a second less.
        """
        name = f"keystone-{next(self._counter)}"
        listener = Listener()
        config = self._site.keystone(name=name, url=listener.url, token_lifetime_s=token_lifetime_s, cached=False)
        program = self._site.keystone_program(config)
        with self._second(name, program=program, listener=listener, health=_HEALTH["keystone"]):
            yield f"{listener.url}/v3"

    # ---- its life -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        folder = self._given_folder
        if folder is None:
            folder = self._resources.enter_context(workspace()).folder("cloud")
            self._resources.callback(shutil.rmtree, folder)
        listeners = {app: self._resources.enter_context(_listening()) for app in APPS}
        self.keystone_url, self.barbican_url, self.glance_url = (listeners[app].url for app in APPS)
        self._site = Site(folder=folder, keystone_url=self.keystone_url, service_passwords=self._passwords)
        self._site.make_folders()
        self._site.make_keys()
        programs = {
            "keystone": self._site.keystone_program(self._site.keystone(url=self.keystone_url)),
            "barbican": self._barbican(),
            "glance": self._glance(),
        }
        self._ids = plant(self._site)
        urls = {app: listener.url for app, listener in listeners.items()}
        identity.personalise(self._site.database("keystone"), urls=urls, passwords=self._passwords)
        _write_secret(self.clouds_file, identity.clouds(self.keystone_url, passwords=self._passwords))
        self._resources.callback(lambda: stop_all(list(self._services.values())))
        for app in APPS:
            self._services[app] = Service(app, program=programs[app], listener=listeners[app], logs=self.logs)
        for app in APPS:  # they start beside each other; on two cores in 3 s
            self._services[app].wait_until_ready(_HEALTH[app])

    def _barbican(self) -> Program:
        self._site.barbican(url=self.barbican_url)
        return self._site.barbican_program()

    def _glance(self) -> Program:
        options = {}
        if self._guards_parents:
            use_policy(self.policy_file("glance"), GLANCE_POLICY.read_text())
            options["property_protection_file"] = str(PROPERTY_PROTECTIONS)
        return glance_program(
            self._site.glance(url=self.glance_url, default=options),
            process_count=self._glance_worker_count,
            socket_timeout_s=self._socket_timeout_s,
        )

    def _assign(self, method: str, user: str, project: str, role: str) -> None:
        path = identity.grant_path(self.projects[project], self.users[user], self._ids.roles[role])
        answer = self.call(identity.ADMIN, identity.ADMIN, method, f"{self.keystone_url}/v3{path}")
        if answer.status != 204:
            raise CloudError(f"{method} {role} of {user} in {project}: {answer}")

    @contextlib.contextmanager
    def _second(self, name: str, *, program: Program, listener: Listener, health: str) -> Iterator[None]:
        service = Service(name, program=program, listener=listener, logs=self.logs)
        try:
            service.wait_until_ready(health)
            yield
        finally:
            service.stop()


@contextlib.contextmanager
def _listening() -> Iterator[Listener]:
    listener = Listener()
    with contextlib.closing(listener.socket):
        yield listener


def _write_secret(path: Path, told: Mapping[str, Any]) -> Path:
    """As JSON, which is YAML."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json_module.dump(told, file, indent=1)
    return path
