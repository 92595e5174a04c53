"""
What became of a candidate: facts in, verdict out. The order of the questions is the decision.

The machine is asked first (libvirt's lookup, the inode, the folders): it says whether anybody can still write to the
disk. Then Nova is, where there is a cloud: only its own record tells a termination from a rebuild, a shelve, a resize
or an evacuation, which look the same on the host. Without a cloud (`verdict = "libvirt"`) the machine's word must do.
The sequences behind each line were measured on a real Nova; the rows and traps have tests by their numbers.

Invariants 2 and 8: whatever cannot be told is `undecided`, which waits; an unanswered question is never a "no".
"""

import enum
from dataclasses import dataclass

from autobackup.model import Occasion, VerdictKind


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


class Answer(enum.StrEnum):
    """What Nova said of one server."""

    NOT_ASKED = "not_asked"
    SILENT = "silent"  # no answer, a fault, or one that says too little
    SERVER = "server"  # it has it; a soft-deleted one, too
    DELETED = "deleted"  # it has the record of a deleted one
    NO_RECORD = "no_record"  # 404, and in no list


class Host(enum.StrEnum):
    """The host that Nova's record names."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """Nova's word on one server."""

    answer: Answer
    host: Host = Host.NONE
    vm_state: str = ""
    task_state: str = ""
    launched: bool = True  # it has run, by `launched_at`
    control: bool = False  # the same asking saw another server of this host, alive and here: no record means no server
    reason: str = ""  # why it was silent


