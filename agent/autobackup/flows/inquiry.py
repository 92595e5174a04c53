"""
Asks Nova: what became of candidates, and what owners say of servers that live.

Questions are gathered for a second and answered together: 500 candidates are two lists, and one more question for each
that is in neither. The list of living servers comes with every asking; whoever keeps their words hears it first. An
asking that failed gives every candidate a word, too: that Nova was silent, and why.

No record is only a word where absence proves something: right before and right after, Nova showed another server of
this host that we hold a disk of. This module decides nothing: `rules.termination` does.
"""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final

from autobackup import logs
from autobackup.cloud.nova import Nova, Server
from autobackup.errors import AutobackupError, CloudUnavailable, Transient
from autobackup.metrics import Metrics
from autobackup.model import InstanceId
from autobackup.rules.termination import NOT_ASKED, Answer, Host, Word

_log = logs.get("flows.inquiry")
_GATHER_S: Final = 1.0  # questions that come within it are asked together
_OVERLAP_S: Final = 3600.0  # the end of a record does not count as its change; and clocks differ
_MOST_FOUND_ONE_BY_ONE: Final = 25  # in one asking; the others are next
_LONGEST_PAUSE_S: Final = 60.0
_LONGEST_ASKED_S: Final = 600.0
_NOBODY_IS_ANSWERED: Final = (None, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_REQUEST_ID: Final = re.compile(r" \(req-[0-9a-f-]+\)")
_ALL_AT_ONCE_S: Final = 5.0  # 1,000 hosts that start together do not ask together


class Inquiry:
    """
    *held* are the instances whose disks are held here. *on_servers* gets the living ones of this host, by id;
    *on_word* is told that there is a word on an instance.
    """

    def __init__(
        self,
        *,
        nova: Nova,
        refresh_interval_s: float,
        held: Callable[[], frozenset[InstanceId]],
        on_servers: Callable[[Mapping[InstanceId, Server]], Awaitable[None]],
        on_word: Callable[[InstanceId], None],
        metrics: Metrics,
    ) -> None:
        self._nova = nova
        self._refresh_interval_s = refresh_interval_s
        self._held = held
        self._on_servers = on_servers
        self._on_word = on_word
        self._metrics = metrics
        self._words: dict[InstanceId, tuple[float, Word]] = {}
        self._wanted: dict[InstanceId, float] = {}  # -> Unix time of the first question
        self._refresh_at_s = 0.0
        self._failures = 0
        self._wake = asyncio.Event()
        self.trouble = ""
        """Why Nova cannot be asked, as of the last asking; "" if it can."""

    def word(self, instance: InstanceId, *, since_s: float) -> Word:
        """Nova's word on *instance*, if it was asked for since *since_s* (monotonic); otherwise it is asked now."""
        asked_at_s, word = self._words.get(instance, (0.0, NOT_ASKED))
        if asked_at_s >= since_s and word is not NOT_ASKED:
            return word
        if instance not in self._wanted:
            self._wanted[instance] = time.time()
            self._wake.set()
        return NOT_ASKED

    def forget(self, instance: InstanceId) -> None:
        self._words.pop(instance, None)
        self._wanted.pop(instance, None)

    def refresh_soon(self) -> None:
        """There is a new server: what its owner says of it is not known yet."""
        self._refresh_at_s = 0.0
        self._wake.set()

    async def run(self) -> None:
        """For ever."""
        await asyncio.sleep(random.uniform(0, min(_ALL_AT_ONCE_S, self._refresh_interval_s / 10)))  # noqa: S311
        while True:
            if not self._wanted:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._refresh_at_s - time.monotonic())):
                        await self._wake.wait()
                await asyncio.sleep(_GATHER_S)
            self._wake.clear()
            pause_s = await self._ask()
            await asyncio.sleep(pause_s)

    # ---- one asking -----------------------------------------------------------------------------------------

    async def _ask(self) -> float:
        """All that is wanted now; how long to wait before the next asking."""
        started_s, wanted = time.monotonic(), dict(self._wanted)
        self._refresh_at_s = started_s + self._refresh_interval_s * random.uniform(0.75, 1.25)  # noqa: S311
        words: dict[InstanceId, Word] = {}
        pause_s = 0.0
        try:
            await self._answer(wanted, words)
        except AutobackupError as exc:
            reason = _REQUEST_ID.sub("", str(exc))  # a new one in each answer
            self._failures += 1
            self._refresh_at_s = started_s + min(self._refresh_interval_s, _LONGEST_PAUSE_S)
            if reason != self.trouble:
                _log.warning("nova.silent", error=str(exc), consequence="nothing is decided; candidates wait")
            self.trouble = reason
            nominal_s = min(_LONGEST_PAUSE_S, 2.0 ** min(self._failures, 6))
            pause_s = max(nominal_s * random.uniform(0.5, 1.0), _asked_for_s(exc))  # noqa: S311
            words = {instance: Word(answer=Answer.SILENT, reason=reason) for instance in wanted} | words
        else:
            if self.trouble:
                _log.info("nova.answers")
            self._failures, self.trouble = 0, ""
        self._metrics.nova_reachable.set(not self.trouble)
        for instance, word in words.items():
            if self._wanted.pop(instance, None) is not None:  # nobody has forgotten it meanwhile
                self._words[instance] = (started_s, word)
                self._on_word(instance)
        return pause_s

    async def _answer(self, wanted: Mapping[InstanceId, float], words: dict[InstanceId, Word]) -> None:
        """Add to *words* one for each of *wanted*, but for those that are left to the next asking."""
        living = await self._nova.living()
        await self._tell(living)
        if not wanted:
            return
        deleted = await self._nova.deleted(since_s=min(wanted.values()) - _OVERLAP_S)
        known = {**living, **deleted}
        words.update({instance: self._said(known[instance]) for instance in wanted if instance in known})
        without: list[InstanceId] = []
        for instance in [one for one in wanted if one not in known][:_MOST_FOUND_ONE_BY_ONE]:
            try:
                found = await self._nova.find(instance)
            except CloudUnavailable as exc:
                if exc.status in _NOBODY_IS_ANSWERED:
                    raise
                words[instance] = Word(answer=Answer.SILENT, reason=_REQUEST_ID.sub("", str(exc)))  # its cell is down
                continue
            if found is None:
                without.append(instance)
            else:
                words[instance] = self._said(found)
        if without:
            again = await self._nova.living()
            for instance in without:
                alive = {one for one in living.keys() & again.keys() if not again[one].is_deleted}
                others = (alive & self._held()) - {instance}
                words[instance] = Word(answer=Answer.NO_RECORD, control=bool(others))

    async def _tell(self, living: Mapping[InstanceId, Server]) -> None:
        """What keeps us from writing down what owners say keeps no verdict back."""
        try:
            await self._on_servers(living)
        except AutobackupError as exc:
            _log.warning("servers.unheard", error=str(exc), consequence="heard again with the next list")

    def _said(self, server: Server) -> Word:
        host = Host.NONE if server.host is None else Host.HERE if server.host == self._nova.host else Host.ELSEWHERE
        return Word(
            answer=Answer.DELETED if server.is_deleted else Answer.SERVER,
            host=host,
            vm_state=server.vm_state,
            task_state=server.task_state,
            launched=server.launched,
        )


def _asked_for_s(error: AutobackupError) -> float:
    """The pause that Nova asked for; a Retry-After of a day is a mistake."""
    asked_s = error.retry_after_s if isinstance(error, Transient) else None
    return min(asked_s or 0.0, _LONGEST_ASKED_S)
