"""
The mount table and the loop devices of this machine: read, and undone reliably.

Nothing here decides what may be unmounted; callers pass only mounts of their own.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNMOUNT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    mount_point: Path
    kind: str
    source: str


class StillBusy(RuntimeError):
    """A mount or loop device of ours is held by a process; it was detached lazily."""


def mount_table() -> list[Mount]:
    """Every mount this process sees, in the order in which they were made."""
    table = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, source, *_ = after.split(" ")
        table.append(Mount(mount_point=Path(_unescaped(before.split(" ")[4])), kind=kind, source=source))
    return table


def mounts_below(root: Path) -> list[Mount]:
    """The mounts at or below *root*, the last made first."""
    return [mount for mount in reversed(mount_table()) if mount.mount_point.is_relative_to(root)]


def loop_devices() -> dict[str, Path]:
    """Attached loop devices and their image files, deleted ones included."""
    attached = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text().rstrip("\n").removesuffix(" (deleted)")
        except OSError:  # detached while we looked
            continue
        attached[f"/dev/{backing.parts[3]}"] = Path(name)
    return attached


def mount(*arguments: str | Path) -> None:
    _run("mount", *arguments)


def unmount(mount_point: Path, *, timeout_s: float = UNMOUNT_TIMEOUT_S) -> None:
    """Unmount, waiting for stragglers; then detach lazily and say who was holding it."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        tried = subprocess.run(["umount", str(mount_point)], capture_output=True, text=True)
        if tried.returncode == 0:
            return
        if time.monotonic() > deadline_s or not os.path.ismount(mount_point):
            break
        time.sleep(0.05)
    held_by = _holders(mount_point)
    _run("umount", "--lazy", mount_point)
    raise StillBusy(f"{mount_point}: {tried.stderr.strip()}; held by {held_by or 'another mount'}")


def wait_until_detached(image: Path, *, timeout_s: float = UNMOUNT_TIMEOUT_S) -> None:
    """Return when no loop device stands on *image*: the kernel detaches a little after umount."""
    deadline_s = time.monotonic() + timeout_s
    while devices := [device for device, backing in loop_devices().items() if backing == image]:
        if time.monotonic() > deadline_s:
            for device in devices:
                _run("losetup", "--detach", device)
            raise StillBusy(f"{image} is still attached to {', '.join(devices)}")
        time.sleep(0.01)


def _run(*argv: str | Path) -> None:
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr.strip()}")


def _holders(root: Path) -> str:
    """The processes with a file or their working folder below *root*."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        for link in (process / "cwd", process / "root", *_open_files(process)):
            try:
                target = Path(os.readlink(link))
            except OSError:
                continue
            if target.is_relative_to(root):
                found.append(f"{process.name} ({link.parent.name}/{link.name} -> {target})")
    return ", ".join(found)


def _open_files(process: Path) -> list[Path]:
    try:
        return list((process / "fd").iterdir())
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """Undo the kernel's octal escapes for space, tab, newline and backslash."""
    for code in ("040", "011", "012", "134"):
        field = field.replace("\\" + code, chr(int(code, 8)))
    return field
