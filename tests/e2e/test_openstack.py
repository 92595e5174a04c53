"""
Backups into projects of a real cloud: whose they are, who can open them, and what happens while a part of it is down.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.crash.evidence import MiB, mortal, restart_plain, scribble, sha256_of, spawn_known, wait_for_death
from tests.crash.scene import Scene
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.guest_view import guest_view_sha256
from tests.lab.instances import Instance
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.views import Backup, backups_in, clouds_yaml, secrets_of
from tests.lab.proxy import Proxy

ARRIVED_S = 60.0


def glance(project: str, **keys: object) -> dict[str, object]:
    return {"store": "glance", "cloud": "autobackup", "project": project, "key": "barbican", **keys}


class Stage:
    """An agent whose destinations are in a cloud, and an instance that it knows."""

    def __init__(self, scene: Scene, cloud: Cloud) -> None:
        self.scene = scene
        self.cloud = cloud
        self.agent: AgentProcess

    def start(
        self,
        destinations: Mapping[str, Mapping[str, object]],
        *,
        clouds: Path | None = None,
        more: str = "",
        command: list[str] | None = None,
        rule: str = 'name = "everything"',
    ) -> AgentProcess:
        options: dict[str, Any] = {"command": command} if command else {}
        self.agent = self.scene.agent(
            stores=(), destinations=destinations, rule=rule,
            more=f'[openstack]\nclouds_yaml = "{clouds or self.cloud.clouds_file}"\n{more}', **options,
        )  # fmt: skip
        self.agent.start()
        return self.agent

    def spawn(self, *, size_bytes: int = 3 * MiB) -> Instance:
        instance = spawn_known(self.scene.compute, self.agent)
        if size_bytes > 3 * MiB:
            scribble(instance.disk, size_bytes=size_bytes)
        return instance

    def terminate(self, instance: Instance) -> None:
        self.scene.compute.terminate(instance)

    def backup(self, user: str, project: str, instance: Instance) -> Backup:
        """The one whole backup of *instance* in *project*."""
        held = backups_in(self.cloud, user, project, instance=instance.uuid)
        assert [image["status"] for image in held] == ["active"], held
        return Backup(cloud=self.cloud, image_id=held[0]["id"])

    def restored(self, backup: Backup, cloud_entry: str, **environment: str) -> str:
        """The restored root disk's digest as the guest would see it, by the command line and as somebody else."""
        target = self.scene.home / "restored"
        done = self.agent.cli(
            "restore", backup.image_id, "--cloud", cloud_entry, "--to", str(target), "-f", "json",
            environment={"OS_CLIENT_CONFIG_FILE": str(self.cloud.clouds_file), **environment},
        )  # fmt: skip
        disk = Path(json.loads(done.stdout)["disks"][0]["path"])
        try:
            return guest_view_sha256(disk, "qcow2")
        finally:
            shutil.rmtree(target)

    def job(self) -> dict[str, Any]:
        return self.agent.jobs()[0]


@pytest.fixture
def stage(scene: Scene, cloud: Cloud) -> Iterator[Stage]:
    yield Stage(scene, cloud)
    for project, user in (("tenant-a", "alice"), ("tenant-b", "bob"), ("vault", "vera")):
        for image in backups_in(cloud, user, project):
            cloud.call(user, project, "DELETE", f"{cloud.glance_url}/v2/images/{image['id']}")


# ---- where it lands, and who can open it ------------------------------------------------------------------------


def test_a_backup_lands_in_the_project_that_the_rule_names(stage: Stage) -> None:
    """Opaque to its owner, invisible to strangers, open to the named reader alone."""
    cloud = stage.cloud
    agent = stage.start({"vault": glance("tenant-a", readers=[cloud.users["erin"]])})
    instance = stage.spawn()
    expected = guest_view_sha256(instance.disk, "qcow2")
    stage.terminate(instance)

    receipt = agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    assert receipt["outcome"].startswith("verified in every destination, then scrubbed")
    backup = stage.backup("alice", "tenant-a", instance)
    image = backup.image("alice", "tenant-a").json()
    assert image["owner"] == cloud.projects["tenant-a"]
    assert (image["visibility"], image["disk_format"], image["container_format"]) == ("private", "raw", "bare")
    assert image["instance_uuid"] == instance.uuid
    assert image["os_encrypt_key_id"] == backup.words["secret"]
    assert backup.words["project"] == cloud.projects["tenant-a"]
    assert backup.is_opaque()
    assert backup.data("alice", "tenant-a").body == cloud.image_file(backup.image_id).read_bytes()

    assert backup.image("mallory", "elsewhere").status == 404
    assert backup.data("mallory", "elsewhere").status == 404
    assert backup.key("mallory", "elsewhere").status == 403
    assert backup.key("alice", "tenant-a").status == 403, "a member of the project is not a reader"
    assert backup.key("carol", "tenant-a").status == 403
    assert backup.key("erin", "tenant-a").status == 200

    assert stage.restored(backup, "erin") == expected
    refused = agent.cli(
        "restore", backup.image_id, "--cloud", "alice", "--to", str(stage.scene.home / "no"), check=False,
        environment={"OS_CLIENT_CONFIG_FILE": str(cloud.clouds_file)},
    )  # fmt: skip
    assert refused.returncode == 3, refused.stderr
    assert "403" in refused.stderr
    assert not (stage.scene.home / "no").exists()
    assert not (stage.scene.home / "no.partial").exists()


