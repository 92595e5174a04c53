"""
Owners ask with the tools of their cloud, operators set the rules, Nova says what was terminated: all of it real but
for nova-compute, which the lab plays.
"""

import os
from collections.abc import Iterator

import pytest
from tests.crash.evidence import sha256_of
from tests.crash.scene import in_company
from tests.e2e.nova_host import (
    CAP_DAYS,
    POLICY_FILE,
    Host,
    Tenants,
    doctor,
    inspector,
    kept_in_sight,
    keystone_policy,
    record_of,
)
from tests.lab.agent import wait_until
from tests.lab.hypervisor import Hypervisor
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.compute.nova import Nova, missing_nova
from tests.lab.openstack.identity import DOMAIN, INSPECTOR
from tests.lab.openstack.views import backups_in, secrets_of
from tests.lab.workspace import Workspace

pytestmark = pytest.mark.timeout(240)  # the first one starts a cloud; the last one waits for a minute to pass

POLICY = "packaging/openstack/nova-policy.yaml"
CONSENT = ("member", "creator", "autobackup")


@pytest.fixture(scope="module")
def nova(cloud: Cloud) -> Iterator[Nova]:
    if missing := missing_nova():
        if os.environ.get("CI") or os.environ.get("AUTOBACKUP_REQUIRE_OPENSTACK"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with Nova(cloud) as started, inspector(cloud, started):
        yield started
    for project, user in (("tenant-a", "alice"), ("tenant-b", "bob"), ("vault", "vera")):
        for image in backups_in(cloud, user, project):
            cloud.call(user, project, "DELETE", f"{cloud.glance_url}/v2/images/{image['id']}")


@pytest.fixture(scope="module")
def company(
    request: pytest.FixtureRequest, hypervisor: Hypervisor, workspace: Workspace, nova: Nova, cloud: Cloud
) -> Iterator[Tenants]:
    """The tests with a `scene` share a host, and run beside each other and beside all others."""
    items = [item for item in request.session.items if item.path == request.path]
    with Host.open(hypervisor, workspace, cloud, nova) as host:
        tenants = Tenants(host, items)
        yield tenants
        tenants.close()


@pytest.fixture(scope="module")
def lone(hypervisor: Hypervisor, workspace: Workspace, nova: Nova, cloud: Cloud) -> Iterator[Host]:
    """A host in a cell of its own, with no server but those of one test."""
    with Host.open(hypervisor, workspace, cloud, nova, cell="cell2", call_timeout="3s") as host:
        yield host


# ---- what owners ask for ----------------------------------------------------------------------------------------


@in_company
def test_the_properties_of_a_server_say_where_its_last_state_goes_and_for_how_long(scene: Host) -> None:
    """As `openstack server set --property` sets them, on a server that no rule wants; the operator caps the time."""
    cloud, asked_days = scene.cloud, {"7d": 7, "60d": CAP_DAYS, "": CAP_DAYS}
    servers = {retention: scene.boot("vm") for retention in asked_days}
    for retention, server in servers.items():
        wish = {"autobackup": "true", "autobackup_project": cloud.projects["tenant-b"]}
        wish |= {"autobackup_retention": retention} if retention else {}
        answer = scene.nova.ask(
            f"/v2.1/servers/{server.uuid}/metadata", method="POST", json={"metadata": wish},
            user="alice", project="tenant-a",
        )  # fmt: skip
        assert answer.status == 200, answer
    for server in servers.values():
        assert scene.heard(server)["source"] == "server"
        scene.terminate(server)

    for retention, server in servers.items():
        receipt = scene.scrubbed(server)
        assert receipt["verdict_reason"].startswith("Nova deleted it on this host")
        assert receipt["rule"] == "request"
        backup = scene.backup(server, "tenant-b")
        assert f"autobackup-{backup.image_id}" in secrets_of(cloud, "tenant-b")
        assert backup.key("autobackup", "tenant-b").status == 200
        image = backup.image("bob", "tenant-b").json()
        kept_s = int(image["autobackup_expires_at"]) - int(image["autobackup_created_at"])
        assert kept_s == asked_days[retention] * 86400
        assert not scene.images(server, "tenant-a")
        assert not scene.images(server, "vault")


@in_company
def test_a_wish_that_names_no_project_is_for_the_servers_own(scene: Host) -> None:
    server = scene.boot("vm", project="tenant-b", properties={"autobackup": "true"})
    assert scene.heard(server)["store_project"] == scene.cloud.projects["tenant-b"]
    scene.terminate(server)

    scene.scrubbed(server)
    scene.backup(server, "tenant-b")


@in_company
def test_a_rule_and_a_wish_are_two_backups_with_two_keys(scene: Host) -> None:
    cloud = scene.cloud
    wish = {"autobackup": "true", "autobackup_project": cloud.projects["tenant-b"]}
    server = scene.boot("firm-1", properties={**wish, "autobackup_user": cloud.users["bob"]})
    scene.heard(server)
    scene.terminate(server)

    receipt = scene.scrubbed(server)
    by_rule, by_wish = scene.backup(server, "vault"), scene.backup(server, "tenant-b")
    assert {copy["attempt"]["attempt"] for copy in receipt["copies"]} == {by_rule.image_id, by_wish.image_id}
    keys = {by_rule.key("autobackup", "vault").body, by_wish.key("autobackup", "tenant-b").body}
    assert [len(key) for key in keys] == [32, 32]
    assert (by_wish.key("bob", "tenant-b").status, by_rule.key("bob", "tenant-b").status) == (200, 403)


@in_company
def test_extra_specs_that_only_the_api_tells_are_a_wish(scene: Host) -> None:
    """Nova before 2025.2 writes none of them into the domain."""
    project = scene.cloud.projects["tenant-b"]
    server = scene.boot("vm", extra_specs={"autobackup:enabled": "true", "autobackup:project": project})
    assert "extraSpec" not in record_of(scene, server)["domain_xml"]
    assert scene.heard(server)["source"] == "flavor"
    scene.terminate(server)

    scene.scrubbed(server)
    scene.backup(server, "tenant-b")


@in_company
def test_a_property_of_the_image_is_a_wish_where_we_may_read_the_image(scene: Host) -> None:
    """One is shown to all projects, the other to its own alone, where ours is not."""
    cloud, wish = scene.cloud, {"autobackup:enabled": "true", "autobackup:project": scene.cloud.projects["tenant-b"]}
    images = {visibility: _image(cloud, visibility, wish) for visibility in ("community", "private")}
    shown, hidden = (scene.boot("vm", image=images[visibility]) for visibility in ("community", "private"))
    assert scene.heard(shown)["source"] == "image"
    scene.terminate(shown)
    scene.terminate(hidden)

    scene.scrubbed(shown)
    scene.backup(shown, "tenant-b")
    assert scene.is_let_go(hidden)


# ---- what operators rule ----------------------------------------------------------------------------------------


@in_company
def test_where_a_rule_forbids_requests_a_wish_adds_nothing(scene: Host) -> None:
    wish = {"autobackup": "true", "autobackup_project": scene.cloud.projects["tenant-b"]}
    closed, alone = (scene.boot(name, properties=wish) for name in ("closed-1", "alone-1"))
    for server, rule in ((closed, "closed"), (alone, "ours alone")):
        scene.heard(server)
        assert f"not heeded: rule {rule!r} forbids requests" in scene.explain(server)
        scene.terminate(server)

    scene.scrubbed(alone)
    scene.backup(alone, "vault")
    wait_until(lambda: scene.is_let_go(closed), words="its rule excludes it")
    assert not scene.images(alone, "tenant-b")
    assert not scene.images(closed, "tenant-b")


@in_company
def test_an_owners_no_is_heeded_by_a_rule_that_may_be_declined_and_by_no_other(scene: Host) -> None:
    declinable, firm = (scene.boot(name, properties={"autobackup": "false"}) for name in ("declinable-1", "firm-1"))
    willing = scene.boot("declinable-2")
    for server in (declinable, firm):
        assert scene.heard(server)["enabled"] is False
    assert "not heeded: declined, which rule 'firm' does not let its owner" in scene.explain(firm)
    for server in (declinable, firm, willing):
        scene.terminate(server)

    for server in (firm, willing):
        scene.scrubbed(server)
        scene.backup(server, "vault")
    wait_until(lambda: scene.is_let_go(declinable), words="its owner declined")


@in_company
def test_a_rule_by_domain_decides_where_we_may_read_the_project_and_asks_an_operator_where_not(scene: Host) -> None:
    cloud = scene.cloud
    readable = f"role:{INSPECTOR} and '{cloud.projects['vault']}':%(target.project.id)s"
    with keystone_policy(cloud, get_project=f"rule:admin_required or ({readable})"):
        known, unknown = scene.boot("domain-1", project="vault"), scene.boot("domain-2", project="elsewhere")
        assert f"domain is {DOMAIN}   (it is: {DOMAIN})" in scene.explain(known)
        assert "cannot be told domain is" in " ".join(scene.explain(unknown).split())
        for server in (known, unknown):
            scene.terminate(server)

        assert scene.scrubbed(known)["rule"] == "by domain"
        wait_until(lambda: scene.job(unknown).get("state") == "parked", words="an operator is asked")
    job = scene.job(unknown)
    assert "rule 'by domain' asks for domain, which nobody has told" in job["last_error"]
    assert not scene.images(unknown, "vault")
    scene.agent.cli("queue", "retry", job["job"], "--config", str(scene.agent.config))

    scene.scrubbed(unknown)
    scene.backup(unknown, "vault")


@in_company
def test_an_admin_needs_no_role_of_ours_and_the_doctor_calls_that_weak(scene: Host) -> None:
    with scene.sibling(entry="admin", project="") as host:
        server = host.boot("firm-1")
        result, remedy, status = doctor(host)
        assert (result, status) == ("weak", 0)
        assert POLICY in remedy
        host.terminate(server)

        host.scrubbed(server)
        host.backup(server, "vault")


@in_company
def test_a_wish_outlives_the_agent_that_heard_it(scene: Host) -> None:
    """The server is deleted before the next one starts, and its properties with it."""
    with scene.sibling() as host:
        wish = {"autobackup": "true", "autobackup_project": host.cloud.projects["tenant-b"]}
        server = host.boot("vm", properties=wish)
        host.heard(server)
        wait_until(lambda: record_of(host, server)["request"], words="it is written down")
        with host.agent_away():
            host.terminate(server)
            (record,) = host.nova.servers(f"&uuid={server.uuid}&deleted=True")
            assert record["metadata"] == {}

        host.scrubbed(server)
        host.backup(server, "tenant-b")


# ---- Nova's word --------------------------------------------------------------------------------------------------


def test_without_a_record_another_server_of_the_host_is_the_proof_or_an_operator_says(lone: Host) -> None:
    """Archived, and Nova shows nobody that this host holds. What an operator takes is sealed, and not overwritten."""
    taken, let_go, proven = (lone.boot(f"firm-{n}") for n in range(3))
    digest, order = sha256_of(taken.disk), ["--confirm", "--config", str(lone.agent.config)]
    with kept_in_sight(taken.disk) as content:
        with lone.agent_away():  # it comes when all is over
            for server in (taken, let_go, proven):
                lone.end_on_host(server)
                lone.nova.delete(server.uuid)
            lone.nova.archive()
        for server in (taken, let_go, proven):
            lone.waits_for(server, "Nova has no record of it, nor showed any other server of this host")
        lone.goes_on_waiting(taken, digest)
        assert lone.agent.cli("queue", "take", taken.uuid, *order[1:], check=False).returncode == 2
        lone.agent.cli("queue", "take", taken.uuid, *order)
        lone.agent.cli("queue", "let-go", let_go.uuid, *order)

        receipt = lone.receipt(taken)
        assert receipt["outcome"].startswith("verified, not scrubbed: its verdict is undecided")
        assert receipt["verdict_reason"].startswith("an operator had it taken")
        assert receipt["member_sha256"]["disks/disk"] == digest
        wait_until(lambda: not lone.agent.claims(taken.uuid) and not lone.job(taken))
        assert content() == digest
    lone.backup(taken, "vault")
    wait_until(lambda: lone.is_let_go(let_go))
    assert lone.waiting(proven), "nobody spoke of this one"
    other = lone.boot("vm")

    assert lone.scrubbed(proven)["verdict_reason"].startswith("Nova has no record of it any more")
    lone.terminate(other)
    wait_until(lambda: lone.is_let_go(other))


def test_while_a_cell_is_down_nothing_is_decided(lone: Host) -> None:
    """Nova answers well, and leaves the servers of that cell out. Their owners' wishes stay."""
    wish = {"autobackup": "true", "autobackup_project": lone.cloud.projects["tenant-b"]}
    server, living = lone.boot("vm", properties=wish), lone.boot("firm-2")
    digest = sha256_of(server.disk)
    lone.heard(server)
    lone.nova.change(server.uuid, task_state="deleting")
    with lone.nova.cell_down("cell2"):
        lone.end_on_host(server)
        lone.waits_for(server, "Nova did not say")
        lone.goes_on_waiting(server, digest)
    lone.nova.delete(server.uuid)

    lone.scrubbed(server)
    lone.backup(server, "tenant-b")
    lone.terminate(living)
    lone.scrubbed(living)


def test_while_nova_does_not_answer_nothing_is_decided(lone: Host) -> None:
    server = lone.boot("firm-1")
    digest = sha256_of(server.disk)
    with kept_in_sight(server.disk) as content:
        with lone.nova.paused():
            lone.terminate(server)
            lone.waits_for(server, "Nova did not say")
            lone.goes_on_waiting(server, digest)
            assert any("Nova cannot be asked" in words for words in lone.agent.ask("/healthz")[1]["degraded"])

        lone.scrubbed(server)
        assert content() != digest
    lone.backup(server, "vault")


def test_the_policy_file_is_what_it_takes_and_its_lack_is_said_with_the_remedy(lone: Host) -> None:
    """Of a server of another project, by a user that is no admin anywhere."""
    server = lone.boot("firm-1", project="elsewhere")
    digest = sha256_of(server.disk)
    assert doctor(lone) == ("ok", "", 0)
    lone.nova.use_policy({})
    try:
        lone.terminate(server)
        assert POLICY in lone.waits_for(server, "Nova did not say")["reason"]
        lone.goes_on_waiting(server, digest)
        result, remedy, status = doctor(lone)
        assert (result, status) == ("unusable", 5)
        assert POLICY in remedy
    finally:
        lone.nova.use_policy(POLICY_FILE.read_text())

    lone.scrubbed(server)
    lone.backup(server, "vault")


def test_a_server_that_goes_before_its_owners_project_was_asked_waits_for_the_answer(lone: Host) -> None:
    """Nobody has said no. The wish is written down: who starts the agent anew need not wait until it asks again."""
    cloud = lone.cloud
    wish = {
        "autobackup": "true", "autobackup_project": cloud.projects["tenant-b"],
        "autobackup_user": cloud.users["mallory"],  # nobody has been asked of the two of them yet
    }  # fmt: skip
    with cloud.paused("barbican"):
        server = lone.boot("vm", properties=wish)
        digest = sha256_of(server.disk)
        lone.terminate(server)
        lone.waits_for(server, "the project that its owner names has not been asked yet")
        lone.goes_on_waiting(server, digest)
    with lone.agent_away():
        pass

    lone.scrubbed(server)
    lone.backup(server, "tenant-b")


# ---- the slow one: a no is asked again after a minute -----------------------------------------------------------


@in_company
def test_a_wish_is_refused_for_all_to_see_until_its_project_consents(scene: Host) -> None:
    cloud, project = scene.cloud, scene.cloud.projects["no-consent"]
    early, late = (scene.boot("vm", project="no-consent", properties={"autobackup": "true"}) for _ in range(2))
    for server in (early, late):
        refusal = scene.refusal(server)
        assert refusal.startswith(f"project {project} has not consented")
        assert scene.agent.ask("/v1/status")[1]["requests_refused"][server.uuid] == refusal
        assert f"not heeded: {refusal}" in scene.explain(server)
    wait_until(lambda: scene.metric("autobackup_requests_refused") >= 2)
    scene.terminate(early)
    wait_until(lambda: scene.is_let_go(early), words="nobody consented")
    assert scene.request(late)["refused"]

    for role in CONSENT:
        cloud.grant("autobackup", "no-consent", role)
    try:
        wait_until(lambda: not scene.request(late)["refused"], within_s=120, words="it is asked for again")
        assert late.uuid not in scene.agent.ask("/v1/status")[1]["requests_refused"]
        scene.terminate(late)
        scene.scrubbed(late)
        backup = scene.backup(late, "no-consent")
        assert not scene.images(early, "no-consent")
        cloud.call("autobackup", "no-consent", "DELETE", f"{cloud.glance_url}/v2/images/{backup.image_id}")
    finally:
        for role in CONSENT:
            cloud.revoke("autobackup", "no-consent", role)


# ---- helpers ----------------------------------------------------------------------------------------------------


def _image(cloud: Cloud, visibility: str, properties: dict[str, str]) -> str:
    body = {"name": "base", "disk_format": "raw", "container_format": "bare", "visibility": visibility, **properties}
    answer = cloud.call("alice", "tenant-a", "POST", f"{cloud.glance_url}/v2/images", json=body)
    assert answer.status == 201, answer
    return str(answer.json()["id"])
