"""
One stage per test: an instances folder, an agent's home, a nova-compute; and tests that share the machine's time.

A crash test mostly waits: for a quiet period, for a death, for an agent to come up. `in_company` lets the tests of a
module run beside each other, each on a stage of its own; pytest still reports them one by one. A test that hurts
libvirtd is not for company, and belongs in another module.
"""

import contextlib
import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from tests.crash.evidence import quicken
from tests.lab.agent import AgentProcess
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute
from tests.lab.workspace import Workspace

from autobackup.stores.keyfile import write_kek

COMPANIONS = int(os.environ.get("AUTOBACKUP_COMPANIONS", "4"))


_number = itertools.count(1)


class _Compute(Compute):
    """Several share one libvirtd, and a domain's name is taken once."""

    def _next_domain_name(self) -> str:
        return f"instance-{next(_number):08x}"


@dataclass
class Scene:
    """What one test has to itself. Domains are the test driver's unless it is opened with `qemu`."""

    hypervisor: Hypervisor
    workspace: Workspace
    compute: Compute
    instances_path: Path
    home: Path
    agents: list[AgentProcess] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, hypervisor: Hypervisor, workspace: Workspace, *, instances_path: Path | None = None, qemu: bool = False
    ) -> Iterator[Self]:
        home = workspace.folder("home")
        instances = instances_path or workspace.folder("instances")
        try:
            with _Compute(hypervisor.uri if qemu else hypervisor.test_uri, instances) as compute:
                scene = cls(hypervisor, workspace, compute, instances, home)
                try:
                    yield scene
                finally:
                    scene.end()
        finally:
            shutil.rmtree(home)
            if instances_path is None:
                shutil.rmtree(instances)

    def agent(self, *, more: str = "", qemu: bool = False, **options: Any) -> AgentProcess:
        """An agent on this stage, not started; *more* is appended to its configuration."""
        options.setdefault("uri", self.hypervisor.uri if qemu else self.hypervisor.test_uri)
        home = options.pop("home", self.home)
        if not (home / "kek").exists():
            write_kek(str(home / "kek"))
        agent = AgentProcess(home, options.pop("instances_path", self.instances_path), **options)
        self.agents.append(agent)
        return quicken(agent, more)

    def end(self) -> None:
        for agent in self.agents:
            if agent.process is not None:
                agent.kill()


class Company:
    """Runs the bodies of a module's tests, some at a time, as soon as the first is asked for."""

    def __init__(self, hypervisor: Hypervisor, workspace: Workspace, items: list[pytest.Item]) -> None:
        self._hypervisor = hypervisor
        self._workspace = workspace
        self._pool = ThreadPoolExecutor(COMPANIONS, "company")
        self._running: dict[str, Future[None]] = {}
        for item in items:
            body = getattr(getattr(item, "function", None), "body", None)
            if body is not None:
                callspec = getattr(item, "callspec", None)
                self._running[item.nodeid] = self._pool.submit(self._act, body, callspec.params if callspec else {})

    def result(self, nodeid: str) -> None:
        self._running[nodeid].result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _act(self, body: Callable[..., None], parameters: dict[str, Any]) -> None:
        with Scene.open(self._hypervisor, self._workspace) as scene:
            body(scene, **parameters)


def in_company(body: Callable[..., None]) -> Callable[..., None]:
    """Make a test of *body(scene, parameters…)*, to be run beside the others of its module."""

    def test(request: pytest.FixtureRequest, company: Company, **_parameters: Any) -> None:
        company.result(request.node.nodeid)

    names = ["request", "company", *(name for name in inspect.signature(body).parameters if name != "scene")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    test.__signature__ = inspect.Signature([inspect.Parameter(name, keyword) for name in names])  # type: ignore[attr-defined]
    test.__doc__, test.__name__, test.__module__ = body.__doc__, body.__name__, body.__module__
    test.body = body  # type: ignore[attr-defined]
    return test
