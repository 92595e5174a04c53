"""
The store is full, read-only, gone, or lies; the key is gone or another one; the spool's disk is full.

The job waits and says why and what to do, or is parked; nothing is lost, nothing is scrubbed unproven, and it
completes when the trouble is over (invariants 1 and 4).
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.evidence import (
    MiB,
    assert_captured_once,
    assert_spool_empty,
    bundles,
    mortal,
    scribble,
    sha256_of,
    spawn_known,
    wait_for_stop,
)
from tests.crash.scene import Scene, in_company
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.filesystem import bind_mount, loop_filesystem
from tests.lab.instances import Disks
from tests.lab.mounts import mount

from autobackup.stores import BASE


@contextlib.contextmanager
def store_of_its_own(scene: Scene, *, size_bytes: int = 24 * MiB) -> Iterator[Path]:
    """A small filesystem mounted at the store's folder."""
    folder = scene.home / "vault"
    folder.mkdir(mode=0o700)
    with loop_filesystem("ext4", size_bytes, mkfs_options=["-m", "0"]) as volume:
        (volume.mount_point / "lost+found").rmdir()
        volume.mount_point.chmod(0o700)
        with bind_mount(volume.mount_point, folder):
            yield folder


# ---- full, read-only, gone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "in the middle"])
@in_company
def test_a_full_store_is_waited_for(scene: Scene, when: str) -> None:
    with store_of_its_own(scene) as store:
        agent = scene.agent()
        agent.start()
        instance = spawn_known(scene.compute, agent)
        scribble(instance.disk, size_bytes=6 * MiB)
        sha256 = sha256_of(instance.disk)
        fill(store, leave_bytes=0 if when == "before" else 3 * MiB)
        scene.compute.terminate(instance)

        job = failing(agent)
        assert f"{store}: is full" in job["last_error"]
        assert_not_scrubbed(agent, sha256)
        assert beside_bases(store) == ["filler"], "no partial is left to make it fuller"
        (store / "filler").unlink()

        assert_captured_once(agent, instance, sha256)
        agent.kill()


@in_company
def test_a_store_that_turns_read_only_is_waited_for(scene: Scene) -> None:
    with store_of_its_own(scene) as store:
        agent = scene.agent(command=mortal(f"!put:{MiB}"))
        agent.start()
        instance = spawn_known(scene.compute, agent)
        sha256 = sha256_of(instance.disk)
        scene.compute.terminate(instance)
        pid = wait_for_stop(agent)
        # an open file keeps a mount writable: what happens in the middle of a put is an error of the filesystem
        # below, and is the same to us as one before
        agent.kill()
        mount("-o", "remount,bind,ro", store)
        del pid
        agent.command = mortal()
        agent.start()

        job = failing(agent)
        assert f"{store}: is read-only; remount it read-write" in job["last_error"]
        assert_not_scrubbed(agent, sha256)
        mount("-o", "remount,bind,rw", store)

        assert_captured_once(agent, instance, sha256)
        agent.kill()


@pytest.mark.parametrize("must_be_mount", [True, False])
@in_company
def test_a_store_that_is_unmounted_in_the_middle_of_a_put_is_waited_for(scene: Scene, *, must_be_mount: bool) -> None:
    """The open file still works, the names do not: no half bundle in the folder below, nor one taken for whole."""
    folder = scene.home / "vault"
    folder.mkdir(mode=0o700)
    with loop_filesystem("ext4", 24 * MiB) as volume:
        (volume.mount_point / "lost+found").rmdir()
        volume.mount_point.chmod(0o700)
        agent = scene.agent(command=mortal(f"!put:{MiB}"))
        if must_be_mount:
            text = agent.config.read_text()
            agent.config.write_text(text.replace('reserve = "0B"\n', 'reserve = "0B"\nmust_be_mount = true\n'))
        mount("--bind", volume.mount_point, folder)
        agent.start()
        instance = spawn_known(scene.compute, agent)
        sha256 = sha256_of(instance.disk)
        scene.compute.terminate(instance)
        pid = wait_for_stop(agent)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        os.kill(pid, signal.SIGCONT)

        if must_be_mount:
            job = failing(agent)
            assert f"{folder}: nothing is mounted there, and must_be_mount is set; mount it" in job["last_error"]
            assert_not_scrubbed(agent, sha256)
            assert os.listdir(folder) == []
            mount("--bind", volume.mount_point, folder)
        assert_captured_once(agent, instance, sha256)
        agent.kill()
        if must_be_mount:
            subprocess.run(["umount", str(folder)], check=True)


