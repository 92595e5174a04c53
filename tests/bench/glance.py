"""What a Glance under load takes: CPU and memory of its uWSGI workers, by the kernel's count."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.peak import peak_rss_bytes

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_FORGET_PEAK: Final = "5"  # clear_refs: VmHWM counts from now on; proc(5)


@dataclass(slots=True)
class GlanceUse:
    """Of all workers together; *peak_bytes* is the largest one's."""

    cpu_s: float = 0.0
    peak_bytes: int = 0


@contextmanager
def used(workers: Sequence[int]) -> Iterator[GlanceUse]:
    """What *workers* take while this is entered, told at its end."""
    for pid in workers:
        Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_PEAK)
    use, before_s = GlanceUse(), _cpu_s(workers)
    yield use
    use.cpu_s = _cpu_s(workers) - before_s
    use.peak_bytes = max(peak_rss_bytes(pid) for pid in workers)


def _cpu_s(workers: Sequence[int]) -> float:
    total_ticks = 0
    for pid in workers:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
        total_ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return total_ticks / _TICKS_PER_S
