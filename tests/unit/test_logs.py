"""One JSON object a line, whatever is logged; and nothing in it that was not passed to it."""

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from autobackup import logs
from autobackup.model import InstanceRecord, JobState, VerdictKind

SECRET = "5ec7e7-0f-the-data-key"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the process logs to for one test; structlog is set as before afterwards."""
    before = structlog.get_config()
    out = io.StringIO()
    logs.configure(stream=out)
    yield out
    structlog.configure(**before)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_object_with_its_room_level_and_time(stream: io.StringIO) -> None:
    logs.get("flows.backup").info("send.attempt", outcome="sent", sent_bytes=5, elapsed_s=0.25, error="")
    (line,) = lines(stream)
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert at.utcoffset() == timedelta(0)
    assert line == {
        "room": "flows.backup",
        "event": "send.attempt",
        "level": "info",
        "outcome": "sent",
        "sent_bytes": 5,
        "elapsed_s": 0.25,
        "error": "",
    }


def test_every_level_says_which_it_is_and_debug_is_left_out(stream: io.StringIO) -> None:
    log = logs.get("room")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(log, level)("thing.done")
    assert [line["level"] for line in lines(stream)] == ["info", "warning", "error", "critical"]


def test_debug_is_there_for_who_asks() -> None:
    before, out = structlog.get_config(), io.StringIO()
    try:
        logs.configure(stream=out, level=logging.DEBUG)
        logs.get("room").debug("thing.done")
    finally:
        structlog.configure(**before)
    assert [line["level"] for line in lines(out)] == ["debug"]


@pytest.mark.parametrize(
    "value",
    [
        "two\nlines\r\nand a third",
        "line separators \x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 of Unicode",
        '"quotes" and \\ and }{',
        "\x00\x1b[31mred\x1b[0m",
        "a file name \udce9 that is not UTF-8",
        b"bytes\n",
        Path("/i/disk"),
        OSError(28, "No space left on device\n"),
        JobState.PARKED,
        VerdictKind.TERMINATED,
        InstanceRecord(instance="6a", domain_xml="<domain>\n</domain>"),  # type: ignore[arg-type]
        {"a": {1, 2}},
        (1, 2),
        float("inf"),
        None,
        2**70,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_value_breaks_the_line(stream: io.StringIO, value: object) -> None:
    """A guest chooses what the console, and a tenant what the server is called: neither writes a line of its own."""
    logs.get("room").warning("thing.done", value=value)
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().isascii()
    (line,) = lines(stream)
    assert line["event"] == "thing.done"


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    before = structlog.get_config()
    path, count, each = tmp_path / "log", 8, 200
    with path.open("w", encoding="utf-8") as out:
        try:
            logs.configure(stream=out)
            log = logs.get("room")
            begin = threading.Barrier(count)

            def talk(n: int) -> None:
                begin.wait()
                for m in range(each):
                    log.info("thing.done", talker=n, number=m, filler="x" * 300)

            threads = [threading.Thread(target=talk, args=(n,)) for n in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            structlog.configure(**before)
    said = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert sorted((line["talker"], line["number"]) for line in said) == [
        (n, m) for n in range(count) for m in range(each)
    ]


# ---- exceptions ---------------------------------------------------------------------------------------------


def plain() -> None:
    key = SECRET
    assert key
    raise OSError(28, "No space left on device")


def caused() -> None:
    token = {"header": SECRET}
    try:
        plain()
    except OSError as exc:
        raise ValueError(f"{len(token)} words") from exc


def during() -> None:
    wrapped_key = [SECRET]
    try:
        plain()
    except OSError:
        raise ValueError(f"{len(wrapped_key)} words")  # noqa: B904


def grouped() -> None:
    passphrase = SECRET
    errors = []
    for fail in (plain, caused, during):
        try:
            fail()
        except Exception as exc:
            errors.append(exc)
    raise ExceptionGroup(f"{len(passphrase)} letters", errors)


@pytest.mark.parametrize("fail", [plain, caused, during, grouped])
def test_a_traceback_shows_frames_and_no_locals(stream: io.StringIO, fail: Callable[[], None]) -> None:
    """A data key is a local variable of whoever seals."""
    try:
        fail()
    except Exception:
        logs.get("room").exception("thing.failed")
    (line,) = lines(stream)
    assert SECRET not in stream.getvalue()
    assert '"locals"' not in stream.getvalue()
    assert fail.__name__ in {frame["name"] for frame in line["exception"][0]["frames"]}
    assert line["exception"][0]["exc_type"] in ("OSError", "ValueError", "ExceptionGroup")


def test_the_cause_of_an_exception_is_told(stream: io.StringIO) -> None:
    try:
        caused()
    except ValueError:
        logs.get("room").error("thing.failed", exc_info=True)
    (line,) = lines(stream)
    assert [one["exc_type"] for one in line["exception"]] == ["ValueError", "OSError"]
    assert "No space left on device" in line["exception"][1]["exc_value"]


# ---- the process --------------------------------------------------------------------------------------------


def test_the_journal_gets_it_from_stderr() -> None:
    """stdout belongs to commands, whose output is data."""
    program = "from autobackup import logs; logs.configure(); logs.get('room').info('thing.done', n=1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert ended.stdout == b""
    assert json.loads(ended.stderr)["event"] == "thing.done"


def test_a_logger_that_was_made_before_the_set_up_follows_it() -> None:
    """Every module makes its own at import."""
    program = (
        "from autobackup import logs; log = logs.get('room'); logs.configure(); log.debug('no'); log.info('thing.done')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert [json.loads(line)["event"] for line in ended.stderr.splitlines()] == ["thing.done"]
