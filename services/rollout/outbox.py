"""What has been decided about samples, on its way to the buffer in batches: completed, or given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import PolyheadError, UnavailableError
from services.rollout.batching import batches
from services.rollout.records import SampleRecord
from services.rollout.samples import SampleBuilder
from services.rollout.saver import Saver
from services.rollout.stats import Stats

log = structlog.get_logger()

# Samples that finish within this time of each other share one call.
LINGER_S = 0.005
_RETRY_S = 1.0
_RELEASE_BYTES = 1024


@dataclass(frozen=True)
class GivenBack:
    """A sample that is released instead of completed."""

    record: SampleRecord
    reason: pb.ReleaseReason
    drop_reason: sample_pb2.DropReason = sample_pb2.DROP_REASON_UNSPECIFIED
    error: str = ""
    keep_partial: bool = True
    """Save the tokens that have streamed in first; False when they are at fault."""


class Outbox:
    """Delivers in the order given, and goes on trying until the buffer has answered."""

    def __init__(
        self,
        buffer: BufferClient,
        replica_id: str,
        limits: LimitsConfig,
        saver: Saver,
        builder: SampleBuilder,
        stats: Stats,
        engine_name: Callable[[], str],
    ) -> None:
        self._buffer = buffer
        self._replica_id = replica_id
        self._max_items = limits.samples_per_rpc
        self._max_bytes = limits.message_mb * (1 << 20) // 2
        self._saver = saver
        self._builder = builder
        self._stats = stats
        self._engine_name = engine_name
        self._completed: list[SampleRecord] = []
        self._released: list[GivenBack] = []
        self._waiting = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def complete(self, record: SampleRecord) -> None:
        self._completed.append(record)
        self._wake()

    def release(self, given_back: GivenBack) -> None:
        given_back.record.to_be_saved = given_back.keep_partial
        self._released.append(given_back)
        self._wake()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until everything has been delivered; False when that took longer."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Delivers for ever."""
        while True:
            await self._waiting.wait()
            await asyncio.sleep(LINGER_S)
            self._waiting.clear()
            try:
                await self._deliver_completed(len(self._completed))
                await self._deliver_released(len(self._released))
            except UnavailableError as error:
                log.warning("buffer_away", waiting=len(self._completed) + len(self._released), reason=str(error))
                await asyncio.sleep(_RETRY_S)
            if self._completed or self._released:
                self._waiting.set()
            else:
                self._empty.set()

    def _wake(self) -> None:
        self._empty.clear()
        self._waiting.set()

    async def _deliver_completed(self, count: int) -> None:
        records = self._completed[:count]
        payloads = self._builder.build(records, self._engine_name()) if records else []
        sized = [((record, data), len(data)) for record, data in zip(records, payloads, strict=True)]
        for batch in batches(sized, max_items=self._max_items, max_bytes=self._max_bytes):
            await self._complete(batch)

    async def _complete(self, batch: Sequence[tuple[SampleRecord, bytes]]) -> None:
        """Delivers the head of the queue, and takes it off as soon as its fate is known.

        The buffer stores all of a call or nothing: what it refuses is sent one by one, to find the sample at fault.
        """
        samples = [
            pb.CompletedSample(sample_id=record.sample_id, lease_id=record.lease_id, sample=data)
            for record, data in batch
        ]
        try:
            response = await self._buffer.complete(sample_pb2.STAGE_GENERATE, self._replica_id, samples)
        except UnavailableError:
            raise
        except PolyheadError as error:
            if len(batch) > 1:
                log.warning("batch_refused", samples=len(batch), reason=str(error))
                for item in batch:
                    await self._complete([item])
                return
            del self._completed[0]
            self._refused(batch[0][0], error)
            return
        del self._completed[: len(batch)]
        for (record, _), result in zip(batch, response.results, strict=True):
            if result.outcome in (pb.OUTCOME_OK, pb.OUTCOME_DUPLICATE):
                self._stats.samples_completed += 1
                self._stats.multi_span_samples += len({span.version for span in record.spans}) > 1
            else:
                self._too_late(record, result.outcome)

    def _refused(self, record: SampleRecord, error: PolyheadError) -> None:
        log.error("sample_refused", sample_id=record.sample_id, reason=str(error))
        self.release(
            GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=f"refused: {error}"[:500], keep_partial=False)
        )

    async def _deliver_released(self, count: int) -> None:
        released = self._released[:count]
        keep = [item.record for item in released if item.keep_partial and item.record.unsaved]
        if keep:
            await self._saver.save(keep)
        sized = [(item, len(item.error) + _RELEASE_BYTES) for item in released]
        for batch in batches(sized, max_items=self._max_items, max_bytes=self._max_bytes):
            await self._release([item for item in batch if not item.record.lost])
            del self._released[: len(batch)]

    async def _release(self, batch: Sequence[GivenBack]) -> None:
        if not batch:
            return
        samples = [
            pb.ReleasedSample(
                sample_id=item.record.sample_id,
                lease_id=item.record.lease_id,
                reason=item.reason,
                drop_reason=item.drop_reason,
                error=item.error,
                tokens_discarded=item.record.unsaved,
            )
            for item in batch
        ]
        try:
            await self._buffer.release(sample_pb2.STAGE_GENERATE, self._replica_id, samples)
        except UnavailableError:
            raise
        except PolyheadError as error:
            if len(batch) > 1:
                log.warning("batch_refused", samples=len(batch), reason=str(error))
                for item in batch:
                    await self._release([item])
                return
            # The lease will expire: that is slower, and as exact.
            log.error("release_refused", sample_id=batch[0].record.sample_id, reason=str(error))
        for item in batch:
            self._stats.discarded[_name(item.reason)] += item.record.unsaved

    def _too_late(self, record: SampleRecord, outcome: pb.Outcome) -> None:
        log.warning("completed_too_late", sample_id=record.sample_id, outcome=pb.Outcome.Name(outcome))
        self._stats.discarded["completed_late"] += record.unsaved


def _name(reason: pb.ReleaseReason) -> str:
    return pb.ReleaseReason.Name(reason).removeprefix("RELEASE_REASON_").lower()
