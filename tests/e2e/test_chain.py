"""
Backups and what they stand on, in a real cloud: whatever becomes of the parent, what was verified can be restored, and
what nobody needs any more is let go.
"""

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.evidence import restart_plain, wait_for_death
from tests.crash.scene import in_company
from tests.e2e.chain_stage import ARRIVED_S, ChainCompany, KiB, MiB, Stage, glance
from tests.lab import guest
from tests.lab.agent import wait_until
from tests.lab.chain import VENDOR, kept, publish
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Disks
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.config import GLANCE_POLICY, PROPERTY_PROTECTIONS
from tests.lab.openstack.images import Images
from tests.lab.openstack.views import Backup, secrets_of
from tests.lab.workspace import Workspace

_LONG = bool(os.environ.get("AUTOBACKUP_LONG"))  # `make crash`: all moments
_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def company(
    request: pytest.FixtureRequest, hypervisor: Hypervisor, workspace: Workspace, openstack_services: None
) -> Iterator[ChainCompany]:
    items = [item for item in request.session.items if item.path == request.path]
    protections = str(PROPERTY_PROTECTIONS)
    with (
        Cloud(glance_worker_count=4) as cloud,
        cloud.glance_with(policy=GLANCE_POLICY, property_protection_file=protections) as guarded_url,
    ):
        gathered = ChainCompany(hypervisor, workspace, items, cloud=cloud, guarded_url=guarded_url)
        yield gathered
        gathered.close()


# the parent goes


@in_company
def test_a_parent_deleted_while_its_instance_runs_travels_as_a_copy(scene: Stage) -> None:
    image = publish(scene.cloud)
    instance = scene.spawn(image)
    agent = scene.start({"vault": glance("vault", readers=[scene.cloud.users["vera"]])})
    assert scene.images.delete(VENDOR, image.id) == 204
    scene.terminate(instance)

    receipt = scene.receipt(instance)
    assert kept(receipt) == {"vault": ["copy"]}
    scene.assert_restored(scene.attempt(receipt, "vault"), instance, "--cloud", "vera")
    assert agent.events("base.sent")


@pytest.mark.parametrize("moment", ["!after:sending/sending", *([f"!put:{MiB // 4}"] if _LONG else [])])
@in_company
def test_a_parent_deleted_while_its_child_is_sent_is_noticed(scene: Stage, moment: str) -> None:
    """It had been found, compared and protected. Then its owner takes the protection away, and it."""
    image = publish(scene.cloud)
    instance = scene.spawn(image)
    scene.start({"vault": glance("vault", readers=[scene.cloud.users["vera"]])}, fates=[moment])
    scene.terminate(instance)
    with scene.while_stopped():
        assert scene.image(image.id)["protected"]
        scene.unprotect_and_delete(image.id)

    receipt = scene.receipt(instance)
    assert kept(receipt) == {"vault": ["copy"]}
    scene.assert_restored(scene.attempt(receipt, "vault"), instance, "--cloud", "vera")


@in_company
def test_a_copy_does_not_miss_its_image(scene: Stage) -> None:
    """On the terms `copy` an image is nobody's but its owner's, and is not asked for."""
    image = publish(scene.cloud)
    first, second = scene.spawn(image), scene.spawn(image)
    scene.start({"copies": glance("tenant-a", readers=[scene.cloud.users["erin"]], parents="copy")})
    scene.terminate(first, second)
    receipts = [scene.receipt(one) for one in (first, second)]
    assert scene.images.delete(VENDOR, image.id) == 204

    assert [kept(receipt) for receipt in receipts] == [{"copies": ["copy"]}] * 2
    assert len({receipt["copies"][0]["parents"][0]["parent"] for receipt in receipts}) == 1, "one base for both"
    scene.assert_restored(scene.attempt(receipts[1], "copies"), second, "--cloud", "erin")


# the parent is not what it should be, or not ours


