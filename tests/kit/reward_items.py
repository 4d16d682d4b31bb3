"""Short ways to make the items and pools of the reward service's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from services.reward.pool import ScorerPool
from services.reward.scorers.base import Item
from services.reward.settings import ScorerSettings

KIT = Path(__file__).parent
BY_ORDER = "reward_functions:by_order"


def item(completion: str, label: str = "42", **fields: object) -> Item:
    whole = Item("g00000001-000", "What?", "", completion, label, "", "completed", 1, 1, 8)
    return whole._replace(**fields)


@asynccontextmanager
async def running_pool(
    scorer: str,
    *,
    processes: int = 1,
    timeout_s: float = 10.0,
    paths: Sequence[str] = (),
    judge: str = "",
    **more: object,
) -> AsyncIterator[ScorerPool]:
    settings = ScorerSettings(scorer, [str(KIT), *paths], {"n_samples_per_prompt": 8}, judge, **more)
    pool = ScorerPool(settings, processes=processes, timeout_s=timeout_s)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
