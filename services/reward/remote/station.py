"""The station whose scorer is elsewhere: a queue, from which each server takes what it has places for.

A call that fails is repeated after a random pause, which takes up no place: neither a slow server nor a sample that
fails again and again holds up the others. When no server answers any more, everything goes back as UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog

from services.common.config.remote import RemoteConfig
from services.reward.filters import WaitingItem
from services.reward.jobs import FailureKind, Job, Result
from services.reward.pool import ScorerPool
from services.reward.remote.breaker import State
from services.reward.remote.endpoint import Endpoint
from services.reward.remote.outcomes import (
    Answer,
    BadAnswerError,
    BrokenCallError,
    CallError,
    RefusedError,
    UnreachableError,
)
from services.reward.scorers.base import Item, SampleError, Verdict
from services.reward.scorers.overlong import Overlong
from services.reward.station import score_all

log = structlog.get_logger()

_LOOK_S = 0.5


class _Entry:
    """A job on its way."""

    __slots__ = ("alone", "always_broke", "item", "job", "tries")

    def __init__(self, job: Job, item: Item) -> None:
        self.job = job
        self.item = item
        self.tries = 0
        self.always_broke = True
        """Whether each failure so far may have been the sample's."""
        self.alone = False
        """Whether it is to be called for by itself: its batch failed."""


