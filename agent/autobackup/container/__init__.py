"""
The sealed bundle: header, sealed stream, compressed frames, tar archive, records. docs/format.md is the spec.

The room is pure: bytes in, bytes out. Keys, salts, nonces and times are arguments; nothing here opens a
file, reads a clock, draws a random number or starts a thread. Each class is used by one thread at a time.

Two kinds of failure, and no third: what was read is not a sealed bundle of version 1 (`ContainerDamaged`,
whose text says what and where), or the caller broke a rule of the interface (`ValueError`, `RuntimeError`: a
bug, which nothing handles).
"""

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