@in_company
def test_a_store_that_is_gone_in_the_middle_of_a_put_is_waited_for(scene: Scene) -> None:
    agent = scene.agent(command=mortal(f"!put:{MiB}"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    store = agent.stores["vault"]
    store.rename(store.with_name("away"))
    os.kill(pid, signal.SIGCONT)

    job = failing(agent)
    assert f"{store}: is gone; mount it, or make the folder with: install -d -m 700 {store}" in job["last_error"]
    assert_not_scrubbed(agent, sha256)
    assert job["state"] == "queued"
    health = agent.ask("/healthz")[1]
    assert health["status"] == "degraded"
    assert [words for words in health["degraded"] if f"{store}: is gone" in words]
    store.with_name("away").rename(store)

    assert_captured_once(agent, instance, sha256)
    wait_until(lambda: agent.ask("/healthz")[1]["status"] == "ok")
    metrics = agent.ask("/metrics")[1]
    assert 'outcome="StoreUnavailable"' in metrics  # before the read or in the middle of it


@in_company
def test_a_store_with_open_permissions_is_not_written_to(scene: Scene) -> None:
    agent = scene.agent()
    store = agent.stores["vault"]
    store.chmod(0o755)
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    assert f"run: chmod 700 {store}" in failing(agent)["last_error"]
    assert_not_scrubbed(agent, sha256)
    assert os.listdir(store) == []
    store.chmod(0o700)

    assert_captured_once(agent, instance, sha256)


@in_company
def test_one_broken_destination_holds_up_the_scrub_and_not_the_other(scene: Scene) -> None:
    agent = scene.agent(stores=["vault", "second"])
    agent.stores["second"].rmdir()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)

    wait_until(lambda: copies(agent).get("vault") == "verified")
    [attempt] = bundles(agent)
    time.sleep(1.5)  # tries at the second
    assert_not_scrubbed(agent, sha256)
    assert agent.receipts() == []
    agent.stores["second"].mkdir(mode=0o700)

    assert_captured_once(agent, instance, sha256, stores=["vault", "second"])
    assert bundles(agent) == [attempt], "the proven copy was not sent again"


@in_company
def test_a_parked_copy_does_not_make_a_waiting_one_spin(scene: Scene) -> None:
    """One copy waits for an operator, the other for its back-off: between two tries nothing is journaled."""
    agent = scene.agent(
        stores=["vault", "second"],
        more='[retry]\nfirst = "2s"\nlongest = "60s"\n',
        command=mortal("!after:sending/sent"),
    )
    agent.stores["second"].rmdir()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    agent.keyfile.write_text("ab" * 32 + "\n")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: copies(agent).get("vault") == "parked")
    wait_until(lambda: agent.jobs()[0]["copies"][1]["failures"] >= 3, within_s=40)
    record = next((agent.spool / "jobs").glob("*/job.json"))
    journaled = set()
    over_at_s = time.monotonic() + 2
    while time.monotonic() < over_at_s:
        journaled.add(record.stat().st_mtime_ns)
        time.sleep(0.01)

    assert len(journaled) < 20


# ---- the operator -----------------------------------------------------------------------------------------------


@in_company
def test_a_discard_needs_a_word_and_goes_on_the_receipt(scene: Scene) -> None:
    agent = scene.agent()
    agent.stores["vault"].rmdir()
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    job = failing(agent)["job"]

    refused = agent.cli("queue", "--socket", str(agent.socket), "discard", job, check=False)
    assert refused.returncode == 2
    assert "--confirm" in refused.stderr
    assert agent.ask(f"/v1/queue/{job}/discard", method="POST", body={"confirm": "yes"})[0] == 409
    assert_not_scrubbed(agent, sha256)
    order(agent, "discard", job, "--confirm")

    receipt = agent.receipt_of(instance.uuid)
    assert receipt["outcome"].startswith("discarded by an operator; vault: ")
    assert not receipt["scrub"]["scrubbed"]
    assert_spool_empty(agent)


