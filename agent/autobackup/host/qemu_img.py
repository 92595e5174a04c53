"""
qemu-img, called for what a restore makes: headers rewritten, chains flattened, files checked.

It sees a disk only where `host.qcow2.mistrust` found nothing: whoever could write a header can name any file of this
machine in it (invariant 5). Formats are always said, never probed, and names go as JSON, in which a comma is a comma.
"""

import json
import os
import resource
import subprocess
from collections.abc import Callable
from typing import Final

from autobackup.container.manifest import Health
from autobackup.errors import Refused
from autobackup.units import GiB

_CHECK_MEMORY_BYTES: Final = 1 * GiB
_CHECK_CPU_S: Final = 300
_HEADER_S: Final = 600.0
_LOOK_EVERY_S: Final = 0.2
_NOT_INSTALLED: Final = "qemu-img is not installed; the chain cannot be put together (package qemu-utils)"
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def attach(path: str, *, backing: str, backing_format: str) -> None:
    """Write the name of the backing file, relative to *path*'s folder, into the header of *path*, and nothing else."""
    # -u: the base was checked by its digest, not by opening it
    _run("rebase", "-u", "-f", "qcow2", "-F", backing_format, "-b", backing, os.path.abspath(path), limit_s=_HEADER_S)


def flatten(
    path: str, target: str, *, format_name: str, target_format: str, is_given_up: Callable[[], bool] = lambda: False
) -> None:
    """Make *target*, a disk of *target_format* without a backing file and 0600, of the chain whose top is *path*."""
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # its mode stays
    source = json.dumps({"driver": format_name, "file": {"driver": "file", "filename": os.path.abspath(path)}})
    arguments = ("convert", "-O", target_format, f"json:{source}", os.path.abspath(target))
    try:
        process = subprocess.Popen(["qemu-img", *arguments], stderr=subprocess.PIPE, env=_ENVIRONMENT)
    except FileNotFoundError:
        raise Refused(_NOT_INSTALLED) from None
    with process:
        while True:
            try:
                _, complaints = process.communicate(timeout=_LOOK_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                if is_given_up():
                    process.kill()
    if process.returncode != 0:
        raise Refused(f"qemu-img convert: {complaints.decode(errors='replace').strip()[:400]}")


def check(path: str, *, member: str, mistrusted: str | None) -> Health:
    """The health of one qcow2 file; blocks for as long as qemu-img reads its tables. Nobody may have it open."""
    if mistrusted:
        return Health(member=member, tool="header", result="not trusted", detail=mistrusted)
    image = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None})
    try:
        done = _call("check", "--output=json", f"json:{image}", limit_s=_CHECK_CPU_S * 2.0, prepare=_limit)
    except FileNotFoundError:
        return Health(member=member, tool="qemu-img check", result="not checked", detail="qemu-img is not installed")
    except subprocess.TimeoutExpired:
        return Health(member=member, tool="qemu-img check", result="not checked", detail="took too long")
    results = {0: "clean", 2: "corrupt", 3: "leaked clusters", 63: "not supported"}
    detail = done.stderr.decode(errors="replace").strip().replace(path, "<disk>")[:400]
    return Health(member=member, tool="qemu-img check", result=results.get(done.returncode, "failed"), detail=detail)


def _run(*arguments: str, limit_s: float) -> None:
    try:
        done = _call(*arguments, limit_s=limit_s)
    except FileNotFoundError:
        raise Refused(_NOT_INSTALLED) from None
    except subprocess.TimeoutExpired:
        raise Refused(f"qemu-img {arguments[0]}: no end after {limit_s:.0f} s") from None
    if done.returncode != 0:
        raise Refused(f"qemu-img {arguments[0]}: {done.stderr.decode(errors='replace').strip()[:400]}")


def _call(
    *arguments: str, limit_s: float, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["qemu-img", *arguments], capture_output=True, timeout=limit_s, check=False, preexec_fn=prepare,
        env=_ENVIRONMENT,
    )  # fmt: skip


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_CHECK_MEMORY_BYTES, _CHECK_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CHECK_CPU_S, _CHECK_CPU_S))
