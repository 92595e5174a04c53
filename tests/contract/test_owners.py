"""What else is asked about a server: of a real Keystone and a real Glance, through a face that can refuse."""

import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from tests.contract.test_project_session import entry_of, session_of
from tests.lab.fake_glance import Edit, FakeGlance
from tests.lab.openstack.cloud import Cloud

from autobackup.cloud.owners import Owners
from autobackup.errors import CloudUnavailable

HOUR_S: Final = 3600.0
PROJECT_PATH: Final = "/v3/projects/[^/]+"
IMAGE_PATH: Final = "/v2/images/[^/]+"


@dataclass(slots=True)
class Office:
    """*owners* is the code under test; the faces pass on what they are not told to answer."""

    owners: Owners
    keystone: FakeGlance
    glance: FakeGlance
    now_s: list[float] = field(default_factory=lambda: [1000.0])

    def asked(self) -> list[str]:
        return [str(call) for face in (self.keystone, self.glance) for call in face.calls]


@asynccontextmanager
async def office(cloud: Cloud, folder: Path, *, user: str = "admin", project: str = "admin") -> AsyncIterator[Office]:
    async with FakeGlance(cloud.keystone_url) as keystone, FakeGlance(cloud.glance_url) as glance:
        entry = entry_of(cloud, user) | {
            "identity_endpoint_override": f"{keystone.url}/v3", "image_endpoint_override": glance.url,
        }  # fmt: skip
        now_s = [1000.0]
        session = session_of(folder, entry, project=project)
        yield Office(Owners(session, clock=lambda: now_s[0]), keystone, glance, now_s)


@pytest.fixture(name="admins")
async def _admins(cloud: Cloud, tmp_path: Path) -> AsyncIterator[Office]:
    async with office(cloud, tmp_path) as one:
        yield one


def made(cloud: Cloud, kind: str, **fields: object) -> str:
    url = f"{cloud.keystone_url}/v3/{kind}s"
    answer = cloud.call("admin", "admin", "POST", url, json={kind: {"name": uuid.uuid4().hex, **fields}})
    assert answer.status == 201, answer
    return str(answer.json()[kind]["id"])


def image_of(cloud: Cloud, user: str = "alice", project: str = "tenant-a", **properties: str) -> str:
    asked = {"name": "golden", "disk_format": "raw", "container_format": "bare", **properties}
    answer = cloud.call(user, project, "POST", f"{cloud.glance_url}/v2/images", json=asked)
    assert answer.status == 201, answer
    return str(answer.json()["id"])


# ---- what they say ----------------------------------------------------------------------------------------


async def test_the_domain_of_a_project_is_told_by_its_id(cloud: Cloud, admins: Office) -> None:
    domain = made(cloud, "domain")
    project = made(cloud, "project", domain_id=domain)

    assert await admins.owners.domain_of(project) == domain
    assert await admins.owners.domain_of(cloud.projects["tenant-a"]) == "default"
    assert admins.asked() == [f"GET /v3/projects/{project}", f"GET /v3/projects/{cloud.projects['tenant-a']}"]


async def test_an_image_has_the_properties_that_are_texts(cloud: Cloud, admins: Office) -> None:
    image = image_of(cloud, autobackup_want="true", hw_disk_bus="virtio", os_distro="größe")

    properties = await admins.owners.image_properties(image)

    told = {key: properties[key] for key in ("autobackup_want", "hw_disk_bus", "os_distro", "name")}
    assert told == {
        "autobackup_want": "true", "hw_disk_bus": "virtio", "os_distro": "größe", "name": "golden",
    }  # fmt: skip
    assert all(isinstance(value, str) for value in properties.values())
    assert "tags" not in properties
    assert admins.asked() == ["GET /v2/images/ID"]


async def test_what_they_say_is_remembered_for_an_hour(cloud: Cloud, admins: Office) -> None:
    project, image = cloud.projects["tenant-a"], image_of(cloud, a="1")

    async def ask() -> tuple[str | None, str]:
        properties = await admins.owners.image_properties(image)
        return await admins.owners.domain_of(project), properties["a"]

    assert await ask() == ("default", "1")
    change = [{"op": "replace", "path": "/a", "value": "2"}]
    answer = cloud.call(
        "alice", "tenant-a", "PATCH", f"{cloud.glance_url}/v2/images/{image}",
        data=json.dumps(change).encode(), headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
    )  # fmt: skip
    assert answer.status == 200
    admins.now_s[0] += HOUR_S - 1
    assert await ask() == ("default", "1")
    assert len(admins.asked()) == 2
    admins.now_s[0] += 2
    assert await ask() == ("default", "2")
    assert len(admins.asked()) == 4


async def test_one_project_or_image_is_not_taken_for_another(cloud: Cloud, admins: Office) -> None:
    images = {image_of(cloud, n=str(n)): str(n) for n in range(3)}
    for _ in range(2):
        for image, n in images.items():
            properties = await admins.owners.image_properties(image)
            assert properties["n"] == n
    assert len(admins.asked()) == 3


# ---- what may not be read ---------------------------------------------------------------------------------


