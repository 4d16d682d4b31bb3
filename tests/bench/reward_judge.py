"""A judge elsewhere with 50 ms latency and 20% errors: ``python -m tests.bench.reward_judge``.

The judge is a process of its own behind real HTTP. Ideal is what `CONCURRENCY` calls at a time get done when a fifth of
them has to be made again and nothing else takes time. A plain loop of as many workers, which calls again at once, is
measured in the same run: on a busy machine it is as far from the ideal. No right score is 0, so that an invented one
would show.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from services.common.process import free_port
from services.reward.scorers.base import Item
from tests.kit.reward_items import item
from tests.kit.reward_servers import remote

LATENCY_S = 0.05
ERRORS = 0.2
CONCURRENCY = 16
SAMPLES = 2000


async def measure_judge(samples: int = SAMPLES) -> dict[str, Any]:
    """`judge_efficiency` = achieved over ideal throughput; `invented_scores` are those the judge did not give."""
    port = free_port()
    server = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.bench.reward_judge", str(port))
    settings = {
        "concurrency": CONCURRENCY,
        "attempts": 8,
        "backoff_s": 0.05,
        "breaker_failures": 10,
        "judge": {"model": "judge", "prompt": "{response}", "high": 100_000},
    }
    try:
        async with remote("judge", f"http://127.0.0.1:{port}/v1", **settings) as station:
            await _until_up(station)
            begun = time.perf_counter()
            items = [item(str(number), sample_id=f"s{number}") for number in range(samples)]
            results = await station.score(items)
            seconds = time.perf_counter() - begun
        plain_s = await _plain_loop(f"http://127.0.0.1:{port}/v1/chat/completions", samples)
    finally:
        server.terminate()
        await server.wait()
    ideal_s = samples / (1 - ERRORS) * LATENCY_S / CONCURRENCY
    given = [result.verdict.reward if result.verdict is not None else None for result in results]
    return {
        "judge_efficiency": round(ideal_s / seconds * sum(each is not None for each in given) / samples, 3),
        "judge_ratio_to_plain_loop": round(plain_s / seconds, 3),
        "judge_unscored": given.count(None),
        "invented_scores": sum(each not in (None, number + 1) for number, each in enumerate(given)),
    }


async def _plain_loop(url: str, samples: int) -> float:
    """Seconds."""
    left = iter(range(samples))

    async def work(session: aiohttp.ClientSession) -> None:
        for number in left:
            status = 0
            while status != 200:
                body = {"messages": [{"role": "user", "content": str(number)}]}
                async with session.post(url, json=body) as response:
                    status = response.status
                    await response.read()

    begun = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(work(session) for _ in range(CONCURRENCY)))
    return time.perf_counter() - begun


async def _until_up(station: Any) -> None:
    warm: list[Item] = [item("1", sample_id="warm")]
    async with asyncio.timeout(20):
        while (await station.score(warm))[0].verdict is None:
            await asyncio.sleep(0.1)


async def _judge(port: int) -> None:
    dice = random.Random(0)

    async def answer(request: web.Request) -> web.Response:
        asked = int((await request.json())["messages"][-1]["content"])
        await asyncio.sleep(LATENCY_S)
        if dice.random() < ERRORS:
            return web.Response(status=dice.choice((429, 500, 503)))
        said = f"Let me think.\nScore: {asked + 1}"
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": said}}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(_judge(int(sys.argv[1])))
    else:
        print(json.dumps(uvloop.run(measure_judge()), indent=2))  # as the service does
