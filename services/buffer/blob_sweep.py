"""Deletes blobs that no sample refers to: retired ones, and those whose sample was never completed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from services.buffer.store import Store
from services.common.blobs import Blobs
from services.common.errors import PolyheadError

log = structlog.get_logger()

# A sample's blobs are put before it is completed: so long it may take to be known.
GRACE_S = 3600.0
_INTERVAL_S = 600.0
_PER_CALL = 1024


class BlobSweep:
    """Sweeps when it is `wanted`, and every ten minutes for what a crash left behind."""

    def __init__(self, store: Store, blobs: Blobs, wanted: asyncio.Event, grace_s: float = GRACE_S) -> None:
        self._store = store
        self._blobs = blobs
        self._grace_s = grace_s
        self._wanted = wanted

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _INTERVAL_S)
            self._wanted.clear()
            try:
                await self.sweep()
            except (PolyheadError, OSError) as error:
                log.warning("blobs_not_swept", reason=str(error))

    async def sweep(self) -> int:
        """Deletes what may go. Returns the number of blobs."""
        old = await asyncio.to_thread(lambda: list(self._blobs.older_than(self._grace_s)))
        removed = 0
        for at in range(0, len(old), _PER_CALL):
            digests = old[at : at + _PER_CALL]
            referenced = await self._store.referenced_blobs(digests)
            removed += await asyncio.to_thread(self._remove, [each for each in digests if each not in referenced])
        if removed:
            log.info("blobs_removed", count=removed)
        return removed

    def _remove(self, digests: list[str]) -> int:
        return sum(self._blobs.remove(digest, self._grace_s) for digest in digests)
