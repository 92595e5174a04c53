"""
The agent, with a death (or a coma) in its future.

    python -m tests.crash.mortal_agent --config FILE      with AUTOBACKUP_MORTAL in the environment:

    before:JOB[/COPY]   right before a record with this job state (and a copy in this state) is journaled:
                        its previous effect has happened, nothing says so yet
    after:JOB[/COPY]    right after it was journaled, before anything follows from it
    put:BYTES           in the middle of a put of a backup, when so many bytes were given to the store
    name                at the end of a put: the store has named the object, and nobody knows yet
    begun               before the first byte of a put, when what the backup stands on was just looked at
    base:BYTES, base-name     the same of a sealed base
    delete              before the store deletes an attempt
    scrub               in the middle of a scrub, if the method is `mortal` (see `install_scrub_method`)

Several are separated by blanks. An `!` in front makes it a SIGSTOP: the test does what it likes to the world and
sends SIGCONT. `#N` behind waits for the N-th time. Each happens once; started without the variable, this is the
plain agent. Everything goes through the seams of `Agent` and the entry points of a site: nothing is patched.
"""

import argparse
import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autobackup import logs
from autobackup.configfile import load
from autobackup.host.scrub_methods import zero
from autobackup.model import AttemptId, JobRecord
from autobackup.service.app import Agent
from autobackup.stores import KIND, KIND_BASE, Begun, Body, Chunk, OpenDestination, Store, Stored

MORTAL = "AUTOBACKUP_MORTAL"


@dataclass
class Fate:
    """One thing that is to happen, and when."""

    moment: str
    signo: signal.Signals
    left: int = 1

    def strike(self, moment: str) -> None:
        if moment == self.moment and self.left > 0:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signo)


class Fates(list[Fate]):
    def strike(self, *moments: str) -> None:
        for moment in moments:
            for fate in self:
                fate.strike(moment)

    def strike_at(self, kind: str, record: JobRecord) -> None:
        copies = {f"{kind}:{record.state}/{copy.state}" for copy in record.copies}
        self.strike(f"{kind}:{record.state}", *copies)


class MortalBody:
    """A body that strikes as its bytes are taken."""

    def __init__(self, body: Body, fates: Fates, kind: str) -> None:
        self._body = body
        self._fates = fates
        self._kind = kind

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        mine = f"{self._kind}:"
        marks = sorted(int(fate.moment.removeprefix(mine)) for fate in self._fates if fate.moment.startswith(mine))
        given_bytes = 0
        async for chunk in self._body:
            yield chunk
            given_bytes += len(chunk)
            while marks and given_bytes >= marks[0]:
                self._fates.strike(f"{mine}{marks.pop(0)}")

    @property
    def announced_bytes(self) -> int | None:
        return self._body.announced_bytes

    @property
    def size_bytes(self) -> int:
        return self._body.size_bytes

    @property
    def digest(self) -> str:
        return self._body.digest


class MortalStore:
    """Any store, with the moments of a put and a delete."""

    def __init__(self, store: Store, fates: Fates) -> None:
        self._store = store
        self._fates = fates

    @property
    def digest_algorithm(self) -> str:
        return self._store.digest_algorithm

    async def check(self) -> None:
        await self._store.check()

    async def put(
        self, attempt: AttemptId, body: Body, *, properties: Mapping[str, str], begun: Begun | None = None
    ) -> None:
        async def looked() -> None:
            if begun is not None:
                await begun()
                self._fates.strike("begun")

        is_base = properties.get(KIND) == KIND_BASE
        body = MortalBody(body, self._fates, "base" if is_base else "put")
        await self._store.put(attempt, body, properties=properties, begun=looked)
        self._fates.strike("base-name" if is_base else "name")

    async def stat(self, attempt: AttemptId) -> Stored:
        return await self._store.stat(attempt)

    async def digest(self, attempt: AttemptId) -> str:
        return await self._store.digest(attempt)

    async def read(self, attempt: AttemptId, *, offset: int, length: int) -> bytes:
        return await self._store.read(attempt, offset=offset, length=length)

    def stream(self, attempt: AttemptId, *, offset: int) -> AsyncGenerator[bytes, None]:
        return self._store.stream(attempt, offset=offset)

    async def delete(self, attempt: AttemptId) -> None:
        self._fates.strike("delete")
        await self._store.delete(attempt)

    async def held(self) -> list[Stored]:
        return await self._store.held()

    async def children(self, parent: str) -> list[AttemptId]:
        return await self._store.children(parent)

    async def link(self, attempt: AttemptId, parent: str) -> None:
        await self._store.link(attempt, parent)

    async def unlink(self, attempt: AttemptId, parent: str) -> None:
        await self._store.unlink(attempt, parent)

    async def everything(self) -> list[AttemptId]:
        return await self._store.everything()

    async def bases(self, content: str | None = None) -> list[Stored]:
        return await self._store.bases(content)

    async def retire(self, attempt: AttemptId) -> None:
        await self._store.retire(attempt)

    async def unfinished(self, agent_id: str) -> list[AttemptId]:
        return await self._store.unfinished(agent_id)


def read_fates(words: str) -> Fates:
    fates = Fates()
    for word in words.split():
        moment, _, times = word.partition("#")
        signo = signal.SIGSTOP if moment.startswith("!") else signal.SIGKILL
        fates.append(Fate(moment=moment.removeprefix("!"), signo=signo, left=int(times or 1)))
    return fates


def scrub(fd: int, ranges: Iterable[tuple[int, int]], size_bytes: int) -> None:
    """The scrub method `mortal`: `zero`, with a death after its first half."""
    everything = list(ranges)
    half = [(start, length // 2) for start, length in everything]
    zero(fd, half, size_bytes)
    read_fates(os.environ.get(MORTAL, "")).strike("scrub")
    zero(fd, everything, size_bytes)


def install_scrub_method(folder: Path) -> None:
    """Make *folder*, put on PYTHONPATH, a site's package with the entry point `mortal`."""
    metadata = folder / "mortal_scrub-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mortal-scrub\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[autobackup.scrub]\nmortal = mortal_scrub:scrub\n")
    (folder / "mortal_scrub.py").write_text(Path(__file__).read_text())


async def run(config: Path, fates: Fates) -> None:
    def opened(place: OpenDestination) -> OpenDestination:
        return replace(place, store=MortalStore(place.store, fates))

    await Agent(
        load(config),
        intend=lambda record: fates.strike_at("before", record),
        observe=lambda record: fates.strike_at("after", record),
        opened=opened,
    ).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    logs.configure()
    asyncio.run(run(parser.parse_args().config, read_fates(os.environ.get(MORTAL, ""))))


if __name__ == "__main__":
    main()
