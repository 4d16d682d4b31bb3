"""A circuit breaker: a server that does not answer is left alone for a while, then tried with a single call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum


class State(StrEnum):
    CLOSED = "closed"
    """Calls go out."""
    OPEN = "open"
    """None does."""
    HALF_OPEN = "half-open"
    """One may."""
    PROBING = "probing"
    """It is out; the others wait for its end."""


class Breaker:
    """Opens after `failures` calls in a row that failed, for `reset_s`; twice as long after each probe that fails too.

    `on_change` is called after each change of state.
    """

    def __init__(self, *, failures: int, reset_s: float, max_reset_s: float, on_change: Callable[[], None]) -> None:
        self._failures = failures
        self._reset_s = reset_s
        self._max_reset_s = max_reset_s
        self._on_change = on_change
        self._in_a_row = 0
        self._delay_s = reset_s
        self._timer: asyncio.TimerHandle | None = None
        self.state = State.CLOSED
        self.reason = ""
        """Of the last failure."""

    @property
    def admits(self) -> bool:
        return self.state in (State.CLOSED, State.HALF_OPEN)

    @property
    def on_the_brink(self) -> bool:
        """Whether one more failure opens it."""
        return self.state is State.PROBING or (self.state is State.CLOSED and self._in_a_row + 1 >= self._failures)

    def begin(self) -> None:
        """A call goes out."""
        if self.state is State.HALF_OPEN:
            self._become(State.PROBING)

    def good(self) -> None:
        """The server works."""
        self._in_a_row = 0
        self._delay_s = self._reset_s
        if self.state is not State.CLOSED:
            self._become(State.CLOSED)

    def bad(self, reason: str) -> None:
        self.reason = reason
        self._in_a_row += 1
        if self.state is State.PROBING or (self.state is State.CLOSED and self._in_a_row >= self._failures):
            delay, self._delay_s = self._delay_s, min(2 * self._delay_s, self._max_reset_s)
            self._become(State.OPEN)
            self._timer = asyncio.get_running_loop().call_later(delay, self._become, State.HALF_OPEN)

    def close(self) -> None:
        """No more changes."""
        if self._timer is not None:
            self._timer.cancel()

    def _become(self, state: State) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.state = state
        self._on_change()
