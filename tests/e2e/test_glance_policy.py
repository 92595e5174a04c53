"""
What a real Glance answers, and to whom, with the policy and the property protections that the agent is deployed with.

`guarded` has both; `plain` is a Glance without them on the same database and files.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.compute.nova import Nova, missing_nova
from tests.lab.openstack.config import GLANCE_POLICY, use_policy
from tests.lab.openstack.images import PATCH, Images, User, default_rules
from tests.lab.openstack.parents import parent_image

RULES: Final[Mapping[str, str]] = yaml.safe_load(GLANCE_POLICY.read_text())
MARK: Final = "autobackup_has_children"
OCTETS: Final = {"Content-Type": "application/octet-stream"}
DATA: Final = b"a parent" * 1000

OWNER, AGENT, ADMIN = ("ivy", "images"), ("autobackup", "images"), ("admin", "admin")
RESTORER = ("rory", "vault")


@pytest.fixture(scope="module")
def guarded_cloud(openstack_services: None) -> Iterator[Cloud]:
    with Cloud(guards_parents=True) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def guarded(guarded_cloud: Cloud) -> Images:
    return Images(cloud=guarded_cloud, url=guarded_cloud.glance_url)


@pytest.fixture(scope="module")
def plain(guarded_cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    policy = tmp_path_factory.mktemp("plain") / "policy.yaml"
    policy.write_text("{}\n")
    with guarded_cloud.glance_with(policy=policy) as url:
        yield Images(cloud=guarded_cloud, url=url)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parents") / "parent.raw"
    path.write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def sealed(guarded: Images, data: Path) -> str:
    """An image in the vault, with properties."""
    return parent_image(
        guarded.cloud, "vera", "vault", data, disk_format="raw", properties={"autobackup_x": "1", "color": "red"}
    )


@contextmanager
def without(images: Images, name: str) -> Iterator[None]:
    """The policy has Glance's own rule; taken out of the file, ours would live on until a restart."""
    policy = images.cloud.policy_file("glance")
    use_policy(policy, json.dumps({**RULES, name: default_rules()[name]}))
    try:
        yield
    finally:
        use_policy(policy, GLANCE_POLICY.read_text())


# the files


def test_each_rule_is_glances_own_and_one_thing_more(openstack_services: None) -> None:
    """So that everybody else may do what she could do before."""
    own = default_rules()
    expected = {}
    for name, role in (("get_images", "reader"), ("get_image", "reader"), ("download_image", "member")):
        admin, _, reads = own[name].partition(" or ")
        expected[name] = f"{admin} or {reads} or {reads.replace(f'role:{role}', 'role:autobackup-restore')}"
    expected["delete_image"] = f"({own['delete_image']}) and not 'yes':%({MARK})s"

    assert expected == RULES


# deletion of parents


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("user", [OWNER, AGENT, ADMIN])
def test_nobody_deletes_a_parent_that_has_children(guarded: Images, user: User, protected: bool) -> None:
    image = guarded.created(OWNER, protected=protected)
    assert guarded.change(AGENT, image, "add", MARK).status == 200

    assert guarded.delete(user, image) == 403
    with without(guarded, "delete_image"):
        assert guarded.delete(user, image) == (403 if protected else 204)


def test_nobody_deletes_a_public_parent_with_data(guarded: Images, data: Path) -> None:
    image = parent_image(guarded.cloud, *OWNER, data, disk_format="raw", visibility="public")
    assert guarded.change(AGENT, image, "add", MARK).status == 200

    for user in (OWNER, AGENT, ADMIN, ("alice", "tenant-a")):
        assert guarded.delete(user, image) == 403
    assert guarded.ask(("alice", "tenant-a"), "GET", f"/{image}/file").body == DATA
    assert guarded.change(AGENT, image, "remove", MARK).status == 200
    assert guarded.delete(OWNER, image) == 204


def test_only_the_one_value_keeps_an_image(guarded: Images) -> None:
    for value in ("no", "", "Yes", "yes "):
        assert guarded.delete(OWNER, guarded.created(AGENT, **{MARK: value})) == 204


def test_protected_alone_holds_as_long_as_its_owner_wants(plain: Images) -> None:
    """Unmodified Glance refuses, and so the agent without our files has something, but not against the owner's will."""
    image = plain.created(OWNER)
    assert plain.change(AGENT, image, "replace", "protected", True).status == 200

    refused = plain.ask(OWNER, "DELETE", f"/{image}")
    assert (refused.status, "is protected and cannot be deleted" in refused.body.decode()) == (403, True)
    assert plain.delete(ADMIN, image) == 403
    assert plain.change(OWNER, image, "replace", "protected", False).status == 200
    assert plain.delete(OWNER, image) == 204


