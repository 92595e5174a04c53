"""
The connection to libvirt: its events, and the few questions the agent asks. Read-only, and never in the loop.

libvirt's event loop runs in a thread of its own (`virEventRunDefaultImpl`): libvirtaio loses every event in
asyncio's debug mode and cannot serve a second loop. Each call goes to a thread of its own with a deadline, because
any call blocks while any domain is being destroyed, and opening a connection to a hung daemon blocks for ever. A
call that misses its deadline condemns the connection.

On every connect: register for events first, then list and scan, so that nothing falls between. What happened
while the connection was down is never reported by libvirt; only the scan finds it.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import libvirt

from autobackup import logs
from autobackup.errors import HypervisorUnavailable
from autobackup.metrics import Metrics
from autobackup.model import InstanceId
from autobackup.rules.termination import Domain

_log = logs.get("host.libvirt")
_KEEPALIVE_COUNT: Final = 3
_FIRST_RETRY_S: Final = 0.2
_WAKE_MS: Final = 500

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvent:
    """One lifecycle event. `migrated_away` only for STOPPED_MIGRATED; `disk_is_near` where a claim can still help."""

    instance: InstanceId
    name: str
    migrated_away: bool
    disk_is_near: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAnswer:
    """What a lookup said. `xml` is empty unless the domain exists."""

    domain: Domain
    xml: str = ""


class LibvirtLink:
    """
    One connection, kept up.

    *on_event* runs in libvirt's thread, before anything else: it may link, it must not call libvirt.
    *on_connected* runs in the event loop after each registration.
    """

    def __init__(
        self,
        *,
        uri: str,
        call_timeout_s: float,
        keepalive_interval_s: float,
        reconnect_longest_s: float,
        metrics: Metrics,
        on_event: Callable[[DomainEvent], None],
        on_connected: Callable[[], None],
    ) -> None:
        self._uri = uri
        self._call_timeout_s = call_timeout_s
        self._keepalive_interval_s = keepalive_interval_s
        self._reconnect_longest_s = reconnect_longest_s
        self._metrics = metrics
        self._on_event = on_event
        self._on_connected = on_connected
        self._connection: Any = None
        self._closed = asyncio.Event()

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    async def run(self) -> None:
        """Connect, stay, reconnect; for ever. Cancel it to stop."""
        _start_event_thread()
        failure_count = 0
        try:
            while True:
                try:
                    await self._connect()
                except HypervisorUnavailable as exc:
                    failure_count += 1
                    pause_s = min(self._reconnect_longest_s, _FIRST_RETRY_S * 2.0 ** min(failure_count, 16))
                    _log.warning("libvirt.unreachable", uri=self._uri, error=str(exc), failures=failure_count)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                    continue
                failure_count = 0
                self._metrics.libvirt_connected.set(1)
                _log.info("libvirt.connected", uri=self._uri)
                self._on_connected()
                await self._closed.wait()
                _log.warning("libvirt.lost", uri=self._uri, consequence="claims go on by inotify; verdicts wait")
                self._drop()
        finally:
            self._drop()

    async def domains(self) -> list[tuple[InstanceId, str]]:
        """(uuid, XML) of every domain, running or not. Raises `HypervisorUnavailable`."""
        return await self._ask(
            "list domains", lambda conn: [(InstanceId(d.UUIDString()), d.XMLDesc()) for d in _each(conn)]
        )

    async def look_up(self, instance: InstanceId) -> DomainAnswer:
        """What libvirt knows of one domain. UNKNOWN, never ABSENT, when it could not be asked."""
        try:
            return await self._ask(f"look up {instance}", lambda conn: _look_up(conn, instance))
        except HypervisorUnavailable:
            return DomainAnswer(domain=Domain.UNKNOWN)

    # ---- inside -----------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        self._closed = closed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def close(_conn: object, _reason: int, _opaque: object) -> None:
            loop.call_soon_threadsafe(closed.set)

        def lifecycle(_conn: object, domain: Any, event: int, detail: int, _opaque: object) -> None:
            self._on_event(_translate(domain, event, detail))

        def open_and_register() -> Any:
            connection = libvirt.openReadOnly(self._uri)
            connection.registerCloseCallback(close, None)
            connection.setKeepAlive(max(1, round(self._keepalive_interval_s)), _KEEPALIVE_COUNT)
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
            return connection

        self._connection = await self._in_thread("connect", open_and_register)

    async def _ask(self, call: str, question: Callable[[Any], _Answer]) -> _Answer:
        connection = self._connection
        if connection is None:
            raise HypervisorUnavailable(f"{call}: not connected to {self._uri}")
        try:
            return await self._in_thread(call, lambda: question(connection))
        except HypervisorUnavailable:
            if connection is self._connection and not await self._is_alive(connection):
                self._closed.set()
            raise

    async def _is_alive(self, connection: Any) -> bool:
        try:
            return bool(await self._in_thread("is alive", connection.isAlive, deadline_s=1.0))
        except HypervisorUnavailable:
            return False

    async def _in_thread(self, call: str, work: Callable[[], _Answer], deadline_s: float | None = None) -> _Answer:
        """The one way into libvirt. A thread that hangs is left behind; it is a daemon and holds no lock of ours."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def settle(result: _Answer | None, error: BaseException | None) -> None:
            if not answer.done():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except libvirt.libvirtError as exc:
                error = HypervisorUnavailable(f"{call}: {exc}")
            except BaseException as exc:
                error = exc  # type: ignore[assignment]
            with contextlib.suppress(RuntimeError):  # the loop is gone: the process is ending
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name=f"libvirt {call}", daemon=True).start()
        try:
            async with asyncio.timeout(deadline_s or self._call_timeout_s):
                return await answer
        except TimeoutError:
            raise HypervisorUnavailable(f"{call}: no answer from libvirt within its deadline") from None

    def _drop(self) -> None:
        self._metrics.libvirt_connected.set(0)
        connection, self._connection = self._connection, None
        if connection is not None:
            # close() itself blocks on a hung daemon
            threading.Thread(target=_close_quietly, args=(connection,), name="libvirt close", daemon=True).start()


def _translate(domain: Any, event: int, detail: int) -> DomainEvent:
    near = event in (
        libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STOPPED,
    )  # fmt: skip
    migrated = event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED
    return DomainEvent(
        instance=InstanceId(domain.UUIDString()), name=domain.name(), migrated_away=migrated, disk_is_near=near
    )


def _each(connection: Any) -> list[Any]:
    domains: list[Any] = connection.listAllDomains()
    return domains


def _look_up(connection: Any, instance: InstanceId) -> DomainAnswer:
    try:
        domain = connection.lookupByUUIDString(instance)
        active, xml = bool(domain.isActive()), str(domain.XMLDesc())
    except libvirt.libvirtError as exc:
        if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return DomainAnswer(domain=Domain.ABSENT)
        raise
    return DomainAnswer(domain=Domain.ACTIVE if active else Domain.INACTIVE, xml=xml)


def _close_quietly(connection: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


_event_thread: threading.Thread | None = None


def _start_event_thread() -> None:
    """libvirt's default event loop, once per process, for as long as the process lives."""
    global _event_thread
    if _event_thread is not None:
        return
    libvirt.virEventRegisterDefaultImpl()
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it prints to stderr otherwise
    libvirt.virEventAddTimeout(_WAKE_MS, lambda _timer, _opaque: None, None)

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    _event_thread = threading.Thread(target=run, name="libvirt events", daemon=True)
    _event_thread.start()
