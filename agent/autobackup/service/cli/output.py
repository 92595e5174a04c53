"""
How the CLI speaks: `-f json|table|value`, progress on a terminal only, and errors as one line and an exit status.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

from autobackup.errors import AutobackupError, ConfigError, Damaged, Refused, Transient

EXIT_CODES: Final[Mapping[type[AutobackupError], int]] = {ConfigError: 2, Refused: 3, Damaged: 4, Transient: 5}

_LATEST_S: Final = 253402300799  # the last second of the year 9999
_Command = TypeVar("_Command", bound=Callable[..., Any])


class ErrorsToExitCodes(click.Group):
    """The edge of a command: an `AutobackupError` becomes a line on stderr and its exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutobackupError as exc:
            click.echo(f"autobackup: {exc}", err=True)
            ctx.exit(next((code for kind, code in EXIT_CODES.items() if isinstance(exc, kind)), 1))


def format_option(command: _Command) -> _Command:
    """`-f json|table|value`, the OpenStack client's habit."""
    return _format_option("-f", "--format")(command)


def short_format_option(command: _Command) -> _Command:
    """`-f` alone: for a command whose `--format` is that of a disk."""
    return _format_option("-f")(command)


def _format_option(*names: str) -> Callable[[_Command], _Command]:
    return click.option(
        *names, "fmt", type=click.Choice(["table", "json", "value"]), default="table", show_default=True,
        help="table for people, json for programs, value for shell loops.",
    )  # fmt: skip


def show_rows(rows: Sequence[Mapping[str, object]], *, columns: Sequence[str], fmt: str, empty: str) -> None:
    """A list: every row whole as JSON, or its *columns*."""
    if fmt == "json":
        click.echo(json.dumps(rows, indent=1))
    elif fmt == "value":
        for row in rows:
            click.echo(" ".join(_text(row.get(column)) for column in columns))
    elif not rows:
        click.echo(empty)
    else:
        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(_text(row.get(column)) for column in columns))
        _console().print(table)


def show_one(record: Mapping[str, object], *, fmt: str) -> None:
    """One object."""
    if fmt == "json":
        click.echo(json.dumps(record, indent=1))
    elif fmt == "value":
        for value in record.values():
            click.echo(_text(value))
    else:
        table = Table("field", "value", box=None, pad_edge=False, header_style="bold")
        for key, value in record.items():
            table.add_row(key, _text(value))
        _console().print(table)


def show_text(lines: Iterable[str], *, record: Mapping[str, object], fmt: str) -> None:
    """Words for people; *record* where JSON is asked for."""
    if fmt == "json":
        click.echo(json.dumps(record, indent=1))
    else:
        for line in lines:
            click.echo(_text(line))


def show_tree(tree: Tree) -> None:
    """A tree of `_text`s."""
    for node in (tree, *_below(tree)):
        node.label = _text(node.label)
    _console().print(tree)


@contextmanager
def progress(words: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr when that is a terminal; otherwise nothing at all."""
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(_text(words), total=total_bytes)
        yield lambda count: bar.advance(task, count)


def as_time(unix_s: object) -> str:
    """1700000000 -> 2023-11-14T22:13:20Z; nothing for nothing."""
    text = str(unix_s or "")
    if not (text.isascii() and text.isdigit()) or int(text) > _LATEST_S:
        return text  # somebody's own words
    return datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _below(tree: Tree) -> Iterator[Tree]:
    for child in tree.children:
        yield child
        yield from _below(child)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        # a guest's name, or a tenant's property, must not speak to the terminal
        return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in str(value))
    return json.dumps(value, indent=1 if isinstance(value, dict) else None)


def _console() -> Console:
    is_terminal = sys.stdout.isatty()  # and a tenant's words are no markup
    return Console(
        width=None if is_terminal else 240, soft_wrap=not is_terminal, markup=False, emoji=False, highlight=False
    )
