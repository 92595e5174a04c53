"""
A real libvirtd of our own: private to one process tree, gone without a trace.

It runs as root on any machine, beside whatever libvirtd runs there, without systemd,
D-Bus, polkit, cgroups or a network: `unshare` gives it a mount, a pid and a network
namespace, and `init.py` is PID 1 in there. The end of that one process is the end of
libvirtd, virtlogd and every QEMU; it also ends when its standard input does, so that not
even a kill -9 of the tests leaves a QEMU behind.

Clients come by the ordinary path of its socket. Disks work wherever QEMU's user
(libvirt-qemu) may go: below `Workspace.folder`, not below pytest's tmp_path.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.lab.init import DAEMONS, TREES
from tests.lab.workspace import workspace

NEEDED_PROGRAMS: Final = (
    *DAEMONS.values(),
    "unshare",
    "mount",
    "qemu-system-x86_64",
    "qemu-img",
    "qemu-nbd",
    "as",
    "ld",
)

_CONFIG: Final = {
    # Without these, libvirtd asks polkit over D-Bus about everybody but root.
    "libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\nlog_level = 3\n',
    "virtlogd.conf": "log_level = 3\n",
    # No AppArmor or SELinux; the DAC driver stays and chowns disks to libvirt-qemu and back,
    # as on a real host. QEMU in a mount namespace of its own would pin our loop devices.
    "qemu.conf": 'security_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n',
}
_INIT: Final = Path(__file__).with_name("init.py")
_EVENT_TIMEOUT_S: Final = 10.0

# In a process of its own: a connection to a libvirtd that hangs blocks for ever.
_PROBE: Final = """
import sys, time, libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
while True:
    try:
        connection = libvirt.open(sys.argv[1])
        connection.getDomainCapabilities(None, "x86_64", "pc", "qemu")
        break
    except libvirt.libvirtError as error:
        print(error, flush=True)
        time.sleep(0.02)
