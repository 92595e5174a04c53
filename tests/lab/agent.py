"""
The agent as a process: its configuration written, started, asked, killed. As an operator would have it.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

_Answer = TypeVar("_Answer")


def wait_until(what: Callable[[], _Answer], *, within_s: float = 30.0, words: str = "") -> _Answer:
    """Poll until *what* is true, and return it."""
    deadline_s = time.monotonic() + within_s
    while True:
        answer = what()
        if answer:
            return answer
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s:g} s: {words or what}")
        time.sleep(0.02)


class AgentProcess:
    """
    One agent on *instances_path*, with a `directory` store below *home*. Use it as a context manager.

    *destinations* are further ones, by name, with the keys of their tables; the rule names all of them.

    *command* replaces `autobackup-agent`, for tests that need the agent with a seam.
    """

    def __init__(
        self,
        home: Path,
        instances_path: Path,
        *,
        uri: str,
        filesystems: Sequence[str] = ("ext4", "xfs"),
        stores: Sequence[str] = ("vault",),
        destinations: Mapping[str, Mapping[str, object]] | None = None,
        rule: str = 'name = "everything"',
        capture: str = "",
        extra: str = "",
        verify: str = "fast",
        scrub: str = "zero",
        run_folder: Path | None = None,
        command: Sequence[str] = (sys.executable, "-m", "autobackup.service"),
    ) -> None:
        self.home = home
        self.instances_path = instances_path
        self.spool = instances_path / ".autobackup"
        self.keyfile = home / "kek"
        self.config = home / "autobackup.toml"
        self.log_path = home / "agent.log"
        self.socket = (run_folder or home) / "agent.sock"  # at most 108 bytes long
        self.stores = {name: home / name for name in stores}
        self.command = list(command)
        self.process: subprocess.Popen[bytes] | None = None
        for folder in self.stores.values():
            folder.mkdir(mode=0o700, exist_ok=True)
        if not self.keyfile.exists():
            self.cli("keygen", str(self.keyfile))
        tables = "\n".join(
            f'[[destination]]\nname = "{name}"\nstore = "directory"\npath = "{folder}"\nkey = "keyfile"\n'
            f'keyfile = "{self.keyfile}"\nretention = "30d"\nverify = "{verify}"\nreserve = "0B"\n'
            for name, folder in self.stores.items()
        )
        for name, keys in (destinations or {}).items():
            table = {"name": name, "retention": "30d", "verify": verify, **keys}
            destinations_text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
            tables += f"\n[[destination]]\n{destinations_text}\n"
        names = ", ".join(f'"{name}"' for name in (*self.stores, *(destinations or {})))
        self.config.write_text(
            f'instances_path = "{instances_path}"\nverdict = "libvirt"\nverdict_despite_nova = true\n{extra}\n'
            f'[libvirt]\nuri = "{uri}"\nkeepalive_interval = "1s"\ncall_timeout = "5s"\nreconnect_longest = "1s"\n'
            f'[capture]\nquiet_period = "1s"\nleaked_after = "3s"\nscan_interval = "5s"\nundecided_longest = "2s"\n'
            f"filesystems = {json.dumps(list(filesystems))}\n{capture}\n"
            f'[retry]\nfirst = "200ms"\nlongest = "1s"\n'
            f'[api]\nsocket = "{self.socket}"\n\n{tables}\n[[rule]]\n{rule}\ndestinations = [{names}]\n'
            f'scrub = "{scrub}"\n'
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- its life -----------------------------------------------------------------------------------------

    def start(self, *, ready: bool = True) -> None:
        """Start it; with *ready*, return when it holds claims and libvirt answered."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--config", str(self.config)], stderr=log, stdout=log, stdin=subprocess.DEVNULL
            )
        if ready:
            wait_until(self.is_ready, words=f"the agent is ready; its log: {self.log_path}")

    def stop(self) -> int:
        """SIGTERM, as systemd would; the exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process = None

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def wait_for_end(self, *, within_s: float = 30.0) -> int:
        assert self.process is not None
        return self.process.wait(within_s)

    # ---- what it says -------------------------------------------------------------------------------------

    def ask(self, target: str, *, method: str = "GET", body: object = None) -> tuple[int, Any]:
        """(status, JSON or text) over its socket."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.sock.settimeout(10)
            connection.sock.connect(str(self.socket))
            connection.request(method, target, body=None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.getheader("Content-Type", "").startswith("application/json")
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def is_ready(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            log = self.log_path.read_text()[-4000:]
            raise AssertionError(f"the agent ended with {self.process.returncode}:\n{log}")
        try:
            return self.ask("/readyz")[0] == 200
        except OSError:
            return False

    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.ask("/v1/queue")[1]["jobs"]
        return jobs

    def log(self) -> list[dict[str, Any]]:
        """Every structured line so far."""
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def events(self, event: str, **keys: object) -> list[dict[str, Any]]:
        lines = [line for line in self.log() if line["event"] == event]
        return [line for line in lines if all(line.get(key) == value for key, value in keys.items())]

    def claims(self, uuid: str = "") -> list[str]:
        folder = self.spool / "claims"
        return sorted(name for name in os.listdir(folder) if name.startswith(uuid)) if folder.exists() else []

    def receipts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.spool / "receipts").glob("*.json"))]

    def receipt_of(self, uuid: str, *, within_s: float = 60.0) -> dict[str, Any]:
        """Wait for the receipt of an instance's job."""
        return wait_until(
            lambda: next((one for one in self.receipts() if one["instance"] == uuid), None),
            within_s=within_s,
            words=f"a receipt for {uuid}; log: {self.log_path}",
        )

    def cli(
        self, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The command line, as a process."""
        done = subprocess.run(
            [sys.executable, "-m", "autobackup.service.cli", *arguments],
            capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"autobackup {' '.join(arguments)}: {done.returncode}\n{done.stderr}")
        return done

    def restore(self, backup: str, target: Path) -> dict[str, Any]:
        done = self.cli("restore", backup, "--to", str(target), "--config", str(self.config), "-f", "json")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
