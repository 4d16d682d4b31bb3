"""A pool of processes that score, with a hard time limit per score.

Each process has a window of items, whose width follows how long scores take: cheap ones travel in batches, slow ones
one by one, so that a slow item delays few others. Answers come item by item and in order, so the oldest unanswered
item of a process is the one it is on: that one fails when the process passes the time limit (it is killed) or ends by
itself. The other items of its window go to another process, and nobody counts that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog

from services.common.errors import PolyheadError
from services.reward.child import Child
from services.reward.filters import GroupItem, Judgement, WaitingItem
from services.reward.jobs import AnyItem, FailureKind, Job, Result, each_of
from services.reward.scorers.base import Item, Verdict, WholeItem
from services.reward.settings import ScorerSettings
from services.reward.station import score_all

log = structlog.get_logger()

MAX_WINDOW = 64
# A window holds about this much work.
WINDOW_S = 0.005
# Cheap answers are gathered for this long before the event loop wakes up for them.
GATHER_S = 0.001
# When a scorer lacks what it needs, nothing is leased for this long.
PAUSE_S = 1.0
_SMOOTHING = 0.1
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0


class _Slot:
    """A place in the pool: its present process, and the jobs that process has."""

    __slots__ = ("blamed", "child", "jobs", "progress_at")

    def __init__(self) -> None:
        self.child: Child | None = None
        self.jobs: deque[Job] = deque()
        self.progress_at = 0.0
        self.blamed: Job | None = None


class ScorerPool:
    """`processes` processes with one scorer each. `start` first, `close` last; all on one event loop."""

    def __init__(self, settings: ScorerSettings, *, processes: int, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._slots = [_Slot() for _ in range(processes)]
        self._queue: deque[Job] = deque()
        self._keepers: list[asyncio.Task[None]] = []
        self._watch: asyncio.TimerHandle | None = None
        self._mean_s = WINDOW_S
        self._why_unavailable = "the pool is not running"
        self._running = False
        self._paused = False
        self.available = asyncio.Event()
        """Set while processes can be started and have what they need."""

    @property
    def judges(self) -> bool:
        """Whether its processes have a filter for groups."""
        return bool(self._settings.filter)

    @property
    def orders_partials(self) -> bool:
        """Whether its processes have a filter for the groups that wait unfinished."""
        return bool(self._settings.buffer_filter)

    @property
    def scores_whole(self) -> bool:
        """Whether its scorer takes groups."""
        return self._settings.group_rm

    async def prefer(self, waiting: WaitingItem) -> Result:
        """Asks the buffer filter."""
        return await self._ask(waiting)

    async def _ask(self, item: AnyItem) -> Result:
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = Job(item, done.set_result)
        self.submit([job])
        try:
            return await done
        finally:
            job.cancelled = True

    @property
    def scorer(self) -> str:
        return self._settings.name

    @property
    def wants_tokens(self) -> bool:
        return False

    @property
    def room(self) -> int | None:
        return None

    @property
    def width(self) -> int:
        return len(self._slots)

    @property
    def trouble(self) -> str:
        return "" if self.available.is_set() else self._why_unavailable

    async def start(self) -> None:
        """Returns when every process has loaded the scorer. Raises ConfigError or UnavailableError with the reason."""
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self._slots:
                    group.create_task(self._fill(slot))
        except BaseExceptionGroup as group_of_errors:
            await self.close()
            raise group_of_errors.exceptions[0] from None
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in self._slots]
        self._watch_time()

    async def close(self) -> None:
        """Kills the processes. Jobs that are not finished are never reported."""
        if self._watch is not None:
            self._watch.cancel()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for slot in self._slots:
            if slot.child is not None:
                await slot.child.end()
                slot.child = None
        self.available.clear()

    def pids(self) -> list[int]:
        return [slot.child.pid for slot in self._slots if slot.child is not None]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs. While no process can be started, they are reported as UNAVAILABLE instead."""
        self._queue.extend(jobs)
        if not self._running:
            asyncio.get_running_loop().call_soon(self._fail_queue)
        for slot in self._slots:
            self._dispatch(slot)

    async def score(self, items: Sequence[Item]) -> list[Result]:
        """One result per item, in order. Where groups are scored as a whole, the items are one.

        Cancelling the call cancels what is left of its work.
        """
        if self.scores_whole and items:
            return each_of(await self._ask(WholeItem("one call", list(items))), len(items))
        return await score_all(self, items)

    def _window(self) -> int:
        return max(1, min(MAX_WINDOW, int(WINDOW_S / self._mean_s)))

    def _dispatch(self, slot: _Slot) -> None:
        """Fills the window of a process, once half of it is used up."""
        window = self._window()
        if slot.child is None or not self._queue or len(slot.jobs) > window // 2:
            return
        jobs: list[Job] = []
        while self._queue and len(slot.jobs) + len(jobs) < window:
            if not (job := self._queue.popleft()).cancelled:
                jobs.append(job)
        if not jobs:
            return
        if not slot.jobs:
            slot.progress_at = asyncio.get_running_loop().time()
        slot.jobs.extend(jobs)
        slot.child.send([job.item for job in jobs])

    def _on_frames(self, slot: _Slot, frames: list[list[Any]]) -> None:
        slot.progress_at = asyncio.get_running_loop().time()
        for failure, reason, seconds, answer in frames:
            self._note(seconds)
            job = slot.jobs.popleft()
            if failure == FailureKind.UNAVAILABLE:
                self._pause(reason)
            job.report(
                Result(None, seconds, FailureKind(failure), reason) if failure else _result(job.item, answer, seconds)
            )
        self._dispatch(slot)
        if slot.child is not None and self._window() > 1:
            slot.child.rest(GATHER_S)

    def _watch_time(self) -> None:
        """Kills the processes that are over the limit, and comes back when the next one could be."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        next_at = now + self._timeout_s
        for slot in self._slots:
            if slot.child is None or not slot.jobs or slot.blamed is not None:
                continue
            if now >= slot.progress_at + self._timeout_s:
                slot.blamed = slot.jobs[0]
                slot.child.kill()
            else:
                next_at = min(next_at, slot.progress_at + self._timeout_s)
        self._watch = loop.call_at(next_at, self._watch_time)

    async def _fill(self, slot: _Slot) -> None:
        slot.child = await Child.start(self._settings, lambda _, frames: self._on_frames(slot, frames))
        self._running = True
        self._tell_available()

    def _pause(self, reason: str) -> None:
        """Keeps the puller from leasing at once what it has just given back. What is queued goes on."""
        self._why_unavailable = reason
        if not self._paused:
            self._paused = True
            asyncio.get_running_loop().call_later(PAUSE_S, self._resume)
        self._tell_available()

    def _resume(self) -> None:
        self._paused = False
        self._tell_available()

    def _tell_available(self) -> None:
        if self._running and not self._paused:
            self.available.set()
        else:
            self.available.clear()

    async def _keep(self, slot: _Slot) -> None:
        """Replaces the process of a slot whenever it ends."""
        while True:
            assert slot.child is not None
            how = await slot.child.ended()
            slot.child = None
            self._settle(slot, how)
            await self._replace(slot)
            self._dispatch(slot)

    def _settle(self, slot: _Slot, how: str) -> None:
        """Fails the item that the ended process was on; the rest goes back to the head of the queue."""
        blamed, slot.blamed = slot.blamed, None
        timed_out = blamed is not None
        if blamed is None and slot.jobs:
            blamed = slot.jobs[0]
        rest = [job for job in slot.jobs if job is not blamed]
        unanswered = len(rest) < len(slot.jobs)
        slot.jobs.clear()
        self._queue.extendleft(reversed(rest))
        if blamed is not None and unanswered:
            log.warning("scorer_process_lost", item=blamed.name, timed_out=timed_out, how=how)
            blamed.report(self._timeout() if timed_out else self._death(how))
        for other in self._slots:
            self._dispatch(other)

    def _timeout(self) -> Result:
        self._note(self._timeout_s)
        return Result(None, self._timeout_s, FailureKind.TIMED_OUT, f"timed out after {self._timeout_s:g} s")

    def _death(self, how: str) -> Result:
        return Result(None, 0.0, FailureKind.DIED, f"the scorer's process {how}")

    def _note(self, seconds: float) -> None:
        self._mean_s += _SMOOTHING * (max(seconds, 1e-6) - self._mean_s)

    async def _replace(self, slot: _Slot) -> None:
        delay = _FIRST_DELAY_S
        while True:
            try:
                return await self._fill(slot)
            except (PolyheadError, OSError) as error:
                self._why_unavailable = str(error)
                log.error("scorer_process_does_not_start", reason=str(error), retry_s=delay)
            if not self.pids():
                self._running = False
                self._tell_available()
                self._fail_queue()
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)

    def _fail_queue(self) -> None:
        jobs, self._queue = self._queue, deque()
        for job in jobs:
            job.report(Result(None, 0.0, FailureKind.UNAVAILABLE, self._why_unavailable))


def _result(item: AnyItem, answer: Any, seconds: float) -> Result:
    """What a process answered, by what it was asked."""
    if isinstance(item, GroupItem):
        return Result(None, seconds, judgement=Judgement(*answer))
    if isinstance(item, WaitingItem):
        return Result(None, seconds, preferred=answer)
    if isinstance(item, WholeItem):
        return Result(None, seconds, verdicts=[Verdict(*each) for each in answer])
    verdict, scorer = answer
    return Result(Verdict(*verdict), seconds, scorer=scorer)