# ---- the spool's own disk ---------------------------------------------------------------------------------------


@in_company
def test_a_full_spool_still_lets_jobs_finish(scene: Scene) -> None:
    """Only a finished job gives space back, so the journal has a reserve."""
    with loop_filesystem("ext4", 48 * MiB, mkfs_options=["-m", "0"]) as volume:
        instances = volume.mount_point / "instances"
        instances.mkdir()
        with Scene.open(scene.hypervisor, scene.workspace, instances_path=instances) as inner:
            agent = inner.agent(command=mortal("!before:queued"))
            agent.start()
            instance = spawn_known(inner.compute, agent)
            sha256 = sha256_of(instance.disk)
            inner.compute.terminate(instance)
            pid = wait_for_stop(agent)
            with (volume.mount_point / "filler").open("wb") as filler:
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(bytes(64 << 10))
                        filler.flush()
                with contextlib.suppress(OSError):
                    os.fsync(filler.fileno())
            # the folders' own blocks too
            with contextlib.suppress(OSError):
                for number in range(10_000):
                    (volume.mount_point / f"f{number:05}").mkdir()
            os.kill(pid, signal.SIGCONT)

            assert_captured_once(agent, instance, sha256)
            assert agent.events("spool.full"), "it was not full enough to prove anything"
            agent.kill()


# ---- keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["!after:queued", "!after:sending/sent"])
@in_company
def test_a_key_file_that_is_removed_is_waited_for(scene: Scene, moment: str) -> None:
    agent = scene.agent(command=mortal(moment))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    agent.keyfile.rename(agent.keyfile.with_name("away"))
    held = bundles(agent)
    os.kill(pid, signal.SIGCONT)

    job = failing(agent)
    assert f"{agent.keyfile}: no such key file" in job["last_error"]
    time.sleep(1)
    assert_not_scrubbed(agent, sha256)
    assert bundles(agent) == held
    agent.keyfile.with_name("away").rename(agent.keyfile)

    assert_captured_once(agent, instance, sha256)
    assert held in ([], bundles(agent)), "what had been sent was only to be proven"


@pytest.mark.parametrize("content", ["ab" * 32 + "\n", "rubbish\n", ""])
@in_company
def test_a_key_file_that_is_replaced_parks_and_never_scrubs(scene: Scene, content: str) -> None:
    agent = scene.agent(command=mortal("!after:sending/sent"))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    right = agent.keyfile.read_text()
    agent.keyfile.write_text(content)
    os.kill(pid, signal.SIGCONT)

    job = wait_until(lambda: next((one for one in agent.jobs() if one["state"] == "parked"), None))
    assert "key" in job["last_error"]
    assert right.strip() not in agent.log_path.read_text()
    assert_not_scrubbed(agent, sha256)
    agent.keyfile.write_text(right)
    order(agent, "retry", job["job"])

    assert_captured_once(agent, instance, sha256)


# ---- a store that does not hold what it was given ---------------------------------------------------------------


def flip_in_header(path: Path) -> None:
    flip(path, 100)


def flip_in_first_segment(path: Path) -> None:
    flip(path, 5000)


def flip_in_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_at_the_end(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def lose(path: Path) -> None:
    path.unlink()


def another_of_the_same_size(path: Path) -> None:
    path.write_bytes(random.randbytes(path.stat().st_size))


DAMAGES = (
    flip_in_header, flip_in_first_segment, flip_in_the_middle, flip_at_the_end, cut, cut_to_nothing, extend, lose,
    another_of_the_same_size,
)  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "verify"),
    [*((damage, "fast") for damage in DAMAGES), (flip_in_the_middle, "readback"), (cut, "readback")],
)
@in_company
def test_what_was_damaged_in_the_store_is_sent_again(scene: Scene, damage: Callable[[Path], None], verify: str) -> None:
    agent = scene.agent(command=mortal("!after:sending/sent"), verify=verify)
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    [damaged] = bundles(agent)
    damage(agent.stores["vault"] / f"{damaged}.autobackup")
    os.kill(pid, signal.SIGCONT)

    assert_captured_once(agent, instance, sha256)

    assert damaged not in bundles(agent)
    assert agent.events("verify.attempt")[0]["outcome"] != "proven"


