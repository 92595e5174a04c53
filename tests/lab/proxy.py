"""
A TCP forwarder between a client and a server of the lab, with faults to order.

    with Proxy.to(cloud.glance_url) as proxy:
        proxy.cut_after(3 * MiB)

Faults may be ordered at any time and from any thread; they reach open connections within
a few hundredths of a second. A cut is a RST to both sides, as from a firewall that forgot
a connection. It knows nothing of HTTP but the first word of a request.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_BUFFER_BYTES: Final = 1024 * 1024  # with less, system calls and not copies are the limit
_LOOK_S: Final = 0.02  # how late a fault may come that was ordered meanwhile
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends a RST


class Proxy:
    """Forwards what comes to `url`. Use it as a context manager; its end cuts what is open."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._lock = threading.Lock()
        self._faults = _Faults()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._closing = False
        # Bound and never listening: it keeps the port ours while connections are refused.
        self._reserved = _bound(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._reserved.getsockname()
        self.url = f"http://{self.address[0]}:{self.address[1]}"
        self.client_bytes = 0
        """What has been passed on from clients to the server."""
        self.connection_count = 0
        """How many connections were accepted."""
        self.open_count = 0
        """How many of them are open: two descriptors of this process each, as long as it takes to notice an end."""
        self.fault_count = 0
        """How many of the faults that happen once (`cut_after`, `drop_reply`) have happened."""

    @classmethod
    def to(cls, url: str) -> Self:
        """In front of the server that *url* names."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port)

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closing = True
            threads = [*self._threads]
        for thread in threads:
            thread.join()
        self._reserved.close()

    # ---- faults -------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No fault is in force or waiting any more."""
        with self._lock:
            self._faults = _Faults()
            refused = self._listener is None
        if refused:
            self._listen()

    def refuse(self) -> None:
        """As if the server were gone: open connections are cut, new ones refused. Returns when that is so."""
        with self._lock:
            self._faults.refuse = True
            threads = [*self._threads]
        for thread in threads:
            thread.join()

    def cut_after(self, client_bytes: int) -> None:
        """Once: after so many more bytes from clients, cut the connection that brought the last of them."""
        with self._lock:
            self._faults.cut_at_bytes = self.client_bytes + client_bytes

    def stall(self) -> None:
        """Accept connections and pass on nothing, either way."""
        with self._lock:
            self._faults.stall = True

    def slow(self, bytes_per_s: float) -> None:
        """All clients together send no faster than this, in small portions and without long pauses."""
        with self._lock:
            self._faults.bytes_per_s = bytes_per_s
            self._faults.paid_until_s = time.monotonic()

    def drop_reply(self) -> None:
        """Once: pass on the whole of the next PUT, and cut when the server begins to answer it."""
        with self._lock:
            self._faults.drop_reply = True

    # ---- forwarding ---------------------------------------------------------------------------------------

    def _listen(self) -> None:
        listener = _bound(self.address)
        listener.listen(128)
        listener.settimeout(_LOOK_S)
        with self._lock:
            self._listener = listener
            self._start(self._accept, listener)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy", daemon=True)
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._is_gone():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                server = socket.create_connection(self._target, timeout=10.0)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self.connection_count += 1
                self.open_count += 1
                self._start(self._forward, _Connection(client=client, server=server))
        listener.close()
        with self._lock:
            self._listener = None

    def _is_gone(self) -> bool:
        with self._lock:
            return self._closing or self._faults.refuse

    def _forward(self, connection: "_Connection") -> None:
        """Run one connection until both directions have ended, or one side or a fault breaks it."""
        with connection:
            try:
                while not connection.is_over:
                    if self._is_gone() or not self._step(connection):
                        connection.cut()
            except OSError:  # one side broke it: so do we
                connection.cut()
        with self._lock:
            self.open_count -= 1

    def _step(self, connection: "_Connection") -> bool:
        """Wait for a short while and pass on what is there; False if a fault ends the connection."""
        with self._lock:
            stalled = self._faults.stall
            allowed = self._faults.allowed_bytes()
        if stalled:
            time.sleep(_LOOK_S)
            return True
        client_ready, server_ready = connection.wait(may_read_client=allowed > 0)
        up, down = connection.up, connection.down
        if server_ready and down.read():
            with self._lock:
                if connection.is_put and self._faults.drop_reply:
                    self._faults.drop_reply = False
                    self.fault_count += 1
                    return False
            connection.is_put = None
        if server_ready or down.pending:
            down.write()
        if client_ready and (got := up.read(min(allowed, _BUFFER_BYTES))):
            if connection.is_put is None:  # what comes first, or first after an answer, is the head of a request
                connection.is_put = bytes(up.pending[:4]) == b"PUT "
            with self._lock:
                self._faults.pay(got)
        if up.pending or up.is_ended:
            return self._write_to_server(up)
        return True

    def _write_to_server(self, up: "_Direction") -> bool:
        with self._lock:  # held over the send, which does not wait: the count is exact, whoever else sends
            limit = self._faults.cut_at_bytes
            until_cut = len(up.pending) if limit is None else limit - self.client_bytes
            try:
                self.client_bytes += up.write(until_cut)
            except ConnectionError:  # it has perhaps answered early, and does not want the rest
                up.give_up()
            if limit is None or self.client_bytes < limit:
                return True
            self._faults.cut_at_bytes = None
            self.fault_count += 1
            return False


@dataclass(slots=True)
class _Faults:
    refuse: bool = False
    stall: bool = False
    drop_reply: bool = False
    cut_at_bytes: int | None = None
    bytes_per_s: float = 0.0
    paid_until_s: float = 0.0

    def allowed_bytes(self) -> int:
        if not self.bytes_per_s:
            return _BUFFER_BYTES
        return int((time.monotonic() - self._earliest_s) * self.bytes_per_s)

    def pay(self, count: int) -> None:
        if self.bytes_per_s:
            self.paid_until_s = self._earliest_s + count / self.bytes_per_s

    @property
    def _earliest_s(self) -> float:
        """Since when time has not been used for bytes. A pause is not made up for, but one byte always comes."""
        return max(self.paid_until_s, time.monotonic() - max(2 * _LOOK_S, 1.5 / self.bytes_per_s))


@dataclass(slots=True)
class _Direction:
    """One way through: at most one buffer is on its way."""

    source: socket.socket
    sink: socket.socket
    buffer: bytearray = field(default_factory=lambda: bytearray(_BUFFER_BYTES))
    pending: memoryview = field(default_factory=lambda: memoryview(b""))
    is_ended: bool = False
    """The source has said all."""
    is_over: bool = False
    """And the sink knows, or will not hear it."""

    def read(self, limit_bytes: int = _BUFFER_BYTES) -> int:
        try:
            got = self.source.recv_into(self.buffer, limit_bytes)
        except BlockingIOError:
            return 0
        self.pending = memoryview(self.buffer)[:got]
        self.is_ended = got == 0
        return got

    def write(self, limit_bytes: int = _BUFFER_BYTES) -> int:
        """Send what the sink takes now; end it once all is sent."""
        sent = 0
        if self.pending:
            with contextlib.suppress(BlockingIOError):
                sent = self.sink.send(self.pending[:limit_bytes])
            self.pending = self.pending[sent:]
        if self.is_ended and not self.pending and not self.is_over:
            self.is_over = True
            self.sink.shutdown(socket.SHUT_WR)
        return sent

    def give_up(self) -> None:
        self.pending, self.is_over = memoryview(b""), True


class _Connection:
    def __init__(self, *, client: socket.socket, server: socket.socket) -> None:
        self._sockets = (client, server)
        for one in self._sockets:
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.up = _Direction(source=client, sink=server)
        self.down = _Direction(source=server, sink=client)
        self.is_put: bool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            one.close()

    @property
    def is_over(self) -> bool:
        """
        Whether nothing is left to pass on.

        A server that has answered and closed reads no more: what its client still sends is not waited for.
        """
        return self.down.is_over

    def cut(self) -> None:
        for one in self._sockets:
            _reset(one)
        self.up.is_over = self.down.is_over = True

    def wait(self, *, may_read_client: bool) -> tuple[bool, bool]:
        """Whether client and server have said something; returns once one has or a pending buffer may go on."""
        client, server = self._sockets
        wanted = {client: 0, server: 0}
        for direction, may_read in ((self.up, may_read_client), (self.down, True)):
            if direction.pending:
                wanted[direction.sink] |= select.POLLOUT
            elif may_read and not (direction.is_ended or direction.is_over):
                wanted[direction.source] |= select.POLLIN
        poll = select.poll()
        for one, events in wanted.items():
            if events:  # a socket that is asked for nothing would still report its end, for ever
                poll.register(one, events)
        found = dict(poll.poll(_LOOK_S * 1000))
        came = select.POLLIN | select.POLLHUP | select.POLLERR
        said = [bool(wanted[one] & select.POLLIN and found.get(one.fileno(), 0) & came) for one in (client, server)]
        return said[0], said[1]


def _bound(address: tuple[str, int]) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    return made


def _reset(one: socket.socket) -> None:
    if one.fileno() >= 0:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        one.close()