@in_company
def test_an_image_with_other_bytes_is_no_parent(scene: Stage) -> None:
    """Copied where that is allowed; where it is not, the disk waits in the spool for an operator."""
    cloud = scene.cloud
    images = [publish(cloud, disk_format="raw"), publish(cloud, disk_format="qcow2")]
    for image, disk_format in zip(images, ("raw", "qcow2"), strict=True):
        path = scene.base(image, disk_format)
        with path.open("r+b") as base:
            base.seek(MiB + 4711)
            base.write(b"backdoor")
    instances = [scene.spawn(image) for image in images]
    readers = [cloud.users["vera"]]
    terms = {"auto": glance("vault", readers=readers), "strict": glance("tenant-b", readers=readers, parents="protect")}
    agent = scene.start(terms)
    scene.terminate(*instances)

    wait_until(lambda: [job["state"] for job in agent.jobs()] == ["parked"] * 2, within_s=ARRIVED_S)
    for job in agent.jobs():
        copies = {copy["destination"]: copy for copy in job["copies"]}
        assert {name: copy["state"] for name, copy in copies.items()} == {"auto": "verified", "strict": "parked"}
        assert 'parents = "protect", and its image holds other bytes than the base' in copies["strict"]["last_error"]
        assert (agent.spool / "jobs" / job["job"]).is_dir()
    assert not agent.receipts()
    agent.stop()
    agent.config.write_text(agent.config.read_text().replace('parents = "protect"', 'parents = "auto"'))
    agent.start()
    for job in agent.jobs():
        agent.cli("queue", "retry", job["job"], "--config", str(agent.config))

    for instance in instances:
        receipt = scene.receipt(instance)
        assert kept(receipt) == {"auto": ["copy"], "strict": ["copy"]}
        scene.assert_restored(scene.attempt(receipt, "auto"), instance, "--cloud", "vera")
    for image in images:
        assert scene.is_free(image.id)


@in_company
def test_an_image_in_any_format_is_a_parent_if_its_bytes_are_the_base(scene: Stage) -> None:
    """And can be read again as one."""
    formats = ("raw", "iso")
    images = [publish(scene.cloud, disk_format=one) for one in formats]
    for image, disk_format in zip(images, formats, strict=True):
        scene.base(image, disk_format)
    instances = [scene.spawn(image) for image in images]
    scene.start({"vault": glance("vault", readers=[scene.cloud.users["vera"]])})
    scene.terminate(*instances)

    for instance in instances:
        receipt = scene.receipt(instance)
        assert kept(receipt) == {"vault": ["protected"]}
        scene.assert_restored(scene.attempt(receipt, "vault"), instance, "--cloud", "vera")


@in_company
def test_a_private_parent_is_protected_in_its_project_and_copied_elsewhere(scene: Stage) -> None:
    cloud = scene.cloud
    image = publish(cloud, user=("alice", "tenant-a"), visibility="private")
    instance = scene.spawn(image)
    scene.start({
        "owners": glance("tenant-a", readers=[cloud.users["erin"]]),
        "vault": glance("vault", readers=[cloud.users["vera"]]),
    })  # fmt: skip
    scene.terminate(instance)

    receipt = scene.receipt(instance)
    assert kept(receipt) == {"owners": ["protected"], "vault": ["copy"]}
    assert scene.images.delete(("alice", "tenant-a"), image.id) == 403
    for destination, user in (("owners", "erin"), ("vault", "vera")):
        scene.assert_restored(scene.attempt(receipt, destination), instance, "--cloud", user)


