"""A pool of processes that score, with a hard time limit per score.

Each process has a window of items of one scorer, whose width follows how long its scores take: cheap ones travel in
batches, slow ones one by one, so that a slow item delays few others. Answers come item by item and in order, so the
oldest unanswered item of a process is the one it is on: that one fails when the process passes the time limit (it is
killed) or ends by itself. The other items of its window go to another process, and nobody counts that.

Which scorer is next: `lanes.py`. A process that is on an item for long is set aside with it, before its limit: it is
none of the pool's `processes` until it is done, another one is started in its place, at most as many as the pool has,
and what else it had goes to others. So is one that tries a scorer whose last score ran out of time.
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
from services.reward.lanes import STALL_S, Lane, Lanes
from services.reward.scorers.base import Item, RewardSpan, Verdict, WholeItem
from services.reward.settings import ScorerSettings
from services.reward.station import score_all

log = structlog.get_logger()

# A process keeps to a scorer for this long while others wait: to change costs it a pause.
TURN_S = 0.05
# A process that stands in for one that is set aside is kept for this long after it was last needed.
SPARE_S = 10.0
# Cheap answers are gathered for this long before the event loop wakes up for them.
GATHER_S = 0.001
# When a scorer lacks what it needs, nothing is leased for this long.
PAUSE_S = 1.0
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0


class _Slot:
    """A place for a process: the present one, and the jobs that it has, of one lane."""

    __slots__ = ("aside", "blamed", "child", "jobs", "keeper", "lane", "progress_at", "surplus", "turn_ends", "worn")

    def __init__(self) -> None:
        self.child: Child | None = None
        self.keeper: asyncio.Task[None] | None = None
        self.jobs: deque[Job] = deque()
        self.lane: Lane | None = None
        """None while it has no jobs."""
        self.progress_at = 0.0
        self.turn_ends = 0.0
        self.blamed: Job | None = None
        self.aside = False
        """Whether it is none of the pool's processes for now: its item takes long, or it tries a suspect scorer."""
        self.worn = False
        """Whether its process is to end with its present item."""
        self.surplus = False
        """Whether it is not to have another process."""


