"""
What else may decide over a server: the domain of its owner's project, by Keystone, and its image's words, by Glance.

Neither is Nova's to tell. What we may not read is no error: a domain is not known then, and a rule that asks for it
neither applies nor does not. Answers are remembered; both change seldom.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

from autobackup import logs
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudUnavailable

_log = logs.get("cloud.owners")
_REMEMBERED_S: Final = 3600.0
_REFUSAL_REMEMBERED_S: Final = 60.0  # somebody may grant the right
_MAY_NOT: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})


class Owners:
    """Asked with the session that Nova is asked with."""

    def __init__(self, session: ProjectSession, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._clock = clock
        self._domains: dict[str, tuple[float, str | None]] = {}  # -> until when, what
        self._images: dict[str, tuple[float, Mapping[str, str]]] = {}

    async def domain_of(self, project: str) -> str | None:
        """The id of the domain that *project* (id) is in. Raises `CloudUnavailable` if Keystone does not answer."""
        until_s, domain = self._domains.get(project, (None, None))
        if until_s is None or self._clock() > until_s:
            said = await self._get("identity", f"/v3/projects/{project}")
            domain = None if said is None else self._domain_in(said)
            self._domains[project] = (self._until_s(said), domain)
        return domain

    async def image_properties(self, image: str) -> Mapping[str, str]:
        """
        Every property of *image* (id) that is a text; none of one that we may not read: there is nothing more to hear.

        Raises `CloudUnavailable` if Glance does not answer.
        """
        until_s, properties = self._images.get(image, (None, {}))
        if until_s is None or self._clock() > until_s:
            said = await self._get("image", f"/v2/images/{image}")
            if said is not None and said.get("id") != image:
                raise CloudUnavailable(f"{self._session.place}: GET image/v2/images/{image}: it is not that image")
            properties = {key: value for key, value in (said or {}).items() if isinstance(value, str)}
            self._images[image] = (self._until_s(said), properties)
        return properties

    def _until_s(self, said: object) -> float:
        return self._clock() + (_REFUSAL_REMEMBERED_S if said is None else _REMEMBERED_S)

    async def _get(self, service: str, path: str) -> Mapping[str, object] | None:
        """The object there; None where we may not read it, or there is none."""
        answer = await self._session.call(service, "GET", path)
        if answer.status in _MAY_NOT:
            _log.debug("owner.unknown", answer=answer.words)
            return None
        if not answer.is_success:
            words = f"{self._session.place}: {answer.words}"
            raise CloudUnavailable(words, status=answer.status, retry_after_s=answer.retry_after_s)
        said = answer.json()
        if not isinstance(said, dict) or not said:
            raise CloudUnavailable(f"{self._session.place}: {answer.call}: not what was asked for")
        return said

    def _domain_in(self, said: Mapping[str, object]) -> str:
        project = said.get("project")
        if not isinstance(project, dict):
            raise CloudUnavailable(f"{self._session.place}: Keystone shows a project without saying which")
        return str(project.get("domain_id") or "")
