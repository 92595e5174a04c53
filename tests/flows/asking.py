"""An `Inquiry` that runs, of a real `Nova` that asks a fake one; and all that it tells, in order."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.contract.novas import Reader, reader
from tests.lab.fake_nova import Policy, Request

from autobackup.cloud.nova import Server
from autobackup.flows.inquiry import Inquiry
from autobackup.metrics import Metrics
from autobackup.model import InstanceId
from autobackup.rules.termination import Answer, Word

CALM_S: Final = 10.0
"""A refresh interval that does not disturb a short test: the first asking is within 1 s, the next after 7."""


@dataclass(slots=True)
class Asking:
    """*told* has a frozenset of ids for each `on_servers`, and an id for each `on_word`."""

    nova: Reader
    inquiry: Inquiry
    held: set[InstanceId] = field(default_factory=set)
    told: list[frozenset[InstanceId] | InstanceId] = field(default_factory=list)
    on_servers: Callable[[Mapping[InstanceId, Server]], Awaitable[None]] | None = None
    metrics: Metrics = field(default_factory=Metrics)

    @classmethod
    def of(cls, nova: Reader, *, refresh_interval_s: float = CALM_S) -> "Asking":
        metrics, held, told = Metrics(), set[InstanceId](), list[frozenset[InstanceId] | InstanceId]()

        async def on_servers(servers: Mapping[InstanceId, Server]) -> None:
            told.append(frozenset(servers))
            if asking.on_servers is not None:
                await asking.on_servers(servers)

        inquiry = Inquiry(
            nova=nova.nova,
            refresh_interval_s=refresh_interval_s,
            held=lambda: frozenset(held),
            on_servers=on_servers,
            on_word=told.append,
            metrics=metrics,
        )
        asking = cls(nova, inquiry, held, told, None, metrics)
        return asking

    @property
    def fake(self) -> Any:
        return self.nova.fake

    @property
    def heard(self) -> list[frozenset[InstanceId]]:
        """What `on_servers` was given, each time."""
        return [one for one in self.told if isinstance(one, frozenset)]

    @property
    def word_count(self) -> int:
        return len(self.told) - len(self.heard)

    @property
    def is_reachable(self) -> bool:
        """The metric."""
        return b"autobackup_nova_reachable 1.0" in self.metrics.render()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.inquiry.run())
        try:
            yield task
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is not None:
                task.result()

    async def words(
        self, instances: Sequence[InstanceId], *, since_s: float | None = None, within_s: float = 15.0
    ) -> dict[InstanceId, Word]:
        """On each, asked for now; whoever is told that there is a word asks again."""
        since_s = time.monotonic() if since_s is None else since_s
        async with asyncio.timeout(within_s):
            while True:
                words = {one: self.inquiry.word(one, since_s=since_s) for one in instances}
                if all(word.answer is not Answer.NOT_ASKED for word in words.values()):
                    return words
                count = self.word_count
                while self.word_count == count:
                    await asyncio.sleep(0.01)

    async def first_hearing(self, *, count: int = 1, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while len(self.heard) < count:
                await asyncio.sleep(0.01)


def kind(request: Request) -> str:
    """L: the living of this host; D: its deleted; U: one server, by a list; G: one, by itself."""
    if not request.path.endswith("/detail"):
        return "G"
    return "U" if "uuid" in request.query else "D" if "deleted" in request.query else "L"


def kinds(requests: Sequence[Request]) -> str:
    return "".join(kind(request) for request in requests)


@contextmanager
def an_asking(folder: Path, *, refresh_interval_s: float = CALM_S, call_timeout_s: float = 10.0) -> Iterator[Asking]:
    """With the rights of the role."""
    with reader(folder, call_timeout_s=call_timeout_s) as nova:
        nova.fake.policy = Policy.least()
        yield Asking.of(nova, refresh_interval_s=refresh_interval_s)


def archived(asking: Asking) -> InstanceId:
    """There was such a server, and there is no record of it."""
    one = asking.nova.put()
    asking.fake.archive(one)
    return one


def with_control(asking: Asking) -> InstanceId:
    """A living server here, of which a disk is held."""
    one = asking.nova.put()
    asking.held.add(one)
    return one


def at_request(asking: Asking, letter: str, act: Callable[[], object]) -> None:
    """Do it as the first request of that kind comes, before it is answered."""
    done: list[bool] = []

    def before(_number: int) -> None:
        if not done and asking.fake.requests and kinds(asking.fake.requests[-1:]) == letter:
            done.append(True)
            act()

    asking.fake.before = before
