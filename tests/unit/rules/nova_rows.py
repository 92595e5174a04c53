"""
The decision table of facts/nova.md, rows 1 to 33: what this host and Nova show at each moment, and what it means.

A moment is told by how the domain and the disk stand (`running`, `off`, `undefined`: named in Nova's folder;
`unlinked`, `gone`: the last name is ours) and by Nova's word. Its quiet period is over unless it says otherwise: the
hardest case, since whatever is undecided then is undecided by its facts and not for want of time.
"""

from dataclasses import dataclass
from typing import Any

from autobackup.model import Occasion, VerdictKind
from autobackup.rules.termination import Answer, Domain, Facts, Host, Lease, Place, Word

QUIET_S = 60.0
LEAKED_S = 3600.0

TERMINATED, ALIVE, MOVED = VerdictKind.TERMINATED, VerdictKind.ALIVE, VerdictKind.MOVED
REPLACED, UNDECIDED = VerdictKind.REPLACED, VerdictKind.UNDECIDED
TERMINATE, REBUILD, SHELVE_OFFLOAD = Occasion.TERMINATE, Occasion.REBUILD, Occasion.SHELVE_OFFLOAD
HERE, ELSEWHERE, NOWHERE = Host.HERE, Host.ELSEWHERE, Host.NONE


@dataclass(frozen=True)
class Moment:
    """When in the operation, the facts then, and the verdict."""

    when: str
    facts: Facts
    kind: VerdictKind
    occasion: Occasion | None = None


# ---- Nova's word -------------------------------------------------------------------------------------------------


def server(vm_state: str = "active", task: str = "", *, host: Host = HERE, launched: bool = True) -> Word:
    return Word(answer=Answer.SERVER, host=host, vm_state=vm_state, task_state=task, launched=launched)


def deleted(host: Host = HERE, *, launched: bool = True) -> Word:
    return Word(answer=Answer.DELETED, host=host, vm_state="deleted", launched=launched)


def no_record(*, control: bool = True) -> Word:
    return Word(answer=Answer.NO_RECORD, control=control)


SILENT = Word(answer=Answer.SILENT, reason="503")
OFFLOADED = server("shelved_offloaded", host=NOWHERE)

# ---- how the domain and the disk stand ---------------------------------------------------------------------------


def standing(nova: Word | None, /, **facts: Any) -> Facts:
    place = facts.pop("place", Place.INSTANCE)
    usual = {"link_count": 2, "named_at": place, "last_named_at": place, "other_root_disk": False,
             "migrated_away": False, "lease": Lease.GRANTED, "quiet_s": QUIET_S, "quiet_required_s": QUIET_S,
             "leaked_after_s": LEAKED_S, "nova": nova}  # fmt: skip
    return Facts(**{**usual, **facts})


def running(nova: Word | None = None, /, **facts: Any) -> Facts:
    return standing(nova or server(), **{"domain": Domain.ACTIVE, "lease": Lease.BUSY, **facts})


def off(nova: Word, /, **facts: Any) -> Facts:
    """Defined and not running; the disk is named."""
    return standing(nova, **{"domain": Domain.INACTIVE, **facts})


def undefined(nova: Word, /, **facts: Any) -> Facts:
    """No domain; the disk is named."""
    return standing(nova, **{"domain": Domain.ABSENT, **facts})


def unlinked(nova: Word, /, *, last: Place = Place.DELETED, **facts: Any) -> Facts:
    """Defined and not running; the last name is ours."""
    return off(nova, **{"link_count": 1, "named_at": Place.NOWHERE, "last_named_at": last, **facts})


def gone(nova: Word, /, *, last: Place = Place.DELETED, **facts: Any) -> Facts:
    """No domain; the last name is ours."""
    return undefined(nova, **{"link_count": 1, "named_at": Place.NOWHERE, "last_named_at": last, **facts})


def under_the_guest(nova: Word, /, **facts: Any) -> Facts:
    """The guest runs, and the last name is ours."""
    return running(nova, **{"link_count": 1, "named_at": Place.NOWHERE, "last_named_at": Place.DELETED, **facts})


# ---- the rows ----------------------------------------------------------------------------------------------------