@in_company
def test_without_a_role_where_the_parent_is_it_is_copied_or_granted(scene: Stage) -> None:
    """`elsewhere` has not let the agent in; when it does, `queue retry` is enough."""
    cloud = scene.cloud
    image = publish(cloud, user=("mallory", "elsewhere"))
    instance = scene.spawn(image)
    readers = [cloud.users["vera"]]
    terms = {"auto": glance("vault", readers=readers), "strict": glance("tenant-b", readers=readers, parents="protect")}
    agent = scene.start(terms)
    scene.terminate(instance)

    wait_until(lambda: [job["state"] for job in agent.jobs()] == ["parked"], within_s=ARRIVED_S)
    [job] = agent.jobs()
    strict = next(copy for copy in job["copies"] if copy["destination"] == "strict")
    assert "its image is not ours to protect; grant it" in strict["last_error"]
    assert scene.is_free(image.id)
    cloud.grant("autobackup", "elsewhere", "member")
    try:
        agent.cli("queue", "retry", job["job"], "--socket", str(agent.socket))
        receipt = scene.receipt(instance)
    finally:
        cloud.revoke("autobackup", "elsewhere", "member")
    assert kept(receipt) == {"auto": ["copy"], "strict": ["protected"]}
    scene.assert_restored(scene.attempt(receipt, "auto"), instance, "--cloud", "vera")
    assert scene.is_kept(image.id)


@in_company
def test_a_base_that_is_not_its_image_is_told_by_its_name_or_its_bytes(scene: Stage) -> None:
    """An unshelved server names its snapshot, older releases resized bases; some bases never were images."""
    cloud = scene.cloud
    first, grown = publish(cloud), publish(cloud)
    shelved = scene.spawn(first, disks=Disks(ephemeral=True, swap=True))
    scene.scene.compute.shelve_offload(shelved)
    unshelved = scene.scene.compute.unshelve(shelved)
    scene.write(unshelved)
    resized = scene.spawn(grown)
    base = scene.scene.compute.base(grown)
    old = base.rename(base.with_name(f"{base.name}_10"))
    with old.open("r+b") as file:
        file.truncate(80 * MiB)
    subprocess.run(["qemu-img", "rebase", "-u", "-F", "raw", "-b", str(old), str(resized.disk)], check=True)
    scene.start({"vault": glance("vault", readers=[cloud.users["vera"]])})
    scene.terminate(unshelved, resized)

    receipts = [scene.receipt(one) for one in (unshelved, resized)]
    ways = [
        {Path(one["path"]).name: one["protection"] for one in receipt["copies"][0]["parents"]} for receipt in receipts
    ]
    assert unshelved.root_id != first.id
    assert ways[0] == {first.base_name: "protected", "ephemeral_1_40d1d2c": "copy", "swap_1": "copy"}
    assert ways[1] == {f"{grown.base_name}_10": "copy"}
    assert scene.is_free(grown.id)
    for receipt, one in zip(receipts, (unshelved, resized), strict=True):
        scene.assert_restored(scene.attempt(receipt, "vault"), one, "--cloud", "vera")


# who may do what


@in_company
def test_with_the_policy_a_parent_outlives_its_owners_wish_and_a_restorer_does_nothing_else(scene: Stage) -> None:
    """rory has the role autobackup-restore in the vault, is named as a reader of keys, and that is all."""
    cloud = scene.cloud
    guarded = Images(cloud=cloud, url=scene.guarded_url)
    rory = ("rory", "vault")
    image = publish(cloud)
    instance = scene.spawn(image)
    scene.start({"vault": glance("vault", readers=[cloud.users["rory"]])}, guarded=True)
    scene.terminate(instance)
    receipt = scene.receipt(instance)
    child = scene.attempt(receipt, "vault")
    assert kept(receipt) == {"vault": ["policy"]}

    assert guarded.change(VENDOR, image.id, "replace", "protected", False).status == 200
    assert guarded.delete(VENDOR, image.id) == 403

    as_rory = ("--cloud", "rory@vault")
    listed = json.loads(scene.cli("list", *as_rory, "--instance", instance.uuid, "-f", "json", guarded=True).stdout)
    assert [one["backup"] for one in listed] == [child]
    said = scene.assert_restored(child, instance, *as_rory, "--boot", "--boot-for", "4", "--tcg", guarded=True)
    assert guest.TEXT_WROTE.decode() in said["console"]
    refused = scene.cli(
        "promote", child, *as_rory, "--from-project", "vault", "--project", "vault", guarded=True, check=False
    )
    assert refused.returncode != 0
    assert "403" in refused.stderr
    assert not guarded.ask(("vera", "vault"), "GET", f"?autobackup_origin={child}").json()["images"]
    assert guarded.delete(rory, child) == guarded.delete(rory, image.id) == 403
    assert guarded.change(rory, child, "replace", "protected", True).status == 403
    secret = f"{cloud.barbican_url}/v1/secrets/{Backup(cloud=cloud, image_id=child).words['secret']}"
    assert cloud.call(*rory, "DELETE", secret).status == 403

    assert guarded.delete(("vera", "vault"), child) == 204
    scene.let_go(image.id, child)
    assert guarded.delete(VENDOR, image.id) == 204


