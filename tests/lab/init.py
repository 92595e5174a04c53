"""
PID 1 of a private hypervisor: mounts its folders, starts its daemons, reaps.

Run by `hypervisor.py` as `unshare --mount --pid --net --fork --kill-child`; takes the
folder that holds the private trees. It must reap at once: libvirtd polls for a killed
QEMU with kill(pid, 0), and a zombie answers; where PID 1 does not reap, each capability
probe takes 40 s ("Failed to terminate process … with SIGKILL") and each destroy 1.5 s.

Commands come on stdin, a line each (`start NAME`); reports go to stdout, a JSON object
a line. The end of stdin is the order to end: the kernel then kills every process of the
namespace, so nothing outlives the test run, not even after a kill -9 of it.

Only the standard library, and no import of ours: it runs with `python -I -S`.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Final

# Private trees: sub-folder of ours -> where the daemons look for it. The whole of /run,
# because /run/libvirt may not exist to be mounted over, and because it hides D-Bus:
# libvirtd would register every QEMU with the machine's systemd-machined.
TREES: Final = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
DAEMONS: Final = {"virtlogd": "/usr/sbin/virtlogd", "libvirtd": "/usr/sbin/libvirtd"}

_MS_BIND: Final = 4096
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def main(root: Path) -> None:
    _mount_private_trees(root)
    wake_read, wake_write = socket.socketpair()
    wake_read.setblocking(False)
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _signo, _frame: None)

    running: dict[int, str] = {}
    commands = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        _report(ready=os.getpid())
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake_read:
                    _drain(wake_read)
                    continue
                received = os.read(0, 4096)
                if not received:
                    return
                commands += received
            *lines, commands = commands.split(b"\n")
            for line in lines:
                _start(line.decode(), root, running)
            _reap(running)


def _mount_private_trees(root: Path) -> None:
    _mount("proc", "/proc", "proc", 0)
    # Without a cgroup mount in sight libvirtd uses none: neither v1 nor v2 is touched.
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for target in sorted((m for m in mounted if m.startswith("/sys/fs/cgroup")), reverse=True):
        _checked(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")
    _mount("sysfs", "/sys", "sysfs", 0)  # that of our own network namespace
    for name, target in TREES.items():
        _mount(str(root / name), target, "", _MS_BIND)
    # A /dev/kvm that root can open and QEMU's user cannot makes libvirt probe QEMU anew
    # (0.6 s) before every define and start. A file that nobody can use settles it: TCG.
    if Path("/dev/kvm").exists():
        no_kvm = root / "no-kvm"
        no_kvm.touch(mode=0o600)
        _mount(str(no_kvm), "/dev/kvm", "", _MS_BIND)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None)
    _checked(result, f"mount {source} on {target}")


def _checked(result: int, doing: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")


def _drain(wake: socket.socket) -> None:
    try:
        while wake.recv(4096):
            pass
    except BlockingIOError:
        pass


def _start(command: str, root: Path, running: dict[int, str]) -> None:
    verb, _, name = command.partition(" ")
    if verb != "start" or name not in DAEMONS:
        raise ValueError(f"unknown command {command!r}")
    log = os.open(root / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDWR)
    pid = os.posix_spawn(
        DAEMONS[name],
        [name],
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
        setsid=True,
    )
    os.close(null)
    os.close(log)
    running[pid] = name
    _report(started=name, pid=pid)


def _reap(running: dict[int, str]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if name := running.pop(pid, None):
            _report(exited=name, status=os.waitstatus_to_exitcode(status))


def _report(**report: object) -> None:
    os.write(1, json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