def test_a_mark_holds_against_its_owner(guarded: Images, plain: Images) -> None:
    image = guarded.created(OWNER)
    assert guarded.change(AGENT, image, "replace", "protected", True).status == 200
    assert guarded.change(AGENT, image, "add", MARK).status == 200

    assert guarded.change(OWNER, image, "replace", "protected", False).status == 200
    refused = guarded.change(OWNER, image, "remove", MARK)
    assert (refused.status, f"Attribute '{MARK}' is reserved" in refused.body.decode()) == (403, True)
    assert guarded.delete(OWNER, image) == 403
    assert plain.change(OWNER, image, "remove", MARK).status == 200
    assert plain.delete(OWNER, image) == 204


def test_an_image_without_data_shows_whether_the_policy_is_there(guarded: Images, plain: Images) -> None:
    for glance, refused in ((guarded, 403), (plain, 204)):
        canary = glance.created(AGENT, **{MARK: "yes"})
        assert glance.delete(AGENT, canary) == refused
    canary = guarded.created(AGENT, **{MARK: "yes"})
    assert guarded.change(AGENT, canary, "remove", MARK).status == 200
    assert guarded.delete(AGENT, canary) == 204


# who writes what


@pytest.mark.parametrize("user", [OWNER, ADMIN])
def test_only_the_agent_writes_the_mark(guarded: Images, plain: Images, user: User) -> None:
    """Not an admin, either: whoever comes through Nova would be one."""
    image, marked = guarded.created(OWNER), guarded.created(AGENT, **{MARK: "yes"})

    for spelled in (MARK, MARK.upper(), MARK.title()):
        assert guarded.create(user, **{spelled: "yes"}).status == 403
        assert guarded.change(user, image, "add", spelled).status == 403
    for op, value in (("add", "yes"), ("add", "no"), ("replace", "no"), ("remove", "")):
        assert guarded.change(user, marked, op, MARK, value).status == 403
    assert guarded.properties(OWNER, marked) == {MARK: "yes"}
    assert guarded.change(AGENT, marked, "replace", MARK, "no").status == 200
    assert guarded.change(AGENT, marked, "remove", MARK).status == 200

    for op in ("add", "replace", "remove"):
        assert plain.change(user, image, op, MARK).status == 200


def test_mark_protection_and_tags_are_one_change(guarded: Images) -> None:
    """All of it or nothing: Glance writes an image as a whole."""
    image = guarded.created(OWNER, tags=["theirs"])
    changes = [
        {"op": "replace", "path": "/tags", "value": ["theirs", "autobackup:protected"]},
        {"op": "replace", "path": "/protected", "value": True},
        {"op": "add", "path": f"/{MARK}", "value": "yes"},
    ]

    assert guarded.ask(OWNER, "PATCH", f"/{image}", json=changes, headers=PATCH).status == 403
    seen = guarded.ask(OWNER, "GET", f"/{image}").json()
    assert (seen["tags"], seen["protected"], seen.get(MARK)) == (["theirs"], False, None)
    assert guarded.ask(AGENT, "PATCH", f"/{image}", json=changes, headers=PATCH).status == 200
    seen = guarded.ask(OWNER, "GET", f"/{image}").json()
    assert (sorted(seen["tags"]), seen["protected"], seen[MARK]) == (["autobackup:protected", "theirs"], True, "yes")


@pytest.mark.parametrize("user", [("vera", "vault"), ("autobackup", "vault"), ("erin", "tenant-a"), ADMIN])
def test_every_other_property_is_everybodys(guarded: Images, user: User) -> None:
    keys = ("autobackup", "autobackup_attempt", "autobackup_property_x", "autobackup_children", "color", f"x_{MARK}")
    image = guarded.created(user, **dict.fromkeys(keys, "1"))

    for op, value in (("replace", {"value": "2"}), ("remove", {}), ("add", {"value": "3"})):
        changes = [{"op": op, "path": f"/{key}", **value} for key in keys]
        answer = guarded.ask(user, "PATCH", f"/{image}", json=changes, headers=PATCH)
        assert answer.status == 200, str(answer)
        assert {answer.json().get(key, "") for key in keys} == {value.get("value", "")}


@pytest.mark.parametrize("user", [("vera", "vault"), ("autobackup", "vault"), RESTORER, ADMIN])
def test_every_role_reads_every_property(guarded: Images, sealed: str, user: User) -> None:
    assert guarded.properties(user, sealed) == {"autobackup_x": "1", "color": "red"}


