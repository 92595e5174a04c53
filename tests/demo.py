"""
`make demo`: one instance from its boot to its scrub and back, on a real libvirtd and QEMU, seen from outside.

Each step is checked from the outside (link counts, raw blocks, a guest's view of its disk), not taken from what the
agent says of itself. The last line is one JSON object; the exit status is 0 only if every promise in it held.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
from tests.lab import guest
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.filesystem import loop_filesystem, scan_for
from tests.lab.guest_view import guest_view_read, guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute, Instance, Step
from tests.lab.workspace import workspace

HOME = Path("build/demo").resolve()
_started_s = time.monotonic()


def main() -> int:
    """Run the demo; leave `build/demo` behind, and nothing running."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # else "Domain not found" on stderr, which it should be
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    os.environ["TMPDIR"] = str(HOME / "tmp")  # whatever the agent might write anywhere is scanned with the rest
    (HOME / "tmp").mkdir()
    with workspace() as place, loop_filesystem("ext4") as filesystem, Hypervisor() as hypervisor:
        say("libvirtd and QEMU (TCG) are up; the instances lie on an ext4 of their own, in a loop device")
        instances = filesystem.mount_point
        agent = AgentProcess(HOME, instances, uri=hypervisor.uri, stores=["store"], run_folder=place.folder("run"))
        with Compute(hypervisor.uri, instances) as compute, agent:
            say("the agent is up: it watches the instances folder and libvirt's events")
            facts, marker = live_and_die(compute, agent, filesystem.image_path)
        shutil.copytree(agent.spool / "receipts", HOME / "receipts")
        filesystem.unmount()
        remains = scan_for(filesystem.image_path, [marker])[marker]
    written = {path for path in HOME.iterdir() if path.name != "restored"}
    found = bool(remains) or any(scan_for(path, [marker])[marker] for path in written)
    facts["cleartext_found"] = found
    say(f"the guest's marker in the raw blocks of the filesystem, the store, the spool or a log: {found}")
    shutil.rmtree(HOME / "tmp")
    print(f"\nLook into {HOME.relative_to(Path.cwd())}: store, kek, agent.log, receipts, restored\n")
    print(json.dumps(facts))
    kept = facts["verdict"] == "terminated" and facts["verified"] and facts["scrubbed"]
    return 0 if kept and facts["restored_identical"] and not found else 1


def live_and_die(compute: Compute, agent: AgentProcess, image: Path) -> tuple[dict[str, Any], bytes]:
    """Boot, write, terminate, seal, restore. The facts for the last line, and the guest's marker."""
    with claim_timed(agent.instances_path) as claim_ms:
        instance = compute.spawn(name="demo", nova_metadata=False)
    compute.wait_for(instance)
    marker = guest.marker(instance.image.seed)
    assert instance.disk.stat().st_nlink == 2, "the agent does not hold the disk"
    say(f"instance {instance.uuid} wrote its data; the agent holds its overlay by a second hard link")

    expected: dict[str, str] = {}

    def at_step(step: Step, one: Instance) -> None:
        if step is Step.STOPPED:  # the last state: nobody writes any more
            expected["sha256"] = guest_view_sha256(one.disk, "qcow2")
            os.sync()
            assert scan_for(image, [marker])[marker], "the scan does not even find the marker while it is there"

    compute.on_step = at_step
    compute.terminate(instance)
    assert not instance.folder.exists()
    say("terminated as Nova does it: destroy, rename to _del, rmtree, undefine; its folder is gone")

    receipt = agent.receipt_of(instance.uuid)
    verdict = agent.events("verdict.reached", instance=instance.uuid)[-1]
    say(f"verdict: {verdict['verdict']} ({verdict['reason']})")
    copy = receipt["copies"][0]
    say(f"sealed {copy['attempt']['size_bytes']} bytes into the store, read back, then: {receipt['outcome']}")
    wait_until(lambda: not agent.jobs(), words="the job is done")
    held = agent.claims(instance.uuid)

    restored = agent.restore(copy["attempt"]["attempt"], HOME / "restored")
    disk = Path(restored["disks"][0]["path"])
    identical = guest_view_sha256(disk, "qcow2") == expected["sha256"]
    for offset, data in guest.expected_regions(instance.image.seed):
        identical = identical and guest_view_read(disk, "qcow2", offset, len(data)) == data
    say(f"restored with its chain into {disk.relative_to(Path.cwd())}: identical to what the guest saw: {identical}")
    facts = {
        "instance": instance.uuid,
        "verdict": receipt["verdict"],
        "claim_ms": claim_ms[0],
        "sealed_bytes": copy["attempt"]["size_bytes"],
        "store": str(agent.stores["store"].relative_to(Path.cwd())),
        "verified": copy["state"] == "verified",
        "scrubbed": receipt["scrub"]["scrubbed"] and not held,
        "restored_identical": identical,
    }
    return facts, marker


@contextmanager
def claim_timed(instances_path: Path) -> Iterator[list[float]]:
    """
    How long a new root disk had only one name, in ms, by the kernel's clock: from its birth to its second link.

    The link sets the inode's ctime, which is read as soon as the second name is seen; whatever comes between the two
    makes the figure larger, never smaller.
    """
    answer: list[float] = []
    before = set(os.listdir(instances_path))

    def look() -> None:
        disk = None
        deadline_s = time.monotonic() + 60
        while disk is None and time.monotonic() < deadline_s:
            fresh = [name for name in os.listdir(instances_path) if name not in before and len(name) == 36]
            disk = next((path for name in fresh if (path := instances_path / name / "disk").exists()), None)
        while disk is not None and time.monotonic() < deadline_s:
            seen = disk.stat()
            if seen.st_nlink >= 2:
                birth = subprocess.run(["stat", "--format=%.9W", disk], capture_output=True, text=True, check=True)
                answer.append(round(max(0.0, seen.st_ctime - float(birth.stdout)) * 1000, 3))
                return

    thread = threading.Thread(target=look)
    thread.start()
    yield answer
    thread.join()


def say(words: str) -> None:
    print(f"{time.monotonic() - _started_s:6.1f}s  {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
