"""A disk is booted as it is, by a QEMU that can do nothing else, and what it says is safe to show."""

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.lab import guest

from autobackup.errors import AutobackupError, Damaged, Refused
from autobackup.host.boot import Booted
from autobackup.host.boot import boot as boot_fastest

boot = functools.partial(boot_fastest, may_use_kvm=False)  # the one accelerator that every machine has
MiB = 1 << 20
SCRATCH = "/memfd:boot-scratch (deleted)"
needs_qemu = pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-system-x86_64", "qemu-img", "as", "ld"))), reason="needs QEMU and binutils"
)

# cli; ds = 0; dx = COM1; times over: every byte of the text, up to a NUL, to COM1; then off, as guest.S goes off
_PRINT = "fa 31c0 8ed8 fc bd{times} be247c baf803 ac 84c0 7403 ee ebf8 4d 75ef ba0406 b80020 ef f4 ebfd"


def lay_out(folder: Path, *, mode: guest.Mode) -> Path:
    """A chain of three as a restore leaves it: relative names, explicit formats. Gives the top."""
    (folder / "disks").mkdir(parents=True)
    (folder / "bases").mkdir()
    guest.build_base(folder / "bases/base", seed=guest.new_seed(), mode=mode)
    overlay(folder / "bases/middle", backing="base", backing_format="raw")
    overlay(folder / "disks/disk", backing="../bases/middle", backing_format="qcow2")
    return folder / "disks/disk"


def overlay(path: Path, *options: str, backing: str = "", backing_format: str = "raw") -> Path:
    behind = ["-u", "-b", backing, "-F", backing_format] if backing else []
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *behind, *options, str(path), str(guest.VIRTUAL_BYTES)]
    subprocess.run(argv, check=True)
    return path


def printing(path: Path, text: bytes, *, times: int = 1) -> Path:
    """A raw disk whose boot sector sends *text* to COM1 and goes off."""
    sector = bytes.fromhex(_PRINT.format(times=times.to_bytes(2, "little").hex())) + text + b"\0"
    assert len(sector) <= 510
    path.write_bytes((sector.ljust(510, b"\0") + b"\x55\xaa").ljust(MiB, b"\0"))
    return path


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
            path.stat().st_blocks,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def emulators(parent: int) -> list[int]:
    """QEMU processes that are children of *parent*, zombies too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            if name.startswith("qemu-system") and int(rest.split()[1]) == parent:
                found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], object], *, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_emulator_left() -> Iterator[None]:
    yield
    assert emulators(os.getpid()) == []


@needs_qemu
def test_a_guest_boots_and_nothing_that_it_writes_stays(tmp_path: Path) -> None:
    """Content, mtime and blocks of the whole chain; no new file; and a name with all that QEMU's options choke on."""
    target = tmp_path / 'a,b"{c}:'
    disk = lay_out(target, mode=guest.Mode.POWER_OFF)
    before = state(tmp_path)

    booted = boot(str(disk), format_name="qcow2", console_limit_s=20, within=str(target))

    assert guest.TEXT_WROTE.decode() in booted.console
    assert "SeaBIOS" in booted.console
    assert not booted.still_running, "it went off by itself"
    assert booted.accelerator == "tcg"
    assert state(tmp_path) == before


@needs_qemu
def test_it_ends_with_the_text_that_was_waited_for(tmp_path: Path) -> None:
    disk = lay_out(tmp_path, mode=guest.Mode.DEAF)

    booted = boot(str(disk), format_name="qcow2", console_limit_s=20, until=guest.TEXT_WROTE, within=str(tmp_path))

    assert guest.TEXT_WROTE.decode() in booted.console
    assert booted.still_running
    assert booted.seconds < 15


@needs_qemu
def test_a_disk_that_does_not_boot_says_so_and_ends_in_time(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB - 100))  # not whole sectors

    told = boot(str(disk), format_name="raw", console_limit_s=20, until=b"No bootable device")
    silent = boot(str(disk), format_name="raw", console_limit_s=0.3, until=b"never said")

    assert "Boot failed: not a bootable disk" in told.console
    assert silent.still_running
    assert 0.3 <= silent.seconds < 5


@needs_qemu
def test_qemu_is_alone(tmp_path: Path) -> None:
    """Seen from /proc while it runs; then Ctrl-C, which ends it at once."""
    disk = lay_out(tmp_path, mode=guest.Mode.STOP)
    before = state(tmp_path)
    seen: dict[str, str] = {}
    writable: set[str] = set()
    over = threading.Event()

    def look() -> None:
        try:
            wait_for(lambda: over.is_set() or any(map(is_filtered, emulators(os.getpid()))))
            process = Path("/proc", str(emulators(os.getpid())[0]))
            for name in ("status", "net/dev", "limits"):
                seen[name] = (process / name).read_text()
            seen["arguments"] = (process / "cmdline").read_text().replace("\0", " ")
            for fd in (process / "fd").iterdir():
                flags = int((process / "fdinfo" / fd.name).read_text().partition("flags:")[2].split()[0], 8)
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    writable.add(os.readlink(fd))
        finally:
            if not over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    watcher = threading.Thread(target=look)
    watcher.start()
    started_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            boot(str(disk), format_name="qcow2", console_limit_s=30, within=str(tmp_path))
    finally:
        over.set()
        watcher.join()

    assert time.monotonic() - started_s < 20
    assert "-nic none" in seen["arguments"]
    assert "NoNewPrivs:\t1" in seen["status"]
    assert "Seccomp:\t2" in seen["status"]
    assert "CapEff:\t0000000000000000" in seen["status"]
    assert next(line.split() for line in seen["limits"].splitlines() if "core file" in line)[4:6] == ["0", "0"]
    assert {path for path in writable if not path.startswith(("pipe:", "anon_inode:"))} == {SCRATCH, "/dev/null"}
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534" in seen["status"]
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode == 0:
        assert [line.split(":")[0].strip() for line in seen["net/dev"].splitlines()[2:]] == ["lo"]
    assert state(tmp_path) == before


