"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import libvirt
import pytest
from tests.crash.scene import Company, Scene
from tests.lab.hypervisor import Hypervisor
from tests.lab.workspace import Workspace


@pytest.fixture(scope="session", autouse=True)
def _quiet_libvirt() -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)


@pytest.fixture(scope="module")
def company(request: pytest.FixtureRequest, hypervisor: Hypervisor, workspace: Workspace) -> Iterator[Company]:
    """The tests of this module that run beside each other."""
    items = [item for item in request.session.items if item.path == request.path]
    gathered = Company(hypervisor, workspace, items)
    yield gathered
    gathered.close()


@pytest.fixture
def scene(hypervisor: Hypervisor, workspace: Workspace) -> Iterator[Scene]:
    """A stage for one test alone; libvirtd is well again afterwards."""
    with Scene.open(hypervisor, workspace) as one:
        try:
            yield one
        finally:
            hypervisor.heal()
