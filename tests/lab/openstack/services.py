"""
The services as processes: uWSGI on a socket that we made, in a process group of its own.

It owns where the services' environment lies, what theirs inherits from ours (next to
nothing), how they are started, awaited and ended, and what to show when one fails. It does
not know what their configuration says (`config.py`).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final

from tests.lab.openstack.rest import request

ROOT: Final = Path(__file__).resolve().parents[3]
BUILD: Final = ROOT / "build/openstack"
HOST: Final = "127.0.0.1"

_OVERRIDE: Final = "AUTOBACKUP_OPENSTACK_VENV"
_INHERITED: Final = {"PATH", "TMPDIR", "TZ"}
_HERE: Final = Path(__file__).parent
_READY_TIMEOUT_S: Final = 90.0
_STOP_TIMEOUT_S: Final = 10.0


class CloudError(RuntimeError):
    """The private cloud did not do what it was told, or left something behind."""


def venv() -> Path:
    """The services' own environment: `make` builds it; AUTOBACKUP_OPENSTACK_VENV names another."""
    return Path(os.environ.get(_OVERRIDE) or BUILD / "venv")


def missing_services() -> str:
    """Why no `Cloud` can be started here; empty if it can."""
    if (venv() / "bin/uwsgi").exists() and (os.environ.get(_OVERRIDE) or (BUILD / ".installed").exists()):
        return ""
    return f"no OpenStack services in {venv()}: make build/openstack/.installed"


def environment(**more: str) -> dict[str, str]:
    """What a service's process gets: no proxy, no credentials, no Python path of ours, but our mark."""
    kept = {
        name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith("AUTOBACKUP_LAB_")
    }
    return {"LANG": "C.UTF-8", "HOME": "/nonexistent", **kept, **more}


def run_tool(tool: str, *arguments: str, log: Path, **more: str) -> None:
    """Run one of the services' command line tools to its end."""
    with log.open("ab") as output:
        done = subprocess.run(
            [venv() / "bin" / tool, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env=environment(**more),
            check=False,
        )
    if done.returncode:
        raise CloudError(f"{tool} {' '.join(arguments)}: exit status {done.returncode}\n{tail(log)}")


def tail(*logs: Path) -> str:
    """The last words of *logs*."""
    return "".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}\n" for log in logs if log.exists())


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How one service is run."""

    app: str
    process_count: int = 1
    socket_timeout_s: int = 10  # as in the sample httpd/glance-api-uwsgi.ini that Glance ships
    environment: Mapping[str, str]


class Listener:
    """A listening socket on a free port. Clients may come at once; they wait until the service is up."""

    def __init__(self) -> None:
        self.socket = socket.create_server((HOST, 0), backlog=100)
        self.url = f"http://{HOST}:{self.socket.getsockname()[1]}"


class Service:
    """One running service. `stop` leaves none of its processes."""

    def __init__(self, name: str, *, program: Program, listener: Listener, logs: Path) -> None:
        self.name = name
        self.url = listener.url
        self._logs = [logs / f"uwsgi-{name}.log", logs / f"{name}.log"]
        # No --procname-prefix: it writes over the environment, by which the leftover check knows our processes.
        uwsgi = [
            *("--http-socket", f"fd://{listener.socket.fileno()}", "--master", "--die-on-term", "--exit-on-reload"),
            *("--lazy-apps", "--need-app", "--enable-threads", "--thunder-lock"),
            *("--processes", str(program.process_count), "--threads", "4", "--buffer-size", "65535"),
            # Glance reads chunked bodies through uWSGI's own API.
            *("--http-auto-chunked", "--http-chunked-input", "--http-raw-body"),
            *("--socket-timeout", str(program.socket_timeout_s), "--add-header", "Connection: close"),
            *("--virtualenv", str(venv()), "--wsgi-file", str(_HERE / "wsgi.py"), "--disable-logging"),
        ]
        keeper = [sys.executable, "-I", "-S", str(_HERE / "keeper.py"), str(listener.socket.fileno())]
        with self._logs[0].open("ab") as log, listener.socket:
            self._keeper = subprocess.Popen(
                [*keeper, str(venv() / "bin/uwsgi"), *uwsgi],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=logs,
                env=environment(LAB_APP=program.app, **program.environment),
                pass_fds=[listener.socket.fileno()],
                start_new_session=True,  # a Ctrl-C at the tests must not end it before its users
            )

    def wait_until_ready(self, path: str) -> None:
        """Return when *path* is answered with 200 (or 300, the list of versions)."""
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        said = "nothing"
        while self._keeper.poll() is None and time.monotonic() < deadline_s:
            try:
                answer = request("GET", f"{self.url}{path}", timeout_s=max(1.0, deadline_s - time.monotonic()))
            except (OSError, HTTPException) as error:
                said = repr(error)
            else:
                if answer.status in {200, 300}:
                    return
                said = str(answer)
            time.sleep(0.05)
        raise CloudError(f"{self.name} did not become ready: {said}\n{tail(*self._logs)}")

    @property
    def workers(self) -> list[int]:
        """The processes that answer requests; their master starts another for each that dies."""
        members = _group(self._keeper.pid)
        masters = {pid for pid, parent in members.items() if parent == self._keeper.pid}
        return sorted(pid for pid, parent in members.items() if parent in masters)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It accepts connections and never answers; all of it but the keeper is stopped."""
        members = [pid for pid in _group(self._keeper.pid) if pid != self._keeper.pid]
        _signal(members, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(members, signal.SIGCONT)

    def stop(self) -> None:
        """End its whole process group and see it gone. A second call does nothing."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # It has not been waited for: the pid is still its own, and so is the group.
            os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while left := _group(self._keeper.pid):
            if time.monotonic() > deadline_s:
                raise CloudError(f"processes outlive {self.name}: {sorted(left)}")
            time.sleep(0.005)


def stop_all(services: Sequence[Service]) -> None:
    """Every one of them, even if another cannot be stopped."""
    with contextlib.ExitStack() as stack:
        for service in services:
            stack.callback(service.stop)


def _group(leader: int) -> dict[int, int]:
    """The living processes of a group: pid -> pid of the parent."""
    members = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # ended while we looked
            continue
        if int(group) == leader and state not in "ZX":
            members[int(stat.parent.name)] = int(parent)
    return members


def _signal(pids: Sequence[int], signo: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signo)
