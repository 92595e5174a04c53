"""Sizes and durations are read without a guess, and what is shown can be read back."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobackup.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration_s,
)


def test_the_multiples_are_binary() -> None:
    assert (KiB, MiB, GiB, TiB) == (2**10, 2**20, 2**30, 2**40)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("1B", 1),
        ("512 B", 512),
        ("4KiB", 4096),
        ("64 MiB", 67_108_864),
        ("  64MiB\t", 67_108_864),
        ("1.5MiB", 1_572_864),
        ("200GiB", 214_748_364_800),
        ("2TiB", 2_199_023_255_552),
        ("999999999999999TiB", 999_999_999_999_999 * 2**40),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "64", "1.5", "GiB", "64 GB", "64G", "64gib", "64KIB", "64MB", "-1MiB", "+1MiB", "1,5MiB", "1e3MiB",
        "1MiB 2KiB", "1 MiB.", ".5MiB", "5.MiB", "0x10MiB", "infB", "nanB", "1_000B", "٣MiB", "1PiB", "1s",
        "9" * 400 + "GiB",
    ],
)  # fmt: skip
def test_what_is_not_a_size_is_refused_with_the_units_to_choose_from(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write a number and one of B, KiB, MiB, GiB, TiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("0s", 0),
        ("1s", 1),
        ("1.5s", 1.5),
        ("90m", 5400),
        ("2h", 7200),
        ("30d", 2_592_000),
        ("1w", 604_800),
        ("1h 30m", 5400),
        ("1h30m", 5400),
        ("30m 1h", 5400),
        (" 1 h  30 m ", 5400),
        ("1w 1d 1h 1m 1s 1ms", 694_861.001),
        ("10m 5m", 900),
    ],
)
def test_a_duration_is_the_sum_of_its_terms(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "30", "30 ", "1h 30", "30 1h", "s", "-1s", "+1s", "1h -30m", "1h, 30m", "1h and 30m", "1H", "1D", "1M",
        "1min", "30sec", "1y", "1.s", ".5s", "1e3s", "infs", "nans", "1_0s", "٣s", "30 parsecs", "1h 30m!", "1MiB",
        "9" * 400 + "d",
    ],
)  # fmt: skip
def test_what_is_not_a_duration_is_refused_with_the_units_to_choose_from(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write numbers with ms, s, m, h, d or w"):
        parse_duration_s(text)


@given(st.text())
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    for parse in (parse_bytes, parse_duration_s):
        with contextlib.suppress(ValueError):
            assert 0 <= parse(text) < float("inf")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (1_048_166, "1023.6 KiB"),
        (1_048_535, "1.0 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**30, "1.0 GiB"),
        (214_748_364_800, "200.0 GiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=0, max_value=2**60))
def test_a_shown_size_reads_back_to_a_tenth_of_its_unit(count: int) -> None:
    shown = format_bytes(count)
    number, unit = shown.split()
    assert float(number) < 1024 or unit == "TiB"
    assert abs(parse_bytes(shown) - count) <= parse_bytes(f"1{unit}") * 0.05 + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.25, "250ms"),
        (0.0004, "0ms"),
        (0.9, "900ms"),
        (0.9996, "999ms"),
        (1, "1s"),
        (59.9, "59s"),
        (60, "1m"),
        (61, "1m 1s"),
        (5400.2, "1h 30m"),
        (3600, "1h"),
        (3605, "1h 5s"),
        (86399, "23h 59m"),
        (86400, "1d"),
        (90061, "1d 1h"),
        (40 * 86400, "40d"),
    ],
)
def test_an_age_is_shown_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(min_value=1, max_value=10**10))
def test_a_shown_age_reads_back_and_is_never_longer_than_the_real_one(seconds: int) -> None:
    shown = format_duration(seconds)
    assert re.fullmatch(r"\d+[dhms]( \d+[hms])?", shown)
    smallest_s = parse_duration_s(f"1{shown[-1]}")
    assert 0 <= seconds - parse_duration_s(shown) < smallest_s