def test_a_backup_lands_in_the_project_that_the_owner_asks_for(stage: Stage) -> None:
    """No rule names the instance; its owner's request does, names a reader, and says how long."""
    cloud = stage.cloud
    agent = stage.start(
        {"owners": glance("vault")},
        more='[request]\ndestination = "owners"\n',
        rule='name = "nothing"\nmatch = { name = "none of them" }',
    )
    instance, unwanted = stage.spawn(), stage.spawn()
    ask = f"/v1/instances/{instance.uuid}/terminate_backup"

    status, said = agent.ask(ask, method="POST", body={
        "enabled": True, "store_project": cloud.projects["no-consent"],
    })  # fmt: skip
    assert status == 409
    assert f"project {cloud.projects['no-consent']} has not consented" in said["error"]
    assert "vault" not in said["error"], "which other projects have consented is not the owner's to read"
    wish = {"enabled": True, "store_project": cloud.projects["tenant-b"], "store_user": cloud.users["bob"]}
    status, said = agent.ask(ask, method="POST", body={**wish, "retention": "7d"})
    assert (status, said["enabled"]) == (200, True)
    assert agent.ask(ask)[1]["store_project"] == cloud.projects["tenant-b"]
    agent.kill()  # the wish outlives the agent
    agent.start()
    stage.terminate(instance)
    stage.terminate(unwanted)

    receipt = agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    backup = stage.backup("bob", "tenant-b", instance)
    assert receipt["copies"][0]["attempt"]["attempt"] == backup.image_id
    assert backup.key("bob", "tenant-b").status == 200
    image = backup.image("bob", "tenant-b").json()
    assert int(image["autobackup_expires_at"]) - int(image["autobackup_created_at"]) == 7 * 86400
    assert not backups_in(cloud, "vera", "vault")
    wait_until(lambda: not agent.claims(unwanted.uuid), words="what nobody asked for is let go")
    assert [one["instance"] for one in agent.receipts()] == [instance.uuid]


def test_both_at_once_have_different_keys(stage: Stage) -> None:
    """By rule in one project, by request in another: one read, two keys, neither opens the other."""
    cloud = stage.cloud
    agent = stage.start({"vault": glance("vault")}, more='[request]\ndestination = "vault"\n')
    instance = stage.spawn()
    expected = guest_view_sha256(instance.disk, "qcow2")
    ask = f"/v1/instances/{instance.uuid}/terminate_backup"
    wish = {"enabled": True, "store_project": cloud.projects["tenant-a"], "store_user": cloud.users["erin"]}
    assert agent.ask(ask, method="POST", body=wish)[0] == 200
    stage.terminate(instance)

    agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    by_rule = stage.backup("vera", "vault", instance)
    by_request = stage.backup("alice", "tenant-a", instance)
    assert by_rule.words["project"] == cloud.projects["vault"]
    assert by_request.words["project"] == cloud.projects["tenant-a"]
    keys = {by_rule.key("autobackup", "vault").body, by_request.key("autobackup", "tenant-a").body}
    assert [len(key) for key in keys] == [32, 32]
    assert by_rule.key("erin", "tenant-a").status == 403
    assert stage.restored(by_request, "erin") == expected