def is_filtered(pid: int) -> bool:
    """It runs under the filter, which QEMU puts in place before it runs a guest. What has ended does not."""
    with contextlib.suppress(OSError):
        status = Path("/proc", str(pid), "status").read_text()
        return "Seccomp:\t2" in status and "(zombie)" not in status
    return False


@needs_qemu
def test_qemu_dies_with_us(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    program = (
        "import sys; from autobackup.host.boot import boot;"
        " boot(sys.argv[1], format_name='raw', console_limit_s=60, may_use_kvm=False)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(disk)]) as caller:
        wait_for(lambda: [pid for pid in emulators(caller.pid) if is_filtered(pid)])
        (orphan,) = emulators(caller.pid)
        caller.kill()

    try:
        wait_for(lambda: not is_filtered(orphan))
    except AssertionError:
        os.kill(orphan, signal.SIGKILL)
        raise


@needs_qemu
def test_a_hostile_console_is_harmless(tmp_path: Path) -> None:
    text = (
        b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1bPdcs\x1b\\ \x1bc\x1b(B \xc2\x9b2J \x9b2J \xe2\x80\xaeltr\xe2\x80\xac"
        b" bell\x07 back\x08\x08 one\rtwo\r\r\nthree\tfour \x0e\x7f \xef\xbb\xbf\xf3\xa0\x80\xa1 \xc3\xa4 end"
    )
    booted = boot(str(printing(tmp_path / "disk", text)), format_name="raw", console_limit_s=20)

    assert booted.console.endswith("red ]0;title Pdcs  2J \ufffd2J ltr bell back one\ntwo\nthree\tfour   ä end"), repr(
        booted.console
    )
    assert_harmless(booted)


@needs_qemu
def test_of_a_flood_the_end_is_kept(tmp_path: Path) -> None:
    disk = printing(tmp_path / "disk", b"\x1b[1m0123456789\r\n" * 20, times=600)  # 190 KiB

    booted = boot(str(disk), format_name="raw", console_limit_s=20)

    assert 40_000 < len(booted.console) <= 64 << 10
    assert booted.console.endswith("0123456789\n")
    assert "SeaBIOS" not in booted.console
    assert_harmless(booted)


def assert_harmless(booted: Booted) -> None:
    assert [char for char in booted.console if not (char in "\n\t" or char.isprintable())] == []


@needs_qemu
def test_what_cannot_be_booted_is_refused(tmp_path: Path) -> None:
    """No header leads out of the folder, to a guess, or to anything but a regular file."""
    folder = tmp_path / "restored"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(MiB))
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "text").write_text("no header")
    os.mkfifo(folder / "fifo")
    overlay(folder / "guess", backing="text").write_bytes(without_backing_format(folder / "guess"))
    overlay(folder / "bad")
    with (folder / "bad").open("r+b") as file:
        file.seek(48)
        file.write(b"\xff" * 8)  # where the refcount table is: our parser does not look at it, QEMU does
    cases: list[tuple[Path, str, type[AutobackupError], str]] = [
        (folder / "gone", "raw", Refused, "No such file"),
        (folder / "link", "raw", Refused, "symbolic link"),
        (folder / "fifo", "raw", Refused, "not a regular file"),
        (folder, "raw", Refused, "not a regular file"),
        (folder / "text", "unknown", Refused, "format is given as 'unknown'"),
        (folder / "text", "qcow2", Damaged, "no qcow2 header"),
        (folder / "guess", "qcow2", Refused, "without its format"),
        (folder / "bad", "qcow2", Refused, ": qemu-system-x86_64: .*offset invalid"),
        (overlay(folder / "data", "-o", f"data_file={folder / 'raw'}"), "qcow2", Refused, "external data file"),
        (overlay(folder / "self", backing="self", backing_format="qcow2"), "qcow2", Refused, "back one another"),
        (overlay(folder / "vmdk", backing="text", backing_format="vmdk"), "qcow2", Refused, "given as 'vmdk'"),
        (overlay(folder / "lost", backing="nowhere"), "qcow2", Refused, "No such file"),
        (overlay(folder / "json", backing='json:{"driver":"null-co"}'), "qcow2", Refused, "No such file"),
        *(
            (overlay(folder / f"out{number}", backing=name), "qcow2", Refused, "outside of")
            for number, name in enumerate(["../outside", str(tmp_path / "outside"), "link", "/etc/shadow"])
        ),
    ]
    for path, format_name, error, words in cases:
        with pytest.raises(error, match=words) as refused:
            boot(str(path), format_name=format_name, console_limit_s=20)
        assert "{" not in str(refused.value) or path.name == "json", "QEMU's words, not our arguments"


def without_backing_format(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    at = data.index(b"\xe2\x79\x2a\xca")
    data[at : at + 4] = b"\x00\x00\x00\x01"  # an extension that nobody knows
    return bytes(data)


def test_without_qemu_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=r"qemu-system-x86_64 is not installed.*package qemu-system-x86\)"):
        boot(str(tmp_path / "disk"), format_name="raw", console_limit_s=1)
