"""Watches the store's memory: above a share of the budget, new groups are not admitted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from services.buffer.store import Store
from services.common.errors import PolyheadError
from services.common.rpc import MIB

log = structlog.get_logger()

ADMIT_BELOW = 0.8
_INTERVAL_S = 1.0


class MemoryWatch:
    """`admit` is the verdict of the last look."""

    def __init__(self, store: Store, max_memory_mb: int) -> None:
        self._store = store
        self._admit_below = ADMIT_BELOW * max_memory_mb * MIB
        self.admit = True

    async def look(self) -> None:
        """Raises UnavailableError when the store does not answer."""
        used = await self._store.used_memory()
        admit = used < self._admit_below
        if admit != self.admit:
            log.warning("admission", open=admit, used_mb=used // MIB, limit_mb=int(self._admit_below) // MIB)
        self.admit = admit

    async def run(self, reachable: Callable[[bool], Awaitable[None]]) -> None:
        """Looks about once a second, until cancelled; tells `reachable` whether the store answers."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.look()
                await reachable(True)
            except PolyheadError as error:
                log.warning("store_unreachable", reason=str(error))
                await reachable(False)
