"""Parents in a real Glance: which image it is, that it stays while backups need it, and that its owner has it back."""

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from tests.lab.openstack.cloud import Cloud
from tests.lab.openstack.config import GLANCE_POLICY, use_policy
from tests.lab.openstack.images import PATCH
from tests.lab.openstack.parents import parent_image

from autobackup.cloud.parents import Parents
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudRefused, CloudUnavailable
from autobackup.model import Protection

User = tuple[str, str]
IVY, VERA, MALLORY, AGENT = ("ivy", "images"), ("vera", "vault"), ("mallory", "elsewhere"), ("autobackup", "vault")
OURS: Final = "autobackup:protected"
MARK: Final = "autobackup_has_children"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """One cloud, its images by the API, and agents for projects in it."""

    def __init__(self, cloud: Cloud, data: Path) -> None:
        self.cloud = cloud
        self._data = data
        self.made: list[tuple[User, str]] = []

    def agent(self, project: str = "vault", *, clock: Clock | None = None) -> Parents:
        return Parents(self._session(project), session_of=self._session, clock=clock or Clock())

    def _session(self, project: str) -> ProjectSession:
        clouds_yaml = self.cloud.clouds_file
        return ProjectSession(cloud="autobackup", project=project, clouds_yaml=clouds_yaml, call_timeout_s=30)

    def image(self, owner: User = IVY, *, visibility: str = "public", **properties: str) -> str:
        image = parent_image(
            self.cloud, *owner, self._data, disk_format="raw", visibility=visibility, properties=properties
        )
        self.made.append((owner, image))
        return image

    def ask(self, who: User, method: str, path: str, **what: Any) -> Any:
        return self.cloud.call(*who, method, f"{self.cloud.glance_url}/v2/images{path}", **what)

    def show(self, image: str) -> Mapping[str, Any]:
        answer = self.ask(("admin", "admin"), "GET", f"/{image}")
        assert answer.status == 200, answer
        return dict(answer.json())

    def edit(self, who: User, image: str, **values: object) -> None:
        changes = [{"op": "add", "path": f"/{name}", "value": value} for name, value in values.items()]
        answer = self.ask(who, "PATCH", f"/{image}", data=json.dumps(changes).encode(), headers=PATCH)
        assert answer.status == 200, answer

    def delete(self, who: User, image: str) -> int:
        return int(self.ask(who, "DELETE", f"/{image}").status)

    def canaries(self) -> list[str]:
        return [one["name"] for one in self.ask(VERA, "GET", "?name=autobackup%20canary").json()["images"]]

    def tag(self, project: str) -> str:
        return f"autobackup:children:{self.cloud.projects[project]}"

    def clean(self) -> None:
        for owner, image in self.made:
            if self.ask(owner, "GET", f"/{image}").status == 200:
                self.edit(owner, image, protected=False)
                self.delete(owner, image)


@contextlib.contextmanager
def scene_in(cloud: Cloud, data: Path) -> Iterator[Scene]:
    scene = Scene(cloud, data)
    yield scene
    scene.clean()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parents") / "parent.raw"
    path.write_bytes(b"a parent" * 1000)
    return path


@pytest.fixture
def scene(cloud: Cloud, data: Path) -> Iterator[Scene]:
    with scene_in(cloud, data) as scene:
        yield scene


@pytest.fixture(scope="module")
def guarded_cloud(openstack_services: None) -> Iterator[Cloud]:
    with Cloud(guards_parents=True) as cloud:
        yield cloud


@pytest.fixture
def guarded(guarded_cloud: Cloud, data: Path) -> Iterator[Scene]:
    with scene_in(guarded_cloud, data) as scene:
        yield scene


def base_of(image: str, suffix: str = "") -> str:
    return f"/var/lib/nova/instances/_base/{hashlib.sha1(image.encode()).hexdigest()}{suffix}"


# ---- which image it is ------------------------------------------------------------------------------------