@in_company
def test_a_store_that_always_damages_parks_the_job(scene: Scene) -> None:
    agent = scene.agent(command=mortal(*(f"!after:sending/sent#{number}" for number in (1, 2, 3))))
    agent.start()
    instance = spawn_known(scene.compute, agent)
    sha256 = sha256_of(instance.disk)
    scene.compute.terminate(instance)
    for _ in range(3):
        pid = wait_for_stop(agent)
        [attempt] = bundles(agent)
        flip_in_the_middle(agent.stores["vault"] / f"{attempt}.autobackup")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: stat_of(agent) != "T")

    job = wait_until(lambda: next((one for one in agent.jobs() if one["state"] == "parked"), None))
    assert "is not that of what was sent" in job["last_error"]
    assert_not_scrubbed(agent, sha256)
    assert agent.ask("/healthz")[1]["status"] == "degraded"
    order(agent, "retry", job["job"])

    assert_captured_once(agent, instance, sha256)


@in_company
def test_no_key_is_in_a_log_an_argument_a_receipt_or_a_record(scene: Scene) -> None:
    agent = scene.agent(command=mortal("!after:sending/sent"))
    agent.start()
    instance = spawn_known(scene.compute, agent, disks=Disks(root_format="raw"))
    scene.compute.terminate(instance)
    pid = wait_for_stop(agent)
    kek = agent.keyfile.read_text().strip()
    needles = {kek.encode(), kek.upper().encode(), bytes.fromhex(kek)}
    places = [agent.log_path, *agent.spool.rglob("*.json"), agent.config, *agent.stores["vault"].iterdir()]
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(pid, signal.SIGCONT)
    agent.receipt_of(instance.uuid)
    assert_spool_empty(agent)
    places += [agent.log_path, *(agent.spool / "receipts").iterdir()]

    for text in (*lines, *(place.read_bytes() for place in places if place.exists())):
        assert not [needle for needle in needles if needle in text]
    assert not re.search(rb"[0-9a-f]{64}", agent.log_path.read_bytes()), "32 bytes in hex have no place in a log"


# ---- helpers ----------------------------------------------------------------------------------------------------


def fill(store: Path, *, leave_bytes: int) -> None:
    room = os.statvfs(store)
    with (store / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - leave_bytes - (64 << 10))
    if leave_bytes == 0:
        with (store / "filler").open("ab") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
                filler.flush()


def beside_bases(store: Path) -> list[str]:
    """Every file in *store* that is no part of a whole sealed base, which may be small enough to have come through."""
    whole = [path.stem for path in store.glob("*.json") if BASE in json.loads(path.read_text())["properties"]]
    return sorted(path.name for path in store.iterdir() if path.stem not in whole)


def failing(agent: AgentProcess) -> dict[str, Any]:
    """The job, once it has met its trouble and waits."""
    return wait_until(
        lambda: next((one for one in agent.jobs() if one["state"] == "queued" and one["last_error"]), None)
    )


def copies(agent: AgentProcess) -> dict[str, str]:
    return {copy["destination"]: copy["state"] for job in agent.jobs() for copy in job["copies"]}


def assert_not_scrubbed(agent: AgentProcess, sha256: str) -> None:
    [link] = (agent.spool / "jobs").glob("*/*.disk.*")
    assert sha256_of(link) == sha256


def order(agent: AgentProcess, what: str, job: str, *more: str) -> None:
    """A job that is being worked on is refused: try again, as the answer says."""
    wait_until(lambda: not agent.cli("queue", "--socket", str(agent.socket), what, job, *more, check=False).returncode)


def stat_of(agent: AgentProcess) -> str:
    assert agent.process is not None
    return Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def flip(path: Path, at_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(at_bytes)
        byte = file.read(1)[0]
        file.seek(at_bytes)
        file.write(bytes([byte ^ 1]))