@in_company
def test_a_folder_and_a_private_key_are_enough(scene: Stage) -> None:
    """What was taken out of Glance restores where there is no cloud, with the base beside it or any file that is it."""
    cloud, home = scene.cloud, scene.home
    scene.scene.agent(stores=()).cli("keygen", "--recipient", str(home / "analyst"))
    image = publish(cloud)
    instance = scene.spawn(image)
    terms = {"key": "recipient", "recipients": [str(home / "analyst.pub")]}
    scene.start({"copies": glance("tenant-a", **terms, parents="copy"), "vault": glance("vault", **terms)})
    scene.terminate(instance)
    receipt = scene.receipt(instance)
    assert kept(receipt) == {"copies": ["copy"], "vault": ["protected"]}

    (home / "away").mkdir()
    child, [anchor] = scene.attempt(receipt, "copies"), receipt["copies"][0]["parents"]
    for one in (child, anchor["parent"], scene.attempt(receipt, "vault")):
        (home / "away" / f"{one}.autobackup").write_bytes(cloud.image_file(one).read_bytes())
    offline = ("--from", str(home / "away"), "--keyfile", str(home / "analyst"))
    nobody = {"OS_CLIENT_CONFIG_FILE": os.devnull}
    scene.assert_restored(child, instance, *offline, environment=nobody)

    (home / "away" / f"{anchor['parent']}.autobackup").unlink()
    child = scene.attempt(receipt, "vault")
    alone = scene.cli("restore", child, *offline, "--to", str(home / "alone"), environment=nobody, check=False)
    assert (alone.returncode, "name a file with --parent FILE" in alone.stderr) == (3, True), alone.stderr
    parent = home / "away" / "downloaded"
    parent.write_bytes(cloud.image_file(image.id).read_bytes())
    scene.assert_restored(child, instance, *offline, "--parent", str(parent), environment=nobody)
    assert not list(home.glob("alone*"))


# after the last child


@in_company
def test_the_look_alone_lets_go_and_protects_again(scene: Stage) -> None:
    """Nobody says `link --delete`: people delete what is theirs, with the cloud's own tools."""
    cloud = scene.cloud
    image = publish(cloud)
    instance = scene.spawn(image)
    scene.start({"keep": glance("tenant-b"), "copy": glance("tenant-b", parents="copy")})
    scene.terminate(instance)
    receipt = scene.receipt(instance)
    [base] = [one["parent"] for held in receipt["copies"] if held["destination"] == "copy" for one in held["parents"]]
    secret, bob = f"autobackup-{base}", ("bob", "tenant-b")
    assert secret in secrets_of(cloud, "tenant-b")

    assert scene.images.change(VENDOR, image.id, "replace", "protected", False).status == 200
    scene.look_until(lambda: scene.is_kept(image.id), words="protected again")
    for destination in ("keep", "copy"):
        assert scene.images.delete(bob, scene.attempt(receipt, destination)) == 204
    scene.look_until(lambda: scene.is_free(image.id), words="the image is let go")
    assert scene.images.ask(bob, "GET", f"/{base}").status == 200, "it may have its first child under way"
    scene.look("copy", again_after_s=7200)

    assert scene.images.ask(bob, "GET", f"/{base}").status == 404
    assert secret not in secrets_of(cloud, "tenant-b")
    assert scene.images.delete(VENDOR, image.id) == 204


