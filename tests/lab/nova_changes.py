"""
Rebuilds, resizes, shelves, builds that fail and moves to other hosts: on the host, most of it looks like a delete.

Played as in `nova_deletes`; numbers in the docstrings are rows of the decision table in facts/nova.md.
"""

import time
from collections.abc import Callable
from typing import Final, Literal

from tests.lab.fake_nova import Policy
from tests.lab.instances import Disks, Instance, Step
from tests.lab.nova_host import EVIDENCE, LONGER_THAN_QUIET_S, wait_slowly
from tests.lab.nova_servers import HOST
from tests.lab.nova_stage import ALIVE, Play, pause

OTHER_HOST: Final = "compute-2"
SEVERAL: Final = Disks(ephemeral=True, swap=True, config_drive=True)


def rebuild(play: Play) -> None:
    """15: to the host a delete, until the new folder is there: longer than the quiet period if the image is large."""
    _rebuild(play, play.boot())


def rebuild_of_evidence(play: Play) -> None:
    """15, where a rule wants the old disk: whoever broke in may rebuild to destroy what he left."""
    _rebuild(play, play.boot(name=f"{EVIDENCE}{play.name}", disks=SEVERAL))


def rebuild_fails(play: Play) -> None:
    """15: the image cannot be had. In error, without a disk: an operator rebuilds it again, or deletes it."""
    instance = play.boot()
    play.record(task_state="rebuilding")
    with play.nova_drops():
        play.compute.shelve_offload(instance)  # stop, unlink, undefine: the same steps
    play.tasks("rebuild_block_device_mapping", each_s=LONGER_THAN_QUIET_S)
    play.record(vm_state="error", task_state=None)


def rebuild_fails_and_delete(play: Play) -> None:
    """15, 1: then what the rebuild took was its last disk."""
    rebuild_fails(play)
    play.wait_undecided(for_s=2.0)
    play.record(task_state="deleting")
    play.nova.delete(play.instance)


def resize_and_confirm(play: Play) -> None:
    """20, 20c: nothing is lost, so a rule that wants rebuilds does not want the old disk."""
    instance = play.boot(name=f"{EVIDENCE}{play.name}")
    _resize(play, instance)
    with play.nova_drops(play.disks[0]):
        play.compute.confirm_resize(instance)
    play.record(vm_state="active", task_state=None)


def resize_and_revert(play: Play) -> None:
    """20, 20r: the copy is unlinked after the undefine, and the first disk comes back. No rule wants such a copy."""
    instance = play.boot(name=f"{EVIDENCE}{play.name}")
    _resize(play, instance)
    _revert(play, instance)


def resize_and_revert_unseen(play: Play) -> None:
    """20r: reverted while the agent was down."""
    instance = play.boot(name=f"{EVIDENCE}{play.name}")
    _resize(play, instance)
    play.host.agent.kill()
    _revert(play, instance)
    play.host.agent.start()


def resize_and_revert_and_delete(play: Play) -> None:
    """20r, 1: the disk that came back is the last one."""
    instance = play.boot()
    _resize(play, instance)
    _revert(play, instance)
    assert wait_slowly(lambda: play.reached(play.disks[1])), "no verdict on the copy"
    play.record(task_state="deleting")
    with play.nova_drops(play.disks[0]):
        play.compute.terminate(instance)
    play.nova.delete(play.instance)


def resize_to_other_host(play: Play) -> None:
    """16, 17: disk and domain stay for a revert; both go at the confirm, when the server runs elsewhere."""
    instance = play.boot()
    play.tasks("resize_prep", "resize_migrating")
    play.compute.resize_to_other_host(instance)
    play.record(host=OTHER_HOST, task_state="resize_finish")
    play.record(vm_state="resized", task_state=None)
    pause()
    play.assert_open()
    with play.nova_drops():
        play.compute.confirm_resize_to_other_host(instance)
    play.record(vm_state="active")


