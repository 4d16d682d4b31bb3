"""The one thread that runs the model. Everything that touches scheduler or weights happens here, between steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import structlog
import torch

from services.rollout.engines.torch_engine.scheduler import Scheduler

log = structlog.get_logger()

PauseMode = Literal["abort", "retract", "in_place"]
T = TypeVar("T")


class EngineThread:
    """Steps the scheduler while there is work and nothing holds it back.

    Commands run between two steps, in order: when the answer to one arrives, no forward pass is running that began
    before it.
    """

    def __init__(self, scheduler: Scheduler, may_step: Callable[[], bool]) -> None:
        """`may_step` is asked before each step, on this thread: False while the weights are not whole."""
        self.scheduler = scheduler
        self._may_step = may_step
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.paused: PauseMode | None = None
        self.busy_seconds = 0.0
        """Time spent in steps since the start."""

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the present step; requests are left as they are."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def post(self, command: Callable[[], None]) -> None:
        """Runs `command` between two steps; returns at once."""
        self._commands.append(command)
        self._wake.set()

    async def call(self, command: Callable[[], T]) -> T:
        """Runs `command` between two steps and returns its result or raises its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(result)

        def run() -> None:
            try:
                result = command()
            except Exception as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self.post(run)
        return await future

    async def pause(self, mode: PauseMode) -> None:
        """Stops stepping. New requests wait from now on; `mode` says what becomes of those that are running."""

        def pause() -> None:
            self.paused = mode
            if mode == "retract":
                self.scheduler.retract()
            elif mode == "abort":
                self.scheduler.abort(None, "generation was paused with mode abort")

        await self.call(pause)

    async def resume(self) -> None:
        def resume() -> None:
            self.paused = None

        await self.call(resume)

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()()
                idle = self._idle_seconds()
                if idle == 0:
                    self._step()
                elif not self._commands and not self._stopping:
                    self._wake.wait(idle)

    def _idle_seconds(self) -> float | None:
        """How long there is nothing to do; None: until a command comes."""
        if self.paused is not None or not self.scheduler.has_work or not self._may_step():
            return None
        return self.scheduler.idle_seconds()

    def _step(self) -> None:
        started = time.monotonic()
        try:
            self.scheduler.step()
        except Exception as error:
            # A defect must not take the requests that come later with it.
            log.exception("step_failed")
            self.scheduler.abort(None, f"the engine failed: {error}", 500)
        self.busy_seconds += time.monotonic() - started
