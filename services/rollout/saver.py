"""Partial tokens go to the buffer as deltas while they are generated; the same call is the heartbeat of the leases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, LimitError, PolyheadError, UnavailableError
from services.rollout.batching import batches
from services.rollout.records import SampleRecord
from services.rollout.stats import Stats

log = structlog.get_logger()

# One token of a delta: id and log-probability.
_TOKEN_BYTES = 8
_HEADER_BYTES = 256
# Leases are extended at least this often within their time to live.
_BEATS_PER_TTL = 3.0
# Refusals that say something about the record. After any other one, the next beat tries again.
_VERDICTS = (LimitError, InvalidArgumentError)


class Saver:
    """Writes deltas of records, one call at a time: two calls at once would conflict with each other."""

    def __init__(
        self,
        buffer: BufferClient,
        replica_id: str,
        limits: LimitsConfig,
        interval_s: float,
        stats: Stats,
        lost: Callable[[SampleRecord], None],
        refused: Callable[[SampleRecord, PolyheadError], None],
        *,
        keep_partials: bool = True,
    ) -> None:
        """`lost` is told of each record whose lease has ended, after it was marked so; `refused` of each open record
        whose tokens the buffer does not accept. Without `keep_partials` leases are extended and no token is saved.
        """
        self._buffer = buffer
        self._replica_id = replica_id
        self._max_items = limits.samples_per_rpc
        self._max_bytes = limits.message_mb * (1 << 20) // 2
        self._interval_s = interval_s
        self._stats = stats
        self._lost = lost
        self._refused = refused
        self._keep_partials = keep_partials
        self._lock = asyncio.Lock()

    def heed_ttl(self, lease_ttl_s: float) -> None:
        """Beats often enough for leases of this length."""
        if lease_ttl_s > 0:
            self._interval_s = min(self._interval_s, lease_ttl_s / _BEATS_PER_TTL)

    async def run(self, held: Callable[[], Collection[SampleRecord]]) -> None:
        """Saves everything held, every interval, for ever."""
        self._stats.unsaved = lambda: sum(record.unsaved for record in held())
        self._stats.in_flight = lambda: sum(record.in_flight for record in held())
        while True:
            await asyncio.sleep(self._interval_s)
            records = list(held())
            if not records:
                continue
            try:
                await self.save(records)
            except UnavailableError as error:
                log.warning("save_failed", samples=len(records), reason=str(error))

    async def save(self, records: Sequence[SampleRecord]) -> None:
        """Extends every lease and appends what the store does not have.

        Raises UnavailableError when the buffer stays away; saving again later is right. What it refuses is the matter
        of one record, and never raised: that record stays unsaved.
        """
        async with self._lock:
            sized = [(record, record.unsaved * _TOKEN_BYTES + _HEADER_BYTES) for record in records]
            for batch in batches(sized, max_items=self._max_items, max_bytes=self._max_bytes):
                await self._save(batch)

    async def _save(self, records: Sequence[SampleRecord]) -> None:
        try:
            conflicts = await self._extend(records)
            if conflicts:
                await self._extend(conflicts)
        except UnavailableError:
            raise
        except PolyheadError as error:
            log.warning("save_refused", samples=len(records), reason=str(error))
            if len(records) > 1:
                for record in records:
                    await self._save([record])
            elif isinstance(error, _VERDICTS) and not records[0].closed:
                self._refused(records[0], error)

    async def _extend(self, records: Sequence[SampleRecord]) -> list[SampleRecord]:
        """Returns the records whose saved count was corrected, to be tried again."""
        reaches = [len(record.token_ids) for record in records]
        samples = [
            pb.ExtendedSample(
                sample_id=record.sample_id,
                lease_id=record.lease_id,
                delta=record.delta() if record.unsaved and self._keep_partials else None,
            )
            for record in records
        ]
        response = await self._buffer.extend(self._replica_id, samples)
        return [
            record
            for record, reach, result in zip(records, reaches, response.results, strict=True)
            if self._settle(record, reach, result)
        ]

    def _settle(self, record: SampleRecord, reach: int, result: pb.SampleResult) -> bool:
        if result.outcome in (pb.OUTCOME_OK, pb.OUTCOME_DUPLICATE):
            record.saved = reach if self._keep_partials else record.saved
        elif record.closed and not record.to_be_saved:
            pass  # it was decided meanwhile: what is delivered for it has an answer of its own
        elif result.outcome == pb.OUTCOME_CONFLICT and result.saved_tokens <= reach:
            # Only we write under this lease: an earlier call was carried out and its answer lost.
            record.saved = result.saved_tokens
            return True
        else:
            self.give_up(record)
        return False

    def give_up(self, record: SampleRecord) -> None:
        """The lease has ended: what is not saved is lost with it."""
        if not record.lost:
            record.lost = True
            self._stats.discarded["lease_lost"] += record.unsaved
            self._lost(record)
