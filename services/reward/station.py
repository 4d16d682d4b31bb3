"""What scores: the one interface by which the puller and the service know it, here or elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from services.reward.filters import WaitingItem
from services.reward.jobs import Job, Result
from services.reward.scorers.base import Item


class Station(Protocol):
    """Takes jobs and reports their results. `start` first, `close` last; all on one event loop."""

    available: asyncio.Event
    """Set while it takes jobs. Nothing is leased while it is not."""

    @property
    def scorer(self) -> str:
        """What gave the scores, as it is written into them."""
        ...

    @property
    def judges(self) -> bool:
        """Whether it has a filter for groups."""
        ...

    @property
    def orders_partials(self) -> bool:
        """Whether it has a filter for the groups that wait unfinished."""
        ...

    @property
    def scores_whole(self) -> bool:
        """Whether it scores groups, not samples."""
        ...

    @property
    def wants_tokens(self) -> bool:
        """Whether items are to carry the token ids of their samples."""
        ...

    @property
    def room(self) -> int | None:
        """How many items it wants at most at present; None for any number."""
        ...

    @property
    def width(self) -> int:
        """How many items it can be on at a time."""
        ...

    @property
    def held_back(self) -> int:
        """How many jobs wait for a scorer whose last score ran out of time: others are to find room beside them."""
        ...

    @property
    def trouble(self) -> str:
        """Why it takes no jobs, or too few; empty when nothing is wrong."""
        ...

    async def start(self) -> None:
        """Returns when it can be given jobs. Raises ConfigError or UnavailableError with the reason."""
        ...

    async def close(self) -> None:
        """Jobs that are not finished are never reported."""
        ...

    def pids(self) -> list[int]: ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs. What cannot be done by anybody now is reported as UNAVAILABLE."""
        ...

    async def score(self, items: Sequence[Item]) -> list[Result]:
        """One result per item, in order; where groups are scored, the items are one.

        Cancelling the call cancels what is left of its work.
        """
        ...

    async def prefer(self, waiting: WaitingItem) -> Result:
        """Asks the buffer filter."""
        ...


async def score_all(station: Station, items: Sequence[Item]) -> list[Result]:
    """`Station.score` by means of `submit`."""
    results: list[Result | None] = [None] * len(items)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    missing = len(items)

    def reporter(place: int) -> Callable[[Result], None]:
        def report(result: Result) -> None:
            nonlocal missing
            results[place] = result
            missing -= 1
            if not missing and not done.done():
                done.set_result(None)

        return report

    if not items:
        return []
    jobs = [Job(item, reporter(place)) for place, item in enumerate(items)]
    station.submit(jobs)
    try:
        await done
    finally:
        for job in jobs:
            job.cancelled = True
    return [result for result in results if result is not None]
