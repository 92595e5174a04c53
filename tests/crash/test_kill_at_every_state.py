"""
Killed at any instant, the agent resumes: the last state of a terminated instance ends up in the store, once and
whole, and only then is the disk scrubbed (invariants 1, 2, 4 and 6).

The moments are enumerated, not sampled: right before and right after every journaled state, in the middle of a put,
between its end and the journal, in the middle of a scrub. What lies between two writes and has no seam is made by
hand from the files that a crash there leaves behind.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.evidence import (
    MiB,
    assert_captured_once,
    assert_spool_empty,
    bundles,
    mortal,
    restart_plain,
    scribble,
    sha256_of,
    site_with_scrub_method,
    spawn_known,
    unpack,
    wait_for_death,
    wait_for_stop,
)
from tests.crash.scene import Scene, in_company
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.instances import Disks

STATES = (
    "queued/queued",
    "sending/queued",
    "sending/sending",
    "sending/sent",
    "sending/verified",
    "verified/verified",
    "scrubbing/verified",
    "scrubbed/verified",
    "done/verified",
)
MOMENTS = (
    *(f"{kind}:{state}" for state in STATES for kind in ("before", "after")),
    "put:4096",
    f"put:{2 * MiB}",
    "begun",
    "name",
    "base:4096",
    "base-name",
)


@pytest.mark.parametrize("moment", MOMENTS)
@in_company
def test_killed_at(scene: Scene, moment: str) -> None:
    agent = scene.agent(command=mortal(moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)

    restart_plain(agent)

    assert_captured_once(agent, instance, sha256)


@in_company
def test_killed_in_the_middle_of_a_scrub(scene: Scene) -> None:
    """What is half zeros must not be captured again: from `scrubbing` on there is only forward."""
    site = site_with_scrub_method(scene.home)
    agent = scene.agent(command=mortal("scrub", site=site), scrub="mortal")
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)
    [link] = (agent.spool / "jobs").glob("*/*.disk.*")
    assert sha256_of(link) != sha256, "the kill came too early to prove anything"

    agent.command = mortal(site=site)
    agent.start()

    assert_captured_once(agent, instance, sha256)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"put:{MiB}", f"put:{MiB}"),
        ("name", "delete"),
        ("base:4096", "base:4096"),
        ("base:4096", "delete"),
        ("base-name", "begun"),
        ("after:sending/sending", "before:sending/queued"),
        ("after:sending/sent", "before:sending/verified"),
        ("after:scrubbing", "before:scrubbed"),
        ("before:done", "after:done"),
    ],
)
@in_company
def test_killed_twice_in_a_row(scene: Scene, first: str, second: str) -> None:
    agent = scene.agent(command=mortal(first))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)
    agent.command = mortal(second)
    agent.start(ready=False)
    wait_for_death(agent)

    restart_plain(agent)

    assert_captured_once(agent, instance, sha256)


@pytest.mark.parametrize("moment", ["before:kept", "after:kept", "before:scrubbing", "after:scrubbing", "before:done"])
@in_company
def test_killed_over_a_disk_that_stays_named(scene: Scene, moment: str) -> None:
    """A leaked `_del` with a console log beside it: one file is scrubbed, the other never touched."""
    agent = scene.agent(command=mortal(moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    instance.console.write_bytes(b"login:\n")
    wait_until(lambda: len(agent.claims(instance.uuid)) == 2)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance, leak_del=True)
    leaked = instance.del_folder / "disk"
    if moment != "before:done":
        wait_for_death(agent)
        restart_plain(agent)

    receipt = agent.receipt_of(instance.uuid)
    wait_until(lambda: leaked.stat().st_nlink == 1, words="our own name is gone")
    assert receipt["outcome"] == f"verified, not scrubbed: still named {leaked}"
    assert sha256_of(leaked) == sha256
    [job] = agent.jobs()
    shutil.rmtree(instance.del_folder)
    order(agent, "retry", job["job"])  # its first look may not have been over yet: then it is done by itself
    if moment == "before:done":
        wait_for_death(agent)
        restart_plain(agent)
    assert_spool_empty(agent)
    [attempt] = bundles(agent)
    assert unpack(agent, attempt).digests.members["disks/disk"].sha256 == sha256


@pytest.mark.parametrize(
    "moment",
    ["before:sending/parked", "after:sending/parked", "before:parked", "after:parked", "before:queued/queued#2",
     "after:queued/queued#2"],
)  # fmt: skip
@in_company
def test_killed_over_a_copy_that_is_parked(scene: Scene, moment: str) -> None:
    """Its key is another one when it is to be proven; an operator brings the right one back and orders a retry."""
    agent = scene.agent(command=mortal("!after:sending/sent", moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    right_key = agent.keyfile.read_text()
    agent.keyfile.write_text("ab" * 32 + "\n")
    os.kill(pid, signal.SIGCONT)
    if "#" not in moment:
        wait_for_death(agent)
        restart_plain(agent)
    job = parked_job(agent)
    agent.keyfile.write_text(right_key)
    order(agent, "retry", job)
    if "#" in moment:
        wait_for_death(agent)
        restart_plain(agent)
        if moment.startswith("before"):
            order(agent, "retry", parked_job(agent))

    assert_captured_once(agent, instance, sha256)


@pytest.mark.parametrize("moment", ["before:discarded", "after:discarded", "before:done", "after:done"])
@in_company
def test_killed_over_a_discard(scene: Scene, moment: str) -> None:
    agent = scene.agent(command=mortal(moment))
    shutil.rmtree(agent.stores["vault"])  # nothing can be sent, so the job waits
    agent.start()
    instance = spawn_known(scene.compute, agent)
    scene.compute.terminate(instance)
    job = wait_until(lambda: next((one["job"] for one in agent.jobs() if one["failures"] or one["last_error"]), None))
    order(agent, "discard", job, "--confirm")
    wait_for_death(agent)

    restart_plain(agent)
    if moment == "before:discarded":
        order(agent, "discard", job, "--confirm")

    receipt = agent.receipt_of(instance.uuid)
    assert receipt["outcome"].startswith("discarded by an operator")
    assert not receipt["scrub"]["scrubbed"]
    assert_spool_empty(agent)


@pytest.mark.parametrize("moment", ["before:queued/queued#2", "after:queued/queued#2", "delete"])
@in_company
def test_killed_over_a_torn_capture(scene: Scene, moment: str) -> None:
    """The disk changes after it was proven: the copy is outdated, and only the last content counts."""
    agent = scene.agent(command=mortal("!after:verified", moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    [link] = (agent.spool / "jobs").glob("*/*.disk.*")
    scribble(link)
    sha256 = sha256_of(link)
    os.kill(pid, signal.SIGCONT)
    wait_for_death(agent)

    restart_plain(agent)

    assert_captured_once(agent, instance, sha256)


# ---- between two writes, made by hand ---------------------------------------------------------------------------


def claims_only(agent: AgentProcess) -> None:
    """The record was never written."""
    for record in (agent.spool / "instances").iterdir():
        record.unlink()


def half_a_record(agent: AgentProcess) -> None:
    """Killed within the write of a record."""
    for record in (agent.spool / "instances").iterdir():
        record.rename(record.with_name(f".{record.name}.new"))
        with record.with_name(f".{record.name}.new").open("r+b") as file:
            file.truncate(100)


@pytest.mark.parametrize("crash", [claims_only, half_a_record])
@in_company
def test_killed_between_claim_and_record(scene: Scene, crash: Callable[[AgentProcess], None]) -> None:
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    agent.kill()
    crash(agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    agent.start()

    receipt = assert_captured_once(agent, instance, sha256)
    assert receipt["not_captured"]["domain.xml"] == "the domain was gone before its XML could be read"


def before_the_folder_has_its_name(folder: Path, claims: Path) -> None:
    links_back(folder, claims)
    folder.rename(folder.with_name(f".new-{folder.name}"))


def before_the_take_over(folder: Path, claims: Path) -> None:
    links_back(folder, claims)


def in_the_middle_of_the_take_over(folder: Path, claims: Path) -> None:
    links_back(folder, claims, only=".disk.")


def within_a_journal_write(folder: Path, claims: Path) -> None:
    (folder / ".job.json.new").write_bytes((folder / "job.json").read_bytes()[:200])


@pytest.mark.parametrize(
    "crash",
    [before_the_folder_has_its_name, before_the_take_over, in_the_middle_of_the_take_over, within_a_journal_write],
)
@in_company
def test_killed_within_the_birth_of_a_job(scene: Scene, crash: Callable[[Path, Path], None]) -> None:
    agent = scene.agent(command=mortal("after:queued"))
    agent.start()
    instance = spawn_known(scene.compute, agent, disks=Disks(ephemeral=True))
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)
    [folder] = (agent.spool / "jobs").iterdir()
    crash(folder, agent.spool / "claims")

    restart_plain(agent)

    receipt = assert_captured_once(agent, instance, sha256)
    assert {one["disk"] for one in receipt["captured"]} == {"disk", "disk.eph0"}


@in_company
def test_killed_between_a_job_and_the_end_of_its_record(scene: Scene) -> None:
    """The instance is the job's now, and its record is not needed; nor is the base that the record stands on."""
    agent = scene.agent(command=mortal("after:done"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    record = agent.spool / "instances" / f"{instance.uuid}.json"
    content = record.read_bytes()
    scene.compute.terminate(instance)
    wait_for_death(agent)
    record.write_bytes(content)
    assert b"_base" in content
    assert list((agent.spool / "bases").iterdir())

    restart_plain(agent)

    assert_captured_once(agent, instance, sha256)


@in_company
def test_killed_within_the_end_of_a_job(scene: Scene) -> None:
    """The record is gone, the folder is not yet: nothing is in it, so nothing is kept."""
    agent = scene.agent(command=mortal("after:done"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)
    [record] = (agent.spool / "jobs").glob("*/job.json")
    record.unlink()

    restart_plain(agent)

    assert_captured_once(agent, instance, sha256)


@in_company
def test_two_claims_on_one_inode_become_one(scene: Scene) -> None:
    """A rename between two lives of the agent: the inode is held under a name that Nova no longer uses."""
    agent = scene.agent()
    agent.start()
    instance = spawn_known(scene.compute, agent, disks=Disks(ephemeral=True))
    agent.kill()
    held = agent.spool / "claims" / next(name for name in agent.claims() if ".disk." in name and "eph0" not in name)
    os.link(held, held.with_name(held.name.replace(".disk.", ".disk.rescue.")))
    sha256 = sha256_of(instance.disk)

    agent.start()
    wait_until(lambda: len(agent.claims(instance.uuid)) == 2)
    assert instance.disk.stat().st_nlink == 2
    scene.compute.terminate(instance)

    receipt = assert_captured_once(agent, instance, sha256)
    assert {one["disk"] for one in receipt["captured"]} == {"disk", "disk.eph0"}


@in_company
def test_a_damaged_job_is_left_alone(scene: Scene) -> None:
    """A record that cannot be read is never guessed at: its links stay, and are claimed by nobody else."""
    agent = scene.agent(command=mortal("after:sending"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    wait_for_death(agent)
    [folder] = (agent.spool / "jobs").iterdir()
    record = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(record | {"state": "scrubbing", "surprise": 1}))

    restart_plain(agent)

    wait_until(lambda: agent.events("job.unreadable"))
    [link] = folder.glob("*.disk.*")
    assert sha256_of(link) == sha256
    assert bundles(agent) == []


# ---- helpers ----------------------------------------------------------------------------------------------------


def links_back(folder: Path, claims: Path, only: str = "") -> None:
    """Undo the take-over: what a crash before it would have left."""
    for link in folder.iterdir():
        if link.name != "job.json" and only in link.name:
            link.rename(claims / link.name)


def parked_job(agent: AgentProcess) -> str:
    return wait_until(lambda: next((str(one["job"]) for one in agent.jobs() if one["state"] == "parked"), ""))


def order(agent: AgentProcess, what: str, job: str, *more: str) -> None:
    """An order may meet the agent's death; then it was given, not answered. One that meets a busy job is repeated."""
    wait_until(
        lambda: (
            "try again in a moment"
            not in agent.cli("queue", "--socket", str(agent.socket), what, job, *more, check=False).stderr
        )
    )