class RemoteStation:
    """Scores elsewhere. The user's filters, if the run has any, are in a pool of processes here."""

    def __init__(
        self,
        config: RemoteConfig,
        filters: ScorerPool | None = None,
        penalty: Overlong | None = None,
        *,
        send_tokens: bool = False,
    ) -> None:
        """`send_tokens` is for servers of kind "grpc".

        Raises ConfigError for certificates or prompts that cannot be read.
        """
        self._config = config
        self._penalty = penalty
        self._send_tokens = send_tokens
        self._filters = filters
        self._endpoints = [Endpoint(config, place, self._on_change) for place in config.places]
        self._queue: deque[_Entry] = deque()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.available = asyncio.Event()
        """Set while a server may be called, and the filters run."""

    @property
    def scorer(self) -> str:
        return f"remote/{self._config.kind}"

    @property
    def judges(self) -> bool:
        return self._filters is not None and self._filters.judges

    @property
    def orders_partials(self) -> bool:
        return self._filters is not None and self._filters.orders_partials

    @property
    def scores_whole(self) -> bool:
        return False

    @property
    def wants_tokens(self) -> bool:
        kind = self._config.kind
        return (kind == "classify" and self._config.classify.input == "tokens") or (
            kind == "grpc" and self._send_tokens
        )

    @property
    def room(self) -> int | None:
        """While it is not known that any server answers, one sample finds out."""
        return None if any(each.breaker.state is State.CLOSED for each in self._endpoints) else 1

    @property
    def held_back(self) -> int:
        return 0

    @property
    def trouble(self) -> str:
        filters = self._filters.trouble if self._filters is not None else ""
        return "; ".join(filter(None, (*(each.trouble for each in self._endpoints), filters)))

    @property
    def width(self) -> int:
        return sum(self._config.concurrency * each.client.batch_size for each in self._endpoints)

    async def start(self) -> None:
        """Returns when the filters run. The servers may come later. Raises ConfigError or UnavailableError."""
        if self._filters is not None:
            await self._filters.start()
            self._keep(self._watch_filters(self._filters))
        for endpoint in self._endpoints:
            await endpoint.client.start()
            self._keep(self._serve(endpoint))
        self._on_change()

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for endpoint in self._endpoints:
            await endpoint.close()
        if self._filters is not None:
            await self._filters.close()
        self.available.clear()

    def pids(self) -> list[int]:
        return self._filters.pids() if self._filters is not None else []

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if isinstance(job.item, Item):
                self._queue.append(_Entry(job, job.item))
            else:
                assert self._filters is not None
                self._filters.submit([job])
        self._tell_available()
        self._changed.set()
        if not self._any_left:
            asyncio.get_running_loop().call_soon(self._give_up)

    async def score(self, items: Sequence[Item]) -> list[Result]:
        return await score_all(self, items)

    async def prefer(self, waiting: WaitingItem) -> Result:
        assert self._filters is not None
        return await self._filters.prefer(waiting)

    @property
    def _any_left(self) -> bool:
        """Whether a server may be called, or it is being found out."""
        return any(endpoint.breaker.state is not State.OPEN for endpoint in self._endpoints)

    def _on_change(self) -> None:
        """Of the state of a breaker or of the filters."""
        self._tell_available()
        self._changed.set()
        if not self._any_left:
            log.warning("scorer_unreachable", reason=self.trouble)
            self._give_up()

    def _tell_available(self) -> None:
        # What is queued is enough to find out whether a server is back.
        found_out = self.room is None or not self._queue
        admits = found_out and any(endpoint.breaker.admits for endpoint in self._endpoints)
        if admits and (self._filters is None or self._filters.available.is_set()):
            self.available.set()
        else:
            self.available.clear()

    async def _watch_filters(self, filters: ScorerPool) -> None:
        running = True
        while True:
            await asyncio.sleep(_LOOK_S)
            if filters.available.is_set() is not running:
                running = not running
                self._on_change()

    def _give_up(self) -> None:
        if self._any_left:
            return
        entries, self._queue = self._queue, deque()
        for entry in entries:
            self._unavailable(entry)

    def _unavailable(self, entry: _Entry, reason: str = "") -> None:
        entry.job.report(Result(None, 0.0, FailureKind.UNAVAILABLE, reason or self.trouble))

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, endpoint: Endpoint) -> None:
        """Gives a server one batch after the other, as long as it has places for calls."""
        while True:
            await endpoint.slots.acquire()
            entries = await self._next_batch(endpoint)
            endpoint.breaker.begin()
            self._keep(self._call(endpoint, entries))

    async def _next_batch(self, endpoint: Endpoint) -> list[_Entry]:
        while True:
            while not (self._queue and endpoint.breaker.admits):
                self._changed.clear()
                await self._changed.wait()
            if len(self._queue) < endpoint.batch_size and not self._queue[0].alone:
                await asyncio.sleep(self._config.batch_delay_s)
            if endpoint.breaker.admits and (entries := self._take(endpoint.batch_size)):
                return entries

    def _take(self, most: int) -> list[_Entry]:
        entries: list[_Entry] = []
        while self._queue and len(entries) < most:
            if self._queue[0].alone and entries:
                break
            entry = self._queue.popleft()
            if not entry.job.cancelled:
                entries.append(entry)
                if entry.alone:
                    break
        if not entries:
            self._tell_available()
        return entries

    async def _call(self, endpoint: Endpoint, entries: list[_Entry]) -> None:
        begun = time.perf_counter()
        try:
            answers = await endpoint.score([entry.item for entry in entries])
        except CallError as error:
            if len(entries) > 1 and not isinstance(error, UnreachableError):
                endpoint.breaker.bad(str(error))
                self._part(entries)
                return
            answers = [error] * len(entries)
        except Exception as error:  # a bug here must not keep samples leased for ever
            log.exception("remote_call_failed")
            answers = [BadAnswerError(f"{type(error).__name__}: {error}")] * len(entries)
        finally:
            endpoint.slots.release()
        await self._settle(endpoint, entries, answers, (time.perf_counter() - begun) / len(entries))

    async def _settle(
        self, endpoint: Endpoint, entries: list[_Entry], answers: Sequence[Answer], seconds: float
    ) -> None:
        works = any(isinstance(answer, Verdict | SampleError) for answer in answers)
        if works:
            endpoint.breaker.good()
        elif isinstance(answers[0], UnreachableError | RefusedError):  # the others are decided below
            endpoint.breaker.bad(str(answers[0]))
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, Verdict):
                verdict = self._penalty(entry.item, answer) if self._penalty else answer
                entry.job.report(Result(verdict, seconds))
            elif isinstance(answer, UnreachableError):
                entry.always_broke = False
                self._again(entry, f"{endpoint.name}: {answer}", retry=answer.retry or len(self._endpoints) > 1)
            elif isinstance(answer, BrokenCallError):
                await self._suspect(endpoint, entry, answer)
            elif isinstance(answer, BadAnswerError) and not (works or await endpoint.still_scores(entry.item)):
                entry.always_broke = False
                endpoint.breaker.bad(str(answer))
                self._again(entry, f"{endpoint.name}: {answer}", retry=True)
            else:
                entry.job.report(Result(None, seconds, FailureKind.RAISED, str(answer)))

    def _part(self, entries: list[_Entry]) -> None:
        """A call for several broke, perhaps because of one of them: each is called for by itself."""
        for entry in reversed(entries):
            entry.alone = True
            self._put_back(entry)

    async def _suspect(self, endpoint: Endpoint, entry: _Entry, error: BrokenCallError) -> None:
        """Tells a sample that breaks its calls from a server that breaks all: by one that was scored before."""
        last = entry.tries + 1 >= self._config.attempts
        if (endpoint.breaker.on_the_brink or (last and entry.always_broke)) and await endpoint.still_scores(entry.item):
            endpoint.breaker.good()
            if last and entry.always_broke:
                kind = FailureKind.TIMED_OUT if error.timed_out else FailureKind.RAISED
                reason = f"{error}, {entry.tries + 1} times, and the server scores others"
                entry.job.report(Result(None, 0.0, kind, reason))
                return
        else:
            endpoint.breaker.bad(str(error))
        self._again(entry, f"{endpoint.name}: {error}", retry=True)

    def _again(self, entry: _Entry, reason: str, *, retry: bool) -> None:
        """Later, or not at all: then it goes back."""
        entry.tries += 1
        if not retry or entry.tries >= self._config.attempts or not self._any_left:
            self._unavailable(entry, reason)
            return
        most = min(self._config.max_backoff_s, self._config.backoff_s * 2**entry.tries)
        asyncio.get_running_loop().call_later(random.uniform(0, most), self._put_back, entry)

    def _put_back(self, entry: _Entry) -> None:
        if self._closed:
            return
        self._queue.appendleft(entry)
        self._changed.set()
        self._give_up()