def resize_to_other_host_and_delete(play: Play) -> None:
    """6s: the stale copy here is not its last state."""
    instance = play.boot()
    play.tasks("resize_prep", "resize_migrating")
    play.compute.resize_to_other_host(instance)
    play.record(host=OTHER_HOST, vm_state="resized", task_state=None)
    pause()
    with play.nova_drops():
        play.compute.confirm_resize_to_other_host(instance)
    play.nova.delete(play.instance)


def resize_and_delete(play: Play) -> None:
    """6d: the API confirms first, which takes the task away: `deleting` is not shown."""
    instance = play.boot(disks=SEVERAL)
    _resize(play, instance)
    _delete_resized(play, instance)


def resize_and_delete_unseen(play: Play) -> None:
    """6d: while the agent was down. It finds two ends of a resize, of which one is the server's last state."""
    instance = play.boot(disks=SEVERAL)
    _resize(play, instance)
    play.host.agent.kill()
    _delete_resized(play, instance)
    play.host.agent.start()


def resize_and_revert_and_delete_unseen(play: Play) -> None:
    """20r, 1: while the agent was down. It cannot tell which end was the last one: it takes both."""
    instance = play.boot(disks=SEVERAL)
    _resize(play, instance)
    play.host.agent.kill()
    _revert(play, instance)
    with play.nova_drops(play.disks[0]):
        play.compute.terminate(instance)
    play.nova.delete(play.instance)
    play.host.agent.start()


def shelve_offload(play: Play) -> None:
    """27: by default a shelve offloads at once."""
    _shelve(play, play.boot())


def shelve_offload_of_evidence(play: Play) -> None:
    """27, where a rule wants the disk."""
    _shelve(play, play.boot(name=f"{EVIDENCE}{play.name}"))


def shelve_offload_and_unshelve(play: Play) -> None:
    """27, 28: another disk, on this host again."""
    instance = play.boot()
    _shelve(play, instance)
    assert wait_slowly(lambda: play.reached(play.disks[0])), "no verdict on the offloaded disk"
    play.record(host=HOST, task_state="spawning")
    back = play.compute.unshelve(instance)
    play.record(vm_state="active", task_state=None)
    play.settle(back)


def rebuild_unseen(play: Play) -> None:
    """15: while the agent was down, and a rule wants the old disk."""
    instance = play.boot(name=f"{EVIDENCE}{play.name}")
    play.host.agent.kill()
    play.record(task_state="rebuilding")
    play.nova_takes(play.disks[0])
    play.during[Step.UNDEFINED] = lambda _one: play.release(play.disks[0])
    rebuilt = play.compute.rebuild(instance)
    play.record(task_state=None)
    play.host.agent.start()
    play.settle(rebuilt)


def rebuild_while_cell_is_down(play: Play) -> None:
    """The list is 200, and empty: that the server is in no list is no reason to take its disk."""
    instance = play.boot()
    play.nova.down_cells.add("cell1")
    _rebuild(play, instance)


def rebuild_without_rights(play: Play) -> None:
    """16 of the traps: whoever may not look gets 403 and 404, for servers that run."""
    instance = play.boot()
    play.nova.policy = Policy.none()
    play.record(task_state="rebuilding")
    with play.nova_drops():
        play.compute.shelve_offload(instance)
    play.record(task_state="rebuild_block_device_mapping")


# ---- builds and other hosts ------------------------------------------------------------------------------------


def failed_spawn(after: Literal[Step.DISKS_MADE, Step.DEFINED, Step.STARTED]) -> Callable[[Play], None]:
    """33: no host in the record, and never launched."""

    def drive(play: Play) -> None:
        play.during[Step.DISKS_MADE] = play.note_unwritten
        image = play.register()
        play.compute.failed_spawn(after=after, uuid=play.instance, image=image)
        pause()
        play.assert_open()
        play.record(vm_state="error", task_state=None, host=None)

    return drive