async def test_an_image_is_found_by_the_name_of_its_file(scene: Scene) -> None:
    """By a hint, which may be wrong, or among all there are: hidden and communities' images are booted from, too."""
    public, other = scene.image(), scene.image()
    hidden, community = scene.image(), scene.image(MALLORY, visibility="community")
    own = scene.image(VERA, visibility="private")
    scene.edit(IVY, hidden, os_hidden=True)
    listing = scene.agent()
    for image in (public, hidden, community, own):
        for agent, hints, suffix in (
            (scene.agent(), [image], ""),
            (scene.agent(), [other, "", "no id", image], "_sm"),
            (listing, [other], ""),
            (listing, [], "_20"),
        ):
            found = await agent.find(base_of(image, suffix), hints)
            assert found is not None, (image, hints)
            assert (found.id, found.status) == (image, "active")


async def test_what_is_not_ours_to_see_or_gone_is_not_found(scene: Scene) -> None:
    private, gone = scene.image(MALLORY, visibility="private"), scene.image()
    clock = Clock()
    agent = scene.agent(clock=clock)
    assert await agent.find(base_of(gone), []) is not None
    assert scene.delete(IVY, gone) == 204
    for image in (private, gone):
        for hints in ([image], []):
            assert await agent.find(base_of(image), hints) is None
    for name in ("swap_512", "ephemeral_1_40d1d2c", "disk"):
        assert await agent.find(f"/_base/{name}", [private, gone]) is None

    new = scene.image()
    clock.now_s += 301  # images are listed every five minutes
    assert await agent.find(base_of(new), []) is not None


# ---- protected --------------------------------------------------------------------------------------------


async def test_a_parent_stays_until_it_is_let_go(scene: Scene) -> None:
    """In the destination's own project, and in another where we have the role; then all is as it was."""
    agent = scene.agent()
    owners = ((VERA, "private"), (IVY, "public"), (IVY, "community"))
    await asyncio.gather(*(stays(scene, agent, owner, visibility) for owner, visibility in owners))
    assert await agent.ours() == []


async def stays(scene: Scene, agent: Parents, owner: User, visibility: str) -> None:
    image = scene.image(owner, visibility=visibility, color="red")
    scene.edit(owner, image, tags=["theirs"])
    assert not await agent.is_protected(image)

    assert await agent.protect(image) is Protection.PROTECTED
    protected = scene.show(image)
    assert (protected["protected"], set(protected["tags"])) == (True, {"theirs", OURS, scene.tag("vault")})
    assert (protected["color"], protected.get(MARK)) == ("red", None)
    assert scene.delete(owner, image) == 403
    assert await agent.is_protected(image)
    assert image in [one.id for one in await agent.ours()]
    assert await agent.protect(image) is Protection.PROTECTED
    assert scene.show(image) == protected, "nothing is written where nothing is amiss"

    assert await agent.unprotect(image)
    assert image in [one.id for one in await agent.ours()], "a crash here is taken up by the next look"
    await agent.forget(image)
    assert (scene.show(image)["protected"], scene.show(image)["tags"]) == (False, ["theirs"])
    assert scene.delete(owner, image) == 204
    assert await agent.unprotect(image)
    await agent.forget(image)


async def test_what_is_not_ours_to_protect_is_refused_and_not_touched(scene: Scene) -> None:
    agent = scene.agent()
    for visibility in ("public", "community", "private"):
        image = scene.image(MALLORY, visibility=visibility)
        before = scene.show(image)
        with pytest.raises(CloudRefused):
            await agent.protect(image)
        assert scene.show(image) == before
        assert not await agent.is_protected(image)
    assert scene.delete(MALLORY, image) == 204
    with pytest.raises(CloudRefused):
        await agent.protect(image)
    assert scene.canaries() == []


async def test_what_its_owner_protected_is_not_unprotected(scene: Scene) -> None:
    image = scene.image()
    scene.edit(IVY, image, protected=True)
    agent = scene.agent()
    await agent.protect(image)
    assert set(scene.show(image)["tags"]) == {scene.tag("vault")}

    assert await agent.unprotect(image)
    await agent.forget(image)
    assert (scene.show(image)["protected"], scene.show(image)["tags"]) == (True, [])


async def test_protection_that_was_taken_away_is_noticed_and_given_again(scene: Scene) -> None:
    image, agent, other = scene.image(), scene.agent(), scene.agent("tenant-a")
    await agent.protect(image)
    assert not await other.is_protected(image), "it stays for as long as others please"
    tags = scene.show(image)["tags"]
    for amiss in ({"protected": False}, {"tags": [OURS]}, {"tags": [], "protected": False}):
        scene.edit(IVY, image, **amiss)
        assert not await agent.is_protected(image)
        await agent.protect(image)
        assert await agent.is_protected(image)
        assert set(scene.show(image)["tags"]) == set(tags)
    scene.edit(IVY, image, protected=False)
    assert scene.delete(IVY, image) == 204
    assert not await agent.is_protected(image)


# ---- for several projects ---------------------------------------------------------------------------------


async def test_the_last_project_unprotects(scene: Scene) -> None:
    image, first, second = scene.image(), scene.agent("vault"), scene.agent("tenant-a")
    await first.protect(image)
    await second.protect(image)
    assert set(scene.show(image)["tags"]) == {OURS, scene.tag("vault"), scene.tag("tenant-a")}

    assert not await first.unprotect(image)
    await first.forget(image)
    assert await second.is_protected(image)
    assert scene.delete(IVY, image) == 403
    assert set(scene.show(image)["tags"]) == {OURS, scene.tag("tenant-a")}

    assert await second.unprotect(image)
    await second.forget(image)
    assert (scene.show(image)["protected"], scene.show(image)["tags"]) == (False, [])


async def test_who_comes_between_the_two_steps_of_a_release_can_still_release(scene: Scene) -> None:
    """That it was we who protected it must not be forgotten under another project's backups."""
    image, leaving, coming = scene.image(), scene.agent("vault"), scene.agent("tenant-a")
    await leaving.protect(image)
    assert await leaving.unprotect(image)
    await coming.protect(image)
    await leaving.forget(image)
    assert await coming.is_protected(image)

    assert await coming.unprotect(image)
    await coming.forget(image)
    assert (scene.show(image)["protected"], scene.show(image)["tags"]) == (False, [])


async def test_twenty_at_once_end_with_both_projects_on_it(scene: Scene) -> None:
    """Glance loses one of two changes, with 200 for both: whoever was told that it is protected must find it so."""
    image = scene.image()
    agents = {project: scene.agent(project) for project in ("vault", "tenant-a")}
    told = await asyncio.gather(
        *(agent.protect(image) for agent in agents.values() for _ in range(10)), return_exceptions=True
    )
    assert all(one is Protection.PROTECTED or isinstance(one, CloudUnavailable) for one in told), told
    for number, (project, agent) in enumerate(agents.items()):
        if Protection.PROTECTED not in told[number * 10 : number * 10 + 10]:
            await agent.protect(image)  # as whoever was told to try again later
        assert await agent.is_protected(image), project
    assert set(scene.show(image)["tags"]) == {OURS, scene.tag("vault"), scene.tag("tenant-a")}


async def test_an_owner_who_edits_meanwhile_loses_no_release(scene: Scene) -> None:
    """What Glance lost to the owner's change is done again: it is kept with children, and not for ever without."""
    image, agent = scene.image(), scene.agent()
    is_over = threading.Event()

    def edit() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            scene.edit(IVY, image, color=str(number))

    async def surely(step: str) -> None:
        """As a look does, which comes again."""
        while True:
            try:
                await getattr(agent, step)(image)
            except CloudUnavailable:
                continue
            return

    editing = threading.Thread(target=edit)
    editing.start()
    try:
        await surely("protect")
    finally:
        is_over.set()
        await asyncio.to_thread(editing.join)
    await agent.protect(image)
    assert await agent.is_protected(image)
    assert OURS in scene.show(image)["tags"]

    is_over.clear()
    editing = threading.Thread(target=edit)
    editing.start()
    try:
        await surely("unprotect")
        await surely("forget")
    finally:
        is_over.set()
        await asyncio.to_thread(editing.join)
    await agent.unprotect(image)
    await agent.forget(image)
    assert (scene.show(image)["protected"], scene.show(image)["tags"]) == (False, [])


# ---- with the policy --------------------------------------------------------------------------------------


async def test_with_the_policy_nobody_deletes_a_parent(guarded: Scene) -> None:
    """Not even the owner who takes `protected` away. That it is in force was found out, and nothing is left of that."""
    image, agent, other = guarded.image(), guarded.agent(), guarded.agent("tenant-a")
    assert await agent.protect(image) is Protection.POLICY
    assert await other.protect(image) is Protection.POLICY
    assert guarded.canaries() == []
    guarded.edit(IVY, image, protected=False)
    assert guarded.delete(IVY, image) == 403
    assert not await agent.is_protected(image)
    assert await agent.protect(image) is Protection.POLICY

    assert not await agent.unprotect(image)
    await agent.forget(image)
    assert guarded.show(image)[MARK] == "yes"
    assert await other.unprotect(image)
    await other.forget(image)
    shown = guarded.show(image)
    assert (shown["protected"], shown["tags"], MARK in shown) == (False, [], False)
    assert guarded.delete(IVY, image) == 204


async def test_what_a_crash_left_of_finding_out_is_removed(guarded: Scene) -> None:
    """But not what another agent is finding out just now."""
    fields = {"name": "autobackup canary", "disk_format": "raw", "container_format": "bare", "visibility": "private"}
    fields |= {MARK: "yes"}
    images = []
    for _ in range(2):
        made = guarded.ask(AGENT, "POST", "", json={**fields, "tags": ["autobackup:canary"]})
        assert made.status == 201
        images.append(made.json()["id"])
    old, young = images
    with contextlib.closing(sqlite3.connect(guarded.cloud.site.database("glance"))) as database, database:
        change = "UPDATE images SET created_at = datetime('now', '-1 hour') WHERE id = ?"
        assert database.execute(change, (old,)).rowcount == 1
    assert await guarded.agent().protect(guarded.image()) is Protection.POLICY
    assert [guarded.ask(AGENT, "GET", f"/{image}").status for image in (old, young)] == [404, 200]

    changes = [{"op": "remove", "path": f"/{MARK}"}]
    assert guarded.ask(AGENT, "PATCH", f"/{young}", data=json.dumps(changes).encode(), headers=PATCH).status == 200
    assert guarded.delete(AGENT, young) == 204
    assert guarded.canaries() == []


async def test_a_policy_that_comes_and_goes_is_noticed_within_the_hour(guarded: Scene) -> None:
    clock, first, second = Clock(), guarded.image(), guarded.image()
    agent = guarded.agent(clock=clock)
    assert await agent.protect(first) is Protection.POLICY
    policy = guarded.cloud.policy_file("glance")
    use_policy(policy, GLANCE_POLICY.read_text().replace(" and not 'yes':%(autobackup_has_children)s", ""))
    try:
        clock.now_s += 3601
        assert await agent.protect(second) is Protection.PROTECTED
        assert MARK not in guarded.show(second)
    finally:
        use_policy(policy, GLANCE_POLICY.read_text())
    clock.now_s += 3601
    assert await agent.protect(second) is Protection.POLICY
    for image in (first, second):
        assert await agent.unprotect(image)
        await agent.forget(image)
        assert MARK not in guarded.show(image)
