"""
Everything the agent raises on purpose, sorted by what must happen next.

    AutobackupError
    ├── ConfigError          the operator must edit a file; refuse to start
    ├── Transient            the same call may succeed later; back off and retry
    │   ├── HypervisorUnavailable
    │   ├── StoreUnavailable
    │   │   └── NotConsented     and an owner's request for it is refused
    │   ├── KeysUnavailable
    │   ├── CloudUnavailable
    │   │   └── NoRole
    │   ├── SpoolUnavailable
    │   └── DiskBusy
    ├── Refused              retrying cannot help; park the job for an operator
    │   ├── StoreRefused
    │   ├── KeyRefused
    │   ├── KeyLost          send that copy anew, under a new key
    │   ├── CloudRefused
    │   ├── TargetExists
    │   └── ScrubRefused
    └── Damaged              bytes are not what they should be; park, and never scrub
        ├── ContainerDamaged
        ├── RecordDamaged
        └── OverlayChanged

A new error goes under the branch that names its consequence. If no branch fits, the caller does not yet
know what to do with it: decide that first.
"""


class AutobackupError(Exception):
    """Root of all of them. Stopped only in the job runner and at the edge of a command."""


class ConfigError(AutobackupError):
    """A configuration file or its surroundings are wrong; the text names file, key and remedy."""


class Transient(AutobackupError):
    """The same call may succeed later; not before *retry_after_s*, where whoever was asked has said so."""

    def __init__(self, words: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class HypervisorUnavailable(Transient):
    """libvirt did not answer, or the connection is down."""


class StoreUnavailable(Transient):
    """A store is full, read-only, gone or slow; what it was given is not to be counted on."""


class NotConsented(StoreUnavailable):
    """Whoever administers the project has not granted us the roles that are its consent."""


class KeysUnavailable(Transient):
    """The source of keys cannot be read now."""


class CloudUnavailable(Transient):
    """An OpenStack service did not answer (no *status*), cannot now, or will not until somebody grants us a role."""

    def __init__(self, words: str = "", *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(words, retry_after_s=retry_after_s)
        self.status = status


class NoRole(CloudUnavailable):
    """Keystone knows us, and gives us no token for the project."""


class SpoolUnavailable(Transient):
    """The spool's filesystem is full or not writable."""


class DiskBusy(Transient):
    """Somebody has the disk open; no lease was granted."""


class Refused(AutobackupError):
    """Retrying cannot help."""


class StoreRefused(Refused):
    """A store does not hold the object that was asked for, or will not take it."""


class KeyRefused(Refused):
    """The key at hand is not the one that sealed this."""


class KeyLost(Refused):
    """The key of a sealed bundle can be had from nowhere here: what is not proven yet is sent again."""


class CloudRefused(Refused):
    """An OpenStack service says no (with *status*, where it was an answer), and would say it again."""

    def __init__(self, words: str = "", *, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


class TargetExists(Refused):
    """A path that must not exist yet does."""


class ScrubRefused(Refused):
    """A gate in front of the scrub is closed; the text names the gate."""


class Damaged(AutobackupError):
    """Bytes are not what they should be."""


class ContainerDamaged(Damaged):
    """A sealed bundle is cut, extended, edited, or sealed under another key."""


class RecordDamaged(Damaged):
    """A record in the spool or beside a sealed bundle cannot be read."""


class OverlayChanged(Damaged):
    """A disk is not the one that was read: inode, generation, size or mtime differ."""
