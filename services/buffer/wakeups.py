"""Waiting leasers in lines, woken one by one as work arrives."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress

# The first in each line looks again this often: leases expire unannounced, and other buffer processes wake nobody here.
RECHECK_S = 0.25


class Ticket:
    """A place in a line. `wait` may be called once."""

    def __init__(self) -> None:
        self._called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard = False

    def call(self) -> None:
        if not self._called.done():
            self._called.set_result(None)

    async def wait(self, timeout_s: float) -> bool:
        """True when called, False after `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._called, timeout_s)
            self.heard = True
        return self.heard


class Wakeups:
    """A line for each stage and each `kind` of leaser. The first is called; who looks in vain goes to the end.

    What one of a kind may not have, none of them may, and others may: so each kind has a line, and an arrival calls the
    first of each. Calls are only hints. While anybody waits, the first of each line is called from time to time anyway,
    however many stand behind.
    """

    def __init__(self) -> None:
        self._lines: dict[int, dict[Hashable, OrderedDict[Ticket, None]]] = {}
        self._rechecking: asyncio.Task[None] | None = None

    @contextmanager
    def queue(self, stage: int, kind: Hashable = None) -> Iterator[Ticket]:
        """Stands in line. Entered before looking for work, so that nothing can arrive unnoticed in between.

        A call that the leaver did not wait for goes to the next in line.
        """
        ticket = Ticket()
        lines = self._lines.setdefault(stage, {})
        lines.setdefault(kind, OrderedDict())[ticket] = None
        if self._rechecking is None or self._rechecking.done():
            self._rechecking = asyncio.create_task(self._recheck())
        try:
            yield ticket
        finally:
            line = lines.get(kind, OrderedDict())
            if ticket in line:
                del line[ticket]
            elif not ticket.heard:
                _call_first(line)
            if not line:
                lines.pop(kind, None)

    def wake(self, stage: int) -> None:
        """Calls the first in each line for work of this stage."""
        for line in self._lines.get(stage, {}).values():
            _call_first(line)

    def wake_all(self, stage: int) -> None:
        for line in self._lines.get(stage, {}).values():
            while line:
                _call_first(line)

    async def _recheck(self) -> None:
        """Until nobody waits."""
        while any(self._lines.values()):
            await asyncio.sleep(RECHECK_S)
            for stage in self._lines:
                self.wake(stage)


def _call_first(line: OrderedDict[Ticket, None]) -> None:
    if line:
        line.popitem(last=False)[0].call()
