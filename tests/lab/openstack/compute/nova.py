"""
A real nova-api beside a private cloud, with servers that no nova-compute runs.

    with Cloud() as cloud, Nova(cloud) as nova:
        nova.put(uuid, project="tenant-a", user="alice", host="compute-1")
        nova.delete(uuid)
        nova.ask(f"{nova.DETAIL}&uuid={uuid}&deleted=True").json()["servers"]

The API, its policies, cells and databases are Nova's own, and Keystone says who asks. What
the hosts would save is saved by `rows.py`; Neutron is `ports.py`. There is no scheduler, no
placement and no message queue: creating, moving or deleting servers over the API fails or
is lost.
"""

import contextlib
import json as json_module
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.compute.config import NovaSite, missing_nova
from tests.lab.openstack.compute.ports import Ports
from tests.lab.openstack.compute.seed import plant
from tests.lab.openstack.config import use_policy
from tests.lab.openstack.identity import ADMIN, INSPECTOR, REGION
from tests.lab.openstack.rest import Answer
from tests.lab.openstack.services import CloudError, Listener, Service, environment, tail, venv

__all__ = ["Nova", "missing_nova"]

MICROVERSION: Final = "2.68"
"""From 2.69 on a living server whose cell is down may be answered with 404."""

_READY_PATH: Final = "/"
_ROWS_STOP_TIMEOUT_S: Final = 10.0


