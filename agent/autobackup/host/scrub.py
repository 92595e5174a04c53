"""
The scrub: the only place that overwrites a disk, behind every gate of invariant 2.

No byte is overwritten unless the job is in `scrubbing` with verdict `terminated` and every copy settled
(`rules.lifecycle.scrub_refusal`), the link is the job's own in the job's folder, inode and generation are those
that were captured, on the spool's own device, st_nlink is 1, and a lease was granted. A gate that is closed raises;
nothing was touched then. Backing files never come here: they are not the job's files.

What a method may promise: an overwrite in place on ext4 or xfs without reflinks is a "Clear" in the words of NIST
SP 800-88; an SSD, a journal with data or a copy-on-write layer below may keep older blocks.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Final, TypeAlias

from autobackup.errors import ConfigError, ScrubRefused, SpoolUnavailable
from autobackup.host.disks import HeldDisk
from autobackup.host.filesystems import sync_folder
from autobackup.model import HeldFile, JobRecord
from autobackup.rules.lifecycle import scrub_refusal

GROUP: Final = "autobackup.scrub"

ScrubMethod: TypeAlias = Callable[[int, Iterable[tuple[int, int]], int], None]
"""
`method(fd, ranges, size_bytes)`: destroy the bytes of *ranges* (offset, length) through *fd*, open for reading and
writing, and have them on the medium when it returns. *size_bytes* is the file's size. It does not unlink.
"""


def load_methods() -> Mapping[str, ScrubMethod]:
    """Every installed method by name; a site adds its own as an entry point of the group `autobackup.scrub`."""
    return {point.name: point.load() for point in entry_points(group=GROUP)}


def method_named(name: str, methods: Mapping[str, ScrubMethod]) -> ScrubMethod:
    try:
        return methods[name]
    except KeyError:
        raise ConfigError(f"scrub method {name!r} is not installed; there are: {', '.join(sorted(methods))}") from None


def scrub_file(job: JobRecord, held: HeldFile, *, folder: str, method: ScrubMethod) -> bool:
    """
    Destroy one file of *job* and unlink it. False when it is gone already: a crash came after the unlink.

    Blocks for as long as the disk takes. Raises `ScrubRefused` (a gate is closed), `DiskBusy` (somebody has it
    open), `SpoolUnavailable` (the disk or its filesystem failed).
    """
    refusal = scrub_refusal(job)
    if refusal is not None:
        raise ScrubRefused(f"job {job.job}: {refusal}")
    if held not in job.files:
        raise ScrubRefused(f"job {job.job}: {held.link} is not one of its files")
    path = os.path.join(folder, held.link)
    if not os.path.lexists(path):
        return False
    try:
        with HeldDisk(path, writable=True) as disk:
            _check_gates(disk, held, folder)
            method(disk.fd, list(disk.data_ranges()), disk.identity.size_bytes)
            os.ftruncate(disk.fd, 0)  # gives the blocks back even if the unlink is lost in a crash
            os.fsync(disk.fd)
            os.unlink(path)
        sync_folder(folder)
    except OSError as exc:
        raise SpoolUnavailable(f"{path}: scrub: {exc.strerror or exc}") from exc
    return True


def _check_gates(disk: HeldDisk, held: HeldFile, folder: str) -> None:
    if not disk.identity.same_inode(held.identity):
        raise ScrubRefused(f"{disk.path}: is inode {disk.identity.inode}, captured was {held.identity.inode}")
    if disk.identity.device != os.stat(folder).st_dev:
        raise ScrubRefused(f"{disk.path}: is not on the spool's device")
    if disk.link_count() != 1:
        raise ScrubRefused(f"{disk.path}: has another name")
    disk.require_idle()
