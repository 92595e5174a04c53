"""
The contracts of `pyproject.toml` hold, and they bite: each is broken once, in a copy, and must say so.

A contract that names a module wrongly, or a package that is not searched, is kept for ever.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"

LAYERS = "Rooms import downwards only"
PURE = "rules, container and qcow2 are pure: no files, clock, loop, threads or logging"
OPENSTACK = "only cloud talks to OpenStack"
LIBVIRT = "only host talks to libvirt, inotify"
ALL_KEPT = {LAYERS: True, PURE: True, OPENSTACK: True, LIBVIRT: True}


class Copy:
    """The package and its contracts, to be broken."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(
            REPOSITORY / "agent" / "autobackup", root / "agent" / "autobackup", ignore=shutil.ignore_patterns("*.pyc")
        )
        shutil.copy(REPOSITORY / "pyproject.toml", root)

    def add(self, module: str, line: str) -> None:
        """At the end, where an import is as good as at the top."""
        with (self.root / "agent" / "autobackup" / module).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")

    def lint(self) -> dict[str, bool]:
        """Whether each contract was kept."""
        ended = subprocess.run(
            [sys.executable, "-c", LINT],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root / "agent"), "NO_COLOR": "1", "COLUMNS": "300"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        kept = {}
        for line in ended.stdout.splitlines():
            for word, holds in ((" KEPT", True), (" BROKEN", False)):
                if line.endswith(word):
                    kept[line.removesuffix(word)] = holds
        assert (ended.returncode == 0) is all(kept.values()), ended.stdout + ended.stderr
        assert kept, ended.stdout + ended.stderr
        return kept


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_every_contract_is_kept(copy: Copy) -> None:
    assert copy.lint() == ALL_KEPT


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("rules/policy.py", "import os", PURE),
        ("rules/lifecycle.py", "from time import time", PURE),
        ("rules/termination.py", "def f() -> None:\n    import asyncio", PURE),
        ("container/frames.py", "import threading", PURE),
        ("qcow2/mapping.py", "import os", PURE),
        ("qcow2/header.py", "from autobackup.host import qcow2", LAYERS),
        ("rules/policy.py", "from autobackup.host import claims", LAYERS),
        ("rules/policy.py", "from autobackup.container import header", LAYERS),
        ("model.py", "from autobackup import config", LAYERS),
        ("config.py", "from autobackup import metrics", LAYERS),
        ("host/claims.py", "from autobackup.stores import interface", LAYERS),
        ("flows/capture.py", "from autobackup.service import systemd", LAYERS),
        ("config.py", "from autobackup import configfile", LAYERS),
        ("configfile.py", "from autobackup import logs", LAYERS),
        ("host/claims.py", "from autobackup.cloud import session", LAYERS),
        ("cloud/session.py", "from autobackup.host import claims", LAYERS),
        ("cloud/glance.py", "from autobackup.stores import interface", LAYERS),
        ("rules/policy.py", "from autobackup.cloud import failures", LAYERS),
        *(("stores/glance.py", f"import {one}", OPENSTACK) for one in ("openstack", "requests", "aiohttp")),
        *((f"{one}.py", "import openstack", OPENSTACK) for one in ("rules/policy", "container/header", "host/spool")),
        ("flows/send.py", "import keystoneauth1", OPENSTACK),
        ("stores/barbican.py", "from keystoneauth1.exceptions import ClientException", OPENSTACK),
        ("flows/capture.py", "import libvirt", LIBVIRT),
        ("cloud/session.py", "import libvirt", LIBVIRT),
        ("service/app.py", "import inotify_simple", LIBVIRT),
    ],
)
def test_a_wrong_import_breaks_its_contract_and_no_other(copy: Copy, module: str, line: str, contract: str) -> None:
    copy.add(module, line)
    assert copy.lint() == ALL_KEPT | {contract: False}


def test_every_room_is_in_a_layer() -> None:
    """A room that is in none may import anything, and be imported by anything."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {room.strip() for layer in layers for room in layer.split("|")}
    package = REPOSITORY / "agent" / "autobackup"
    rooms = {file.stem for file in package.glob("*.py")} | {file.parent.name for file in package.glob("*/__init__.py")}
    assert rooms - {"__init__"} == named
