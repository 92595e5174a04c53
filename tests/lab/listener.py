"""
A listener of libvirt events in a process of its own, as the agent is one.

In a process of its own because libvirt's default event loop can be registered once per
process, and that once belongs to the code under test.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

DEFINED: Final = 0
UNDEFINED: Final = 1
STARTED: Final = 2
SUSPENDED: Final = 3
RESUMED: Final = 4
STOPPED: Final = 5
SHUTDOWN: Final = 6

_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleEvent:
    """Codes as in libvirt's VIR_DOMAIN_EVENT_*; `at_s` is when the listener was called."""

    uuid: str
    name: str
    event: int
    detail: int
    at_s: float


class EventListener:
    """Collects every lifecycle event from `__enter__` on: registered before that returns."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._pending = b""
        self._events: list[LifecycleEvent] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.connection_closed = False

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__)), self._uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        if self._next_line() != {"ready": True}:
            raise RuntimeError("the listener did not come up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        with self._process:
            self._process.kill()

    def events(self, *, uuid: str | None = None) -> list[LifecycleEvent]:
        """What has come so far, in order; of one domain or of all."""
        while self._readable(timeout_s=0):
            self._take(self._next_line())
        return [event for event in self._events if uuid in (None, event.uuid)]

    def wait_for(self, count: int, *, uuid: str | None = None, timeout_s: float = _TIMEOUT_S) -> list[LifecycleEvent]:
        """Return once *count* events have come; an error says what came instead."""
        deadline_s = time.monotonic() + timeout_s
        while len(events := self.events(uuid=uuid)) < count:
            if not self._readable(timeout_s=max(0, deadline_s - time.monotonic())):
                raise TimeoutError(f"{len(events)} of {count} events: {events}")
        return events

    def _readable(self, *, timeout_s: float) -> bool:
        assert self._process is not None
        assert self._process.stdout is not None
        if b"\n" in self._pending:
            return True
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _next_line(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        while b"\n" not in self._pending:
            received = os.read(self._process.stdout.fileno(), 65536)
            if not received:
                raise RuntimeError(f"the listener on {self._uri} has ended")
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        decoded: dict[str, Any] = json.loads(line)
        return decoded

    def _take(self, line: dict[str, Any]) -> None:
        if "closed" in line:
            self.connection_closed = True
        else:
            self._events.append(LifecycleEvent(**line))


def listen(uri: str) -> None:
    """The listening process: print events until standard input ends."""
    import libvirt

    def tell(**line: object) -> None:
        os.write(1, json.dumps(line).encode() + b"\n")

    def on_lifecycle(_connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        tell(uuid=domain.UUIDString(), name=domain.name(), event=event, detail=detail, at_s=time.time())

    def serve() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.openReadOnly(uri)
    connection.registerCloseCallback(lambda *_: tell(closed=True), None)
    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None)
    threading.Thread(target=serve, daemon=True).start()
    tell(ready=True)
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    listen(sys.argv[1])
