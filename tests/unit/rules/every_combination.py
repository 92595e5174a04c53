"""
Every combination of facts there can be, Nova's word included: over a hundred million, each of them decided.

They are not written out. A fact is given its value when it is first read, and the reading is repeated with every other
value it can have; what was never read can have made no difference. So a combination stands for all that differ from
it in unread facts only, and whatever a test reads beside the function is branched over, too.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, cast

from tests.unit.rules.nova_rows import LEAKED_S, QUIET_S

from autobackup.rules.termination import Answer, Domain, Facts, Host, Lease, Place, Verdict, Word, decide

YES_OR_NO = (False, True)
# below, at and above both limits
AGES_S = (0.0, QUIET_S - 0.001, QUIET_S, QUIET_S + 1.0, LEAKED_S - 0.001, LEAKED_S, LEAKED_S + 1.0)
VM_STATES = ("", "active", "building", "paused", "suspended", "stopped", "rescued", "resized", "soft-delete", "deleted",
             "error", "shelved", "shelved_offloaded")  # fmt: skip
TASKS = ("", "deleting", "rebuilding", "rebuild_spawning", "resize_reverting", "migrating", "shelving_offloading",
         "spawning", "unshelving")  # fmt: skip

OF_A_WORD: dict[str, Sequence[Any]] = {
    "answer": tuple(Answer),
    "host": tuple(Host),
    "vm_state": VM_STATES,
    "task_state": TASKS,
    "launched": YES_OR_NO,
    "control": YES_OR_NO,
    "reason": ("503",),
}
OF_FACTS: dict[str, Sequence[Any]] = {
    "domain": tuple(Domain),
    "was_defined": YES_OR_NO,
    "link_count": (1, 2, 3),
    "named_at": tuple(Place),
    "last_named_at": tuple(Place),
    "other_root_disk": YES_OR_NO,
    "is_current": YES_OR_NO,
    "was_reverted": YES_OR_NO,
    "migrated_away": YES_OR_NO,
    "lease": tuple(Lease),
    "quiet_s": AGES_S,
    "quiet_required_s": (QUIET_S,),
    "leaked_after_s": (LEAKED_S,),
    "undefined_is_released": YES_OR_NO,
    "cloud_is_silent": YES_OR_NO,
    "nova": (None, Word),
}


class Choices:
    """One path through the tree of all that can be read; `next_path` is the one after it."""

    def __init__(self, path: Sequence[int]) -> None:
        self._path = path
        self._taken: list[tuple[int, int]] = []
        self._is_over = False

    def choose(self, options: Sequence[Any]) -> Any:
        assert not self._is_over, "read too late: the next combination has begun"
        at = self._path[len(self._taken)] if len(self._taken) < len(self._path) else 0
        self._taken.append((at, len(options)))
        return options[at]

    def share(self) -> Fraction:
        """Which part of all combinations this one stands for."""
        share = Fraction(1)
        for _, count in self._taken:
            share /= count
        return share

    def next_path(self) -> list[int] | None:
        self._is_over = True
        while self._taken and self._taken[-1][0] + 1 == self._taken[-1][1]:
            self._taken.pop()
        if not self._taken:
            return None
        path = [at for at, _ in self._taken]
        path[-1] += 1
        return path


class Unread:
    """Stands for a `Facts` or a `Word` of which nothing has been read yet."""

    def __init__(self, kind: type, options: dict[str, Sequence[Any]], choices: Choices) -> None:
        self._kind, self._options, self._choices = kind, options, choices
        self._read: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        derived = vars(self._kind).get(name)
        if isinstance(derived, property):
            assert derived.fget is not None
            return derived.fget(self)
        if name not in self._read:
            value = self._choices.choose(self._options[name])
            self._read[name] = Unread(Word, OF_A_WORD, self._choices) if value is Word else value
        return self._read[name]

    def real(self, *, unread: int) -> Any:
        """One that the program could have been given; what was not read has its option number *unread*."""
        values = {name: self._read.get(name, options[unread]) for name, options in self._options.items()}
        for name, value in values.items():
            if isinstance(value, Unread):
                values[name] = value.real(unread=unread)
            elif value is Word:
                values[name] = Unread(Word, OF_A_WORD, self._choices).real(unread=unread)
        return self._kind(**values)

    def __repr__(self) -> str:
        return f"{self._kind.__name__}({', '.join(f'{name}={value!r}' for name, value in self._read.items())})"


def walk() -> Iterator[tuple[Unread, Verdict, Choices]]:
    path: list[int] | None = []
    while path is not None:
        choices = Choices(path)
        facts = Unread(Facts, OF_FACTS, choices)
        yield facts, decide(cast(Facts, facts)), choices
        path = choices.next_path()


def every_combination() -> Iterator[tuple[Facts, Verdict]]:
    """Read what is needed of the facts before the next one is taken."""
    for facts, verdict, _ in walk():
        yield cast(Facts, facts), verdict
