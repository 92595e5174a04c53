"""What the CLI prints of words that are not ours: a guest's name, a tenant's properties."""

import pytest

from autobackup.service.cli.output import as_time, show_rows


@pytest.mark.parametrize("text", ["99999999999999999999999", "\u00b2", "-1", "1e9", "soon", "253402300800"])
def test_a_time_that_is_none_is_shown_as_it_is(text: str) -> None:
    assert as_time(text) == text


def test_a_time_is_shown_as_people_read_it() -> None:
    assert (as_time("1700000000"), as_time(""), as_time(None)) == ("2023-11-14T22:13:20Z", "", "")


@pytest.mark.parametrize("fmt", ["table", "value"])
def test_no_name_speaks_to_the_terminal(fmt: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_rows([{"name": "\x1b[31mEVIL\x1b[0m\nrow2"}], columns=("name",), fmt=fmt, empty="")
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[31mEVIL\\x1b[0m\\x0arow2" in said
