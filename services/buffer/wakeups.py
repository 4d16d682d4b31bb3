"""Waiting leasers of each stage, woken one by one as work arrives."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Ticket:
    """A place in a line. `wait` may be called once."""

    def __init__(self) -> None:
        self._called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard = False

    def call(self) -> None:
        if not self._called.done():
            self._called.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Returns when called, or after `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._called, timeout_s)
        self.heard = True


class Wakeups:
    """First come, first served, per stage. Only a hint: whoever waits also looks again by itself from time to time."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Ticket]] = {}

    @contextmanager
    def queue(self, stage: int) -> Iterator[Ticket]:
        """Stands in line. Entered before looking for work, so that nothing can arrive unnoticed in between.

        A call that the leaver did not wait for goes to the next in line.
        """
        ticket = Ticket()
        line = self._lines.setdefault(stage, deque())
        line.append(ticket)
        try:
            yield ticket
        finally:
            if ticket in line:
                line.remove(ticket)
            elif not ticket.heard:
                self.wake(stage)

    def wake(self, stage: int) -> None:
        """Calls the first in line for work of this stage."""
        if line := self._lines.get(stage):
            line.popleft().call()

    def wake_all(self, stage: int) -> None:
        while self._lines.get(stage):
            self.wake(stage)
