"""What goes through the pool, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from services.reward.filters import GroupItem, Judgement, WaitingItem
from services.reward.scorers.base import Item, Verdict, WholeItem

AnyItem = Item | WholeItem | GroupItem | WaitingItem


class FailureKind(StrEnum):
    """Why an item has no verdict."""

    RAISED = "raised"
    """The scorer said that it cannot score this item, raised, or returned what is no score."""
    TIMED_OUT = "timed_out"
    DIED = "died"
    """The process ended while it was on this item."""
    UNAVAILABLE = "unavailable"
    """No process could be started, no server answers, or a scorer lacks what it needs: not the item's fault."""


class Result(NamedTuple):
    """A verdict, or why there is none. `seconds` is the time the scorer worked."""

    verdict: Verdict | None
    seconds: float
    failure: FailureKind | None = None
    reason: str = ""
    judgement: Judgement | None = None
    """Of a group instead of a verdict."""
    preferred: list[int] | None = None
    """Of waiting groups: the numbers of those that go first."""
    verdicts: Sequence[Verdict] | None = None
    """Of a group that is scored as a whole: one per sample."""
    scorer: str = ""
    """What scored, where a sample chose it; empty for the run's own scorer."""


def each_of(result: Result, count: int) -> list[Result]:
    """Of the result of a group that was scored as a whole, one per sample: they share its time, and its failure."""
    seconds = result.seconds / count
    if result.verdicts is None:
        return [result._replace(seconds=seconds)] * count
    return [Result(verdict, seconds) for verdict in result.verdicts]


class Job:
    """One item or group on its way through the pool.

    `on_result` is called once, from the event loop, unless the job is cancelled.
    """

    __slots__ = ("cancelled", "item", "on_result")

    def __init__(self, item: AnyItem, on_result: Callable[[Result], None]) -> None:
        self.item = item
        self.on_result = on_result
        self.cancelled = False

    @property
    def name(self) -> str:
        """The id of its sample or group."""
        return self.item[0]

    def report(self, result: Result) -> None:
        if not self.cancelled:
            self.on_result(result)
