"""The training thread's door to the asyncio loop, on which everything lives that talks to other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Io:
    """Runs coroutines on `loop` from the training thread. `stop` asks that thread to come to an end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
        self._loop = loop
        self._stop = stop
        self._failure: BaseException | None = None

    def should_stop(self) -> bool:
        """Whether to come to an orderly end. Raises the failure, if it is one that ends the training."""
        if self._failure is not None:
            raise self._failure
        return self._stop.is_set()

    def fail(self, error: BaseException) -> None:
        """Something on the loop has failed for good: waits end, and the next call raises `error`. On the loop only."""
        self._failure = error
        self._stop.set()

    def fail_from_thread(self, error: BaseException) -> None:
        """`fail`, from any thread."""
        self._loop.call_soon_threadsafe(self.fail, error)

    def watch(self, task: asyncio.Task[Any]) -> None:
        """For `task.add_done_callback`: a task that ends with an error fails the training thread with it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Blocks the calling thread until `coroutine` is done. Raises what it raises."""
        if self._failure is not None:
            coroutine.close()
            raise self._failure
        return self.call_always(coroutine)

    def call_always(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Like `call`, also after a failure: for what has to be put away at the end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def call_or_stop(self, coroutine: Coroutine[Any, Any, T]) -> T | None:
        """Like `call`, but cancels `coroutine` and returns None when a stop is requested before it is done."""
        result = self.call(self._until_stop(coroutine))
        self.should_stop()
        return result

    async def _until_stop(self, coroutine: Coroutine[Any, Any, T]) -> T | None:
        work = asyncio.ensure_future(coroutine)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            stop.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