"""


class HypervisorError(RuntimeError):
    """The private libvirtd did not do what it was told, or left something behind."""


def missing_requirements() -> list[str]:
    """What this machine lacks to run a `Hypervisor`; empty if it can."""
    missing = [program for program in NEEDED_PROGRAMS if shutil.which(program) is None]
    return missing if os.geteuid() == 0 else ["root", *missing]


class Hypervisor:
    """
    A private libvirtd. Use it as a context manager.

    Everything a kill test needs is here: `kill_libvirtd` and `start_libvirtd` leave the
    domains running; `stop_libvirtd` makes it hang. Not for use by two threads at once.
    """

    def __init__(self, *, ready_timeout_s: float = 90.0) -> None:
        self._ready_timeout_s = ready_timeout_s
        self._resources = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._namespace = ""
        self._running: dict[str, int] = {}
        self.root = Path()

    def __enter__(self) -> Self:
        try:
            self._launch()
            self._start("virtlogd")
            self.start_libvirtd()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """For `libvirt.open` and `openReadOnly` alike."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def read_only_uri(self) -> str:
        """By the other socket: read-only even for `libvirt.open`."""
        return f"qemu+unix:///system?socket={self.socket}-ro"

    @property
    def test_uri(self) -> str:
        """The test driver within this libvirtd: domains without QEMU, events over the socket."""
        return f"test+unix:///default?socket={self.socket}"

    @property
    def socket(self) -> Path:
        return self.root / "run/libvirt/libvirt-sock"

    @property
    def libvirtd_pid(self) -> int | None:
        """As this process sees it; None while libvirtd is not running."""
        self._read_reports(timeout_s=0)
        inner_pid = self._running.get("libvirtd")
        return None if inner_pid is None else self._outer_pid(inner_pid)

    @property
    def log(self) -> str:
        """The last words of init, virtlogd, libvirtd and each QEMU."""
        parts = [self.root / "init.log", *sorted((self.root / "log").rglob("*.log"))]
        return "".join(
            f"--- {part.name}\n{part.read_text(errors='replace')[-4000:]}\n" for part in parts if part.exists()
        )

    def processes(self) -> dict[int, str]:
        """Every process of this hypervisor: pid as seen here -> command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self._namespace and os.readlink(entry / "ns/pid") == self._namespace:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace").strip()
            except OSError:  # ended while we looked
                continue
        return found

    def qemu_pid(self, domain_uuid: str) -> int:
        """The QEMU of a running domain, for signals."""
        for pid, command in self.processes().items():
            if f"-uuid {domain_uuid}" in command:
                return pid
        raise HypervisorError(f"no QEMU runs for {domain_uuid}")

    def start_libvirtd(self) -> None:
        """Start libvirtd and return when it answers; domains of an earlier one are picked up."""
        self._start("libvirtd")
        self._wait_until_ready()

    def kill_libvirtd(self, *, signo: int = signal.SIGKILL) -> None:
        """End libvirtd alone (SIGTERM for a clean stop) and wait for it; domains run on."""
        self._signal(signo)
        deadline_s = time.monotonic() + _EVENT_TIMEOUT_S
        while "libvirtd" in self._running:
            if time.monotonic() > deadline_s:
                raise HypervisorError(f"libvirtd outlived signal {signo}")
            self._read_reports(timeout_s=0.1)

    def stop_libvirtd(self) -> None:
        """SIGSTOP: it hangs, its sockets accept and never answer."""
        self._signal(signal.SIGSTOP)
        self._wait_for_state(stopped=True)

    def cont_libvirtd(self) -> None:
        self._signal(signal.SIGCONT)
        self._wait_for_state(stopped=False)

    def heal(self) -> None:
        """Leave libvirtd running and answering, whatever a test did to it."""
        if self.libvirtd_pid is None:
            self.start_libvirtd()
        self.cont_libvirtd()

    def close(self) -> None:
        """End it all and prove that nothing is left. A second call does nothing."""
        process, self._process = self._process, None
        try:
            if process is not None:
                self._end(process)
        finally:
            self._running.clear()
            self._resources.close()
        if process is not None and self.root.exists():
            raise HypervisorError(f"{self.root} is left behind")

    def _launch(self) -> None:
        if missing := missing_requirements():
            raise HypervisorError(f"needs {', '.join(missing)}")
        self.root = self._resources.enter_context(workspace()).folder("hv")
        self._resources.callback(shutil.rmtree, self.root)
        for tree in TREES:
            (self.root / tree).mkdir()
        for name, content in _CONFIG.items():
            (self.root / "etc" / name).write_text(content)
        namespaces = ["--mount", "--propagation", "slave", "--pid", "--net", "--fork", "--kill-child"]
        with (self.root / "init.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", *namespaces, "--", sys.executable, "-I", "-S", str(_INIT), str(self.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # a Ctrl-C at the tests must not end it before its users
            )
        if not any("ready" in report for report in self._read_reports(timeout_s=_EVENT_TIMEOUT_S)):
            raise HypervisorError(f"init did not come up\n{self.log}")
        parent = f"\nPPid:\t{self._process.pid}\n"
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if parent in status.read_text():
                    self._namespace = os.readlink(status.with_name("ns") / "pid")
        if not self._namespace:
            raise HypervisorError("init is not to be seen in /proc")

    def _start(self, daemon: str) -> None:
        process = self._alive()
        assert process.stdin is not None
        process.stdin.write(f"start {daemon}\n".encode())
        deadline_s = time.monotonic() + _EVENT_TIMEOUT_S
        while not any(report.get("started") == daemon for report in self._read_reports(timeout_s=0.1)):
            if time.monotonic() > deadline_s:
                raise HypervisorError(f"{daemon} was not started\n{self.log}")

    def _wait_until_ready(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", _PROBE, self.uri], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as probe:
            deadline_s = time.monotonic() + self._ready_timeout_s
            while probe.poll() is None:
                self._read_reports(timeout_s=0.02)
                if "libvirtd" not in self._running or time.monotonic() > deadline_s:
                    probe.kill()
            said = probe.communicate()[0]
        if probe.returncode != 0:
            raise HypervisorError(f"libvirtd did not become ready: {said[-2000:]}\n{self.log}")

    def _read_reports(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """Take in what init reports: what is there, or what comes first within the time."""
        if self._process is None or self._process.stdout is None:
            return []
        source = self._process.stdout
        poll = select.poll()
        poll.register(source, select.POLLIN)
        reports: list[dict[str, Any]] = []
        while poll.poll(0 if reports else timeout_s * 1000):
            received = os.read(source.fileno(), 65536)
            if not received:  # init has ended, and everything with it
                self._running.clear()
                break
            *lines, self._pending = (self._pending + received).split(b"\n")
            reports += [json.loads(line) for line in lines]
        for report in reports:
            if "started" in report:
                self._running[report["started"]] = report["pid"]
            elif "exited" in report:
                self._running.pop(report["exited"], None)
        return reports

    def _outer_pid(self, inner_pid: int) -> int | None:
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and int(line.split()[-1]) == inner_pid:
                        return pid
        return None

    def _signal(self, signo: int) -> None:
        pid = self.libvirtd_pid
        if pid is None:
            raise HypervisorError("libvirtd is not running")
        os.kill(pid, signo)

    def _wait_for_state(self, *, stopped: bool) -> None:
        deadline_s = time.monotonic() + _EVENT_TIMEOUT_S
        while True:
            threads = list(Path(f"/proc/{self.libvirtd_pid}/task").glob("*/stat"))
            states = [thread.read_text().rpartition(")")[2].split()[0] for thread in threads]
            if states and all((state == "T") == stopped for state in states):
                return
            if time.monotonic() > deadline_s:
                raise HypervisorError(f"libvirtd's threads are in the states {states}")
            time.sleep(0.005)

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise HypervisorError(f"the hypervisor is not running\n{self.log}")
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Close init's input: it exits, and the kernel kills whatever is in its namespace."""
        with process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_EVENT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        deadline_s = time.monotonic() + _EVENT_TIMEOUT_S
        while left := self.processes():
            if time.monotonic() > deadline_s:
                raise HypervisorError(f"processes outlive the hypervisor: {left}")
            time.sleep(0.01)
