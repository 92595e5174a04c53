"""
`make demo-openstack`: one instance from its boot to its scrub, into two projects of a real cloud, and back by a reader.

By rule its last state goes to the project `vault`, by its owner's request to `tenant-a`: one read, two keys. Whatever
is claimed is looked at as the people concerned would: the owner, a stranger, the named reader, and `curl`.
The last line is one JSON object; the exit status is 0 only if every promise in it held.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
from tests.demo import say
from tests.lab import guest
from tests.lab.agent import AgentProcess, wait_until
from tests.lab.filesystem import loop_filesystem, scan_for
from tests.lab.guest_view import guest_view_sha256
from tests.lab.hypervisor import Hypervisor
from tests.lab.instances import Compute, Disks, Instance, Step
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.views import Backup, backups_in
from tests.lab.workspace import workspace

HOME = Path("build/demo-openstack").resolve()
SECOND_DISK_BYTES = 192 << 20  # so that an upload takes long enough to be compared
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Party:
    """A destination, who looks into it, and who was named to open it."""

    name: str
    project: str
    owner: str
    reader: str


PARTIES = (
    Party("vault", project="vault", owner="vera", reader="vera"),
    Party("owners", project="tenant-a", owner="alice", reader="erin"),
)
STRANGER, ELSEWHERE = "mallory", "elsewhere"


def main() -> int:
    """Run the demo; leave `build/demo-openstack` behind, and nothing running."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    shutil.rmtree(HOME, ignore_errors=True)
    (HOME / "tmp").mkdir(parents=True)
    os.environ["TMPDIR"] = str(HOME / "tmp")  # whatever the agent might write anywhere is scanned with the rest
    plain = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        with (
            workspace() as place,
            loop_filesystem("ext4", 1 << 30) as filesystem,
            Cloud(HOME / "cloud") as cloud,
            Hypervisor() as hypervisor,
        ):
            say("Keystone, Barbican, Glance, libvirtd and QEMU (TCG) are up; two projects have consented")
            instances = filesystem.mount_point
            agent = agent_of(cloud, hypervisor, instances, place.folder("run"))
            with Compute(hypervisor.uri, instances) as compute, agent:
                facts, marker = live_and_die(compute, agent, cloud, plain)
            shutil.copytree(agent.spool / "receipts", HOME / "receipts")
            filesystem.unmount()
            remains = scan_for(filesystem.image_path, [marker])[marker]
            written = {path for path in HOME.iterdir() if not path.name.startswith("restored")}
            facts["cleartext_found"] = bool(remains) or any(scan_for(path, [marker])[marker] for path in written)
            say(f"the guest's marker in the raw blocks, in Glance's store, in a log: {facts['cleartext_found']}")
            curl_bytes_s = curl(cloud, sorted(plain.iterdir()))
            ours_bytes_s = facts.pop("disk_bytes") * len(PARTIES) / facts.pop("elapsed_s")
            facts["upload_ratio_to_curl"] = round(ours_bytes_s / curl_bytes_s, 2)
            say(f"disk bytes each second, both at once: {mib(ours_bytes_s)}; curl, plain: {mib(curl_bytes_s)}")
    finally:
        shutil.rmtree(plain)
        shutil.rmtree(HOME / "tmp", ignore_errors=True)
    print(f"\nLook into {HOME.relative_to(Path.cwd())}: agent.log, receipts, cloud/logs\n")
    print(json.dumps(facts))
    return 0 if kept(facts) else 1


def kept(facts: dict[str, Any]) -> bool:
    """Every promise."""
    each = all(
        one["verified"] and one["opaque"] and one["reader_restored"]
        and one["stranger_image_status"] == 404 and one["stranger_key_status"] in (403, 404)
        for one in facts["destinations"]
    )  # fmt: skip
    keys = {one["key_ref"] for one in facts["destinations"]}
    return each and len(keys) == len(PARTIES) and facts["restored_identical"] and not facts["cleartext_found"]


def agent_of(cloud: Cloud, hypervisor: Hypervisor, instances: Path, run_folder: Path) -> AgentProcess:
    by_rule, by_request = PARTIES
    terms = {"store": "glance", "cloud": "autobackup", "key": "barbican"}
    agent = AgentProcess(
        HOME, instances, uri=hypervisor.uri, stores=(), run_folder=run_folder,
        destinations={by_rule.name: {**terms, "project": by_rule.project, "readers": [cloud.users[by_rule.reader]]}},
    )  # fmt: skip
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {"name": by_request.name, **terms}.items())
    with agent.config.open("a") as file:
        file.write(f'\n[[destination]]\nproject = "service"\n{table}\n')
        file.write(f'\n[request]\ndestination = "{by_request.name}"\n')
        file.write(f'\n[openstack]\nclouds_yaml = "{cloud.clouds_file}"\n')
    return agent


