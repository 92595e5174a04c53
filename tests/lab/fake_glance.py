"""
A service's HTTP face that answers in its place where it is told to, and passes on everything else.

    async with FakeGlance(cloud.glance_url) as glance:
        glance.answer("PUT", "/file", status=503, headers={"Retry-After": "7"})

For the faults that a real Glance (or Barbican) cannot be made to show: whatever is left after a fault is what the
real one behind makes of it. It listens on 127.0.0.1 and writes down every call, with the whole of a short body.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import web

_SHORT_BYTES: Final = 64 * 1024
_HOP_BY_HOP: Final = frozenset({"connection", "host", "transfer-encoding"})

Edit = Callable[[bytes], bytes]


@dataclass(slots=True, kw_only=True)
class Call:
    """One call as it came. *body* is what came of it, up to its first 64 KiB; *status* what was answered."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0
    status: int = 0

    def __str__(self) -> str:
        return f"{self.method} {re.sub('[0-9a-f]{8}-[-0-9a-f]{27}', 'ID', self.path)}"


@dataclass(slots=True, kw_only=True)
class _Fault:
    method: str
    path: re.Pattern[str]
    left_count: int
    status: int | None = None  # None: the service's own
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_passed_on: bool = False
    reads_body: bool = False
    echoes: bool = False
    edit: Edit | None = None
    cut_after_bytes: int | None = None
    without_range: bool = False
    hold: asyncio.Event | None = None


class FakeGlance:
    """In front of the service at *url*. Use it as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        self._target = url
        self._faults: list[_Fault] = []
        self.calls: list[Call] = []
        self.passed_on_bytes = 0
        """Of the service's answers, to clients."""
        self.url = ""

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._http.close()

    # ---- faults -------------------------------------------------------------------------------------------

    def answer(
        self,
        method: str,
        path: str,
        *,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        times: int = 1,
        passed_on: bool = False,
        reads_body: bool = False,
        echoes: bool = False,
    ) -> None:
        """
        Say this to the next *times* calls of *method* whose path ends by the pattern *path*.

        *passed_on*: the service gets the call first, and its own answer is thrown away. *reads_body*: all of the
        body is taken before; otherwise the answer comes at once. *echoes*: and it is what was sent.
        """
        self._add(
            method, path, times, status=status, body=body, headers=headers or {},
            is_passed_on=passed_on, reads_body=reads_body or echoes, echoes=echoes,
        )  # fmt: skip

    def edit(self, method: str, path: str, edit: Edit, *, times: int = 1) -> None:
        """The service's own answer, with another body."""
        self._add(method, path, times, edit=edit)

    def cut(self, method: str, path: str, *, after_bytes: int, times: int = 1) -> None:
        """Break the connection after so many bytes of the answer's body."""
        self._add(method, path, times, cut_after_bytes=after_bytes)

    def ignore_range(self, method: str, path: str, *, times: int = 1) -> None:
        """As a cache or an old backend does: the whole is asked of the service, and answered."""
        self._add(method, path, times, without_range=True)

    def hold(self, method: str, path: str, *, times: int = 1) -> asyncio.Event:
        """Neither pass on nor answer until the event is set."""
        until = asyncio.Event()
        self._add(method, path, times, hold=until)
        return until

    def heal(self) -> None:
        self._faults.clear()

    def _add(self, method: str, path: str, times: int, **what: object) -> None:
        fault = _Fault(method=method, path=re.compile(path + "$"), left_count=times, **what)  # type: ignore[arg-type]
        self._faults.append(fault)

    # ---- answering ----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = Call(method=request.method, path=request.path, query=dict(request.query), headers=request.headers.copy())
        self.calls.append(call)
        fault = next(
            (
                one
                for one in self._faults
                if one.left_count and one.method == call.method and one.path.search(call.path)
            ),
            None,
        )
        if fault is None:
            return await self._pass_on(request, call, _Fault(method="", path=re.compile(""), left_count=0))
        fault.left_count -= 1
        if fault.hold is not None:
            await fault.hold.wait()
        if fault.status is None:
            return await self._pass_on(request, call, fault)
        if fault.is_passed_on:
            async with self._asked(request, call, request.headers) as answer:
                await answer.read()
        elif fault.reads_body:
            async for _ in _body(request, call):
                pass
        call.status = fault.status
        body = bytes(call.body) if fault.echoes else fault.body
        return web.Response(status=fault.status, body=body, headers=fault.headers)

    def _asked(
        self, request: web.Request, call: Call, headers: Mapping[str, str]
    ) -> "aiohttp.client._RequestContextManager":
        kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
        return self._http.request(
            request.method,
            self._target + request.raw_path,
            headers=kept,
            data=_body(request, call) if request.body_exists else None,
            allow_redirects=False,
        )

    async def _pass_on(self, request: web.Request, call: Call, fault: _Fault) -> web.StreamResponse:
        headers = dict(request.headers)
        if fault.without_range:
            headers.pop("Range", None)
        async with self._asked(request, call, headers) as answer:
            call.status = answer.status
            not_said = _HOP_BY_HOP | {"content-length"}
            said = {name: value for name, value in answer.headers.items() if name.lower() not in not_said}
            if fault.edit is not None:
                return web.Response(status=answer.status, headers=said, body=fault.edit(await answer.read()))
            response = web.StreamResponse(status=answer.status, headers=said)
            response.content_length = answer.content_length
            await response.prepare(request)
            left = fault.cut_after_bytes
            if left == 0:
                _break(request)
            async for piece in answer.content.iter_any():
                if left is not None and len(piece) >= left:
                    await response.write(piece[:left])
                    await asyncio.sleep(0.05)  # what was written must arrive: a reset throws away what is on its way
                    _break(request)
                    break
                left = None if left is None else left - len(piece)
                await response.write(piece)
                self.passed_on_bytes += len(piece)
            else:
                await response.write_eof()
            return response


async def _body(request: web.Request, call: Call) -> AsyncIterator[bytes]:
    async for piece in request.content.iter_any():
        call.body_bytes += len(piece)
        call.body += piece[: max(0, _SHORT_BYTES - len(call.body))]
        yield piece


def _break(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
