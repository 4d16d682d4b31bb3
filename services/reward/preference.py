"""Asks the user's buffer filter, again and again, which waiting partial groups are to be leased first."""

from __future__ import annotations

import asyncio

import structlog

from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError
from services.reward.items import item_of_waiting
from services.reward.station import Station
from services.reward.stats import Stats

log = structlog.get_logger()

INTERVAL_S = 1.0


async def keep_preferring(buffer: BufferClient, station: Station, stats: Stats, num_samples: int) -> None:
    """Until cancelled. While the filter fails or runs out of time, the oldest groups go first."""
    while station.orders_partials:
        try:
            await _prefer_once(buffer, station, stats, num_samples)
        except PolyheadError as error:
            log.warning("preference_failing", reason=str(error))
        await asyncio.sleep(INTERVAL_S)
    await asyncio.Event().wait()


async def _prefer_once(buffer: BufferClient, station: Station, stats: Stats, num_samples: int) -> None:
    groups = (await buffer.list_partials()).groups
    if not groups:
        return
    result = await station.prefer(item_of_waiting(groups, num_samples))
    stats.count_preferred(result)
    if result.preferred is None:
        log.warning("buffer_filter_failed", why=result.failure, reason=result.reason)
    ids = {group.order: group.group_id for group in groups}
    await buffer.prefer_groups([ids[order] for order in result.preferred or () if order in ids])
