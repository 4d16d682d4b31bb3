"""Colocated mode: engines and trainer have the same GPUs in turn, and the trainer says when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2
from services.common.errors import PolyheadError, UnavailableError
from services.rollout.engines.client import CACHES, WEIGHTS
from services.rollout.engines.engine import Engine
from services.rollout.engines.sleep import put_to_sleep, until_idle, wake
from services.rollout.replica import Replica
from services.rollout.weights import WeightReceiver

log = structlog.get_logger()


class Turns:
    """Calls come one at a time; each reaches its end, whatever becomes of its caller."""

    def __init__(
        self,
        replica: Replica,
        receivers: Sequence[WeightReceiver],
        let_go: Callable[[], Awaitable[int]],
        *,
        timeout_s: float,
        stall_limit_s: float,
    ) -> None:
        """`let_go` ends all requests and gives every sample back. `timeout_s` is of each step. A trainer that does not
        come back within `stall_limit_s` is logged.
        """
        self._replica = replica
        self._receivers = receivers
        self._let_go = let_go
        self._timeout_s = timeout_s
        self._stall_limit_s = stall_limit_s
        self._lock = asyncio.Lock()
        self._reminder: asyncio.TimerHandle | None = None
        self._late: dict[int, asyncio.Task[None]] = {}
        """By the index of the engine."""
        replica.listeners.append(self._look_for_late_engines)

    async def yield_(self, epoch: int) -> rollout_pb2.YieldResponse:
        """Returns when the engines' memory is free. Raises UnavailableError while it is not."""
        replica = self._replica
        replica.fence.check(epoch)
        async with self._lock:
            began = time.monotonic()
            replica.yielded_to = epoch
            replica.turned()
            for receiver in self._receivers:
                await receiver.stand_down()
            returned = await self._let_go()
            await self._each(lambda engine: until_idle(engine, self._timeout_s))
            idle = time.monotonic()
            await self._each(lambda engine: put_to_sleep(engine, self._timeout_s))
            self._remind()
        slept = time.monotonic()
        replica.turned()
        log.info("yielded", epoch=epoch, samples_returned=returned, drain_s=idle - began, sleep_s=slept - idle)
        return rollout_pb2.YieldResponse(samples_returned=returned, drain_s=idle - began, sleep_s=slept - idle)

    async def resume(self, epoch: int) -> rollout_pb2.ResumeResponse:
        """Returns when every engine that is left has its memory back. One that fails is started again."""
        replica = self._replica
        replica.fence.check(epoch)
        async with self._lock:
            began = time.monotonic()
            await asyncio.gather(*self._late.values(), return_exceptions=True)
            if replica.yielded_to:
                await asyncio.gather(*(self._wake(engine) for engine in replica.engines))
            replica.yielded_to = 0
            self._forget_reminder()
            replica.turned()
            seconds = time.monotonic() - began
        log.info("resumed", epoch=epoch, wake_s=seconds)
        return rollout_pb2.ResumeResponse(wake_s=seconds)

    async def _wake(self, engine: Engine) -> None:
        if not engine.attached:
            return
        try:
            await wake(engine, WEIGHTS | CACHES, self._timeout_s)
        except PolyheadError as error:
            _give_up(engine, error)
        else:
            engine.life.wake()

    async def _each(self, step: Callable[[Engine], Awaitable[None]]) -> None:
        """Of every engine that is there. One of ours that does not do it is ended, which frees its memory too."""
        failures = await asyncio.gather(*(self._attempt(engine, step) for engine in self._replica.engines))
        for failure in failures:
            if failure is not None:
                raise UnavailableError(f"did not yield: {failure}", field="engine") from failure

    async def _attempt(self, engine: Engine, step: Callable[[Engine], Awaitable[None]]) -> PolyheadError | None:
        if not engine.attached:
            return None
        try:
            await step(engine)
        except PolyheadError as error:
            return None if _give_up(engine, error) else error
        return None

    def _look_for_late_engines(self) -> None:
        """One that was started while the trainer has the GPUs gives its memory up at once."""
        if not self._replica.yielded_to or self._lock.locked():
            return
        for engine in self._replica.engines:
            fresh = engine.attached and engine.life.state == pb.REPLICA_STATE_JOINING
            if fresh and engine.info is not None and engine.info.sleeps and engine.index not in self._late:
                task = asyncio.create_task(self._put_late_to_sleep(engine))
                self._late[engine.index] = task
                task.add_done_callback(partial(self._forget_late, engine.index))

    async def _put_late_to_sleep(self, engine: Engine) -> None:
        try:
            await put_to_sleep(engine, self._timeout_s)
        except PolyheadError as error:
            _give_up(engine, error)
        self._replica.turned()

    def _forget_late(self, index: int, _: asyncio.Task[None]) -> None:
        del self._late[index]

    def _remind(self) -> None:
        self._forget_reminder()
        self._reminder = asyncio.get_running_loop().call_later(self._stall_limit_s, self._say_what_it_waits_for)

    def _say_what_it_waits_for(self) -> None:
        log.warning("stalled", waiting_for=self._replica.trouble)
        self._remind()

    def _forget_reminder(self) -> None:
        if self._reminder is not None:
            self._reminder.cancel()


def _give_up(engine: Engine, error: PolyheadError) -> bool:
    """Whether the engine is ended by this."""
    log.error("engine_keeps_its_memory", engine=engine.index, reason=str(error))
    engine.suspect.set()
    return engine.kill()