NOT_ASKED = Word(answer=Answer.NOT_ASKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one candidate at one moment."""

    domain: Domain
    was_defined: bool = True  # libvirt has shown its XML at least once
    link_count: int  # st_nlink of the claimed root disk; 1 = only ours is left
    named_at: Place  # where Nova still names the held inode
    last_named_at: Place  # where it was last seen named
    other_root_disk: bool  # another inode is named as the instance's root disk now
    is_current: bool = True  # it is the root disk that the domain was last seen with
    was_reverted: bool = False  # it went when an older disk came back from `_resize`
    migrated_away: bool  # the last stop was STOPPED_MIGRATED
    lease: Lease
    quiet_s: float  # since the last event or change of this instance
    quiet_required_s: float
    leaked_after_s: float  # how long a name may linger after its server is gone, before it counts as leaked
    undefined_is_released: bool = False  # config: plain libvirt, where `undefine` leaves the file behind
    cloud_is_silent: bool = False  # without Nova's word: the instance is a cloud's all the same
    nova: Word | None = None  # None: there is no cloud to be asked

    @property
    def is_dropped(self) -> bool:
        """Nova has unlinked it, and nobody else names it."""
        return self.named_at is Place.NOWHERE and self.link_count == 1

    @property
    def may_come_back(self) -> bool:
        """Nova names it where a start, or the end of a resize, finds it again."""
        return self.named_at in (Place.INSTANCE, Place.RESIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """
    What became of it, and why, in words for an operator.

    *occasion*: what a rule's `on` must name for the disk to be captured; None: by no rule.
    """

    kind: VerdictKind
    reason: str
    look_again_s: float | None = None  # for UNDECIDED: when asking again can help
    asks_nova: bool = False  # for UNDECIDED: only Nova's word is missing
    occasion: Occasion | None = None


def decide(facts: Facts) -> Verdict:
    """The verdict over *facts*. Pure and total: every combination has an answer."""
    if facts.domain is Domain.UNKNOWN:
        return _undecided("libvirt did not answer")
    if facts.other_root_disk or not (facts.is_current or facts.may_come_back):
        return _outlived(facts)
    if facts.domain is Domain.ACTIVE:
        if facts.is_dropped:
            return _undecided("its disk was unlinked while the guest runs on; taken when the guest has ended")
        return _alive("the domain is running")
    if facts.domain is Domain.INACTIVE and not (facts.is_dropped and facts.nova is not None):
        return _alive("the domain is defined")
    if facts.migrated_away:
        return _moved("the domain migrated to another host")
    if facts.nova is None:
        return _by_the_machine_alone(facts)
    if facts.quiet_s < facts.quiet_required_s:
        return _undecided("waiting for the quiet period", facts.quiet_required_s - facts.quiet_s)
    return _by_nova(facts, facts.nova)


def ordered(facts: Facts, verdict: Verdict, *, take: bool) -> Verdict:
    """
    What an operator's order makes of an undecided *verdict*: to take the disk, with an occasion, or to let it go.

    It stays undecided, so that nothing is overwritten by it; and nothing is taken that somebody may still write to.
    """
    if not take:
        return Verdict(kind=VerdictKind.UNDECIDED, reason=f"an operator let it go; it was undecided: {verdict.reason}")
    if facts.domain is not Domain.ABSENT:
        return _undecided(f"an operator wants it taken, but libvirt says that its domain is {facts.domain}")
    if facts.lease is not Lease.GRANTED:
        return _undecided("an operator wants it taken, but somebody has the disk open")
    return Verdict(
        kind=VerdictKind.UNDECIDED,
        reason=f"an operator had it taken; it was undecided: {verdict.reason}",
        occasion=Occasion.TERMINATE,
    )


def _outlived(facts: Facts) -> Verdict:
    """Another disk took its place: a rebuild, or one end of a resize."""
    if facts.may_come_back:
        return _alive("another root disk exists beside this one: a resize in flight")
    if facts.domain is Domain.ABSENT and facts.quiet_s < facts.quiet_required_s:
        return _undecided(
            "another root disk appeared; waiting for the quiet period", facts.quiet_required_s - facts.quiet_s
        )
    is_rebuild = facts.last_named_at is not Place.RESIZE and not facts.was_reverted
    return Verdict(
        kind=VerdictKind.REPLACED,
        reason="the instance has another root disk now" if facts.other_root_disk else "it had another root disk later",
        occasion=Occasion.REBUILD if is_rebuild else None,
    )


# ---- with a cloud: Nova's record ----------------------------------------------------------------------------


def _by_nova(facts: Facts, nova: Word) -> Verdict:
    match nova.answer:
        case Answer.NOT_ASKED:
            return Verdict(kind=VerdictKind.UNDECIDED, reason="waiting for Nova's word", asks_nova=True)
        case Answer.SILENT:
            return _undecided(f"Nova did not say: {nova.reason}")
        case Answer.DELETED:
            return _deleted(facts, nova)
        case Answer.SERVER:
            return _still_a_server(facts, nova)
        case Answer.NO_RECORD:
            return _without_record(facts, nova)


def _deleted(facts: Facts, nova: Word) -> Verdict:
    if nova.host is Host.ELSEWHERE:
        return _moved("Nova deleted it on another host; this is a stale copy")
    if not nova.launched:
        return _moved("Nova deleted it, and it was never launched: a failed build")
    if nova.host is Host.NONE:
        return _undecided("Nova deleted it while it was on no host; an operator must say whether this was its last")
    if not facts.is_current and facts.named_at is Place.RESIZE:
        return Verdict(kind=VerdictKind.REPLACED, reason="Nova deleted it; this is the stale end of a resize")
    return _terminated(facts, "Nova deleted it on this host")


def _still_a_server(facts: Facts, nova: Word) -> Verdict:
    is_gone = facts.link_count == 1 or facts.named_at is Place.RESIZE
    if nova.host is Host.ELSEWHERE:
        if is_gone:
            return _moved("Nova has it on another host")
        return _undecided("Nova has it on another host, but its disk is still named here")
    if nova.vm_state == "soft-delete":
        return _undecided("it is soft-deleted, and can be restored until Nova reclaims it")
    if nova.host is Host.NONE and nova.vm_state == "shelved_offloaded":
        if facts.link_count > 1:
            return _undecided("it is shelved and offloaded, but its disk is still named here")
        return Verdict(
            kind=VerdictKind.MOVED,
            reason="it is shelved and offloaded: a snapshot of it is in Glance",
            occasion=Occasion.SHELVE_OFFLOAD,
        )
    if nova.task_state:
        return _undecided(f"Nova is at work on it: {nova.task_state}")
    if not nova.launched and is_gone:
        return _moved("it was never launched: a failed build")
    if nova.vm_state == "error":
        return _undecided("Nova has it in error; waiting for it to be mended or deleted")
    return _undecided(
        f"Nova has it as {nova.vm_state or 'a server'}, but its domain is gone: a lost domain, or a delete under way"
    )


def _without_record(facts: Facts, nova: Word) -> Verdict:
    """Archived, or deleted long ago: absence proves only something where presence was seen."""
    if not nova.control:
        return _undecided("Nova has no record of it, nor showed any other server of this host: that proves nothing")
    if not facts.was_defined:
        return _undecided("Nova has no record of it, and it was never seen defined here")
    if facts.last_named_at is Place.RESIZE:
        return _undecided("Nova has no record of it, and its disk was one end of a resize")
    if facts.may_come_back:
        return _undecided("Nova has no record of it, but its folder still names the disk")
    return _terminated(facts, "Nova has no record of it any more")


def _terminated(facts: Facts, because: str) -> Verdict:
    """Terminated, by the cloud's word; the disk must be final, too."""
    if not facts.is_dropped and facts.quiet_s < facts.leaked_after_s:
        left_s = facts.leaked_after_s - facts.quiet_s
        return _undecided(f"{because}; waiting for its disk to be unlinked", left_s)
    if facts.lease is not Lease.GRANTED:
        return _undecided(f"{because}, but somebody has the disk open")
    where = "its disk has no other name" if facts.is_dropped else "its disk was left behind"
    return Verdict(
        kind=VerdictKind.TERMINATED,
        reason=f"{because}; {where}, and nobody has it open",
        occasion=Occasion.TERMINATE,
    )


# ---- without one: libvirt, the inode and the folder -----------------------------------------------------------


def _by_the_machine_alone(facts: Facts) -> Verdict:
    if facts.named_at is Place.RESIZE:
        return _undecided("a resize waits to be confirmed or reverted")
    if facts.named_at is Place.INSTANCE and not facts.undefined_is_released:
        return _undecided("the domain is gone but its folder still names the disk: start, hard reboot or lost domain")
    if facts.named_at is Place.NOWHERE and facts.link_count > 1:
        return _undecided("the disk has a name that is neither ours nor Nova's")
    if facts.named_at is Place.NOWHERE and facts.last_named_at is Place.RESIZE:
        return _moved("the old disk of a confirmed resize; the server lives elsewhere")
    required_s = facts.leaked_after_s if facts.named_at is Place.DELETED else facts.quiet_required_s
    if facts.quiet_s < required_s:
        return _undecided("waiting for the quiet period", required_s - facts.quiet_s)
    if facts.lease is not Lease.GRANTED:
        return _undecided("somebody has the disk open")
    if facts.cloud_is_silent:
        return _undecided("the domain carries Nova's metadata, and Nova was not asked (see verdict_despite_nova)")
    return Verdict(kind=VerdictKind.TERMINATED, reason=_TERMINATED_BECAUSE[facts.named_at], occasion=Occasion.TERMINATE)


_TERMINATED_BECAUSE = {
    Place.NOWHERE: "the domain is gone, Nova unlinked the disk, and nobody has it open",
    Place.DELETED: "the domain is gone and Nova left the disk behind in its _del folder",
    Place.INSTANCE: "the domain is undefined, which the configuration takes as its release",
    Place.RESIZE: "unreachable",
}


def _alive(reason: str) -> Verdict:
    return Verdict(kind=VerdictKind.ALIVE, reason=reason)


def _moved(reason: str) -> Verdict:
    return Verdict(kind=VerdictKind.MOVED, reason=reason)


def _undecided(reason: str, look_again_s: float | None = None) -> Verdict:
    return Verdict(kind=VerdictKind.UNDECIDED, reason=reason, look_again_s=look_again_s)
