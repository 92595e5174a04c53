"""An aiohttp application that listens in a thread of its own, for tests that play a synchronous nova-compute."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_Result = TypeVar("_Result")
_CALL_S: Final = 10.0


class HttpThread:
    """
    *handle* answers every request, in the thread's loop. Use it as a context manager.

    `refuse` closes the port, as a service does that is not running; `listen` opens the same one again.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake service", daemon=True)
        self._port = 0
        self._site: web.TCPSite | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    def refuse(self) -> None:
        """Nobody listens: connections are refused, and those that are open are cut."""
        self._call(self._close_port())

    def listen(self) -> None:
        self._call(self._open_port())

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        await self._open_port()
        self.url = f"http://127.0.0.1:{self._port}"

    async def _open_port(self) -> None:
        if self._site is None:
            self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
            await self._site.start()
            self._port = self._runner.addresses[0][1]

    async def _close_port(self) -> None:
        site, self._site = self._site, None
        if site is not None:
            await site.stop()
            assert self._runner.server is not None
            for connection in list(self._runner.server.connections):
                connection.force_close()
