"""`Requests` as the agent wires it, on a real spool with real claims; each project has a door of its own."""

import asyncio
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.flows.rig import Door, NotingKeys, Rig, rig_on

from autobackup.cloud.nova import Server
from autobackup.errors import AutobackupError, NotConsented
from autobackup.flows.learn import Learn
from autobackup.flows.places import Places
from autobackup.flows.requests import Requests
from autobackup.metrics import Metrics
from autobackup.model import InstanceId, Request
from autobackup.rules.policy import Rulebook
from autobackup.stores import OpenDestination
from autobackup.stores.directory import DirectoryStore
from autobackup.stores.keyfile import KeyFile
from autobackup.terms import Destination, RequestSection

OWN, OTHER, USER = "a" * 32, "b" * 32, "c" * 32
NOT_CONSENTED: Final = NotConsented("we may not use project bbb: missing roles; it shares with project ddd")
TAKEN: Final = RequestSection(destination="owners")


class Monotonic:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Told:
    """What Keystone and Glance say of owners and images."""

    domains: dict[str, str] = field(default_factory=dict)
    images: dict[str, Mapping[str, str]] = field(default_factory=dict)
    trouble: AutobackupError | None = None
    calls: list[str] = field(default_factory=list)

    async def domain_of(self, project: str) -> str | None:
        self._ask(project)
        return self.domains.get(project)

    async def image_properties(self, image: str) -> Mapping[str, str] | None:
        self._ask(image)
        return self.images.get(image)

    def _ask(self, what: str) -> None:
        self.calls.append(what)
        if self.trouble is not None:
            raise self.trouble


class Requesting:
    """
    A host whose owners are heard. *refusing* is what a project says when it is asked; one with a gate answers when
    that is open.
    """

    def __init__(self, rig: Rig, *, book: Rulebook, template: Destination, owners: Told | None) -> None:
        self.rig = rig
        self.clock = Monotonic()
        self.refusing: dict[str, AutobackupError] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.opened: list[Destination] = []
        self.asked: list[str] = []
        self.owners = owners
        self.metrics = Metrics()
        self.places = Places([template], self._open)
        self.opened.clear()
        self.learn = self._learn()
        self.requests = Requests(
            book=book,
            learn=self.learn,
            places=self.places,
            owners=owners,  # type: ignore[arg-type]
            metrics=self.metrics,
            clock=self.clock,
        )

    def _learn(self) -> Learn:
        rig = self.rig
        return Learn(
            claims=rig.spool.claims, spool=rig.spool, jobs=rig.jobs, workers=rig.workers, swtpm_path="/nowhere",
            clock=rig.clock,
        )  # fmt: skip

    def restarted(self) -> Learn:
        """What a start finds in the spool."""
        learn = self._learn()
        learn.load()
        return learn

    def _open(self, destination: Destination) -> OpenDestination:
        self.opened.append(destination)
        folder = self.rig.folder / f"project-{destination.project or 'template'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        door = _ProjectsDoor(self, destination.project, folder)
        keys = NotingKeys(KeyFile(str(self.rig.folder / "one.kek")))
        return OpenDestination(destination=destination, store=door, keys=keys)  # type: ignore[arg-type]

    def living(self) -> InstanceId:
        """One more instance, whose disk is held."""
        instance = InstanceId(str(uuid.uuid4()))
        (self.rig.instances / instance).mkdir()
        (self.rig.instances / instance / "disk").write_bytes(b"disk")
        assert self.rig.spool.claims.claim_folder(instance)
        return instance

    async def hear(
        self, instance: InstanceId, properties: Mapping[str, str] | None = None, **changes: object
    ) -> Request | None:
        """Nova lists the server; what its owner's request is then."""
        await self.requests.heard({instance: server(instance, properties or {}, **changes)})
        return self.requests.of(instance)

    @property
    def refused_count(self) -> float:
        """The metric."""
        line = next(
            one for one in self.metrics.render().splitlines() if one.startswith(b"autobackup_requests_refused ")
        )
        return float(line.split()[1])


class _ProjectsDoor(Door):
    """Answers as its project does now."""

    def __init__(self, requesting: Requesting, project: str, folder: Path) -> None:
        super().__init__(DirectoryStore(str(folder)))
        self._requesting, self._project = requesting, project

    async def check(self) -> None:
        self._requesting.asked.append(self._project)
        if self._project in self._requesting.gates:
            await self._requesting.gates[self._project].wait()
        if self._project in self._requesting.refusing:
            raise self._requesting.refusing[self._project]
        await super().check()


def server(instance: InstanceId, properties: Mapping[str, str], **changes: object) -> Server:
    """As Nova lists it."""
    said: dict[str, object] = {
        "is_deleted": False, "host": "here", "vm_state": "active", "task_state": "", "launched": True, "name": "web",
        "project": OWN, "user": USER, "flavor": "m1.small", "extra_specs": {}, "image": "",
    }  # fmt: skip
    return Server(instance=instance, properties=properties, **(said | changes))  # type: ignore[arg-type]


@contextmanager
def requesting(
    folder: Path,
    *,
    caps: RequestSection = TAKEN,
    book: Rulebook | None = None,
    key: str = "barbican",
    owners: Told | None = None,
) -> Iterator[Requesting]:
    template = Destination(
        name="owners", store="glance", cloud="c", project="template", key=key,  # type: ignore[arg-type]
        recipients=(folder / "k.pub",) if key == "recipient" else (), retention_s=86400.0,
    )  # fmt: skip
    with rig_on(folder) as rig:
        yield Requesting(rig, book=book or Rulebook(requests=caps), template=template, owners=owners)
