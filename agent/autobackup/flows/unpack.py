"""
The way back: sealed bytes in, members out to a sink, and a proof at the end that it was all and as it was sealed.

Used by verify (the sink keeps nothing) and restore (the sink writes partial files). What the sink is given is
authentic but not yet complete: it must not be released before `finish` has returned (invariant 7).
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from autobackup.container.bundle import DIGESTS, MANIFEST, BundleReader, MemberData, MemberEnd, MemberStart
from autobackup.container.frames import FrameReader
from autobackup.container.header import Header, decode
from autobackup.container.manifest import Digest, Digests, Manifest, check_bundle
from autobackup.container.unseal import Unsealer
from autobackup.errors import ContainerDamaged


class Sink(Protocol):
    """Takes members one after the other."""

    def start(self, name: str, size_bytes: int) -> None: ...

    def write(self, data: memoryview) -> None:
        """The next bytes of the member; the view is good until the call returns."""

    def end(self, name: str) -> None: ...


class Nowhere:
    """The sink that keeps nothing: reading alone is the proof."""

    def start(self, name: str, size_bytes: int) -> None: ...

    def write(self, data: memoryview) -> None: ...

    def end(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """A bundle that was read to its end and found whole."""

    manifest: Manifest
    digests: Digests


class Unpacker:
    """One sealed bundle from front to back, without its header. Not for the event loop: it computes."""

    def __init__(self, *, header_bytes: bytes, key: bytes, sink: Sink) -> None:
        self._header: Header = decode(header_bytes)
        self._unsealer = Unsealer(key=key, associated_data=header_bytes)
        self._frames = FrameReader()
        self._bundle = BundleReader()
        self._sink = sink
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._read: dict[str, Digest] = {}
        self._record: bytearray | None = None
        self._records: dict[str, bytes] = {}

    def push(self, sealed: bytes) -> None:
        """The next bytes of the stream, in pieces of any size. Raises `ContainerDamaged`."""
        for plain in self._unsealer.push(sealed):
            self._plain(plain)

    def finish(self) -> Unpacked:
        """Return if every layer ended where it should and every digest is the one that was sealed."""
        self._plain(self._unsealer.finish())
        self._frames.finish()
        self._bundle.finish()
        manifest = Manifest.decode(self._records[MANIFEST])
        digests = Digests.decode(self._records[DIGESTS])
        check_bundle(header=self._header, manifest=manifest, digests=digests, read=self._read)
        return Unpacked(manifest=manifest, digests=digests)

    def _plain(self, compressed: memoryview) -> None:
        for frame in self._frames.push(compressed):
            for event in self._bundle.push(frame):
                match event:
                    case MemberData(data=data):
                        self._data(data)
                    case MemberStart(name=name, size_bytes=size_bytes):
                        self._start(name, size_bytes)
                    case MemberEnd(name=name):
                        self._end(name)

    def _start(self, name: str, size_bytes: int) -> None:
        self._digest = hashlib.sha256()
        self._size_bytes = size_bytes
        self._record = bytearray() if name in (MANIFEST, DIGESTS) else None
        self._sink.start(name, size_bytes)

    def _data(self, data: memoryview) -> None:
        self._digest.update(data)
        if self._record is not None:
            self._record += data
        self._sink.write(data)

    def _end(self, name: str) -> None:
        if self._record is not None:
            self._records[name] = bytes(self._record)
        if name != DIGESTS:
            self._read[name] = Digest(size_bytes=self._size_bytes, sha256=self._digest.hexdigest())
        if name == MANIFEST and Manifest.decode(self._records[MANIFEST]).job != self._header.job:
            raise ContainerDamaged("manifest.json: job is not the header's")
        self._sink.end(name)