class ScorerPool:
    """`processes` processes with one scorer each. `start` first, `close` last; all on one event loop."""

    def __init__(self, settings: ScorerSettings, *, processes: int, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._processes = processes
        self._slots = [_Slot() for _ in range(processes)]
        self._lanes = Lanes(processes)
        self._watch: asyncio.TimerHandle | None = None
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
        return self._settings.send_tokens

    @property
    def room(self) -> int | None:
        return None

    @property
    def width(self) -> int:
        return self._processes

    @property
    def held_back(self) -> int:
        return self._lanes.held_back

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
        for slot in self._slots:
            slot.keeper = asyncio.create_task(self._keep(slot))
        self._watch_time()

    async def close(self) -> None:
        """Kills the processes. Jobs that are not finished are never reported."""
        self._running = False
        if self._watch is not None:
            self._watch.cancel()
        keepers = [slot.keeper for slot in self._slots if slot.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for slot in self._slots:
            if slot.child is not None:
                await slot.child.end()
                slot.child = None
        self.available.clear()

    def pids(self) -> list[int]:
        return [slot.child.pid for slot in self._slots if slot.child is not None]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs. While no process can be started, they are reported as UNAVAILABLE instead."""
        self._lanes.add(jobs)
        if not self._running:
            asyncio.get_running_loop().call_soon(self._fail_queue)
        self._dispatch_all()

    async def score(self, items: Sequence[Item]) -> list[Result]:
        """One result per item, in order. Where groups are scored as a whole, the items are one.

        Cancelling the call cancels what is left of its work.
        """
        if self.scores_whole and items:
            return each_of(await self._ask(WholeItem("one call", list(items))), len(items))
        return await score_all(self, items)

    def _dispatch_all(self) -> None:
        for slot in self._slots:
            self._dispatch(slot)

    def _dispatch(self, slot: _Slot) -> None:
        """Fills the window of a process, once half of it is used up."""
        while slot.child is not None and (lane := self._lane_for(slot)) is not None:
            if jobs := lane.take(lane.window - len(slot.jobs)):
                if slot.lane is None:
                    self._occupy(slot, lane)
                slot.jobs.extend(jobs)
                slot.child.send([job.item for job in jobs])
                return

    def _lane_for(self, slot: _Slot) -> Lane | None:
        """Which lane the slot's next jobs come from; None for no jobs now."""
        if slot.aside or slot.worn or slot.surplus or slot.blamed is not None:
            return None
        lane = slot.lane
        if lane is None:
            up = [each for each in self._slots if each.child is not None and not each.aside]
            busy = sum(each.lane is not None for each in up)
            return self._lanes.next(place=busy < self._processes, spare=len(up) > self._processes)
        if not lane.jobs or lane.suspect or len(slot.jobs) > lane.window // 2:
            return None
        its_turn = asyncio.get_running_loop().time() < slot.turn_ends or not self._lanes.others_wait(lane)
        return lane if its_turn else None

    def _occupy(self, slot: _Slot, lane: Lane) -> None:
        slot.lane = lane
        lane.running += 1
        slot.progress_at = asyncio.get_running_loop().time()
        slot.turn_ends = slot.progress_at + TURN_S
        if self._lanes.is_held_back(lane):
            slot.aside = True
            self._fit()

    def _vacate(self, slot: _Slot) -> None:
        """It has no jobs any more. What is worn ends."""
        if slot.lane is not None:
            slot.lane.running -= 1
        slot.lane, slot.aside = None, False
        if slot.worn and slot.child is not None:
            slot.child.kill()

    def _on_frames(self, slot: _Slot, frames: list[list[Any]]) -> None:
        lane = slot.lane
        if lane is None:  # what it had is another process's now
            return
        slot.progress_at = asyncio.get_running_loop().time()
        changes = slot.aside or slot.worn or lane.suspect
        for failure, reason, seconds, answer in frames[: len(slot.jobs)]:
            lane.answered(seconds)
            job = slot.jobs.popleft()
            if failure == FailureKind.UNAVAILABLE:
                self._pause(reason)
            job.report(
                Result(None, seconds, FailureKind(failure), reason) if failure else _result(job.item, answer, seconds)
            )
        if not slot.jobs:
            self._vacate(slot)
        if changes:
            self._dispatch_all()
        else:
            self._dispatch(slot)
        if slot.child is not None and lane.window > 1:
            slot.child.rest(GATHER_S)

    def _watch_time(self) -> None:
        """Ends the processes that are over the limit, and sets aside those that are long on an item."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        next_at = now + min(STALL_S, self._timeout_s / 4)
        for slot in self._slots:
            if slot.child is None or slot.lane is None or slot.blamed is not None:
                continue
            if now >= slot.progress_at + self._timeout_s:
                slot.blamed = slot.jobs[0]
                slot.child.kill()
                continue
            if now >= slot.progress_at + slot.lane.stall_s(self._timeout_s):
                self._step_aside(slot, slot.lane)
            next_at = min(next_at, slot.progress_at + self._timeout_s)
        self._fit()
        self._watch = loop.call_at(next_at, self._watch_time)

    def _step_aside(self, slot: _Slot, lane: Lane) -> None:
        """Lets another process work in place of one that is long on an item, if there is work."""
        assert slot.child is not None
        first, *rest = slot.jobs
        room = sum(each.aside for each in self._slots) < self._processes
        if not slot.aside and room and (rest or self._lanes.waiting):
            slot.aside = True
            slot.jobs = deque([first])
            slot.worn = bool(rest)
            lane.put_back(rest)
            self._fit()
            self._dispatch_all()
        if slot.aside and lane.suspect and not slot.worn:
            # It is likely to hang, and may do so by working.
            slot.child.yield_cores()
            slot.worn = True

    def _fit(self) -> None:
        """Starts a process for each that is set aside, and ends those that have long been too many."""
        if not self._running:
            return
        aside = sum(slot.aside for slot in self._slots) + self._lanes.suspects_wait
        missing = self._processes + min(self._processes, aside) - len(self._slots)
        for _ in range(missing):
            slot = _Slot()
            self._slots.append(slot)
            slot.keeper = asyncio.create_task(self._begin(slot))
        if missing < 0:
            long_ago = asyncio.get_running_loop().time() - SPARE_S
            idle = [each for each in self._slots if each.lane is None and each.child is not None]
            for slot in [each for each in idle if each.progress_at < long_ago][missing:]:
                slot.surplus = True
                assert slot.child is not None
                slot.child.kill()

    async def _fill(self, slot: _Slot) -> None:
        slot.child = await Child.start(self._settings, lambda _, frames: self._on_frames(slot, frames))
        slot.progress_at = asyncio.get_running_loop().time()
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

    async def _begin(self, slot: _Slot) -> None:
        await self._replace(slot)
        self._dispatch_all()
        await self._keep(slot)

    async def _keep(self, slot: _Slot) -> None:
        """Replaces the process of a slot whenever it ends, unless there are too many."""
        while True:
            assert slot.child is not None
            how = await slot.child.ended()
            slot.child, slot.worn = None, False
            self._settle(slot, how)
            if slot.surplus:
                self._slots.remove(slot)
                return
            await self._replace(slot)
            self._dispatch_all()

    def _settle(self, slot: _Slot, how: str) -> None:
        """Fails the item that the ended process was on; the rest goes back to the head of its lane."""
        blamed, slot.blamed = slot.blamed, None
        timed_out = blamed is not None
        if blamed is None and slot.jobs:
            blamed = slot.jobs[0]
        rest = [job for job in slot.jobs if job is not blamed]
        unanswered = len(rest) < len(slot.jobs)
        slot.jobs.clear()
        lane = slot.lane
        self._vacate(slot)
        if lane is not None:
            lane.put_back(rest)
        if lane is not None and blamed is not None and unanswered:
            lane.lost()
            log.warning("scorer_process_lost", item=blamed.name, timed_out=timed_out, how=how)
            blamed.report(self._timeout() if timed_out else self._death(how))
        self._dispatch_all()

    def _timeout(self) -> Result:
        return Result(None, self._timeout_s, FailureKind.TIMED_OUT, f"timed out after {self._timeout_s:g} s")

    def _death(self, how: str) -> Result:
        return Result(None, 0.0, FailureKind.DIED, f"the scorer's process {how}")

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
        for job in self._lanes.clear():
            job.report(Result(None, 0.0, FailureKind.UNAVAILABLE, self._why_unavailable))


def _result(item: AnyItem, answer: Any, seconds: float) -> Result:
    """What a process answered, by what it was asked."""
    if isinstance(item, GroupItem):
        return Result(None, seconds, judgement=Judgement(*answer))
    if isinstance(item, WaitingItem):
        return Result(None, seconds, preferred=answer)
    if isinstance(item, WholeItem):
        return Result(None, seconds, verdicts=[_verdict(each) for each in answer])
    verdict, scorer = answer
    return Result(_verdict(verdict), seconds, scorer=scorer)


def _verdict(answer: Any) -> Verdict:
    reward, parts, spans = answer
    return Verdict(reward, parts, tuple(RewardSpan(*span) for span in spans))
