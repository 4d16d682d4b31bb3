"""The ways in which a call to a server ends without a score, told apart by whose fault that is.

A server may also say so of a sample by its contract: that is `SampleError`, and all is well with the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.reward.scorers.base import Item, SampleError, Verdict


class CallError(Exception):
    """The message says why, in one line."""


class UnreachableError(CallError):
    """The server's: not there, overloaded, not at this route, not for us. `retry` says whether that passes soon."""

    def __init__(self, reason: str, *, retry: bool = True) -> None:
        super().__init__(reason)
        self.retry = retry


class BrokenCallError(CallError):
    """The server's or the sample's: it failed inside, hung up, or took too long, perhaps because of this sample."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class RefusedError(CallError):
    """The sample's: the server says that it does not score it."""


class BadAnswerError(CallError):
    """The server's or the sample's: what came is no score."""


Answer = Verdict | SampleError | CallError


class Client(Protocol):
    """Speaks one kind's protocol with one server. Each call ends within its deadline."""

    batch_size: int

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        """One answer per item, in order. Raises CallError when there is none to any of them."""
        ...