def test_a_reader_reads_every_property(guarded: Images) -> None:
    told = {MARK: "yes", "autobackup_x": "1", "color": "red"}
    image = guarded.created(("autobackup", "tenant-a"), **told)

    assert guarded.properties(("carol", "tenant-a"), image) == told


@pytest.mark.parametrize("user", [OWNER, ADMIN])
def test_a_change_of_something_else_leaves_the_mark(guarded: Images, user: User) -> None:
    """Glance writes all properties anew with every change, those that the caller may read."""
    image = guarded.created(AGENT, **{MARK: "yes"})

    assert guarded.change(user, image, "add", "color", "red").status == 200
    assert guarded.ask(user, "PUT", f"/{image}/tags/mine").status == 204
    assert guarded.properties(user, image) == {MARK: "yes", "color": "red"}


# the role for restores


@pytest.mark.parametrize(
    ("rule", "path", "refused"),
    [("get_images", "", 403), ("get_image", "/{}", 404), ("download_image", "/{}/file", 403)],
)
def test_each_rule_lets_the_restore_role_do_one_thing(
    guarded: Images, plain: Images, sealed: str, rule: str, path: str, refused: int
) -> None:
    path = path.format(sealed)

    assert guarded.ask(RESTORER, "GET", path).status == 200
    with without(guarded, rule):
        assert guarded.ask(RESTORER, "GET", path).status == refused
    assert plain.ask(RESTORER, "GET", path).status in {403, 404}


def test_works_for_a_reader_who_has_only_the_restore_role(guarded: Images, sealed: str) -> None:
    listed = guarded.ask(RESTORER, "GET", "?limit=1000").json()["images"]

    assert sealed in {image["id"] for image in listed}
    assert guarded.ask(RESTORER, "GET", f"/{sealed}/file").body == DATA
    part = guarded.ask(RESTORER, "GET", f"/{sealed}/file", headers={"Range": "bytes=2-7"})
    assert (part.status, part.body) == (206, DATA[2:8])


@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        ("POST", "", {"json": {"name": "x", "disk_format": "raw", "container_format": "bare"}}),
        ("PATCH", "/{}", {"json": [{"op": "add", "path": "/color", "value": "blue"}], "headers": PATCH}),
        ("PATCH", "/{}", {"json": [{"op": "replace", "path": "/visibility", "value": "shared"}], "headers": PATCH}),
        ("DELETE", "/{}", {}),
        ("PUT", "/{}/tags/x", {}),
        ("DELETE", "/{}/tags/x", {}),
        ("POST", "/{}/members", {"json": {"member": "x"}}),
        ("GET", "/{}/members", {}),
        ("POST", "/{}/actions/deactivate", {}),
        ("POST", "/{}/actions/reactivate", {}),
    ],
)  # fmt: skip
def test_the_restore_role_changes_nothing(
    guarded: Images, sealed: str, method: str, path: str, more: dict[str, Any]
) -> None:
    assert guarded.ask(RESTORER, method, path.format(sealed), **more).status == 403


def test_the_restore_role_gives_no_image_its_data(guarded: Images) -> None:
    image = guarded.created(("vera", "vault"))
    download = {"method": {"name": "web-download", "uri": "https://example.org/image"}}

    for path in ("file", "stage"):
        assert guarded.ask(RESTORER, "PUT", f"/{image}/{path}", data=b"x", headers=OCTETS).status == 403
    assert guarded.ask(RESTORER, "POST", f"/{image}/import", json=download).status == 403
    assert guarded.ask(("vera", "vault"), "GET", f"/{image}").json()["status"] == "queued"


@pytest.mark.parametrize(
    ("visibility", "status"), [("private", 404), ("shared", 404), ("public", 200), ("community", 200)]
)
def test_the_restore_role_sees_what_a_member_sees(guarded: Images, data: Path, visibility: str, status: int) -> None:
    image = parent_image(guarded.cloud, *OWNER, data, disk_format="raw", visibility=visibility)

    for user in (RESTORER, ("vera", "vault")):
        assert guarded.ask(user, "GET", f"/{image}").status == status
        assert guarded.ask(user, "GET", f"/{image}/file").status == status
    if visibility == "shared":
        member = {"member": guarded.cloud.projects["vault"]}
        assert guarded.ask(OWNER, "POST", f"/{image}/members", json=member).status == 200
        assert guarded.ask(RESTORER, "GET", f"/{image}/file").body == DATA
        accept = {"status": "accepted"}
        assert guarded.ask(RESTORER, "PUT", f"/{image}/members/{member['member']}", json=accept).status == 403


# the agent's own work