def live_and_die(compute: Compute, agent: AgentProcess, cloud: Cloud, plain: Path) -> tuple[dict[str, Any], bytes]:
    """Boot, write, ask, terminate, look. The facts for the last line, and the guest's marker."""
    expected: dict[str, str] = {}

    def at_step(step: Step, one: Instance) -> None:
        if step is Step.DISKS_MADE:
            fill(one.folder / "disk.eph0")
        if step is Step.STOPPED:  # the last state: nobody writes any more
            for name in ("disk", "disk.eph0"):
                expected[name] = guest_view_sha256(one.folder / name, "qcow2")
                shutil.copyfile(one.folder / name, plain / name)  # in memory, for curl

    compute.on_step = at_step
    instance = compute.spawn(name="demo", nova_metadata=False, disks=Disks(ephemeral=True))
    compute.wait_for(instance)
    say(f"instance {instance.uuid} wrote its data; a rule sends its last state to the project vault")
    by_request = PARTIES[1]
    wish = {"store_project": cloud.projects[by_request.project], "store_user": cloud.users[by_request.reader]}
    status, said = agent.ask(
        f"/v1/instances/{instance.uuid}/terminate_backup", method="POST", body={"enabled": True, **wish}
    )  # fmt: skip
    assert status == 200, said
    say(f"its owner asked for a backup into project {by_request.project}, to be opened by {by_request.reader}")

    compute.terminate(instance)
    receipt = agent.receipt_of(instance.uuid)
    say(f"terminated, sealed, sent, proven: {receipt['outcome']}")
    wait_until(lambda: not agent.jobs(), words="the job is done")
    sent = agent.events("send.attempt", outcome="sent")
    verified = {copy["attempt"]["attempt"] for copy in receipt["copies"] if copy["state"] == "verified"}
    found = [look(agent, cloud, party, instance, expected, verified) for party in PARTIES]
    facts = {
        "instance": instance.uuid,
        "verdict": receipt["verdict"],
        "scrubbed": receipt["scrub"]["scrubbed"] and not agent.claims(instance.uuid),
        "destinations": found,
        "restored_identical": all(one["reader_restored"] for one in found),
        "disk_bytes": sum(path.stat().st_size for path in plain.iterdir()),
        "elapsed_s": max(one["elapsed_s"] for one in sent),
    }
    return facts, guest.marker(instance.image.seed)


def look(
    agent: AgentProcess, cloud: Cloud, party: Party, instance: Instance, expected: dict[str, str], verified: set[str]
) -> dict[str, Any]:
    """One destination, as its owner, a stranger and its reader see it."""
    image = backups_in(cloud, party.owner, party.project, instance=instance.uuid)[0]
    backup = Backup(cloud=cloud, image_id=image["id"])
    target = HOME / f"restored-by-{party.reader}"
    done = agent.cli(
        "restore", backup.image_id, "--cloud", party.reader, "--to", str(target), "-f", "json",
        environment={"OS_CLIENT_CONFIG_FILE": str(cloud.clouds_file)},
    )  # fmt: skip
    disks = {Path(one["path"]).name: Path(one["path"]) for one in json.loads(done.stdout)["disks"]}
    facts = {
        "name": party.name,
        "project": party.project,
        "image_id": backup.image_id,
        "key_ref": backup.words["secret"],
        "verified": backup.image_id in verified,
        "opaque": backup.is_opaque(),
        "stranger_image_status": backup.image(STRANGER, ELSEWHERE).status,
        "stranger_key_status": backup.key(STRANGER, ELSEWHERE).status,
        "reader_restored": {name: guest_view_sha256(disks[name], "qcow2") for name in expected} == expected,
    }
    say(f"project {party.project}: image {backup.image_id}, opaque: {facts['opaque']}; a stranger gets "
        f"{facts['stranger_image_status']} for it and {facts['stranger_key_status']} for its key; "
        f"{party.reader} restored it, identical: {facts['reader_restored']}")  # fmt: skip
    shutil.rmtree(target)
    return facts


def fill(path: Path) -> None:
    """Half of it packs well, half not at all; through QEMU, as a guest would have written it."""
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(path), "1G"], check=True)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
        for _ in range(0, SECOND_DISK_BYTES, 2 * PIECE_BYTES):
            source.write(os.urandom(PIECE_BYTES))
            source.write(os.urandom(1 << 12).hex().encode() * (PIECE_BYTES // (1 << 13)))
        source.flush()
        write = f"write -q -s {source.name} 0 {SECOND_DISK_BYTES}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(path)], check=True)


def curl(cloud: Cloud, plain: list[Path]) -> float:
    """Bytes each second of as many `curl -T` of the plain disks, side by side, as we had uploads."""
    headers = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        uploads, images = [], []
        for n, party in enumerate(PARTIES):
            (headers / str(n)).touch(mode=0o600)
            (headers / str(n)).write_text(
                f"X-Auth-Token: {cloud.token(party.owner, party.project)}\nContent-Type: application/octet-stream\n"
                "Expect:\n"  # or it waits a second for a word that uWSGI does not give
            )
            for path in plain:
                # `compressed` is not looked into: Glance refuses a qcow2 with a backing file
                made = cloud.call(party.owner, party.project, "POST", f"{cloud.glance_url}/v2/images", json={
                    "name": path.name, "disk_format": "qcow2", "container_format": "compressed",
                }).json()  # fmt: skip
                images.append((party, made["id"]))
                url = f"{cloud.glance_url}/v2/images/{made['id']}/file"
                uploads.append((n, ["curl", "-sSf", "-X", "PUT", "-H", f"@{headers / str(n)}", "-T", str(path), url]))
        started_s = time.monotonic()
        lanes = [
            subprocess.Popen(["sh", "-ec", "\n".join(" ".join(words) for m, words in uploads if m == n)])
            for n in range(len(PARTIES))
        ]
        assert [lane.wait() for lane in lanes] == [0] * len(lanes)
        elapsed_s = time.monotonic() - started_s
        for party, image_id in images:
            cloud.call(party.owner, party.project, "DELETE", f"{cloud.glance_url}/v2/images/{image_id}")
    finally:
        shutil.rmtree(headers)
    return sum(path.stat().st_size for path in plain) * len(PARTIES) / elapsed_s


def mib(count: float) -> str:
    return f"{count / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
