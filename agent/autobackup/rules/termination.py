"""
What became of a candidate: facts in, verdict out. The order of the questions is the decision.

Without a cloud the facts are libvirt's, the inode's and the folder's (`verdict = "libvirt"`). Nova's record adds
inputs to `Facts`, not a second function. The sequences behind each line were measured on a real Nova: UNDEFINED
alone is noise (start, hard reboot and live snapshot emit it), nlink 1 alone lies (rebuild, resize confirm), and
an unanswered question is never a "no".

Invariants 2 and 8: whatever cannot be told is `undecided`, which waits; only `terminated` leads to a job.
"""

import enum
from dataclasses import dataclass

from autobackup.model import VerdictKind


class Domain(enum.StrEnum):
    """libvirt's answer to a lookup of the uuid; UNKNOWN when there was no answer."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class Place(enum.StrEnum):
    """The folder of Nova's that names, or last named, the held inode."""

    INSTANCE = "instance"  # <uuid>/
    RESIZE = "resize"  # <uuid>_resize/
    DELETED = "deleted"  # <uuid>_del/
    NOWHERE = "nowhere"


class Lease(enum.StrEnum):
    """F_SETLEASE F_WRLCK on our link: GRANTED means that nobody has the inode open."""

    GRANTED = "granted"
    BUSY = "busy"
    NOT_TRIED = "not_tried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one candidate at one moment."""

    domain: Domain
    link_count: int  # st_nlink of the claimed root disk; 1 = only ours is left
    named_at: Place  # where Nova still names the held inode
    last_named_at: Place  # where it was last seen named
    other_root_disk: bool  # another inode is the instance's root disk now
    migrated_away: bool  # the last stop was STOPPED_MIGRATED
    lease: Lease
    quiet_s: float  # since the last event or change of this instance
    quiet_required_s: float
    leaked_after_s: float  # how long a `_del` may linger before it counts as leaked
    undefined_is_released: bool = False  # config: plain libvirt, where `undefine` leaves the file behind
    cloud_is_silent: bool = False  # the instance is a cloud's, and the cloud was not or could not be asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of it, and why, in words for an operator."""

    kind: VerdictKind
    reason: str
    look_again_s: float | None = None  # for UNDECIDED: when asking again can help


def decide(facts: Facts) -> Verdict:
    """The verdict over *facts*. Pure and total: every combination has an answer."""
    if facts.domain is Domain.UNKNOWN:
        return _undecided("libvirt did not answer")
    if facts.other_root_disk:
        if facts.named_at in (Place.INSTANCE, Place.RESIZE):
            return _alive("another root disk exists beside this one: a resize in flight")
        if facts.domain is Domain.ABSENT and facts.quiet_s < facts.quiet_required_s:
            return _undecided("another root disk appeared; waiting for the quiet period", _rest(facts))
        return Verdict(kind=VerdictKind.REPLACED, reason="the instance has another root disk now")
    if facts.domain is Domain.ACTIVE:
        return _alive("the domain is running")
    if facts.domain is Domain.INACTIVE:
        return _alive("the domain is defined")
    if facts.migrated_away:
        return Verdict(kind=VerdictKind.MOVED, reason="the domain migrated to another host")
    if facts.named_at is Place.RESIZE:
        return _undecided("a resize waits to be confirmed or reverted")
    if facts.named_at is Place.INSTANCE and not facts.undefined_is_released:
        return _undecided("the domain is gone but its folder still names the disk: start, hard reboot or lost domain")
    if facts.named_at is Place.NOWHERE and facts.link_count > 1:
        return _undecided("the disk has a name that is neither ours nor Nova's")
    if facts.named_at is Place.NOWHERE and facts.last_named_at is Place.RESIZE:
        return Verdict(kind=VerdictKind.MOVED, reason="the old disk of a confirmed resize; the server lives elsewhere")
    required_s = facts.leaked_after_s if facts.named_at is Place.DELETED else facts.quiet_required_s
    if facts.quiet_s < required_s:
        return _undecided("waiting for the quiet period", required_s - facts.quiet_s)
    if facts.lease is not Lease.GRANTED:
        return _undecided("somebody has the disk open")
    if facts.cloud_is_silent:
        return _undecided("the domain carries Nova's metadata, and Nova was not asked (see verdict_despite_nova)")
    return Verdict(kind=VerdictKind.TERMINATED, reason=_TERMINATED_BECAUSE[facts.named_at])


_TERMINATED_BECAUSE = {
    Place.NOWHERE: "the domain is gone, Nova unlinked the disk, and nobody has it open",
    Place.DELETED: "the domain is gone and Nova left the disk behind in its _del folder",
    Place.INSTANCE: "the domain is undefined, which the configuration takes as its release",
    Place.RESIZE: "unreachable",
}


def _alive(reason: str) -> Verdict:
    return Verdict(kind=VerdictKind.ALIVE, reason=reason)


def _undecided(reason: str, look_again_s: float | None = None) -> Verdict:
    return Verdict(kind=VerdictKind.UNDECIDED, reason=reason, look_again_s=look_again_s)


def _rest(facts: Facts) -> float:
    return max(facts.quiet_required_s - facts.quiet_s, 0.0)
