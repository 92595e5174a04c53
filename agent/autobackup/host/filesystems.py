"""
What the spool asks of the filesystem below it: one mount with the instances, a kind that was measured, fsync.

`link(2)` between two bind mounts of one filesystem fails with EXDEV, and neither st_dev nor the path shows it.
So the probe makes a real link; a systemd `ReadWritePaths=` that names two folders makes such mounts.
"""

import contextlib
import errno
import os
from collections.abc import Iterable

from autobackup.errors import ConfigError


def check_spool(*, instances_path: str, spool_path: str, allowed: Iterable[str]) -> None:
    """Raise `ConfigError`, with the remedy, when the spool cannot hold links to disks in *instances_path*."""
    if os.path.islink(spool_path):
        raise ConfigError(f"{spool_path}: is a symbolic link; remove it, the spool must be a real folder there")
    kind = kind_of(spool_path)
    if kind not in allowed:
        raise ConfigError(
            f"{spool_path}: lies on {kind}, which was not measured; use {' or '.join(allowed)}, or add '{kind}' to "
            f"capture.filesystems after testing hard links, leases and fsync on it"
        )
    probe = os.path.join(instances_path, f".autobackup-probe-{os.getpid()}")
    target = os.path.join(spool_path, f"probe-{os.getpid()}")
    try:
        for leftover in (target, probe):  # of an agent that was killed right here; in a container the pid is the same
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
        fd = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.close(fd)
        os.link(probe, target, follow_symlinks=False)
    except OSError as exc:
        if exc.errno == errno.EXDEV:
            raise ConfigError(
                f"{spool_path}: is on another mount than {instances_path}, so no hard link can be made; unmount it, "
                f"and let systemd's ReadWritePaths= name their common parent only"
            ) from exc
        raise ConfigError(
            f"{exc.filename or spool_path}: {exc.strerror}; the agent must be able to make links here"
        ) from exc
    finally:
        for leftover in (target, probe):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)


def kind_of(path: str) -> str:
    """The type of the filesystem that *path* lies on, from /proc/self/mountinfo; "unknown" if it is not there."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            mount, _, super_block = line.partition(" - ")
            if mount.split()[2] == wanted:
                return super_block.split()[0]
    return "unknown"


def sync_folder(path: str) -> None:
    """fsync a directory: what was renamed or linked into it survives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
