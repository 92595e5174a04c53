"""
The table: what Nova does with a server, and the verdict on its root disk, and on those that it has afterwards.

Played by `tests/e2e/test_nova_verdicts.py`, and by `make demo-rules`.
"""

from typing import Final

from tests.lab import nova_changes as changes
from tests.lab import nova_deletes as deletes
from tests.lab.instances import Step
from tests.lab.nova_plays import Scenario
from tests.lab.nova_stage import ALIVE, MOVED, REPLACED, TERMINATED, UNDECIDED

SCENARIOS: Final = (
    # those with a host of their own take longest, and begin first
    Scenario(
        name="delete while the API answers 503",
        expected=TERMINATED,
        own_host=True,
        drive=deletes.delete_while(lambda play: play.nova.answer(503, retry_after_s=1), lambda play: play.nova.heal()),
    ),
    Scenario(
        name="delete while the API refuses",
        expected=TERMINATED,
        own_host=True,
        drive=deletes.delete_while(lambda play: play.nova.refuse(), lambda play: play.nova.heal()),
    ),
    Scenario(
        name="delete while the API is silent",
        expected=TERMINATED,
        own_host=True,
        drive=deletes.delete_while(lambda play: play.nova.fall_silent(), lambda play: play.nova.heal()),
    ),
    Scenario(
        name="delete while its cell is down",
        expected=TERMINATED,
        own_host=True,
        drive=deletes.delete_while(
            lambda play: play.nova.down_cells.add("cell1"), lambda play: play.nova.down_cells.clear()
        ),
    ),
    Scenario(
        name="rebuild while its cell is down",
        drive=changes.rebuild_while_cell_is_down,
        expected=REPLACED,
        later=(ALIVE,),
        own_host=True,
    ),
    Scenario(name="rebuild without rights", drive=changes.rebuild_without_rights, expected=UNDECIDED, own_host=True),
    Scenario(
        name="archived, and nobody else", drive=deletes.archived_and_nobody_else, expected=UNDECIDED, own_host=True
    ),
    Scenario(name="migrated while the agent was down", drive=changes.migrated_unseen, expected=MOVED, own_host=True),
    Scenario(name="delete while the agent was down", drive=deletes.delete_unseen, expected=TERMINATED, own_host=True),
    Scenario(
        name="rebuild while the agent was down, wanted by a rule",
        drive=changes.rebuild_unseen,
        expected=REPLACED,
        later=(ALIVE,),
        captured=True,
        own_host=True,
    ),
    Scenario(
        name="resize, revert while the agent was down",
        drive=changes.resize_and_revert_unseen,
        expected=ALIVE,
        later=(REPLACED,),
        own_host=True,
    ),
    Scenario(
        name="resize, delete while the agent was down",
        drive=changes.resize_and_delete_unseen,
        expected=REPLACED,
        later=(TERMINATED,),
        own_host=True,
    ),
    Scenario(
        name="resize, revert, delete while the agent was down",
        drive=changes.resize_and_revert_and_delete_unseen,
        expected=TERMINATED,
        later=(TERMINATED,),
        own_host=True,
    ),
    Scenario(name="delete", drive=deletes.delete, expected=TERMINATED),
    Scenario(name="delete of a stopped server", drive=deletes.delete_stopped, expected=TERMINATED),
    Scenario(name="delete that fails", drive=deletes.delete_fails, expected=UNDECIDED),
    Scenario(name="delete that fails, again", drive=deletes.delete_fails_and_is_repeated, expected=TERMINATED),
    Scenario(name="delete, then archived", drive=deletes.delete_and_archive, expected=TERMINATED),
    Scenario(name="delete that leaks its folder", drive=deletes.delete_leaks, expected=TERMINATED),
    Scenario(name="local delete, then reaped", drive=deletes.local_delete, expected=TERMINATED),
    Scenario(name="unlinked under its guest", drive=deletes.unlinked_under_guest, expected=UNDECIDED),
    Scenario(
        name="unlinked under its guest, which ends", drive=deletes.unlinked_under_guest_that_ends, expected=TERMINATED
    ),
    Scenario(name="soft delete, restore", drive=deletes.soft_delete_and_restore, expected=ALIVE),
    Scenario(name="soft delete, reclaim", drive=deletes.soft_delete_and_reclaim, expected=TERMINATED),
    Scenario(name="soft delete, local delete", drive=deletes.soft_delete_and_local_delete, expected=TERMINATED),
    Scenario(name="hard reboot", drive=deletes.hard_reboot, expected=ALIVE),
    Scenario(name="stop, start", drive=deletes.stop_and_start, expected=ALIVE),
    Scenario(name="lost domain", drive=deletes.lost_domain, expected=UNDECIDED),
    Scenario(name="live snapshot", drive=deletes.live_snapshot, expected=ALIVE),
    Scenario(name="new name and properties", drive=deletes.rename, expected=ALIVE),
    Scenario(name="rebuild", drive=changes.rebuild, expected=REPLACED, later=(ALIVE,)),
    Scenario(
        name="rebuild, wanted by a rule",
        drive=changes.rebuild_of_evidence,
        expected=REPLACED,
        later=(ALIVE,),
        captured=True,
    ),
    Scenario(name="rebuild that fails", drive=changes.rebuild_fails, expected=UNDECIDED),
    Scenario(name="rebuild that fails, delete", drive=changes.rebuild_fails_and_delete, expected=TERMINATED),
    Scenario(name="resize, confirm", drive=changes.resize_and_confirm, expected=REPLACED, later=(ALIVE,)),
    Scenario(name="resize, revert", drive=changes.resize_and_revert, expected=ALIVE, later=(REPLACED,)),
    Scenario(
        name="resize, revert, delete",
        drive=changes.resize_and_revert_and_delete,
        expected=TERMINATED,
        later=(REPLACED,),
    ),
    Scenario(name="resize to another host", drive=changes.resize_to_other_host, expected=MOVED),
    Scenario(name="resize to another host, delete", drive=changes.resize_to_other_host_and_delete, expected=MOVED),
    Scenario(name="resize, delete", drive=changes.resize_and_delete, expected=REPLACED, later=(TERMINATED,)),
    Scenario(name="shelve, offload", drive=changes.shelve_offload, expected=MOVED),
    Scenario(
        name="shelve, offload, wanted by a rule",
        drive=changes.shelve_offload_of_evidence,
        expected=MOVED,
        captured=True,
    ),
    Scenario(
        name="shelve, offload, unshelve", drive=changes.shelve_offload_and_unshelve, expected=MOVED, later=(ALIVE,)
    ),
    Scenario(name="failed build, before libvirt", drive=changes.failed_spawn(Step.DISKS_MADE), expected=MOVED),
    Scenario(name="failed build, after its start", drive=changes.failed_spawn(Step.STARTED), expected=MOVED),
    Scenario(name="evacuated, cleaned up", drive=changes.evacuated, expected=MOVED),
    Scenario(name="evacuated, deleted there", drive=changes.evacuated_and_deleted, expected=MOVED),
    Scenario(name="evacuated, cleaned up too early", drive=changes.evacuated_and_not_finished, expected=MOVED),
)
