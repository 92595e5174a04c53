"""
What a test session left on the machine: processes, mounts, loop devices, folders.

Ours is what can be told to be ours: a process whose environment carries the session's
token (children inherit it), a mount or loop device below one of our folders.
"""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.lab import workspace
from tests.lab.mounts import loop_devices, mounts_below

_VARIABLE: Final = "AUTOBACKUP_LAB_SESSION"
_GRACE_S: Final = 5.0


def mark_children() -> str:
    """Give every process started from now on a token, to be known by later."""
    token = uuid.uuid4().hex
    os.environ[_VARIABLE] = token
    return token


def find_leftovers(token: str, roots: Sequence[Path], *, grace_s: float = _GRACE_S) -> list[str]:
    """What is left once processes that are just ending have had their time."""
    deadline_s = time.monotonic() + grace_s
    while left := [*_processes(token), *_files([*roots, *workspace.opened])]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    return left


def _processes(token: str) -> Iterator[str]:
    mark = f"{_VARIABLE}={token}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            ours = mark in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # ended while we looked
            continue
        if ours and "multiprocessing.resource_tracker" not in command:  # lives as long as Python
            yield f"process {process.name}: {command}"


def _files(roots: Sequence[Path]) -> Iterator[str]:
    for root in roots:
        for mount in mounts_below(root):
            yield f"mount {mount.mount_point} ({mount.kind} of {mount.source})"
        for device, image in loop_devices().items():
            if image.is_relative_to(root):
                yield f"loop device {device} on {image}"
    for root in workspace.opened:
        if root.exists():
            yield f"folder {root}"