@in_company
def test_tenants_edits_release_nothing(scene: Stage) -> None:
    """Tags and properties are theirs; what a bundle stands on is sealed into its header."""
    cloud = scene.cloud
    image = publish(cloud)
    instance = scene.spawn(image)
    terms = {"keep": glance("vault", readers=[cloud.users["vera"]]),
             "copy": glance("tenant-a", parents="copy", readers=[cloud.users["erin"]])}  # fmt: skip
    agent = scene.start(terms)
    scene.terminate(instance)
    receipt = scene.receipt(instance)
    children = {"keep": scene.attempt(receipt, "keep"), "copy": scene.attempt(receipt, "copy")}
    [base] = [one["parent"] for held in receipt["copies"] if held["destination"] == "copy" for one in held["parents"]]
    for user, one in ((("vera", "vault"), children["keep"]), (("alice", "tenant-a"), children["copy"]),
                      (("alice", "tenant-a"), base)):  # fmt: skip
        scene.strip(user, one)
    for destination in children:
        scene.look(destination, again_after_s=7200)

    for parent, child in ((image.id, children["keep"]), (base, children["copy"])):
        status, said = agent.ask(f"/v1/link/{parent}/{child}", method="DELETE")
        assert (status, f"stands on {parent}" in said["error"]) == (409, True)
        assert agent.ask(f"/v1/link/{parent}/{uuid.uuid4()}", method="DELETE")[1]["parent_released"] is False
    assert scene.is_kept(image.id)
    assert scene.image(base)["status"] == "active"
    scene.assert_restored(children["keep"], instance, "--cloud", "vera")
    scene.assert_restored(children["copy"], instance, "--cloud", "erin")


# crashes


@pytest.mark.parametrize(
    ("parents", "fate"),
    [
        pytest.param("auto", "after:sending/sending", id="protected"),
        pytest.param("copy", f"put:{64 * KiB}", id="base under way"),
        *([pytest.param("copy", "name", id="base sent")] if _LONG else []),
    ],
)
@in_company
def test_a_kill_leaves_no_parent_that_nobody_lets_go(scene: Stage, parents: str, fate: str) -> None:
    cloud = scene.cloud
    image = publish(cloud)
    instance = scene.spawn(image)
    agent = scene.start({"copies": glance("tenant-a", parents=parents, readers=[cloud.users["erin"]])}, fates=[fate])
    scene.terminate(instance)
    wait_for_death(agent)
    [journal] = agent.spool.glob("jobs/*/job.json")
    tried = set(_UUID.findall(journal.read_text()))
    restart_plain(agent)

    receipt = scene.receipt(instance)
    child = scene.attempt(receipt, "copies")
    [anchor] = receipt["copies"][0]["parents"]
    assert kept(receipt) == {"copies": ["protected" if parents == "auto" else "copy"]}
    scene.assert_restored(child, instance, "--cloud", "erin")
    made = {child, *([anchor["parent"]] if parents == "copy" else [])}
    wait_until(lambda: scene.made_by(agent, "tenant-a") == made, words="nothing else is left of the first try")
    assert scene.images.delete(("alice", "tenant-a"), child) == 204
    scene.let_go(anchor["parent"], child)

    assert not scene.made_by(agent, "tenant-a")
    assert scene.is_free(image.id)
    left = {name.removeprefix("autobackup-") for name in secrets_of(cloud, "tenant-a")}
    assert left & (tried | made) <= {child}, "the key of a backup is whose the backup was"
