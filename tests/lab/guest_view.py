"""
What a guest sees on its disk: read through QEMU, with no raw copy on this machine.

`qemu-nbd` opens the image with all its backing files and serves it on a socket; the NBD
client here reads it. `qemu-img convert -O raw` needs a file that it can seek in, so it
cannot write into a pipe.
"""

import contextlib
import hashlib
import json
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

Format = Literal["qcow2", "raw"]

_CHUNK_BYTES: Final = 4 << 20
_START_TIMEOUT_S: Final = 30.0
_IO_TIMEOUT_S: Final = 60.0

# https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_FIXED_NEWSTYLE_NO_ZEROES: Final = 3
_OPT_EXPORT_NAME: Final = 1
_CMD_READ: Final = 0
_CMD_DISCONNECT: Final = 2


class GuestView:
    """An open disk. `read` may be called in any order; the end of the disk is an error."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        if self._receive(16) != b"NBDMAGICIHAVEOPT":
            raise RuntimeError("qemu-nbd does not speak the fixed newstyle protocol")
        self._receive(2)
        hello = struct.pack(">I8sII", _FIXED_NEWSTYLE_NO_ZEROES, b"IHAVEOPT", _OPT_EXPORT_NAME, 0)
        self._connection.sendall(hello)
        self.size_bytes: int = struct.unpack(">QH", self._receive(10))[0]

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} of a disk of {self.size_bytes}")
        parts = []
        for at in range(offset, offset + length, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, offset + length - at)
            self._request(_CMD_READ, offset=at, length=count)
            magic, error, _cookie = struct.unpack(">IIQ", self._receive(16))
            if (magic, error) != (0x67446698, 0):
                raise OSError(error, f"qemu-nbd cannot read {count} bytes at {at}")
            parts.append(self._receive(count))
        return b"".join(parts)

    def chunks(self) -> Iterator[bytes]:
        for at in range(0, self.size_bytes, _CHUNK_BYTES):
            yield self.read(at, min(_CHUNK_BYTES, self.size_bytes - at))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def disconnect(self) -> None:
        self._request(_CMD_DISCONNECT, offset=0, length=0)

    def _request(self, command: int, *, offset: int, length: int) -> None:
        self._connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 0, offset, length))

    def _receive(self, count: int) -> bytes:
        received = bytearray(count)
        view = memoryview(received)
        while view:
            got = self._connection.recv_into(view)
            if got == 0:
                raise RuntimeError("qemu-nbd hung up")
            view = view[got:]
        return bytes(received)


@contextlib.contextmanager
def guest_view(disk: Path, format: Format) -> Iterator[GuestView]:  # noqa: A002 - libvirt's word
    """Open *disk* read-only, without asking for locks: a running QEMU is no obstacle."""
    node = {
        "driver": format,
        "read-only": True,
        "force-share": True,
        "file": {"driver": "file", "filename": str(disk.resolve())},
    }
    with tempfile.TemporaryDirectory(prefix="lab-nbd-") as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "nbd")
        command = ["qemu-nbd", "--read-only", "--socket", str(path), "json:" + json.dumps(node)]
        server = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE))
        stack.callback(server.kill)
        connection = stack.enter_context(_connected(path, server))
        view = GuestView(connection)
        yield view
        view.disconnect()


def guest_view_sha256(disk: Path, format: Format) -> str:  # noqa: A002
    """The digest of the whole disk as its guest sees it, holes as zeros."""
    with guest_view(disk, format) as view:
        return view.sha256()


def guest_view_read(disk: Path, format: Format, offset: int, length: int) -> bytes:  # noqa: A002
    with guest_view(disk, format) as view:
        return view.read(offset, length)


def _connected(path: Path, server: subprocess.Popen[bytes]) -> socket.socket:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_IO_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except OSError as exc:
            connection.close()
            if server.poll() is not None:
                assert server.stderr is not None
                raise RuntimeError(f"qemu-nbd: {server.stderr.read().decode().strip()}") from exc
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.002)
        else:
            return connection
