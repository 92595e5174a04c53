"""
Plays scenarios, many at a time, and says what became of every disk in them.

Those that break Nova's API or end the agent have a host of their own; the others share one, as on a real host.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tests.lab.fake_keystone import FakeKeystone
from tests.lab.hypervisor import Hypervisor
from tests.lab.live_watch import LiveWatch
from tests.lab.nova_host import LINGER_S, Host, wait_slowly
from tests.lab.nova_stage import ALIVE, TERMINATED, UNDECIDED, Disk, Play
from tests.lab.workspace import Workspace

_LASTING: Final = frozenset({ALIVE, UNDECIDED})
_HOSTS_AT_ONCE: Final = 6
_AT_ONCE: Final = 15  # on the host that is shared
_REACHED_S: Final = 30.0
_CAPTURED_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    What Nova does with one server, and the verdict on its disk; *later*: on the disks that it had afterwards.

    *captured*: a rule wants the first disk although it was not terminated.
    """

    name: str
    drive: Callable[[Play], None]
    expected: str
    later: tuple[str, ...] = ()
    captured: bool = False
    own_host: bool = False

    @property
    def rows(self) -> Sequence[tuple[str, str]]:
        """The name and the expected verdict for each disk."""
        names = [self.name, *(f"{self.name}, disk {n}" for n in range(2, len(self.later) + 2))]
        return list(zip(names, (self.expected, *self.later), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one disk. *problem*: the verdict may be right, and something else is not."""

    name: str
    expected: str
    verdict: str
    reason: str = ""
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict == self.expected and not self.problem


@dataclass
class Result:
    """Of all of them: rows by the name of their scenario."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    touched: list[str] = field(default_factory=list)
    watched_count: int = 0

    @property
    def wrong(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows if not row.is_right]


def perform(
    scenarios: Iterable[Scenario],
    hypervisor: Hypervisor,
    place: Workspace,
    *,
    say: Callable[[Scenario, list[Row]], None] = lambda _scenario, _rows: None,
) -> Result:
    """Play them all; *say* hears of each when it has ended, in one thread at a time."""
    result, watches, lock = Result(), list[LiveWatch](), threading.Lock()

    def take(scenario: Scenario, rows: list[Row]) -> None:
        with lock:
            result.rows[scenario.name] = rows
            say(scenario, rows)

    @contextmanager
    def opened(keystone: FakeKeystone) -> Iterator[Host]:
        with Host.open(hypervisor, keystone, place) as host:
            try:
                yield host
            finally:
                watches.append(host.watch)

    def play_alone(scenario: Scenario, keystone: FakeKeystone) -> None:
        try:
            with opened(keystone) as host:
                rows = _play(scenario, host)
        except Exception as exc:  # its host did not come up, or did not end
            rows = _failed(scenario, exc)
        take(scenario, rows)

    todo = list(scenarios)
    together = [one for one in todo if not one.own_host]
    with (
        FakeKeystone() as keystone,
        ThreadPoolExecutor(_HOSTS_AT_ONCE, "host") as hosts,
        ThreadPoolExecutor(_AT_ONCE, "play") as plays,
    ):
        alone = [hosts.submit(play_alone, one, keystone) for one in todo if one.own_host]
        if together:
            with opened(keystone) as host:
                for done in [plays.submit(lambda one: take(one, _play(one, host)), one) for one in together]:
                    done.result()
        for done in alone:
            done.result()
    result.touched = [words for watch in watches for words in watch.touched]
    result.watched_count = sum(watch.guarded_count for watch in watches)
    return result


def _play(scenario: Scenario, host: Host) -> list[Row]:
    """Drive it, then read the verdicts."""
    play = Play(host, scenario.name)
    try:
        scenario.drive(play)
        return _read(scenario, play)
    except Exception as exc:  # one that fails must not hide what the others say
        for inode in [inode for disk in play.disks for inode in disk.inodes]:
            host.watch.give_up(inode)
        return _failed(scenario, exc)


def _failed(scenario: Scenario, exc: Exception) -> list[Row]:
    words = f"{type(exc).__name__}: {exc}"
    return [Row(name=name, expected=expected, verdict="failed", problem=words) for name, expected in scenario.rows]


def _read(scenario: Scenario, play: Play) -> list[Row]:
    ended_s = time.monotonic()
    disks = list(zip(play.disks, scenario.rows, strict=True))
    for disk, (_, expected) in disks:
        if expected == UNDECIDED:
            wait_slowly(play.waits, within_s=_REACHED_S)
        elif expected != ALIVE:
            wait_slowly(partial(play.reached, disk), within_s=_REACHED_S)
    if any(expected in _LASTING for _, (_, expected) in disks):
        time.sleep(max(0.0, ended_s + LINGER_S - time.monotonic()))
    rows = []
    for disk, (name, expected) in disks:
        if expected == ALIVE:  # a slow agent may not have looked since
            wait_slowly(partial(play.is_decided, disk), within_s=_REACHED_S)
        is_captured = expected == TERMINATED or (scenario.captured and disk is play.disks[0])
        verdict, line = play.word(disk), play.reached(disk)
        problem = _problem(play, disk, is_captured=is_captured) if verdict == expected else ""
        reason = str(line["reason"]) if line else play.waits()
        rows.append(Row(name=name, expected=expected, verdict=verdict, reason=reason, problem=problem))
    return rows


def _problem(play: Play, disk: Disk, *, is_captured: bool) -> str:
    """What is not as it should be although the verdict is."""
    if not is_captured:
        return "it was captured" if play.receipt(disk) is not None else ""
    receipt = wait_slowly(partial(play.receipt, disk), within_s=_CAPTURED_S)
    if receipt is None:
        return f"no receipt after {_CAPTURED_S:g} s"
    if disk.sha256 and receipt["member_sha256"]["disks/disk"] != disk.sha256["disk"]:
        return "not captured as it was last"
    wait_slowly(lambda: not play.lost(disk), within_s=_CAPTURED_S)
    lost = play.lost(disk)
    return f"in no backup as they were last: {', '.join(lost)}" if lost else ""