def test_sealed_to_a_recipient_the_host_cannot_open_it_and_a_member_project_can_read_it(stage: Stage) -> None:
    """No Barbican at all: the private key is elsewhere. Another project was named as a member of the image."""
    home, cloud = stage.scene.home, stage.cloud
    stage_agent = stage.scene.agent(stores=())  # for its command line
    stage_agent.cli("keygen", "--recipient", "--post-quantum", str(home / "analyst"))
    (home / "away").mkdir()
    shutil.move(home / "analyst", home / "away" / "analyst")
    terms = glance(
        "vault", key="recipient", recipients=[str(home / "analyst.pub")], members=[cloud.projects["tenant-b"]]
    )
    before = secrets_of(cloud, "vault")
    agent = stage.start({"vault": terms})
    instance = stage.spawn()
    expected = guest_view_sha256(instance.disk, "qcow2")
    stage.terminate(instance)

    agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    backup = stage.backup("vera", "vault", instance)
    assert secrets_of(cloud, "vault") == before
    assert backup.image("bob", "tenant-b").json()["status"] == "active"
    assert backup.image("alice", "tenant-a").status == 404
    by_host = agent.cli("verify", backup.image_id, "--config", str(agent.config), check=False)
    assert by_host.returncode == 3
    assert "private key" in by_host.stderr
    target = home / "restored"
    done = agent.cli(
        "restore", backup.image_id, "--cloud", "bob", "--keyfile", str(home / "away" / "analyst"), "--to", str(target),
        "-f", "json", environment={"OS_CLIENT_CONFIG_FILE": str(cloud.clouds_file)},
    )  # fmt: skip
    assert guest_view_sha256(Path(json.loads(done.stdout)["disks"][0]["path"]), "qcow2") == expected


# ---- one part of it down ----------------------------------------------------------------------------------------


def test_a_destination_that_is_down_does_not_stop_the_others_and_gets_its_copy_later(stage: Stage) -> None:
    """And nothing is scrubbed before it has it."""
    with Proxy.to(stage.cloud.glance_url) as proxy:
        clouds = clouds_yaml(stage.cloud, stage.scene.home, far={"image_endpoint_override": proxy.url})
        agent = stage.start({"near": glance("tenant-a"), "far": glance("tenant-b", cloud="far")}, clouds=clouds)
        instance = stage.spawn()
        proxy.refuse()
        stage.terminate(instance)

        wait_until(lambda: agent.jobs() and states(stage)["near"] == "verified", within_s=ARRIVED_S)
        stage.backup("alice", "tenant-a", instance)
        assert states(stage)["far"] == "queued"
        assert (
            "make sure that it runs"
            in next(c for c in stage.job()["copies"] if c["destination"] == "far")["last_error"]
        )
        assert not agent.receipts()
        assert any("far" in words for words in agent.ask("/healthz")[1]["degraded"])
        proxy.heal()

        receipt = agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
        assert receipt["scrub"]["scrubbed"]
        stage.backup("bob", "tenant-b", instance)


def test_a_destination_that_hangs_holds_nobody(stage: Stage) -> None:
    """It takes connections and says nothing: the others do not wait for the end of its deadlines (30 s each)."""
    with Proxy.to(stage.cloud.glance_url) as proxy:
        clouds = clouds_yaml(stage.cloud, stage.scene.home, far={"image_endpoint_override": proxy.url})
        agent = stage.start({"far": glance("tenant-b", cloud="far"), "near": glance("tenant-a")}, clouds=clouds)
        instances = [stage.spawn() for _ in range(3)]
        proxy.stall()
        for instance in instances:
            stage.terminate(instance)

        def near_has_all() -> bool:
            copies = [copy for job in agent.jobs() for copy in job["copies"] if copy["destination"] == "near"]
            return [copy["state"] for copy in copies] == ["verified"] * 3

        wait_until(near_has_all, within_s=25, words="the healthy destination has every copy")
        proxy.heal()

        for instance in instances:
            assert agent.receipt_of(instance.uuid, within_s=90)["scrub"]["scrubbed"]


def test_a_destination_that_is_slow_is_detached_and_sent_later(stage: Stage) -> None:
    with Proxy.to(stage.cloud.glance_url) as proxy:
        clouds = clouds_yaml(stage.cloud, stage.scene.home, far={"image_endpoint_override": proxy.url})
        agent = stage.start({"near": glance("tenant-a"), "far": glance("tenant-b", cloud="far")}, clouds=clouds)
        instance = stage.spawn(size_bytes=24 * MiB)
        proxy.slow(100_000)
        stage.terminate(instance)

        wait_until(lambda: agent.jobs() and states(stage)["near"] == "verified", within_s=ARRIVED_S)
        assert any("held up the shared read" in one["error"] for one in agent.events("send.attempt", destination="far"))
        proxy.heal()

        assert agent.receipt_of(instance.uuid, within_s=ARRIVED_S)["scrub"]["scrubbed"]
        stage.backup("bob", "tenant-b", instance)


