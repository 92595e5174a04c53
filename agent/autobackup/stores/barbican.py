"""
`barbican`: one secret for each attempt, in the destination's project; the header names it and its project.

The secret carries the attempt's id as its name, so that whatever a crash leaves of it can be found and destroyed. It
is read back before anything is sealed under it. A URL in a header is never followed: only the secret's id is taken
from there, and asked of the Barbican that our own catalogue names.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from autobackup.cloud.barbican import Barbican
from autobackup.cloud.session import ProjectSession
from autobackup.errors import CloudRefused, CloudUnavailable, KeyLost, KeyRefused, KeysUnavailable
from autobackup.model import AttemptId
from autobackup.stores.keys import KEY_BYTES, DataKey

_NAME: Final = "autobackup-"
_SECRET: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class BarbicanKeys:
    """See `stores.keys.KeySource`. *readers*: ids of the users who may have the keys, besides us."""

    def __init__(self, session: ProjectSession, *, readers: Sequence[str], project_access: bool) -> None:
        self._session = session
        self._barbican = Barbican(session)
        self._readers = tuple(readers)
        self._project_access = project_access

    async def check(self) -> None:
        with _as_keys_unavailable():
            await self._barbican.named(_NAME)

    async def draw(self, attempt: AttemptId) -> DataKey:
        key = secrets.token_bytes(KEY_BYTES)
        with _as_keys_unavailable():
            access = await self._session.access()
            secret = await self._barbican.store(
                key,
                name=_NAME + attempt,
                readers=self._readers,
                project_access=self._project_access,
                consumer=attempt,
            )
        words = {"source": "barbican", "secret": secret, "project": access.project_id}
        if await self.fetch(words) != key:
            raise KeyRefused(f"{self._session.place}: Barbican gives back another key than it was given ({secret})")
        return DataKey(key=key, header_words=words)

    async def fetch(self, header_words: Mapping[str, str]) -> bytes:
        secret = header_words.get("secret", "")
        if _SECRET.fullmatch(secret) is None:
            raise KeyRefused(f"{secret!r} is not the id of a secret")
        try:
            key = await self._barbican.payload(secret)
        except CloudUnavailable as exc:
            raise KeysUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
        except CloudRefused as exc:
            raise KeyRefused(str(exc)) from exc
        if key is None:
            project = header_words.get("project", "")
            raise KeyLost(f"{self._session.place}: Barbican has no secret {secret} (of project {project}) any more")
        if len(key) != KEY_BYTES:
            raise KeyRefused(f"{self._session.place}: secret {secret} holds {len(key)} bytes, which are no data key")
        return key

    async def circle(self) -> str:
        return f"barbican {' '.join(sorted(self._readers))} {'members' if self._project_access else ''}"

    async def settle(self, attempt: AttemptId) -> None:
        """Nothing is remembered of a key."""

    async def destroy(self, attempt: AttemptId) -> None:
        with _as_keys_unavailable():
            for secret in await self._barbican.named(_NAME + attempt):
                await self._barbican.delete(secret)


@contextmanager
def _as_keys_unavailable() -> Iterator[None]:
    """What keeps us from drawing or destroying a key may pass: a role can be granted, a policy mended."""
    try:
        yield
    except CloudUnavailable as exc:
        raise KeysUnavailable(str(exc), retry_after_s=exc.retry_after_s) from exc
    except CloudRefused as exc:
        raise KeysUnavailable(str(exc)) from exc