async def test_what_we_may_not_read_is_not_known_and_no_error(cloud: Cloud, tmp_path: Path) -> None:
    """Keystone says 403 of another's project; Glance says 404 of a private image."""
    private = image_of(cloud, "bob", "tenant-b")
    async with office(cloud, tmp_path, user="mallory", project="elsewhere") as strangers:
        assert await strangers.owners.domain_of(cloud.projects["tenant-a"]) is None
        assert await strangers.owners.image_properties(private) == {}
        assert [call.status for face in (strangers.keystone, strangers.glance) for call in face.calls] == [403, 404]
        for _ in range(3):  # and that is remembered, too
            assert await strangers.owners.domain_of(cloud.projects["tenant-a"]) is None
            assert await strangers.owners.image_properties(private) == {}
        assert len(strangers.asked()) == 2
        strangers.now_s[0] += HOUR_S + 1
        assert await strangers.owners.domain_of(cloud.projects["tenant-a"]) is None
        assert len(strangers.asked()) == 3


async def test_a_project_or_image_that_is_gone_is_not_known(cloud: Cloud, admins: Office) -> None:
    assert await admins.owners.domain_of(uuid.uuid4().hex) is None
    assert await admins.owners.image_properties(str(uuid.uuid4())) == {}


# ---- trouble ----------------------------------------------------------------------------------------------


def faces(of: Office) -> list[tuple[FakeGlance, str, Callable[[str], Awaitable[object]]]]:
    return [
        (of.keystone, PROJECT_PATH, of.owners.domain_of),
        (of.glance, IMAGE_PATH, of.owners.image_properties),
    ]


@pytest.mark.parametrize("status", [302, 400, 409, 429, 500, 502, 503, 504])
async def test_an_outage_is_told_and_not_remembered(cloud: Cloud, admins: Office, status: int) -> None:
    known = {PROJECT_PATH: cloud.projects["tenant-a"], IMAGE_PATH: image_of(cloud)}
    for face, path, ask in faces(admins):
        for _ in range(2):
            face.answer("GET", path, status=status, headers={"Retry-After": "7"})
            with pytest.raises(CloudUnavailable, match=f"cloud 'mine', project 'admin': .*{status}") as raised:
                await ask(known[path])
            assert raised.value.status == status
        assert await ask(known[path])  # at once, without an hour's wait


async def test_when_to_come_back_is_told(admins: Office) -> None:
    for face, path, ask in faces(admins):
        face.answer("GET", path, status=503, headers={"Retry-After": "7"})
        with pytest.raises(CloudUnavailable) as raised:
            await ask(str(uuid.uuid4()))
        assert raised.value.retry_after_s == 7.0


async def test_an_outage_does_not_undo_what_is_known(cloud: Cloud, admins: Office) -> None:
    project = cloud.projects["tenant-a"]
    assert await admins.owners.domain_of(project) == "default"
    admins.keystone.answer("GET", PROJECT_PATH, status=503, times=9)
    assert await admins.owners.domain_of(project) == "default"


async def test_an_answer_that_is_cut_is_an_outage(cloud: Cloud, admins: Office) -> None:
    known = {PROJECT_PATH: cloud.projects["tenant-a"], IMAGE_PATH: image_of(cloud)}
    for face, path, ask in faces(admins):
        face.cut("GET", path, after_bytes=20)
        with pytest.raises(CloudUnavailable):
            await ask(known[path])
        assert await ask(known[path])


@pytest.mark.parametrize(
    "said",
    [
        b"", b"<html>Welcome</html>", b"\xff",
        b"null", b"[]", b"7", b"{}",
    ],
)  # fmt: skip
async def test_nonsense_is_an_outage_and_not_remembered(cloud: Cloud, admins: Office, said: bytes) -> None:
    """A proxy's page is no word on who owns what."""
    nonsense: Edit = lambda _body: said  # noqa: E731
    known = {PROJECT_PATH: cloud.projects["tenant-a"], IMAGE_PATH: image_of(cloud)}
    for face, path, ask in faces(admins):
        face.edit("GET", path, nonsense)
        with pytest.raises(CloudUnavailable):
            await ask(known[path])
        assert await ask(known[path])


@pytest.mark.parametrize("which", ["project", "image"])
@pytest.mark.parametrize("said", [b'{"project": 7}', b'{"project": null}', b'{"images": []}', b'{"id": "another"}'])
async def test_what_is_no_project_or_image_is_an_outage(admins: Office, which: str, said: bytes) -> None:
    face, path, ask = faces(admins)[which == "image"]
    face.answer("GET", path, status=200, body=said)
    with pytest.raises(CloudUnavailable, match="cloud 'mine'"):
        await ask(str(uuid.uuid4()))


@pytest.mark.parametrize("project", [{}, {"domain_id": None}, {"domain_id": ""}, {"id": "x"}])
async def test_a_project_without_a_domain_is_in_none_that_is_known(admins: Office, project: Mapping[str, Any]) -> None:
    admins.keystone.answer("GET", PROJECT_PATH, status=200, body=json.dumps({"project": project}).encode())

    assert await admins.owners.domain_of(uuid.uuid4().hex) in (None, "")


async def test_they_are_only_ever_read(cloud: Cloud, admins: Office) -> None:
    await admins.owners.domain_of(cloud.projects["tenant-a"])
    await admins.owners.image_properties(image_of(cloud))

    assert {call.method for face in (admins.keystone, admins.glance) for call in face.calls} == {"GET"}
