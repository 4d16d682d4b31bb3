"""Watches the store's memory: when it fills up, checkpoints are wanted, and then no group is admitted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from services.buffer.store import Store
from services.common.errors import PolyheadError
from services.common.rpc import MIB

log = structlog.get_logger()

CHECKPOINT_ABOVE = 0.7
ADMIT_BELOW = 0.8
_INTERVAL_S = 1.0


class MemoryWatch:
    """`admit` and `checkpoint_wanted` are the verdicts of the last look."""

    def __init__(self, store: Store, max_memory_mb: int) -> None:
        self._store = store
        self._limit = max_memory_mb * MIB
        self.admit = True
        self.checkpoint_wanted = False

    async def look(self) -> None:
        """Raises UnavailableError when the store does not answer."""
        used = await self._store.used_memory()
        admit = used < ADMIT_BELOW * self._limit
        if admit != self.admit:
            log.warning("admission", open=admit, used_mb=used // MIB, limit_mb=int(ADMIT_BELOW * self._limit) // MIB)
        self.admit = admit
        self.checkpoint_wanted = used > CHECKPOINT_ABOVE * self._limit

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
