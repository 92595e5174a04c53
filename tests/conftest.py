"""The lab as fixtures, and the proof that a test session leaves nothing on the machine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from tests.crash.scene import Company, Scene
from tests.lab.hypervisor import Hypervisor, missing_requirements
from tests.lab.instances import Compute
from tests.lab.leftovers import find_leftovers, mark_children
from tests.lab.openstack.cloud import Cloud, missing_services
from tests.lab.workspace import Workspace
from tests.lab.workspace import workspace as open_workspace

_LONGEST = (
    "test_chain.py",
    "test_kill_at_every_state.py",
    "test_upload_failures.py",
    "test_store_contract.py",
    "test_nova_verdicts.py",
    "test_rules_openstack.py",
    "test_openstack.py",
    "test_store_parents.py",
    "test_token_lifetimes.py",
    "test_glance_policy.py",
    "test_parents.py",
    "test_nova_policy_faults.py",
    "test_bad_input.py",
    "test_openstack_lab.py",
    "test_restore_chain.py",
    "test_nova_invariants.py",
    "test_kill_storm.py",
    "test_nova_lab.py",
    "test_seal_base.py",
    "test_job_states.py",
    "test_restore.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    `-m "not hypervisor"` leaves out whatever would start one, `-m "not openstack"` whatever needs a cloud.

    The longest files come first: several processes share the files, and none should begin one when the others end.
    """
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    for item in items:
        if "hypervisor" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hypervisor)
        if "openstack_services" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.openstack)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set up first, so torn down last."""
    token = mark_children()
    yield
    left = find_leftovers(token, [tmp_path_factory.getbasetemp()])
    if left:
        pytest.fail("the tests left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _quiet_libvirt() -> None:
    """The library prints every error that it also raises."""
    libvirt.registerErrorHandler(lambda *_: None, None)


@pytest.fixture(scope="session")
def workspace(_nothing_left_behind: None) -> Iterator[Workspace]:
    """Folders and mount points that a hypervisor can use; gone after the session."""
    with open_workspace() as place:
        yield place


@pytest.fixture(scope="session")
def hypervisor(workspace: Workspace) -> Iterator[Hypervisor]:
    """A private libvirtd, started for the first test that asks."""
    if missing := missing_requirements():
        pytest.skip(f"a hypervisor needs {', '.join(missing)}")
    with Hypervisor() as started:
        yield started


@pytest.fixture(scope="session")
def openstack_services() -> None:
    """The services are installed. `cloud` asks for it, and so does a test that starts clouds of its own."""
    if missing := missing_services():
        if os.environ.get("CI") or os.environ.get("AUTOBACKUP_REQUIRE_OPENSTACK"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)


@pytest.fixture(scope="session")
def cloud(workspace: Workspace, openstack_services: None) -> Iterator[Cloud]:
    """A private Keystone, Barbican and Glance, started for the first test that asks; everybody's."""
    with Cloud() as started:
        yield started


@pytest.fixture
def instances_path(workspace: Workspace) -> Iterator[Path]:
    """An instances folder as Nova has it: on the machine's own disk, open to QEMU's user."""
    folder = workspace.folder("instances")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def compute(hypervisor: Hypervisor, instances_path: Path) -> Iterator[Compute]:
    """nova-compute on the hypervisor; its domains end with the test, and libvirtd is well again."""
    with Compute(hypervisor.uri, instances_path) as playing:
        try:
            yield playing
        finally:
            hypervisor.heal()


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
