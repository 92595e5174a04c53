"""
One HTTP request and its whole answer, with nothing but the standard library.

It never retries, follows no redirect, reads no proxy from the environment, and an error
status is an answer like any other. Tests look at a service with it that does not share
any code with the agent.
"""

import contextlib
import http.client
import json as json_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    """Names in any case."""
    body: bytes

    def json(self) -> Any:
        return json_module.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status} {self.body[:500].decode(errors='replace')}"


def request(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    json: object = None,
    data: bytes | Iterable[bytes] | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> Answer:
    """
    Ask, and return whatever is answered; `OSError` or `HTTPException` if nothing is.

    *data* that is not bytes is sent as one HTTP chunk for each item.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    sent = dict(headers or {})
    if json is not None:
        data = json_module.dumps(json).encode()
        sent.setdefault("Content-Type", "application/json")
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)) as connection:
        try:
            connection.request(method, target or "/", body=data, headers=sent)
        except (BrokenPipeError, ConnectionResetError):  # an early answer, perhaps, to a body it does not want
            if connection.sock is None:
                raise
        with connection.getresponse() as response:
            return Answer(status=response.status, headers=response.headers, body=response.read())
