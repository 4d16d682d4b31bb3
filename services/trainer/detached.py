"""Blocking calls that may hang for a long time and cannot be interrupted, such as those of a collective."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")

THREAD_NAME = "detached"


def in_thread(blocking: Callable[[], T]) -> asyncio.Future[T]:
    """Runs a call that may hang in a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # a call that was left behind may fail unheard
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (blocking(), None)
        except BaseException as error:  # handed to the waiter
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is waiting
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return future


def leave(status: int) -> NoReturn:
    """Ends the process with `status`, at once if a call still hangs.

    A thread that comes back from native code while the interpreter shuts down aborts the process.
    """
    if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
