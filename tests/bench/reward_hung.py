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

BY_TYPE = "reward_functions:by_type"
_HUNG = 4
_LIMIT_S = 2.0


async def measure_hung(rounds: int, seconds: float) -> dict[str, Any]:
    """One pool of two processes, math at full load, and in it a scorer whose every sample hangs.

    What hangs waits for ever without working (`slowdown_with_hung_pct`), or works for ever
    (`slowdown_with_spinning_pct`). Its queue never empties: when a process is killed, at the default time limit, the
    next sample hangs in another one. The first round begins with a scorer that nobody knows to hang: `..._first_pct`.
    `slowdown_in_two_pools_pct` has the scorer that waits in a pool of its own, of one process.
    `slowdown_by_sample_pct` is one sample of the very scorer that hangs, beside others of ten milliseconds.
    """
    limit_s = RewardConfig().score_timeout_s
    work = [each._replace(metadata_json='{"rm_type": "math"}') for each in items(math_pairs.load())]
    figures: dict[str, Any] = {}
    for name, word in (("hung", "wait"), ("spinning", "hang")):
        async with running_pool(BY_TYPE, processes=PROCESSES, timeout_s=limit_s) as pool:
            await pool.score(work)
            slowdowns = [await _slowdown(pool, work, pool, [item(word)] * 1000, seconds) for _ in range(rounds)]
        figures[f"slowdown_with_{name}_first_pct"] = round(slowdowns[0], 1)
        figures[f"slowdown_with_{name}_pct"] = round(statistics.median(slowdowns), 1)
    async with AsyncExitStack() as stack:
        math = await stack.enter_async_context(running_pool(BY_TYPE, processes=PROCESSES, timeout_s=limit_s))
        hung = await stack.enter_async_context(running_pool(BY_ORDER, timeout_s=limit_s))
        await math.score(work)
        apart = [await _slowdown(math, work, hung, [item("wait")] * 1000, seconds) for _ in range(rounds)]
    async with running_pool(BY_ORDER, processes=PROCESSES, timeout_s=limit_s) as pool:
        work = [item("sleep 0.01")] * 100
        await pool.score(work)
        by_sample = await _slowdown(pool, work, pool, [item("wait")], min(seconds, limit_s / 2))
    async with running_pool(BY_ORDER, timeout_s=_LIMIT_S) as pool:
        lives = [await _life(pool) for _ in range(_HUNG)]
    return figures | {
        "slowdown_in_two_pools_pct": round(statistics.median(apart), 1),
        "slowdown_by_sample_pct": round(by_sample, 1),
        "hung_limit_s": _LIMIT_S,
        "hung_dies_after_s": round(max(life for life, _ in lives), 3),
        "hung_but_scored": sum(result.failure is not FailureKind.TIMED_OUT for _, result in lives),
    }


async def _slowdown(
    pool: ScorerPool, work: Sequence[Item], other: ScorerPool, hung: Sequence[Item], seconds: float
) -> float:
    """In percent, of the rate alone just before."""
    alone = await _rate(pool, work, seconds)
    hanging = asyncio.create_task(other.score(hung))
    await asyncio.sleep(0)  # it has its processes before the others come
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
