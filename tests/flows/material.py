"""What the tests of the data path share: disks made of data and holes, ends of a fan-out, and the way back."""

import ctypes
import mmap
import os
import secrets
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from autobackup.container.bundle import CONSOLE_LOG
from autobackup.container.header import HEADER_BYTES, Header, encode
from autobackup.container.manifest import DiskEntry, FileEntry, Manifest
from autobackup.flows.contents import Contents, Member
from autobackup.flows.tap import FanoutLimits, Outlet, Tap
from autobackup.flows.unpack import Unpacked, Unpacker
from autobackup.host.disks import HeldDisk
from autobackup.model import DestinationName, DiskIdentity

MiB: Final = 1 << 20
INSTANCE: Final = "6a0b2d0e-3c5f-4d62-9a57-0f8f0f0c1d2e"
JOB: Final = "11111111-2222-3333-4444-555555555555"


def limits(
    *, level: int | None = -1, detach_after_s: float = 60.0, compress_threads: int = 2, tokens: int = 2
) -> FanoutLimits:
    return FanoutLimits(
        cpu_tokens=threading.BoundedSemaphore(tokens),
        zstd_level=level,
        compress_threads=compress_threads,
        detach_after_s=detach_after_s,
    )


# ---- disks ------------------------------------------------------------------------------------------------


def write_disk(path: Path, parts: Sequence[tuple[str, int]]) -> bytes:
    """A file of ("data" | "zeros" | "hole", length) parts; returns what it reads as."""
    content = bytearray()
    with path.open("wb") as file:
        for kind, length in parts:
            data = os.urandom(length) if kind == "data" else bytes(length)
            if kind != "hole":
                file.seek(len(content))
                file.write(data)
            content += data
        file.truncate(len(content))
    return bytes(content)


class CountingDisk(HeldDisk):
    """Notes what was read of it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []

    def read_into(self, buffer: memoryview, offset: int) -> list[tuple[int, int]]:
        self.reads.append((offset, len(buffer)))
        return super().read_into(buffer, offset)


_MAP_FIXED = 0x10


class FailingDisk(HeldDisk):
    """
    A disk on which the kernel itself answers EIO: memory of ours, read through /proc/self/mem.

    *bad_pages* are the 4 KiB blocks that cannot be read: each is a page of an empty file, beyond its end. (What is only
    unmapped is a gap in the address space, which the next small mapping of any thread may fill.)
    """

    def __init__(self, data: bytes, bad_pages: Sequence[int]) -> None:
        super().__init__("/proc/self/mem")
        size_bytes = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._base = libc.mmap(
            None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        ctypes.memmove(self._base, data, len(data))
        empty = os.memfd_create("empty")
        for page in bad_pages:
            at = self._base + page * mmap.PAGESIZE
            assert libc.mmap(at, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, empty, 0) == at
        os.close(empty)
        self.identity = replace(self.identity, size_bytes=len(data))

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        yield 0, self.identity.size_bytes

    def read_into(self, buffer: memoryview, offset: int) -> list[tuple[int, int]]:
        return [(at - self._base, count) for at, count in super().read_into(buffer, self._base + offset)]

    def require_unchanged(self, first: DiskIdentity) -> None:
        assert first == self.identity


# ---- what goes in -----------------------------------------------------------------------------------------


def contents_of(disks: Mapping[str, HeldDisk], *, console: bytes | None = None) -> Contents:
    """A bundle's contents of some open disks, by name."""
    manifest = Manifest(
        job=JOB, instance=INSTANCE, instance_name="web", host="host", captured_at_s=1, verdict="terminated",
        verdict_reason="", bases=(), not_captured=(), facts={},
        disks=tuple(
            DiskEntry(
                name=name, member=f"disks/{name}", format="raw", size_bytes=disk.identity.size_bytes,
                source_path=disk.path, inode=disk.identity.inode, mtime_ns=disk.identity.mtime_ns, backing=None,
                backing_path=None, chain_source="none",
            )
            for name, disk in disks.items()
        ),
        files=() if console is None else (FileEntry(member=CONSOLE_LOG, size_bytes=len(console), source_path=""),),
    )  # fmt: skip
    members = [Member(name=f"disks/{name}", disk=disk, first=disk.identity) for name, disk in disks.items()]
    if console is not None:
        members.append(Member(name=CONSOLE_LOG, data=console))
    return Contents(manifest=manifest, members=members, health=(), mtime_s=1)


@contextmanager
def opened(*paths: Path, kind: type[HeldDisk] = HeldDisk) -> Iterator[dict[str, HeldDisk]]:
    with ExitStack() as stack:
        yield {path.name: stack.enter_context(kind(str(path))) for path in paths}


# ---- where it goes ----------------------------------------------------------------------------------------


class End:
    """
    One destination's end: keeps what it is given. *before_chunk(index)* may wait, or raise as a store would.
    """

    def __init__(
        self,
        name: str,
        *,
        before_chunk: Callable[[int], Awaitable[None]] | None = None,
        keep: bool = True,
        algorithm: str = "sha512",
    ) -> None:
        self._before_chunk = before_chunk
        self._keep = keep
        self.chunks: list[bytes | bytearray | memoryview] = []
        self.chunk_count = 0
        self.got_all = False
        header = Header(
            job=JOB, attempt=str(uuid.uuid4()), instance=INSTANCE, destination=name, created_at_s=1,
            expires_at_s=None, parent=None,
            key={"source": "keyfile", "kek_id": "0" * 16, "wrapped": "A" * 53 + "A=="},
        )  # fmt: skip
        self.outlet = Outlet(
            destination=DestinationName(name),
            header=encode(header),
            key=secrets.token_bytes(32),
            salt=secrets.token_bytes(32),
            nonce_prefix=secrets.token_bytes(7),
            digest_algorithm=algorithm,
            send=self._take,
        )

    async def _take(self, tap: Tap) -> None:
        async for chunk in tap:
            if self._before_chunk is not None:
                await self._before_chunk(self.chunk_count)
            self.chunk_count += 1
            if self._keep:
                self.chunks.append(chunk)  # kept as it is, not copied: a buffer that is used again would show
        self.got_all = True

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)


# ---- the way back -----------------------------------------------------------------------------------------


class Collect:
    """The sink that keeps members in memory."""

    def __init__(self) -> None:
        self.members: dict[str, bytearray] = {}
        self._name = ""

    def start(self, name: str, size_bytes: int) -> None:
        self._name = name
        self.members[name] = bytearray()

    def write(self, data: memoryview) -> None:
        self.members[self._name] += data

    def end(self, name: str) -> None: ...


def open_bundle(data: bytes, key: bytes) -> tuple[dict[str, bytes], Unpacked]:
    """Open a whole sealed bundle; raises `ContainerDamaged` if it is not one."""
    sink = Collect()
    unpacker = Unpacker(header_bytes=data[:HEADER_BYTES], key=key, sink=sink)
    for at in range(HEADER_BYTES, len(data), 700_001):
        unpacker.push(data[at : at + 700_001])
    unpacked = unpacker.finish()
    return {name: bytes(content) for name, content in sink.members.items()}, unpacked


# ---- what must not be left --------------------------------------------------------------------------------


def our_threads() -> list[str]:
    """Threads of a fan-out that are still there. The loop's own pool is not one of them."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("read", "seal", "compress"))]


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the one that listed
            continue
    return sorted(found)


async def chunks_of(data: bytes, chunk_bytes: int = MiB) -> AsyncIterator[bytes]:
    for at in range(0, len(data), chunk_bytes):
        yield data[at : at + chunk_bytes]
