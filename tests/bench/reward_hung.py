"""What a scorer that never answers costs another one, and how long it lives."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from services.common.config.models import RewardConfig
from services.reward.jobs import FailureKind, Result
from services.reward.pool import ScorerPool
from services.reward.scorers.base import Item
from tests.bench import math_pairs
from tests.bench.reward_math import PROCESSES, items
from tests.kit.reward_items import BY_ORDER, item, running_pool

_HUNG = 4
_LIMIT_S = 2.0


async def measure_hung(rounds: int, seconds: float) -> dict[str, Any]:
    """Two pools on one event loop: math with two processes at full load, and beside it one process that hangs.

    What hangs waits for ever without working (`slowdown_with_hung_pct`), or works for ever, which takes a core of its
    own (`slowdown_with_spinning_pct`). Its queue never empties: when the process is killed, at the default time limit,
    its successor hangs on the next sample. `slowdown_in_one_pool_pct` is of samples of ten milliseconds in a pool of
    two processes, of which one waits for ever.
    """
    limit_s = RewardConfig().score_timeout_s
    work = items(math_pairs.load())
    async with AsyncExitStack() as stack:
        math = await stack.enter_async_context(running_pool("math", processes=PROCESSES, timeout_s=limit_s))
        hung = await stack.enter_async_context(running_pool(BY_ORDER, timeout_s=limit_s))
        await math.score(work)
        waiting = [await _slowdown(math, work, hung, "wait", seconds) for _ in range(rounds)]
        spinning = [await _slowdown(math, work, hung, "hang", seconds) for _ in range(rounds)]
    async with running_pool(BY_ORDER, processes=PROCESSES, timeout_s=limit_s) as pool:
        work = [item("sleep 0.01")] * 100
        await pool.score(work)
        together = await _slowdown(pool, work, pool, "wait", min(seconds, limit_s / 2))
    async with running_pool(BY_ORDER, timeout_s=_LIMIT_S) as pool:
        lives = [await _life(pool) for _ in range(_HUNG)]
    return {
        "slowdown_with_hung_pct": round(statistics.median(waiting), 1),
        "slowdown_with_spinning_pct": round(statistics.median(spinning), 1),
        "slowdown_in_one_pool_pct": round(together, 1),
        "hung_limit_s": _LIMIT_S,
        "hung_dies_after_s": round(max(life for life, _ in lives), 3),
        "hung_but_scored": sum(result.failure is not FailureKind.TIMED_OUT for _, result in lives),
    }


async def _slowdown(pool: ScorerPool, work: Sequence[Item], hung: ScorerPool, word: str, seconds: float) -> float:
    """In percent, of the rate alone just before."""
    alone = await _rate(pool, work, seconds)
    hanging = asyncio.create_task(hung.score([item(word)] * (1000 if hung is not pool else 1)))
    await asyncio.sleep(0.1)
    beside = await _rate(pool, work, seconds)
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    return 100 * (1 - beside / alone)


async def _rate(pool: ScorerPool, work: Sequence[Item], seconds: float) -> float:
    begun, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        results = await pool.score(work)
        assert all(result.verdict is not None for result in results)
        done += len(work)
    return done / passed


async def _life(pool: ScorerPool) -> tuple[float, Result]:
    """Seconds from the moment a process is on it until that process is gone and the failure is reported."""
    while not pool.pids():
        await asyncio.sleep(0.01)
    begun = time.perf_counter()
    [result] = await pool.score([item("hang")])
    return time.perf_counter() - begun, result