def evacuated(play: Play) -> None:
    """29: it was rebuilt elsewhere while this host was away; now nova-compute is back, and cleans up."""
    instance = play.boot()
    play.tasks("rebuilding", "rebuild_block_device_mapping", "rebuild_spawning")
    pause()
    assert play.word(play.disks[0]) == ALIVE
    play.record(host=OTHER_HOST, task_state=None)
    play.terminate(instance)


def evacuated_and_deleted(play: Play) -> None:
    """29, 8 of the traps: deleted over there, before nova-compute is back here."""
    instance = play.boot()
    play.record(host=OTHER_HOST)
    play.nova.delete(play.instance)
    pause()
    play.assert_open()
    play.terminate(instance)


def evacuated_and_not_finished(play: Play) -> None:
    """29, 5 of the traps: cleaned up while the record still says this host, and `rebuild_spawning`."""
    instance = play.boot()
    play.tasks("rebuilding", "rebuild_block_device_mapping", "rebuild_spawning")
    play.terminate(instance)
    play.wait_undecided(for_s=2.0)
    play.record(host=OTHER_HOST, task_state=None)


def migrated_unseen(play: Play) -> None:
    """23, 7 of the traps: a block migration while the agent was down, so that nobody heard STOPPED/MIGRATED."""
    instance = play.boot()
    play.record(task_state="migrating")
    play.host.agent.kill()
    with play.nova_drops():
        play.compute.leave(instance)
    play.host.agent.start()
    play.wait_undecided(for_s=2.0)
    play.record(host=OTHER_HOST, task_state=None)


def _rebuild(play: Play, instance: Instance) -> None:
    def fetch_image(_instance: Instance) -> None:
        play.release(play.disks[0])
        play.tasks("rebuild_block_device_mapping", "rebuild_spawning", each_s=LONGER_THAN_QUIET_S)

    play.record(task_state="rebuilding")
    play.nova_takes(play.disks[0])
    play.during[Step.UNDEFINED] = fetch_image
    rebuilt = play.compute.rebuild(instance)
    play.during.clear()
    play.record(task_state=None)
    play.settle(rebuilt)


def _resize(play: Play, instance: Instance) -> None:
    """Up to VERIFY_RESIZE, and for a while."""
    play.tasks("resize_prep", "resize_migrating")
    play.during[Step.RENAMED] = lambda _one: play.tasks("resize_migrated", "resize_finish")
    play.compute.resize_same_host(instance)
    play.during.clear()
    play.record(vm_state="resized", task_state=None)
    play.settle(instance)
    pause()


def _delete_resized(play: Play, instance: Instance) -> None:
    play.record(task_state="deleting")
    play.record(vm_state="active", task_state=None)
    play.terminate(instance)
    pause()
    play.assert_open()
    play.nova.delete(play.instance)


def _revert(play: Play, instance: Instance) -> None:
    copy = play.disks[1]
    play.record(task_state="resize_reverting")
    play.during[Step.UNDEFINED] = lambda _one: time.sleep(0.6)
    play.during[Step.UNLINKED] = lambda _one: play.release(copy)
    play.during[Step.RENAMED] = lambda _one: time.sleep(0.5)  # the first disk is named again, and not yet defined
    play.nova_takes(copy)
    with play.guest_boots(instance):
        play.compute.revert_resize(instance)
    play.during.clear()
    play.record(vm_state="active", task_state=None)


def _shelve(play: Play, instance: Instance) -> None:
    play.tasks("shelving")

    def upload(_instance: Instance) -> None:
        play.tasks("shelving_image_pending_upload", "shelving_image_uploading", "shelving_offloading", each_s=0.3)

    play.during[Step.STOPPED] = upload
    with play.nova_drops():
        play.compute.shelve_offload(instance)
    play.during.clear()
    pause()
    play.assert_open()
    play.record(vm_state="shelved_offloaded", task_state=None, host=None)