def test_the_agent_does_all_that_it_does(guarded: Images) -> None:
    agent, image = ("autobackup", "vault"), str(uuid.uuid4())
    words = {"autobackup_attempt": image, "image_type": "autobackup", "os_encrypt_format": "AES256-GCM-HKDF"}

    guarded.created(agent, id=image, visibility="shared", tags=["autobackup", f"autobackup:{image}"], **words)
    member = {"member": guarded.cloud.projects["tenant-a"]}
    assert guarded.ask(agent, "POST", f"/{image}/members", json=member).status == 200
    sent = guarded.ask(agent, "PUT", f"/{image}/file", data=iter([DATA]), headers=OCTETS)
    assert sent.status == 204
    for user in (agent, ("alice", "tenant-a")):
        assert guarded.ask(user, "GET", f"/{image}/file").body == DATA
    found = guarded.ask(agent, "GET", f"?tag=autobackup:{image}&autobackup_attempt={image}").json()["images"]
    assert [one["id"] for one in found] == [image]
    assert guarded.delete(agent, image) == 204


def test_marked_images_are_found_whoever_published_them(guarded: Images, data: Path) -> None:
    """By the mark; by a tag as well where they are the agent's own, and have no data yet."""
    public = parent_image(guarded.cloud, *OWNER, data, disk_format="raw", visibility="public")
    tag = f"autobackup:parent:{public}"
    assert guarded.change(AGENT, public, "add", MARK).status == 200
    queued = guarded.created(("autobackup", "vault"), tags=["autobackup", tag])

    def found(query: str) -> set[str]:
        answer = guarded.ask(("autobackup", "vault"), "GET", f"?limit=1000&{query}")
        return {image["id"] for image in answer.json()["images"]}

    assert public in found(f"{MARK}=yes")
    assert public in found(f"{MARK}=yes&visibility=public&owner={guarded.cloud.projects['images']}")
    assert found(f"tag={tag}") == found(f"tag=autobackup&tag={tag}&status=queued") == {queued}


# through Nova


@pytest.fixture(scope="module")
def nova(guarded_cloud: Cloud) -> Iterator[Nova]:
    """As the comment in the policy wants it."""
    if missing := missing_nova():
        if os.environ.get("CI") or os.environ.get("AUTOBACKUP_REQUIRE_OPENSTACK"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    told = re.search("non_inheritable_image_properties = (.*)", GLANCE_POLICY.read_text())
    assert told is not None
    with Nova(guarded_cloud, non_inheritable_image_properties=told[1]) as started:
        yield started


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", f"/metadata/{MARK}", {"meta": {MARK: "no"}}),
        ("DELETE", f"/metadata/{MARK}", None),
        ("PUT", "/metadata", {"metadata": {"color": "red"}}),
        ("DELETE", "", None),
    ],
)
def test_nova_is_no_way_around(guarded: Images, nova: Nova, method: str, path: str, body: object) -> None:
    """It asks Glance with its own service token beside the caller's, and its user is an admin."""
    image = guarded.created(("autobackup", "tenant-a"), **{MARK: "yes"})
    url = f"/v2.1/images/{image}{path}"

    answer = nova.ask(url, user="alice", project="tenant-a", method=method, json=body, microversion="2.1")

    assert answer.status == 403, str(answer)
    assert guarded.properties(("alice", "tenant-a"), image) == {MARK: "yes"}


ACTIONS: Final = [
    {"createImage": {"name": "copy"}},
    {"createBackup": {"name": "copy", "backup_type": "daily", "rotation": 1}},
    {"shelve": None},
]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: next(iter(action)))
def test_an_instance_of_a_marked_image_can_be_snapshot(guarded: Images, nova: Nova, action: dict[str, Any]) -> None:
    """And its snapshot is no parent. What Nova is not told to leave out it copies, and Glance refuses it."""
    for inherited, status in (({MARK: "yes", "color": "red"}, 202), ({MARK.upper(): "yes"}, 403)):
        server, user = str(uuid.uuid4()), ("alice", "tenant-a")
        nova.put(server, project="tenant-a", user="alice", image=str(uuid.uuid4()))
        nova.change(server, system_metadata={f"image_{key}": value for key, value in inherited.items()})

        path = f"/v2.1/servers/{server}/action"
        answer = nova.ask(path, user="alice", project="tenant-a", method="POST", json=action, microversion="2.1")

        assert answer.status == status, str(answer)
        found = guarded.ask(user, "GET", f"?instance_uuid={server}").json()["images"]
        taken = [(guarded.properties(user, image["id"]), guarded.delete(user, image["id"])) for image in found]
        assert taken == ([({"color": "red"}, 204)] if status == 202 else [])