class Nova:
    """
    Use it as a context manager, on a cloud that outlives it; one at a time on each. It may have [DEFAULT] options.

    While it runs the cloud's catalogue has a `compute` endpoint. Threads may share it.
    """

    DETAIL: Final = "/v2.1/servers/detail?all_tenants=1"

    def __init__(self, cloud: Cloud, **default_section: str) -> None:
        self._cloud = cloud
        self._default_section = default_section
        self._site = NovaSite(folder=cloud.folder / "nova")
        self._resources = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._service: Service
        self._rows: _Rows
        self.url = ""
        """Without a path: /v2.1 is yours to add."""

    def __enter__(self) -> Self:
        if missing := missing_nova():
            raise CloudError(missing)
        try:
            self._start()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    # ---- as a user ----------------------------------------------------------------------------------------

    def ask(
        self,
        path: str,
        *,
        user: str = INSPECTOR,
        project: str = "service",
        method: str = "GET",
        json: object = None,
        microversion: str = MICROVERSION,
    ) -> Answer:
        """The answer, whatever its status."""
        headers = {"X-OpenStack-Nova-API-Version": microversion}
        return self._cloud.call(user, project, method, self.url + path, json=json, headers=headers)

    def servers(self, query: str = "", *, user: str = INSPECTOR, project: str = "service") -> list[dict[str, Any]]:
        """What `DETAIL` and *query*, which begins with "&", list on their first page."""
        answer = self.ask(self.DETAIL + query, user=user, project=project)
        if answer.status != 200:
            raise CloudError(f"{query}: {answer}")
        listed: list[dict[str, Any]] = answer.json()["servers"]
        return listed

    def log_tail(self) -> str:
        return self._cloud.log_tail("nova", "uwsgi-nova", "nova-rows")

    # ---- its policy ---------------------------------------------------------------------------------------

    @property
    def policy_file(self) -> Path:
        """It is read anew when it changes; empty at first."""
        return self._site.policy

    def use_policy(self, rules: Mapping[str, str] | str) -> None:
        """From the next request on; a file's text, or rules alone."""
        text = rules if isinstance(rules, str) else json_module.dumps(dict(rules))  # JSON is YAML
        use_policy(self._site.policy, text)

    def policy_defaults(self) -> dict[str, str]:
        """Every rule that Nova has and what it is as long as no policy file names it."""
        found: dict[str, str] = self._do("defaults")
        return found

    def allowed(self, *roles: str) -> set[str]:
        """The rules that a token with these roles passes on a server of another project."""
        return set(self._do("allowed", roles=list(roles)))

    # ---- what the hosts do --------------------------------------------------------------------------------

    def put(
        self,
        uuid: str,
        *,
        project: str = "tenant-a",
        user: str = "alice",
        host: str | None = "compute-1",
        cell: str = "cell1",
        name: str = "server",
        image: str = "",
        vm_state: str = "active",
        task_state: str | None = None,
        metadata: Mapping[str, str] | None = None,
        extra_specs: Mapping[str, str] | None = None,
        launched: bool = True,
    ) -> None:
        """A server on *host*; a host belongs to the *cell* (`cell1` or `cell2`) that it is first named in."""
        self._do(
            "put",
            uuid=uuid, project=self._cloud.projects[project], user=self._cloud.users[user], host=host, cell=cell,
            name=name, image=image, vm_state=vm_state, task_state=task_state, metadata=dict(metadata or {}),
            extra_specs=dict(extra_specs or {}), launched=launched,
        )  # fmt: skip

    def change(self, uuid: str, **fields: object) -> None:
        """Columns of its row, as `vm_state`, `task_state`, `host`, `metadata`; `display_description` is its text."""
        self._do("change", uuid=uuid, **fields)

    def delete(self, uuid: str) -> None:
        """As nova-compute does it."""
        self.change(uuid, task_state="deleting")
        self.mark_deleted(uuid)
        self.destroy(uuid)

    def mark_deleted(self, uuid: str) -> None:
        """The first half of it: the disk is gone, the row is not, until `destroy`."""
        self._do("mark_deleted", uuid=uuid)

    def destroy(self, uuid: str) -> None:
        """The row alone; its states stay."""
        self._do("destroy", uuid=uuid)

    def soft_delete(self, uuid: str) -> None:
        self._do("soft_delete", uuid=uuid)

    def offload(self, uuid: str) -> None:
        """Shelved and offloaded: it has no host."""
        self._do("offload", uuid=uuid)

    def archive(self) -> None:
        """Every destroyed row leaves Nova's sight."""
        self._do("archive")

    # ---- trouble ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It accepts connections and does not answer."""
        with self._service.paused():
            yield

    @contextlib.contextmanager
    def cell_down(self, cell: str) -> Iterator[None]:
        """The cell's database fails every query, at once; a hanging one would cost each request Nova's 60 s."""
        database = self._site.database(cell)
        with self._lock:
            kept = database.read_bytes()
            os.truncate(database, 0)
        try:
            yield
        finally:
            with database.open("r+b") as file:
                file.write(kept)

    # ---- its life -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._site.folder.exists():
            raise CloudError(f"{self._site.folder} is there: a second Nova on this cloud")
        ports = Ports()
        self._resources.callback(ports.close)
        self._resources.callback(shutil.rmtree, self._site.folder, ignore_errors=True)
        self._site.make()
        self._site.configure(self._cloud.site, ports_url=ports.url, default=self._default_section)
        plant(self._site)
        listener = Listener()
        self._resources.callback(listener.socket.close)
        self.url = listener.url
        self._service = Service("nova", program=self._site.program, listener=listener, logs=self._cloud.logs)
        self._resources.callback(self._service.stop)
        self._rows = self._resources.enter_context(_Rows(self._site.config, log=self._cloud.logs / "nova-rows.log"))
        self._resources.enter_context(self._catalogued())  # while the two of them start
        self._service.wait_until_ready(_READY_PATH)

    @contextlib.contextmanager
    def _catalogued(self) -> Iterator[None]:
        service_id = self._keystone("POST", "/services", {"service": {"name": "nova", "type": "compute"}})["id"]
        try:
            for interface in ("public", "internal", "admin"):
                endpoint = {"interface": interface, "region_id": REGION, "url": f"{self.url}/v2.1"}
                self._keystone("POST", "/endpoints", {"endpoint": {**endpoint, "service_id": service_id}})
            yield
        finally:
            self._keystone("DELETE", f"/services/{service_id}")  # and its endpoints

    def _keystone(self, method: str, path: str, json: Mapping[str, object] | None = None) -> dict[str, Any]:
        answer = self._cloud.call(ADMIN, ADMIN, method, f"{self._cloud.keystone_url}/v3{path}", json=json)
        if answer.status >= 300:
            raise CloudError(f"{method} {path}: {answer}")
        made: dict[str, Any] = next(iter(answer.json().values())) if answer.body else {}
        return made

    def _do(self, verb: str, **arguments: object) -> Any:
        with self._lock:
            return self._rows.do(verb, arguments)


class _Rows:
    """The process that has Nova's objects."""

    def __init__(self, config: Path, *, log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [venv() / "bin/python", "-I", Path(__file__).with_name("rows.py"), config],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=log.parent,
                env=environment(),
                start_new_session=True,  # as the services
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        requests, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            requests.close()
        try:
            self._process.wait(_ROWS_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        answers.close()

    def do(self, verb: str, arguments: Mapping[str, object]) -> Any:
        requests, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # its log says why
            requests.write(json_module.dumps([verb, arguments]) + "\n")
            requests.flush()
        line = answers.readline()
        if not line:
            raise CloudError(f"rows.py ended\n{tail(self._log)}")
        answer = json_module.loads(line)
        if "failed" in answer:
            raise CloudError(f"{verb} {arguments}: {answer['failed']}\n{tail(self._log)}")
        return answer["done"]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout
