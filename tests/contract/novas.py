"""A reader of a fake Nova, and the means to make that one say what no Nova should."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from tests.lab.fake_keystone import PROJECT, FakeKeystone
from tests.lab.fake_nova import FakeNova, Server
from tests.lab.nova_servers import HOST

from autobackup.cloud.nova import Nova
from autobackup.cloud.session import ProjectSession
from autobackup.model import InstanceId

OTHER_HOST: Final = "compute-2"
PIN: Final = "2.68"
REMEDY: Final = "packaging/openstack/nova-policy.yaml"


class WatchedNova(FakeNova):
    """
    Counts methods. *edit* changes a right answer's JSON; *before* is called with each request's number, from 1.

    *redirect_to* answers every call with a 307 to there.
    """

    def __init__(self, keystone: FakeKeystone | None = None, *, max_limit: int = 1000) -> None:
        super().__init__(keystone, max_limit=max_limit)
        self.methods = Counter[str]()
        self.edit: Callable[[Any], Any] | None = None
        self.before: Callable[[int], None] | None = None
        self.redirect_to = ""

    async def _answer(self, request: web.Request, version: str) -> web.StreamResponse:
        self.methods[request.method] += 1
        if self.before is not None:
            self.before(self.methods.total())
        if self.redirect_to:
            return web.Response(status=307, headers={"Location": self.redirect_to + request.path_qs})
        response = await super()._answer(request, version)
        if self.edit is None or response.status != 200 or not isinstance(response, web.Response):
            return response
        said = self.edit(json.loads(response.text or ""))
        headers = {name: value for name, value in response.headers.items() if name.lower().startswith(("x-", "openst"))}
        return web.json_response(said, headers=headers)

    def edit_rows(self, **what: Any) -> None:
        """Every server of every answer has these keys, or has them not where ... is given."""

        def edit(said: Any) -> Any:
            for row in [*said.get("servers", []), *([said["server"]] if "server" in said else [])]:
                for key, value in what.items():
                    if value is ...:
                        row.pop(key, None)
                    else:
                        row[key] = value
            return said

        self.edit = edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """*nova* is the code under test; *fake* is what it asks, and *keystone* where it gets its tokens."""

    keystone: FakeKeystone
    fake: WatchedNova
    nova: Nova

    def put(self, **what: Any) -> InstanceId:
        return InstanceId(self.fake.put(Server(**what)).uuid)


@contextmanager
def reader(
    folder: Path, *, call_timeout_s: float = 10.0, max_limit: int = 1000, roles: tuple[str, ...] = ("reader",)
) -> Iterator[Reader]:
    with FakeKeystone(roles=roles) as keystone, WatchedNova(keystone, max_limit=max_limit) as fake:
        clouds = keystone.write_clouds(folder / "clouds.yaml", nova=fake.url)
        session = ProjectSession(cloud="nova", project=PROJECT, clouds_yaml=clouds, call_timeout_s=call_timeout_s)
        yield Reader(keystone=keystone, fake=fake, nova=Nova(session, host=HOST))