def test_an_operator_discards_one_destination_on_the_record(stage: Stage) -> None:
    """Its project took its consent back. The other copy is enough then, and the receipt says so."""
    cloud = stage.cloud
    agent = stage.start({"near": glance("tenant-a"), "far": glance("tenant-b")})
    instance = stage.spawn()
    cloud.revoke("autobackup", "tenant-b", "autobackup")
    try:
        stage.terminate(instance)
        wait_until(lambda: agent.jobs() and states(stage)["near"] == "verified", within_s=ARRIVED_S)
        error = next(copy for copy in stage.job()["copies"] if copy["destination"] == "far")["last_error"]
        assert "openstack role add --user autobackup --project tenant-b autobackup" in error
        order = ["queue", "discard", stage.job()["job"], "--destination", "far", "--config", str(agent.config)]
        assert agent.cli(*order, check=False).returncode == 2, "without --confirm"
        wait_until(lambda: agent.cli(*order, "--confirm", check=False).returncode == 0)

        receipt = agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    finally:
        cloud.grant("autobackup", "tenant-b", "autobackup")
    assert {copy["destination"]: copy["state"] for copy in receipt["copies"]} == {
        "near": "verified",
        "far": "discarded",
    }
    assert receipt["scrub"]["scrubbed"]
    assert not backups_in(cloud, "bob", "tenant-b", instance=instance.uuid)


# ---- crashes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fate", ["before:sending/sending", "after:sending/sending", f"put:{MiB}", "name", "after:sending/sent"]
)
def test_what_a_kill_leaves_in_the_cloud_is_removed_image_and_key(stage: Stage, fate: str) -> None:
    """One whole image and its base, a secret for each; a recipient's key that was in memory alone is drawn anew."""
    cloud, home = stage.cloud, stage.scene.home
    stage.scene.agent(stores=()).cli("keygen", "--recipient", str(home / "analyst"))
    agent = stage.start(
        {
            "near": glance("tenant-a"),
            "sealed": glance("tenant-b", key="recipient", recipients=[str(home / "analyst.pub")]),
        },
        command=mortal(fate),
    )
    secrets_before = secrets_of(cloud, "tenant-a")
    instance = stage.spawn()
    digest = sha256_of(instance.disk)
    stage.terminate(instance)
    wait_for_death(agent)
    restart_plain(agent)

    receipt = agent.receipt_of(instance.uuid, within_s=ARRIVED_S)
    assert receipt["member_sha256"]["disks/disk"] == digest
    near, sealed = (stage.backup(u, p, instance) for u, p in (("alice", "tenant-a"), ("bob", "tenant-b")))
    assert {near.image_id, sealed.image_id} == {copy["attempt"]["attempt"] for copy in receipt["copies"]}
    copy = next(copy for copy in receipt["copies"] if copy["destination"] == "near")
    kept = {f"autobackup-{near.image_id}", *(f"autobackup-{parent['parent']}" for parent in copy["parents"])}
    wait_until(
        lambda: set(secrets_of(cloud, "tenant-a")) - set(secrets_before) == kept,
        words=f"one secret for the backup, one for its base: {secrets_of(cloud, 'tenant-a')}",
    )


def test_an_upload_whose_job_is_forgotten_is_removed_at_the_next_start(stage: Stage) -> None:
    agent = stage.start({"near": glance("tenant-a")}, command=mortal(f"put:{MiB}"))
    instance = stage.spawn()
    stage.terminate(instance)
    wait_for_death(agent)
    time.sleep(1)  # Glance notices that nobody is there
    assert [image["status"] for image in without_bases(stage.cloud)] == ["queued"]
    for job in (agent.spool / "jobs").iterdir():  # lost, as by a repair of the filesystem
        shutil.rmtree(job)

    restart_plain(agent)

    wait_until(lambda: not without_bases(stage.cloud), words="the orphan is removed")
    assert os.listdir(agent.spool / "jobs") == []


def without_bases(cloud: Cloud) -> list[dict[str, Any]]:
    """A base that was sent may have others on it by now: it is let go an hour after the last of them."""
    return [one for one in backups_in(cloud, "alice", "tenant-a") if one.get("autobackup_kind") != "base"]


def states(stage: Stage) -> dict[str, str]:
    jobs = stage.agent.jobs()
    return {copy["destination"]: copy["state"] for copy in jobs[0]["copies"]} if jobs else {}
