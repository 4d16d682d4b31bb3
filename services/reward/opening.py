"""The station that a run's configuration asks for, from its start to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from services.common.config import Config
from services.common.config.models import REMOTE
from services.reward.pool import ScorerPool
from services.reward.scorers.overlong import Overlong
from services.reward.settings import scorer_settings
from services.reward.station import Station


@asynccontextmanager
async def running_station(config: Config, *, processes: int | None = None) -> AsyncIterator[Station]:
    """`processes` instead of those of the configuration.

    Raises ConfigError or UnavailableError when it cannot be started; a server elsewhere may come later.
    """
    station = _station(config, processes or config.reward.processes)
    try:
        await station.start()
        yield station
    finally:
        await station.close()


def _station(config: Config, processes: int) -> Station:
    reward, settings = config.reward, scorer_settings(config)
    if reward.scorer != REMOTE:
        return ScorerPool(settings, processes=processes, timeout_s=reward.score_timeout_s)
    from services.reward.remote.station import RemoteStation  # brings aiohttp in

    filters = None
    if settings.filter or settings.buffer_filter:
        # Its processes get no items, so any scorer will do.
        filters = ScorerPool(
            replace(settings, name="exact", overlong={}), processes=processes, timeout_s=reward.score_timeout_s
        )
    penalty = Overlong(**settings.overlong) if settings.overlong else None
    return RemoteStation(reward.remote, filters, penalty, send_tokens=reward.send_tokens)
