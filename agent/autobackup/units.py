"""Sizes and durations: the multiples, and how people write and read them. Source of `"30d"` and `"200GiB"`."""

import re
from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB

_SIZES: Final = {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}
_DURATIONS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
# so many digits and no more: a float that overflows to infinity is a duration to nobody
_TERM: Final = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """`"200GiB"` -> 214748364800. Binary units only: a disk vendor's GB is refused rather than guessed."""
    match = _TERM.fullmatch(text)
    if match is None or match[2] not in _SIZES:
        raise ValueError(f"{text!r} is not a size; write a number and one of B, KiB, MiB, GiB, TiB")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_duration_s(text: str) -> float:
    """`"30d"`, `"1h 30m"`, `"250ms"` -> seconds. A bare number is refused: it leaves the unit to a guess."""
    total_s, at = 0.0, 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None or match[2] not in _DURATIONS_S:
            break
        total_s += float(match[1]) * _DURATIONS_S[match[2]]
        at = match.end()
    if at == 0 or at < len(text):
        raise ValueError(f"{text!r} is not a duration; write numbers with ms, s, m, h, d or w, as in '1h 30m'")
    return total_s


def format_bytes(count: int) -> str:
    """1572864 -> `"1.5 MiB"`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if round(value, 1) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """5400.2 -> `"1h 30m"`; the two largest units only, as an operator reads an age."""
    if seconds < 1:
        return f"{min(seconds * 1000, 999):.0f}ms"
    left, parts = int(seconds), []
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= unit_s:
            parts.append(f"{left // unit_s}{unit}")
            left %= unit_s
    return " ".join(parts[:2])
