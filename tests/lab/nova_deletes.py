"""
Deletes of every kind, starts and stops: what nova-compute does, in the order that was measured on a real one.

The host's side (events, renames, unlinks) is `Compute`'s; in between, Nova's record changes at the instants at which
Nova saves it (facts/nova.md, 2 and 3). Numbers in the docstrings are rows of the decision table there.
"""

import time
from collections.abc import Callable

from tests.lab.agent import wait_until
from tests.lab.instances import Instance, Step
from tests.lab.nova_stage import ALIVE, Play, pause


def delete(play: Play) -> None:
    """1: the record is DELETED seconds after the disk went: ports, volumes and placement come in between."""
    _delete(play, play.boot())


def delete_stopped(play: Play) -> None:
    """2: without a STOPPED event."""
    instance = play.boot()
    _stop(play, instance)
    _delete(play, instance)


def delete_fails_and_is_repeated(play: Play) -> None:
    """2, 15: Neutron fails after the disk went: in error, and a server still; the second delete has nothing to do."""
    instance = play.boot()
    play.record(task_state="deleting")
    play.terminate(instance)
    play.record(vm_state="error", task_state=None)
    play.wait_undecided(for_s=2.0)
    play.record(task_state="deleting")
    play.nova.delete(play.instance)


def delete_fails(play: Play) -> None:
    """15: and nobody repeats it."""
    instance = play.boot()
    play.record(task_state="deleting")
    play.terminate(instance)
    play.record(vm_state="error", task_state=None)


def delete_and_archive(play: Play) -> None:
    """22 of the traps: no record is left, but a server that lives shows that Nova can tell."""
    Play(play.host, "the one that shows it").boot()
    instance = play.boot()
    play.record(task_state="deleting")
    play.terminate(instance)
    play.nova.delete(play.instance)
    play.nova.archive(play.instance)


def archived_and_nobody_else(play: Play) -> None:
    """16 of the traps: no record, and nothing that shows that Nova would show one."""
    instance = play.boot()
    play.record(task_state="deleting")
    play.terminate(instance)
    play.nova.archive(play.instance)


def delete_leaks(play: Play) -> None:
    """9: the rmtree fails; the disk stays in `_del` for ever, and so is never scrubbed."""
    instance = play.boot()
    play.record(task_state="deleting")
    play.compute.terminate(instance, leak_del=True)
    play.nova.delete(play.instance)


def local_delete(play: Play) -> None:
    """5: nova-compute is down: DELETED at once, the guest runs and writes; it is reaped later."""
    instance = play.boot()
    play.nova.local_delete(play.instance)
    pause()
    assert play.word(play.disks[0]) == ALIVE
    play.terminate(instance)


def unlinked_under_guest(play: Play) -> None:
    """5b: `running_deleted_instance_action = log`: the files go, and the guest runs on."""
    instance = play.boot()
    play.nova.local_delete(play.instance)
    play.nova_takes(play.disks[0])
    play.compute.unlink_under_guest(instance)


def unlinked_under_guest_that_ends(play: Play) -> None:
    """5b, 14 of the traps: its last state is the one at its end."""
    unlinked_under_guest(play)
    play.wait_undecided(for_s=1.0)
    domain = play.compute.connection.lookupByUUIDString(play.instance)
    domain.shutdown()
    wait_until(lambda: not domain.isActive(), words="the guest goes off at the power button")
    play.release(play.disks[0])


def soft_delete_and_restore(play: Play) -> None:
    """3, 3r"""
    instance = play.boot()
    _soft_delete(play, instance)
    play.record(task_state="restoring")
    with play.guest_boots(instance):
        play.compute.restore(instance)
    play.record(vm_state="active", task_state=None, queued_for_delete=False)


def soft_delete_and_reclaim(play: Play) -> None:
    """3d: no task is set, and the record stays soft-deleted until it goes."""
    instance = play.boot()
    _soft_delete(play, instance)
    play.terminate(instance)
    pause()
    play.assert_open()
    play.nova.delete(play.instance)


def soft_delete_and_local_delete(play: Play) -> None:
    """3d, 5: forced while nova-compute is down: the record says DELETED and, for ever, `soft-delete`."""
    instance = play.boot()
    _soft_delete(play, instance)
    play.nova.destroy(play.instance)
    pause()
    play.terminate(instance)


def delete_unseen(play: Play) -> None:
    """The agent was down from before the delete until after the end of the record."""
    instance = play.boot()
    play.host.agent.kill()
    _delete(play, instance)
    play.host.agent.start()


# ---- Nova does not answer, or does not say all -----------------------------------------------------------------


def delete_while(ill: Callable[[Play], None], heal: Callable[[Play], None]) -> Callable[[Play], None]:
    """A delete that Nova cannot be asked about, until it can."""

    def drive(play: Play) -> None:
        instance = play.boot()
        ill(play)
        _delete(play, instance)
        play.wait_undecided(for_s=3.0)
        heal(play)

    return drive


# ---- starts and stops ------------------------------------------------------------------------------------------


def hard_reboot(play: Play) -> None:
    """11"""
    instance = play.boot()
    play.record(task_state="reboot_started_hard")
    with play.guest_boots(instance):
        play.compute.hard_reboot(instance)
    play.record(task_state=None)


def stop_and_start(play: Play) -> None:
    """10, 11: a start undefines the domain."""
    instance = play.boot()
    _stop(play, instance)
    pause()
    play.record(task_state="powering-on")
    play.during[Step.UNDEFINED] = lambda _one: pause()  # measured: 0.4 to 1.2 s; a busy host takes longer
    with play.guest_boots(instance):
        play.compute.start(instance)
    play.record(vm_state="active", task_state=None)


def lost_domain(play: Play) -> None:
    """11f: a hard reboot that failed after the undefine. The disk is named: nobody may have it."""
    instance = play.boot()
    play.record(task_state="reboot_started_hard")
    play.compute.lose_domain(instance)
    play.record(vm_state="error", task_state=None)


def live_snapshot(play: Play) -> None:
    """30: undefined while it runs."""
    instance = play.boot()
    play.tasks("image_snapshot_pending", "image_snapshot")
    play.during[Step.UNDEFINED] = lambda _one: pause()
    play.compute.live_snapshot(instance)
    play.tasks("image_uploading", None, each_s=0.3)


def rename(play: Play) -> None:
    """A new name, and new properties, while it runs."""
    play.boot()
    play.record(name="renamed", metadata={"autobackup": "true", "team": "b"})
    pause()
    assert play.word(play.disks[0]) == ALIVE


def _delete(play: Play, instance: Instance) -> None:
    play.record(task_state="deleting", queued_for_delete=True)
    play.terminate(instance)
    pause()
    play.assert_open()
    play.nova.end(play.instance)
    time.sleep(0.5)
    play.nova.destroy(play.instance)


def _stop(play: Play, instance: Instance) -> None:
    play.record(task_state="powering-off")
    play.compute.stop(instance)
    play.record(vm_state="stopped", task_state=None)


def _soft_delete(play: Play, instance: Instance) -> None:
    play.record(task_state="soft-deleting")
    play.compute.soft_delete(instance)
    play.nova.soft_delete(play.instance)
    pause()
