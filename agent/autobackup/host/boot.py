"""
A restored disk booted in a QEMU of its own, to see that it boots and what it says on its serial console.

The disk is hostile and stays as it is. QEMU is given descriptors, not names: the disk and its backing files, each
opened here for reading only, in the format that the caller or the header in front of it names, never probed; a
backing file outside one folder is refused. What the guest writes goes into a scratch layer in memory, so that there
is no file to remove, no room to be found beside the disk, and no cleartext left in free blocks.

Started by root, QEMU runs as nobody without capabilities; in any case in network, mount and IPC namespaces of its own
where the machine grants them, under its own seccomp filter, without core dumps, and it dies with the thread that
started it.

This module owns that process and decides nothing: whether a console is that of a healthy guest is the reader's to say.

Not seen: a guest that needs UEFI (the firmware is SeaBIOS), and what a guest writes only to its screen once its boot
loader is done. The firmware and all that prints through it are on the serial port, for the machine has no graphics.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from autobackup.errors import Damaged, Refused
from autobackup.host import qcow2
from autobackup.qcow2.header import parse_header
from autobackup.units import GiB, KiB, MiB

_CONSOLE_BYTES: Final = 64 * KiB
_COMPLAINTS_BYTES: Final = 4 * KiB
_WORDS_CHARS: Final = 400
_SCRATCH_BYTES: Final = 1 * GiB  # a guest that writes more in its first minutes is told of a bad disk
_LONGEST_CHAIN: Final = 32
_SECTOR_BYTES: Final = 512
_HELPER_S: Final = 60.0
_END_S: Final = 5.0  # between the end of QEMU's output and its own
_NOBODY: Final = "65534"  # the kernel's own: every Linux has it, and no guest's disk belongs to it
_KVM: Final = "/dev/kvm"
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

# CSI and two-character sequences. Of a longer one (OSC, DCS) the text stays: it may be all that there is to see.
_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[ -/]*[0-OQ-WYZ\\`-~])?")
_LINE_END: Final = re.compile(r"\r*\n|\r+")
_OWN_ARGUMENT: Final = re.compile(r"-blockdev \{.*\}: ")  # QEMU repeats it in front of what is wrong with it
_IN_PASSING: Final = re.compile(r"warning:|\bkvm\b|falling back", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted:
    """*console* is printable characters, newlines and tabs: the last 64 KiB that firmware and guest wrote."""

    console: str
    still_running: bool
    seconds: float
    accelerator: Literal["kvm", "tcg"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    fd: int
    format_name: str
    virtual_bytes: int


def boot(
    disk_path: str,
    *,
    format_name: str,
    console_limit_s: float,
    memory_bytes: int = 512 * MiB,
    until: bytes = b"",
    within: str = "",
    may_use_kvm: bool = True,
) -> Booted:
    """
    Run the guest on *disk_path* for *console_limit_s*, or until it writes *until* or goes off; its writes are lost.

    Backing files are opened only below *within*; where it is not given, below the disk's own folder. Raises `Refused`
    if the disk or QEMU cannot be used, `Damaged` if a header makes no sense.
    """
    started_s = time.monotonic()
    emulator = _installed("qemu-system-x86_64", package="qemu-system-x86")
    kvm_granted, kvm_group = _kvm_access() if may_use_kvm else (False, "")
    with contextlib.ExitStack() as stack:
        folder = os.path.realpath(within or os.path.dirname(os.path.abspath(disk_path)))
        chain = _open_chain(disk_path, format_name, folder, stack)
        granted = _isolation(kvm_group)
        for with_kvm in (True, False) if kvm_granted else (False,):
            scratch = _scratch(chain[0].virtual_bytes, stack)
            machine = _machine(with_kvm=with_kvm, memory_bytes=memory_bytes)
            argv = [*granted, emulator, *machine, *_disk([scratch, *chain])]
            with _running(argv, [scratch.fd, *(layer.fd for layer in chain)]) as process:
                console, complaints = _listen(process, deadline_s=started_s + console_limit_s, until=until)
                ended = process.poll()
            if not ended:  # a KVM inside a virtual machine may open and then fail ("failed to set MSR 0x10a")
                break
    if ended:
        raise Refused(f"{disk_path}: {_reason(complaints, ended)}")
    return Booted(
        console=_harmless(console),
        still_running=ended is None,
        seconds=time.monotonic() - started_s,
        accelerator="tcg" if not with_kvm or b"falling back to tcg" in complaints else "kvm",
    )


def _installed(program: str, *, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Refused(f"{program} is not installed; without it no disk can be booted here (package {package})")
    return found


def _open_chain(disk_path: str, format_name: str, folder: str, stack: contextlib.ExitStack) -> list[_Layer]:
    """The disk and its backing files, top first."""
    chain: list[_Layer] = []
    path = disk_path
    while True:
        if len(chain) == _LONGEST_CHAIN:
            raise Refused(f"{disk_path}: more than {_LONGEST_CHAIN} files back one another")
        if format_name not in ("qcow2", "raw"):
            raise Refused(f"{path!r}: its format is given as {format_name!r}; qcow2 and raw can be booted")
        fd, size_bytes = _open_regular(path, stack)
        if format_name == "raw":
            sectors = -(-size_bytes // _SECTOR_BYTES)
            chain.append(_Layer(fd=fd, format_name="raw", virtual_bytes=sectors * _SECTOR_BYTES))
            return chain
        try:
            header = parse_header(qcow2.read_head(fd))
        except Damaged as exc:
            raise Damaged(f"{path!r}: {exc}") from exc
        if header.has_data_file:
            raise Refused(f"{path!r}: its header names an external data file; it is not opened")
        chain.append(_Layer(fd=fd, format_name="qcow2", virtual_bytes=header.virtual_bytes))
        if header.backing_path is None:
            return chain
        if header.backing_format is None:
            raise Refused(f"{path!r}: its header names the backing file {header.backing_path!r} without its format")
        path, format_name = _resolve(header.backing_path, path, folder), header.backing_format


def _resolve(name: str, overlay_path: str, folder: str) -> str:
    """Where a header's backing file lies. The name is a path and nothing else: QEMU's `json:` or `nbd:` is not."""
    try:
        path = os.path.realpath(os.path.join(os.path.dirname(overlay_path), name))
    except ValueError as exc:
        raise Refused(f"{overlay_path!r}: its header names the backing file {name!r}: {exc}") from exc
    if os.path.commonpath([path, folder]) != folder:
        raise Refused(f"{overlay_path!r}: its header names the backing file {name!r}, outside of {folder}")
    return path


def _open_regular(path: str, stack: contextlib.ExitStack) -> tuple[int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would hold us up
    except OSError as exc:
        raise Refused(f"{path!r}: {exc.strerror}; it cannot be booted") from exc
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{path!r}: is not a regular file; it cannot be booted")
    return fd, status.st_size


def _scratch(virtual_bytes: int, stack: contextlib.ExitStack) -> _Layer:
    """An empty qcow2 layer in memory; gone with its last descriptor, whoever is killed."""
    fd = os.memfd_create("boot-scratch", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    qemu_img = _installed("qemu-img", package="qemu-utils")
    argv = [qemu_img, "create", "-q", "-f", "qcow2", f"/dev/fd/{fd}", str(virtual_bytes)]
    try:
        made = subprocess.run(
            argv, capture_output=True, timeout=_HELPER_S, check=False, pass_fds=[fd], env=_ENVIRONMENT
        )
    except subprocess.TimeoutExpired as exc:
        raise Refused(f"qemu-img create: no end after {_HELPER_S:.0f} s") from exc
    if made.returncode != 0:
        raise Refused(f"no scratch layer of {virtual_bytes} bytes: {_reason(made.stderr, made.returncode)}")
    return _Layer(fd=fd, format_name="qcow2", virtual_bytes=virtual_bytes)


def _kvm_access() -> tuple[bool, str]:
    """Whether whom QEMU will run as may open /dev/kvm, and the group that lets it, if one must."""
    if os.geteuid() != 0:
        return os.access(_KVM, os.R_OK | os.W_OK), ""
    try:
        status = os.stat(_KVM)
    except OSError:
        return False, ""
    if status.st_mode & 0o006 == 0o006:
        return True, ""
    if status.st_mode & 0o060 == 0o060 and status.st_gid != 0:  # not root's group: too much comes with it
        return True, str(status.st_gid)
    return False, ""


def _isolation(kvm_group: str) -> list[str]:
    """
    The programs that take QEMU's rights away before it starts; each replaces itself by the next.

    They are no `preexec_fn`, which may deadlock in a process with threads.
    """
    limits = ["nice", "-n", "10", "prlimit", "--core=0", f"--fsize={_SCRATCH_BYTES}"]
    rights = ["setpriv", "--no-new-privs", "--inh-caps=-all", "--pdeathsig=KILL"]
    spaces = ["unshare", "--net", "--mount", "--ipc", "--uts"]
    if os.geteuid() == 0:
        groups = f"--groups={kvm_group}" if kvm_group else "--clear-groups"
        rights += [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", groups, "--bounding-set=-all"]
    else:
        spaces += ["--user"]
    for granted in ([*limits, *spaces, *rights], [*limits, *rights]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            tried = subprocess.run(
                [*granted, "true"], capture_output=True, timeout=_HELPER_S, check=False, env=_ENVIRONMENT
            )
            if tried.returncode == 0:
                return granted
    raise Refused("nice, prlimit and setpriv (package util-linux) do not work here; QEMU is not started without them")


def _machine(*, with_kvm: bool, memory_bytes: int) -> list[str]:
    filters = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    return [
        *("-no-user-config", "-nodefaults", "-sandbox", filters),
        # i440fx is what Nova gives a guest unless it was told otherwise; without graphics SeaBIOS prints to COM1
        *("-machine", "pc,graphics=off,usb=off"),
        *(("-accel", "kvm") if with_kvm else ()),
        *("-accel", "tcg"),
        *("-cpu", "max", "-smp", "1"),  # QEMU's default is older than what the C library of RHEL 9 asks for
        *("-m", f"{max(memory_bytes // MiB, 1)}M"),
        *("-nic", "none", "-display", "none", "-monitor", "none", "-serial", "stdio"),
    ]


def _disk(layers: Sequence[_Layer]) -> list[str]:
    """
    One virtio disk: Nova's default, so what a guest of Nova has a driver for; SeaBIOS and boot loaders know it too.

    A guest that was installed on IDE names its disks by UUID or label as a rule, and boots as well.
    """
    node: dict[str, Any] | None = None
    for number, layer in reversed(list(enumerate(layers))):
        is_scratch = number == 0
        file = {"driver": "file", "filename": f"/dev/fdset/{number}", "read-only": not is_scratch}
        below = {"backing": node} if layer.format_name == "qcow2" else {}  # None: whatever the header names, nothing
        node = {"driver": layer.format_name, "read-only": not is_scratch, "file": file, **below}
    descriptors = [text for n, layer in enumerate(layers) for text in ("-add-fd", f"set={n},fd={layer.fd}")]
    # report: a full scratch is the guest's trouble; by default it would stop the machine without a word
    device = "virtio-blk-pci,drive=disk,bootindex=1,werror=report,rerror=report"
    return [*descriptors, "-blockdev", json.dumps({**(node or {}), "node-name": "disk"}), "-device", device]


@contextlib.contextmanager
def _running(argv: Sequence[str], fds: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=fds,
        env=_ENVIRONMENT,
        start_new_session=True,
        restore_signals=False,  # SIGXFSZ stays ignored: at its limit the scratch refuses a write, QEMU lives
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()  # here: after a KeyboardInterrupt, Popen gives its child a quarter of a second


def _listen(process: subprocess.Popen[bytes], *, deadline_s: float, until: bytes) -> tuple[bytes, bytes]:
    """The end of what QEMU writes to stdout, and the beginning of its stderr."""
    assert process.stdout is not None
    assert process.stderr is not None
    console, complaints = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                data = os.read(key.fd, _CONSOLE_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    complaints += data[: _COMPLAINTS_BYTES - len(complaints)]
                else:
                    console += data
                    if until and until in console[-len(data) - len(until) :]:
                        return bytes(console[-_CONSOLE_BYTES:]), bytes(complaints)
                    del console[:-_CONSOLE_BYTES]
        if not selector.get_map():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
    return bytes(console), bytes(complaints)


def _reason(complaints: bytes, ended: int) -> str:
    """QEMU's first line that is not about what it can do without."""
    lines = [_OWN_ARGUMENT.sub("", line) for line in _harmless(complaints).splitlines() if line.strip()]
    told = [line for line in lines if not _IN_PASSING.search(line)] or lines
    how = f"was killed by signal {-ended}" if ended < 0 else f"ended with {ended}"
    return told[0][:_WORDS_CHARS] if told else f"QEMU {how}"


def _harmless(raw: bytes) -> str:
    """Text for a terminal: `isprintable` leaves out controls of both sets, and what turns or hides text."""
    text = _LINE_END.sub("\n", _ESCAPE.sub("", raw.decode("utf-8", "replace")))
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