at = Moment
DELETING = server(task="deleting")
IN_RESIZE = {"place": Place.RESIZE}
IN_DEL = {"place": Place.DELETED}
REVERTING = server("resized", "resize_reverting")
# what the operation does to the server: the column "termination?"
TERMINATING = {"1", "2", "3d", "4", "5", "5b", "6d", "8", "9", "26"}

ROWS: dict[str, tuple[str, list[Moment]]] = {
    "1": ("delete, running", [
        at("before", running(), ALIVE),
        at("asked for, not yet begun", running(DELETING), ALIVE),
        at("destroyed, still named", off(DELETING), ALIVE),
        at("renamed", off(DELETING, **IN_DEL), ALIVE),
        at("unlinked, still defined, Nova at work", unlinked(DELETING), UNDECIDED),
        at("undefined, no 404 yet", gone(DELETING), UNDECIDED),
        at("undefined, no 404 for hours", gone(DELETING, quiet_s=LEAKED_S), UNDECIDED),
        at("undefined, the network failed: error", gone(server("error")), UNDECIDED),
        at("deleted here, not yet quiet", gone(deleted(), quiet_s=QUIET_S - 0.001), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
        at("deleted here, the rename not seen", gone(deleted(), last=Place.INSTANCE), TERMINATED, TERMINATE),
        at("of a paused one", gone(deleted(), quiet_s=LEAKED_S), TERMINATED, TERMINATE),
        at("deleted here, QEMU not dead", gone(deleted(), lease=Lease.BUSY), UNDECIDED),
        at("deleted here, the lease not tried", gone(deleted(), lease=Lease.NOT_TRIED), UNDECIDED),
        at("deleted here, libvirtd dead", gone(deleted(), domain=Domain.UNKNOWN), UNDECIDED),
    ]),
    "2": ("delete, stopped", [
        at("before", off(server("stopped")), ALIVE),
        at("before, suspended", off(server("suspended"), quiet_s=LEAKED_S), ALIVE),
        at("before, shelved and not offloaded", off(server("shelved", "deleting")), ALIVE),
        at("unlinked, no event yet", unlinked(server("stopped", "deleting")), UNDECIDED),
        at("undefined, no 404 yet", gone(server("stopped", "deleting")), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "3": ("soft delete", [
        at("destroyed", off(server("active", "soft-deleting")), ALIVE),
        at("waiting to be reclaimed", off(server("soft-delete"), quiet_s=LEAKED_S), ALIVE),
        at("its domain lost meanwhile", undefined(server("soft-delete"), quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "3r": ("restore", [
        at("undefined", undefined(server("soft-delete", "restoring")), UNDECIDED),
        at("defined", off(server("soft-delete", "restoring")), ALIVE),
        at("running", running(), ALIVE),
    ]),
    "3d": ("reclaim", [
        at("before", off(server("soft-delete")), ALIVE),
        at("unlinked, still defined", unlinked(server("soft-delete", "deleting")), UNDECIDED),
        at("undefined, no 404 yet, no task shown", gone(server("soft-delete")), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "4": ("delete, nova-compute restarting", [
        at("waiting for it", running(DELETING, quiet_s=LEAKED_S), ALIVE),
        at("waiting for it, stopped", off(DELETING, quiet_s=LEAKED_S), ALIVE),
        at("it is back: unlinked", gone(DELETING), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "5": ("local delete, nova-compute down", [
        at("404 while the guest writes", running(deleted(), quiet_s=LEAKED_S), ALIVE),
        at("no record while the guest writes", running(no_record(), quiet_s=LEAKED_S), ALIVE),
        at("the reaper destroyed it", off(deleted()), ALIVE),
        at("unlinked, not yet quiet", unlinked(deleted(), quiet_s=0.0), UNDECIDED),
        at("undefined", gone(deleted()), TERMINATED, TERMINATE),
        at("of a lost domain, nova-compute down", undefined(deleted(), quiet_s=LEAKED_S), TERMINATED, TERMINATE),
    ]),
    "5b": ("local delete, nothing reaps", [
        at("unlinked under the guest", under_the_guest(deleted()), UNDECIDED),
        at("unlinked under the guest for hours", under_the_guest(deleted(), quiet_s=LEAKED_S), UNDECIDED),
        at("a paused writer", under_the_guest(deleted(), lease=Lease.GRANTED), UNDECIDED),
        at("the domain is lost and QEMU is not", gone(deleted(), lease=Lease.BUSY), UNDECIDED),
        at("off by libvirt, open by QEMU", unlinked(deleted(), lease=Lease.BUSY), UNDECIDED),
        at("the guest ended; it stays defined", unlinked(deleted()), TERMINATED, TERMINATE),
        at("the guest ended; it was transient", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "6s": ("delete in VERIFY_RESIZE, on the source", [
        at("still in _resize", off(server("resized", "deleting", host=ELSEWHERE), **IN_RESIZE), ALIVE),
        at("unlinked", unlinked(server("resized", "deleting", host=ELSEWHERE), last=Place.RESIZE), MOVED),
        at("deleted there", gone(deleted(ELSEWHERE), last=Place.RESIZE), MOVED),
        at("the old end, same host", gone(deleted(), last=Place.RESIZE, is_current=False), REPLACED),
        at("the old end, same host, still defined", unlinked(DELETING, last=Place.RESIZE, is_current=False), REPLACED),
    ]),
    "6d": ("delete in VERIFY_RESIZE, on the destination", [
        at("unlinked, the confirm reset the task", gone(server("active")), UNDECIDED),
        at("unlinked, shown as resized", gone(server("resized")), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "7": ("delete of a shelved-offloaded one", [
        at("before, its disk still held", gone(OFFLOADED), MOVED, SHELVE_OFFLOAD),
        at("deleted on no host", gone(deleted(NOWHERE), quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "8": ("delete of a lost domain", [
        at("lost", undefined(server("error"), quiet_s=LEAKED_S), UNDECIDED),
        at("lost, transient, seen as active", undefined(server("active"), quiet_s=LEAKED_S), UNDECIDED),
        at("unlinked silently", gone(server("error", "deleting")), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "9": ("delete, rmtree fails", [
        at("in _del, no 404 yet", undefined(DELETING, **IN_DEL, quiet_s=LEAKED_S), UNDECIDED),
        at("in _del, Nova may come back", undefined(deleted(), **IN_DEL, quiet_s=LEAKED_S - 0.001), UNDECIDED),
        at("in _del for good", undefined(deleted(), **IN_DEL, quiet_s=LEAKED_S), TERMINATED, TERMINATE),
        at("in _del, open", undefined(deleted(), **IN_DEL, quiet_s=LEAKED_S, lease=Lease.BUSY), UNDECIDED),
        at("in _del, archived", undefined(no_record(), **IN_DEL, quiet_s=LEAKED_S), TERMINATED, TERMINATE),
        at("in _resize, its only disk", undefined(deleted(), **IN_RESIZE, quiet_s=LEAKED_S), TERMINATED, TERMINATE),
        at("in _resize, a stale end", undefined(deleted(), **IN_RESIZE, quiet_s=LEAKED_S, is_current=False), REPLACED),
        at("under a name not Nova's", gone(deleted(), link_count=2, quiet_s=LEAKED_S), TERMINATED, TERMINATE),
        at("Nova came back for it", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "10": ("stop, poweroff, crash", [
        at("stopping", off(server("active", "powering-off")), ALIVE),
        at("stopped", off(server("stopped"), quiet_s=LEAKED_S), ALIVE),
        at("killed, not yet seen by Nova", off(server("active")), ALIVE),
    ]),
    "11": ("start, hard reboot", [
        at("undefined", undefined(server("stopped", "powering-on"), quiet_s=0.0), UNDECIDED),
        at("undefined for minutes", undefined(server("active", "reboot_started_hard")), UNDECIDED),
        at("undefined, where plain libvirt would release", undefined(
            server("stopped", "powering-on"), undefined_is_released=True), UNDECIDED),
        at("defined", off(server("stopped", "powering-on")), ALIVE),
        at("running", running(), ALIVE),
    ]),
    "11f": ("hard reboot that fails", [
        at("undefined again", undefined(server("error"), quiet_s=LEAKED_S), UNDECIDED),
        at("until the next try", running(), ALIVE),
    ]),
    "12": ("soft reboot", [
        at("off", off(server("active", "reboot_started")), ALIVE),
        at("running", running(server("active", "reboot_started")), ALIVE),
    ]),
    "13": ("pause, suspend, resume", [
        at("paused", running(server("paused")), ALIVE),
        at("suspended", off(server("suspended"), quiet_s=LEAKED_S), ALIVE),
        at("resuming", running(server("suspended", "resuming")), ALIVE),
    ]),
    "14": ("rescue, unrescue", [
        at("stopped for it", off(server("active", "rescuing")), ALIVE),
        at("rescued", running(server("rescued"), quiet_s=LEAKED_S), ALIVE),
        at("stopped again", off(server("rescued", "unrescuing")), ALIVE),
    ]),
    "15": ("rebuild", [
        at("powered off", off(server(task="rebuilding")), ALIVE),
        at("unlinked, still defined", unlinked(server(task="rebuilding")), UNDECIDED),
        at("undefined", gone(server(task="rebuilding"), quiet_s=0.0), UNDECIDED),
        at("while volumes are attached", gone(server(task="rebuild_block_device_mapping")), UNDECIDED),
        at("while the image is fetched", gone(server(task="rebuild_spawning"), quiet_s=LEAKED_S), UNDECIDED),
        at("the spawn failed", gone(server("error"), quiet_s=LEAKED_S), UNDECIDED),
        at("the new disk appeared", gone(
            server(task="rebuild_spawning"), other_root_disk=True, quiet_s=0.0), UNDECIDED),
        at("the new disk is there", gone(server(task="rebuild_spawning"), other_root_disk=True), REPLACED, REBUILD),
        at("the old one left in _del", undefined(
            server(task="rebuild_spawning"), **IN_DEL, other_root_disk=True), REPLACED, REBUILD),
        at("defined again", unlinked(server(task="rebuild_spawning"), other_root_disk=True), REPLACED, REBUILD),
        at("running again", under_the_guest(server(), other_root_disk=True, quiet_s=0.0), REPLACED, REBUILD),
        at("deleted later, the old disk", gone(deleted(), is_current=False), REPLACED, REBUILD),
        at("deleted later, the new disk", gone(deleted()), TERMINATED, TERMINATE),
    ]),
    "16": ("resize, on the source", [
        at("in _resize, copying", off(server("active", "resize_migrating"), **IN_RESIZE), ALIVE),
        at("in _resize, waiting", off(server("resized", host=ELSEWHERE), **IN_RESIZE, quiet_s=LEAKED_S), ALIVE),
        at("copying, domain lost", undefined(server("active", "resize_migrating"), **IN_RESIZE), UNDECIDED),
        at("waiting, domain lost", undefined(server("resized", host=ELSEWHERE), **IN_RESIZE), MOVED),
    ]),
    "17": ("confirm, on the source", [
        at("before", off(server("resized", host=ELSEWHERE), **IN_RESIZE), ALIVE),
        at("unlinked, still defined", unlinked(server(host=ELSEWHERE), last=Place.RESIZE), MOVED),
        at("undefined", gone(server(host=ELSEWHERE), last=Place.RESIZE), MOVED),
        at("undefined, at work there", gone(server("resized", "resize_confirming", host=ELSEWHERE)), MOVED),
        at("undefined, Nova silent", gone(SILENT, last=Place.RESIZE, quiet_s=LEAKED_S), UNDECIDED),
        at("deleted there later", gone(deleted(ELSEWHERE), last=Place.RESIZE), MOVED),
        at("deleted there and archived", gone(no_record(), last=Place.RESIZE, quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "18": ("revert, on the destination", [
        at("undefined, the host not yet reset", gone(REVERTING), UNDECIDED),
        at("the host is the source", gone(server("resized", "resize_reverting", host=ELSEWHERE)), MOVED),
        at("done", gone(server(host=ELSEWHERE)), MOVED),
        at("on shared storage", undefined(server(host=ELSEWHERE), quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "19": ("revert, on the source", [
        at("in _resize", off(server("resized", "resize_reverting", host=ELSEWHERE), **IN_RESIZE), ALIVE),
        at("back in its place", off(REVERTING), ALIVE),
        at("running", running(), ALIVE),
    ]),
    "20": ("resize on the same host", [
        at("the old disk is set aside", off(server(task="resize_migrating"), **IN_RESIZE), ALIVE),
        at("the new disk is there", off(server(task="resize_finish"), **IN_RESIZE, other_root_disk=True), ALIVE),
        at("the old disk, waiting", running(
            server("resized"), **IN_RESIZE, is_current=False, other_root_disk=True), ALIVE),
        at("the old disk, the new not held", running(server("resized"), **IN_RESIZE, is_current=False), ALIVE),
        at("the old disk, the new not held, off", off(server("resized"), **IN_RESIZE, is_current=False), ALIVE),
        at("the old disk, a start of the new", undefined(
            server("resized", "powering-on"), **IN_RESIZE, is_current=False, other_root_disk=True), ALIVE),
        at("the new disk", running(server("resized")), ALIVE),
    ]),
    "20c": ("confirm on the same host", [
        at("the old disk, running", under_the_guest(
            server(), last_named_at=Place.RESIZE, is_current=False, other_root_disk=True), REPLACED),
        at("the old disk, off", unlinked(
            server("stopped"), last=Place.RESIZE, is_current=False, other_root_disk=True), REPLACED),
        at("the new disk", running(), ALIVE),
    ]),
    "20r": ("revert on the same host", [
        at("the new disk, undefined", undefined(REVERTING), UNDECIDED),
        at("the new disk, unlinked", gone(REVERTING, last=Place.INSTANCE), UNDECIDED),
        at("the new disk, the old one back", gone(
            REVERTING, last=Place.INSTANCE, other_root_disk=True, was_reverted=True, quiet_s=0.0), UNDECIDED),
        at("the new disk, the old one back for long", gone(
            REVERTING, last=Place.INSTANCE, other_root_disk=True, was_reverted=True), REPLACED),
        at("the new disk, the old one running", under_the_guest(
            server(), other_root_disk=True, was_reverted=True, is_current=False), REPLACED),
        at("the old disk, the new one unlinked", undefined(REVERTING, **IN_RESIZE, is_current=False), UNDECIDED),
        at("the old disk, back, not defined", undefined(REVERTING, is_current=False), UNDECIDED),
        at("the old disk, back, defined", off(REVERTING, is_current=False), ALIVE),
        at("the old disk, running", running(), ALIVE),
    ]),
    "21": ("cross-cell resize", [
        at("source undefined", undefined(server(task="resize_migrating")), UNDECIDED),
        at("waiting", undefined(server("resized", host=ELSEWHERE), quiet_s=LEAKED_S), UNDECIDED),
        at("waiting, the other cell down", undefined(SILENT, quiet_s=LEAKED_S), UNDECIDED),
        at("waiting, the other cell in no list", undefined(no_record(), quiet_s=LEAKED_S), UNDECIDED),
        at("confirmed", gone(server(host=ELSEWHERE)), MOVED),
        at("reverted", running(), ALIVE),
    ]),
    "22": ("live migration, shared, on the source", [
        at("STOPPED_MIGRATED", undefined(server(task="migrating"), migrated_away=True, quiet_s=0.0), MOVED),
        at("it was missed, migrating", undefined(server(task="migrating")), UNDECIDED),
        at("it was missed, the other writes", undefined(server(host=ELSEWHERE), lease=Lease.BUSY), UNDECIDED),
        at("it was missed, deleted there", gone(deleted(ELSEWHERE)), MOVED),
    ]),
    "23": ("live migration, block, on the source", [
        at("STOPPED_MIGRATED", undefined(server(task="migrating"), migrated_away=True, quiet_s=0.0), MOVED),
        at("unlinked", gone(server(task="migrating"), migrated_away=True), MOVED),
        at("it was missed, Nova yet says here", gone(server(task="migrating")), UNDECIDED),
        at("it was missed, Nova says there", gone(server(host=ELSEWHERE)), MOVED),
    ]),
    "24": ("live migration, on the destination", [
        at("arriving", running(server(task="migrating", host=ELSEWHERE), was_defined=False), ALIVE),
        at("arrived", running(), ALIVE),
    ]),
    "25": ("live migration that fails, on the destination", [
        at("unlinked", gone(server(task="migrating", host=ELSEWHERE), was_defined=False), MOVED),
        at("deleted there later", gone(deleted(ELSEWHERE), was_defined=False), MOVED),
        at("deleted there and archived", gone(no_record(), was_defined=False, quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "26": ("delete during a live migration", [
        at("destroyed", off(DELETING), ALIVE),
        at("unlinked", gone(DELETING), UNDECIDED),
        at("deleted here", gone(deleted()), TERMINATED, TERMINATE),
        at("on the destination", gone(deleted(ELSEWHERE), was_defined=False), MOVED),
    ]),
    "27": ("shelve, offloaded at once", [
        at("the snapshot is uploaded", off(server("active", "shelving_image_uploading"), quiet_s=LEAKED_S), ALIVE),
        at("unlinked, still defined", unlinked(server("shelved", "shelving_offloading")), UNDECIDED),
        at("undefined", gone(server("shelved", "shelving_offloading")), UNDECIDED),
        at("offloaded, the host not yet reset", gone(server("shelved_offloaded")), UNDECIDED),
        at("offloaded, not yet quiet", gone(OFFLOADED, quiet_s=0.0), UNDECIDED),
        at("offloaded", gone(OFFLOADED), MOVED, SHELVE_OFFLOAD),
        at("offloaded, left in _del", undefined(OFFLOADED, **IN_DEL, quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "27s": ("shelve, offloaded later", [at("shelved", off(server("shelved"), quiet_s=LEAKED_S), ALIVE)]),
    "28": ("unshelve", [
        at("elsewhere, the old disk", gone(server(host=ELSEWHERE)), MOVED),
        # an old disk that was not let go at the offload cannot be told from that of a rebuild any more
        at("here, the old disk", under_the_guest(server(), other_root_disk=True), REPLACED, REBUILD),
        at("here, the new disk", running(), ALIVE),
    ]),
    "29": ("evacuated, the old host comes back", [
        at("the guest lives yet", running(server(task="rebuilding")), ALIVE),
        at("unlinked, Nova yet says here", gone(server(task="rebuilding"), quiet_s=LEAKED_S), UNDECIDED),
        at("unlinked, still defined", unlinked(server(host=ELSEWHERE)), MOVED),
        at("undefined", gone(server(host=ELSEWHERE)), MOVED),
        at("on shared storage", undefined(server(host=ELSEWHERE), quiet_s=LEAKED_S), UNDECIDED),
    ]),
    "30": ("live snapshot", [at("UNDEFINED while it runs", running(server(task="image_snapshot")), ALIVE)]),
    "30c": ("cold snapshot", [
        at("saved", off(server(task="image_pending_upload")), ALIVE),
        at("restored", running(), ALIVE),
    ]),
    "31": ("swap volume", [at("UNDEFINED while it runs", running(), ALIVE)]),
    "32": ("attach, detach, extend", [at("a device event", running(quiet_s=0.0), ALIVE)]),
    "33": ("failed build", [
        at("its domain starts", running(server("building", "spawning", launched=False)), ALIVE),
        at("unlinked, still defined", unlinked(server("building", "spawning", launched=False)), UNDECIDED),
        at("undefined, still at work", gone(server("building", "spawning", launched=False)), UNDECIDED),
        at("in error on no host", gone(server("error", host=NOWHERE, launched=False)), MOVED),
        at("in error here", gone(server("error", launched=False)), MOVED),
        at("in error, still named", undefined(server("error", host=NOWHERE, launched=False)), UNDECIDED),
        at("built elsewhere", gone(server("building", "spawning", host=ELSEWHERE, launched=False)), MOVED),
        at("deleted on no host", gone(deleted(NOWHERE, launched=False)), MOVED),
        at("deleted here, never launched", gone(deleted(launched=False)), MOVED),
        at("archived, never defined", gone(no_record(), was_defined=False, quiet_s=LEAKED_S), UNDECIDED),
    ]),
}  # fmt: skip
