"""The benchmark's judge, and its measure of what goes through it, with scorers that do well, invent and give up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from services.reward.jobs import FailureKind, Result
from services.reward.scorers.base import Item, Verdict
from tests.bench.reward_judge import failing_judge, measure_judge

PLACES = 16


class Client:
    """Calls until it has an answer; or gives up on the first error, with a zero or with nothing."""

    def __init__(self, url: str, *, on_error: str = "again") -> None:
        self._url, self._on_error = url, on_error
        self._places = asyncio.Semaphore(PLACES)

    async def score(self, items: Sequence[Item]) -> Sequence[Result]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(self._one(session, each) for each in items))

    async def _one(self, session: aiohttp.ClientSession, item: Item) -> Result:
        while True:
            async with self._places, session.post(self._url, json={"response": item.completion}) as answer:
                if answer.status == 200:
                    return Result(Verdict(float(await answer.text()), {}), 0.0)
            if self._on_error == "zero":
                return Result(Verdict(0.0, {}), 0.0)
            if self._on_error == "nothing":
                return Result(None, 0.0, FailureKind.UNAVAILABLE, "503")


async def test_a_good_client_comes_near_the_ideal_and_invents_nothing() -> None:
    async with failing_judge() as url:
        figures = await measure_judge(Client(url), concurrency=PLACES, count=200)
    assert (figures["judge_unscored"], figures["invented_scores"]) == (0, 0)
    assert 0 < figures["judge_efficiency"] < 1.2


async def test_zeros_and_gaps_are_counted() -> None:
    async with failing_judge() as url:
        zeros = await measure_judge(Client(url, on_error="zero"), concurrency=PLACES, count=100)
        gaps = await measure_judge(Client(url, on_error="nothing"), concurrency=PLACES, count=100)
    assert 5 < zeros["invented_scores"] < 40
    assert zeros["judge_unscored"] == 0
    assert 5 < gaps["judge_unscored"] < 40
    assert gaps["invented_scores"] == 0
