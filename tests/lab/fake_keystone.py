"""
A Keystone of one user, for tests that want a token and a catalogue at once and nothing else of it.

    with FakeKeystone() as keystone, FakeNova(keystone) as nova:
        keystone.write_clouds(folder / "clouds.yaml", nova=nova.url)

What roles mean is for the services to say: see `fake_nova.Policy`. The real one is `tests.lab.openstack.cloud.Cloud`.
"""

import json
import secrets
import time
import uuid as uuid_module
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web
from tests.lab.http_thread import HttpThread

USER: Final = "autobackup"
PROJECT: Final = "service"
REGION: Final = "RegionOne"
_DOMAIN: Final = {"id": "default", "name": "Default"}
_LIFE_S: Final = 3600


class FakeKeystone:
    """Gives a token to who knows the password. Use it as a context manager."""

    def __init__(self, *, roles: tuple[str, ...] = ("reader", "service", "autobackup-watcher")) -> None:
        self.roles = roles
        self.password = secrets.token_urlsafe(12)
        self.user_id, self.project_id = uuid_module.uuid4().hex, uuid_module.uuid4().hex
        self.catalogue: dict[str, str] = {}
        """Type of a service -> URL of its endpoint."""
        self.issued_count = 0
        self._tokens: set[str] = set()
        self._http = HttpThread(self._handle)

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        return f"{self._http.url}/v3"

    def knows(self, token: str) -> bool:
        return token in self._tokens

    def revoke(self) -> None:
        """Every token so far: the next call with one is answered 401."""
        self._tokens.clear()

    def write_clouds(self, path: Path, *, nova: str = "", cloud: str = "nova") -> Path:
        """A clouds.yaml with our entry; *nova* is where its compute service is, whatever the catalogue says."""
        entry: dict[str, Any] = {
            "auth_type": "password",
            "region_name": REGION,
            "auth": {
                "auth_url": self.url,
                "username": USER,
                "password": self.password,
                "project_name": PROJECT,
                "user_domain_id": "default",
                "project_domain_id": "default",
            },
        }
        if nova:
            entry["compute_endpoint_override"] = nova
        path.touch(mode=0o600)
        path.write_text(json.dumps({"clouds": {cloud: entry}}))  # JSON is YAML
        return path

    # ---- answering ----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        match request.method, request.path.rstrip("/"):
            case "GET", "" | "/v3":
                return web.json_response({"version": self._version()})
            case "POST", "/v3/auth/tokens":
                return self._issue(await request.json())
            case "GET", "/v3/auth/tokens" if self.knows(request.headers.get("X-Subject-Token", "")):
                return web.json_response({"token": self._token(is_scoped=True)})
            case "GET", "/v3/auth/projects" if self.knows(request.headers.get("X-Auth-Token", "")):
                return web.json_response({"projects": [self._project()], "links": {"next": None}})
        return _error(HTTPStatus.NOT_FOUND, "Could not find it.")

    def _version(self) -> Mapping[str, Any]:
        return {
            "id": "v3.14", "status": "stable", "updated": "2020-04-07T00:00:00Z",
            "links": [{"rel": "self", "href": f"{self.url}/"}],
            "media-types": [{"base": "application/json", "type": "application/vnd.openstack.identity-v3+json"}],
        }  # fmt: skip

    def _issue(self, asked: Any) -> web.Response:
        said = asked["auth"]["identity"].get("password", {}).get("user", {})
        if (said.get("name", USER), said.get("password")) != (USER, self.password):
            return _error(HTTPStatus.UNAUTHORIZED, "The request you have made requires authentication.")
        token = f"gAAAA{secrets.token_urlsafe(120)}"
        self._tokens.add(token)
        self.issued_count += 1
        body = {"token": self._token(is_scoped="scope" in asked["auth"])}
        return web.json_response(body, status=HTTPStatus.CREATED, headers={"X-Subject-Token": token})

    def _token(self, *, is_scoped: bool) -> Mapping[str, Any]:
        now_s = time.time()
        token: dict[str, Any] = {
            "methods": ["password"],
            "user": {"domain": _DOMAIN, "id": self.user_id, "name": USER, "password_expires_at": None},
            "audit_ids": [secrets.token_urlsafe(16)],
            "expires_at": _iso(now_s + _LIFE_S),
            "issued_at": _iso(now_s),
        }
        if is_scoped:
            token |= {
                "project": self._project(),
                "is_domain": False,
                "roles": [{"id": uuid_module.uuid4().hex, "name": name} for name in self.roles],
                "catalog": [
                    {
                        "id": uuid_module.uuid4().hex, "type": kind, "name": kind,
                        "endpoints": [{
                            "id": uuid_module.uuid4().hex, "interface": "public", "region": REGION,
                            "region_id": REGION, "url": url,
                        }],
                    }
                    for kind, url in {"identity": self.url, **self.catalogue}.items()
                ],
            }  # fmt: skip
        return token

    def _project(self) -> Mapping[str, Any]:
        return {"domain": _DOMAIN, "id": self.project_id, "name": PROJECT}


def _error(status: HTTPStatus, message: str) -> web.Response:
    return web.json_response(
        {"error": {"code": status.value, "title": status.phrase, "message": message}}, status=status
    )


def _iso(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s)) + ".000000Z"
