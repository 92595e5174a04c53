"""
What the machine shows of a candidate: its inode, its folders, its lease; and which of an instance's files go together.

Blocks, so it is a worker's. It decides nothing: `rules.termination` does.
"""

from collections.abc import Sequence

from autobackup.config import CaptureSection
from autobackup.errors import AutobackupError, DiskBusy
from autobackup.host.claims import Claim, Claims
from autobackup.host.disks import HeldDisk
from autobackup.host.domain_xml import is_novas
from autobackup.model import InstanceRecord
from autobackup.rules.termination import NOT_ASKED, Domain, Facts, Lease, Place


class Evidence:
    """Looks at claims. *asks_nova*: its word will be needed, too."""

    def __init__(
        self, *, claims: Claims, settings: CaptureSection, verdict_despite_nova: bool, asks_nova: bool
    ) -> None:
        self._claims = claims
        self._settings = settings
        self._verdict_despite_nova = verdict_despite_nova
        self._asks_nova = asks_nova

    def facts(
        self, root: Claim, roots: Sequence[Claim], record: InstanceRecord, domain: Domain, *, quiet_s: float
    ) -> Facts:
        """All that can be told of *root* now; *roots* are all root disks of its instance that are held."""
        places = {claim.inode: self._claims.place(claim) for claim in roots}
        here = places[root.inode]
        was_resized = root.inode in record.resized_inodes
        return Facts(
            domain=domain,
            was_defined=bool(record.domain_xml),
            link_count=self._claims.link_count(root),
            named_at=here,
            last_named_at=here if here is not Place.NOWHERE else Place.RESIZE if was_resized else Place.INSTANCE,
            other_root_disk=any(place is Place.INSTANCE for inode, place in places.items() if inode != root.inode),
            # if the two differ, one of them is wrong: both are taken
            is_current=root.inode in (record.root_inode or root.inode, self._last_inode(roots, record)),
            was_reverted=root.inode in record.reverted_inodes,
            migrated_away=record.migrated_away,
            lease=self._lease(root),
            quiet_s=quiet_s,
            quiet_required_s=self._settings.quiet_period_s,
            leaked_after_s=self._settings.leaked_after_s,
            undefined_is_released=self._settings.undefined_is_released,
            nova=NOT_ASKED if self._asks_nova else None,
            cloud_is_silent=is_novas(record.domain_xml) and not self._verdict_despite_nova,
        )

    def _last_inode(self, roots: Sequence[Claim], record: InstanceRecord) -> int:
        """
        The root disk that the domain had last; 0: nothing speaks for one.

        It may have had another than the one that we know of while nobody looked: of disks that are all gone, the one
        that was unlinked last.
        """
        if record.root_inode not in {root.inode for root in roots}:
            return record.root_inode
        if any(self._claims.link_count(root) > 1 for root in roots):
            return record.root_inode
        return max(roots, key=self._claims.changed_at_ns).inode

    def _lease(self, root: Claim) -> Lease:
        try:
            with HeldDisk(self._claims.path(root)) as disk:
                disk.require_idle()
        except DiskBusy:
            return Lease.BUSY
        except (OSError, AutobackupError):
            return Lease.NOT_TRIED
        return Lease.GRANTED

    def of_one_fate(self, root: Claim, claims: Sequence[Claim], record: InstanceRecord) -> tuple[Claim, ...]:
        """
        *root* first, and the other files of the instance that are named where it is, or nowhere any more.

        Of the latter an earlier root disk has those that were seen beside one, and the last one has all others.
        """
        last = self._last_inode([claim for claim in claims if claim.is_root], record)
        is_last, here = last in (0, root.inode), self._claims.place(root)
        files = [root]
        for claim in claims:
            place = self._claims.place(claim)
            is_its = _is_the_lasts(claim, last, record) == is_last if place is Place.NOWHERE else place is here
            if not claim.is_root and is_its:
                files.append(claim)
        return tuple(files)


def _is_the_lasts(claim: Claim, last: int, record: InstanceRecord) -> bool:
    """Whether a file that is named nowhere was the last root disk's, by where it was seen before."""
    was_earlier = claim.inode in record.outlived_inodes
    if last in (0, record.root_inode):
        return not was_earlier
    if last in record.resized_inodes:  # an earlier root disk came back, and what had been beside it
        return was_earlier
    return not was_earlier and claim.inode not in record.companion_inodes
