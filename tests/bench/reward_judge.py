"""What scores elsewhere come to, with a judge that takes 50 ms and fails on a fifth of the calls."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from aiohttp import web

from services.reward.jobs import Result
from services.reward.scorers.base import Item
from tests.kit.reward_items import item

LATENCY_S = 0.05
ERROR_SHARE = 0.2


class Scores(Protocol):
    """Whatever scores items with the judge's help."""

    async def score(self, items: Sequence[Item]) -> Sequence[Result]: ...


@asynccontextmanager
async def failing_judge(*, seed: int = 0) -> AsyncIterator[str]:
    """The address of a `remote_rm` server on this machine: POST {"prompt", "response", "label"}, a number back.

    The number is the response's own, so that a wrong score shows. A fifth of the calls, by lot, is answered with 503,
    also after 50 ms.
    """
    lots = random.Random(seed)

    async def answer(request: web.Request) -> web.Response:
        fails = lots.random() < ERROR_SHARE
        body = await request.json()
        await asyncio.sleep(LATENCY_S)
        return web.Response(status=503) if fails else web.json_response(float(body["response"]))

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


async def measure_judge(scorer: Scores, *, concurrency: int, count: int) -> dict[str, Any]:
    """`concurrency` is how many calls `scorer` makes at a time.

    The ideal has all of these places busy all the time, and calls as often as the errors ask for:
    concurrency × (1 − 20%) / 50 ms. An invented score is one that the judge did not give: any other than the number in
    the completion, which is never 0.
    """
    items = [item(str(number + 1)) for number in range(count)]
    await scorer.score(items[:concurrency])
    begun = time.perf_counter()
    results = await scorer.score(items)
    rate = count / (time.perf_counter() - begun)
    rewards = [None if result.verdict is None else result.verdict.reward for result in results]
    return {
        "judge_scores_per_s": round(rate),
        "judge_efficiency": round(rate / (concurrency * (1 - ERROR_SHARE) / LATENCY_S), 3),
        "judge_unscored": sum(reward is None for reward in rewards),
        "invented_scores": sum(reward not in (None, number + 1) for number, reward in enumerate(rewards)),
    }
