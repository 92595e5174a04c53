"""
Barbican's secrets: 32 bytes each, made so that nobody but their maker and the named readers could ever have them.

The order is what makes it so: POST without a payload, PUT the access list, PUT the payload. openstacksdk's proxy is
not used for it: it answers a 403 with the error's text as the key.

No payload is ever in the text of an error, and neither is what Barbican answers to one.
"""

from base64 import b64encode
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

from autobackup.cloud.session import Answer, ProjectSession
from autobackup.errors import CloudRefused, CloudUnavailable

_SECRETS: Final = "/v1/secrets"
_SERVICE: Final = "key-manager"
_VERSION: Final = {"OpenStack-API-Version": "key-manager 1.2"}  # from 1.2 on a secret with consumers is guarded
_PAGE: Final = 100
_WAIT: Final = frozenset({401, 403, 429, 500, 502, 503, 504})
_REMEDIES: Final = {
    401: "a fresh token was refused, too; make sure that Barbican and Keystone agree on the time",
    403: "a role is missing, or the secret is not ours to have; autobackup doctor names the roles",
    413: "the project's quota of secrets in Barbican is full; make it larger",
}


class Barbican:
    """The key manager of one project."""

    def __init__(self, session: ProjectSession) -> None:
        self._session = session

    async def store(self, key: bytes, *, name: str, readers: Sequence[str], project_access: bool, consumer: str) -> str:
        """
        A new secret that holds *key*; its id. *readers* are ids of users who may have it, besides us.

        *consumer* is the image that needs it: as long as it is registered, a delete is refused.
        """
        wanted = {
            "name": name, "secret_type": "symmetric", "algorithm": "aes", "bit_length": len(key) * 8, "mode": "gcm",
        }  # fmt: skip
        made = self._succeeded(await self._session.call(_SERVICE, "POST", _SECRETS, json=wanted)).json()
        secret = self._id(made)
        path = f"{_SECRETS}/{secret}"
        terms: dict[str, object] = {"project-access": project_access, "users": list(readers)}
        self._succeeded(await self._session.call(_SERVICE, "PUT", f"{path}/acl", json={"read": terms}))
        use = {"service": "image", "resource_type": "image", "resource_id": consumer}
        self._succeeded(
            await self._session.call(_SERVICE, "POST", f"{path}/consumers", json=use, headers=_VERSION)
        )  # fmt: skip
        headers = {"Content-Type": "application/octet-stream", "Content-Encoding": "base64"}
        answer = await self._session.call(_SERVICE, "PUT", path, data=b64encode(key), headers=headers)
        self._succeeded(answer, says=False)
        return secret

    async def payload(self, secret: str) -> bytes | None:
        """What *secret* holds, whatever its length; None if it is gone."""
        headers = {"Accept": "application/octet-stream"}
        answer = await self._session.call(_SERVICE, "GET", f"{_SECRETS}/{secret}/payload", headers=headers)
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        if answer.status == HTTPStatus.FORBIDDEN:
            raise CloudRefused(f"{self._session.place}: {answer.words}; only its maker and the readers it names may")
        return self._succeeded(answer).body

    async def named(self, name: str) -> list[str]:
        """The ids of the secrets of this name that this project may see."""
        params = {"name": name, "limit": str(_PAGE)}
        page = self._succeeded(await self._session.call(_SERVICE, "GET", _SECRETS, params=params)).json()
        try:
            listed = [*page["secrets"]]
        except (KeyError, TypeError) as exc:
            raise CloudUnavailable(f"{self._session.place}: Barbican: what it said is no list of secrets") from exc
        return [self._id(one) for one in listed]

    async def delete(self, secret: str) -> None:
        """With its consumers. Nothing there is success."""
        path = f"{_SECRETS}/{secret}"
        answer = await self._session.call(_SERVICE, "DELETE", path, params={"force": "true"}, headers=_VERSION)
        if answer.status != HTTPStatus.NOT_FOUND:
            self._succeeded(answer)

    def _id(self, said: Any) -> str:
        try:
            return str(said["secret_ref"]).rstrip("/").rpartition("/")[2]
        except (KeyError, TypeError) as exc:
            raise CloudUnavailable(f"{self._session.place}: Barbican: what it said is no secret") from exc

    def _succeeded(self, answer: Answer, *, says: bool = True) -> Answer:
        if answer.is_success:
            return answer
        words = answer.words if says else f"{answer.call}: {answer.status}"
        remedy = _REMEDIES.get(answer.status, "")
        text = f"{self._session.place}: {words}" + (f"; {remedy}" if remedy else "")
        if answer.status in _WAIT or answer.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise CloudUnavailable(text, retry_after_s=answer.retry_after_s)
        raise CloudRefused(text)
