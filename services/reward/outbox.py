"""Verdicts and returned samples on their way to the buffer, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.errors import ConfigError, PolyheadError, UnavailableError

log = structlog.get_logger()

# Verdicts that come within this time share a call.
LINGER_S = 0.003
RETRY_S = 1.0


class Outbox:
    """Keeps everything until the buffer has answered for it. `on_settled` gets the lease ids it has answered for."""

    def __init__(
        self,
        buffer: BufferClient,
        replica_id: str,
        *,
        samples_per_rpc: int,
        on_settled: Callable[[Sequence[int]], None],
    ) -> None:
        self._buffer = buffer
        self._replica_id = replica_id
        self._samples_per_rpc = samples_per_rpc
        self._on_settled = on_settled
        self._completed: list[list[pb.CompletedSample]] = []
        """Each list goes in one call."""
        self._released: list[pb.ReleasedSample] = []
        self._filled = asyncio.Event()

    def complete(self, *samples: pb.CompletedSample) -> None:
        """They go in one call, unless they are more than one may have."""
        for start in range(0, len(samples), self._samples_per_rpc):
            self._completed.append(list(samples[start : start + self._samples_per_rpc]))
        self._filled.set()

    def release(self, sample: pb.ReleasedSample) -> None:
        self._released.append(sample)
        self._filled.set()

    def lease_ids(self) -> set[int]:
        """Of all that the buffer has not answered for."""
        completed = {sample.lease_id for parcel in self._completed for sample in parcel}
        return completed | {sample.lease_id for sample in self._released}

    async def run(self) -> None:
        """Sends what comes, until cancelled. Outages of the buffer and a full store are waited out."""
        reachable = True
        while True:
            await self._filled.wait()
            await asyncio.sleep(LINGER_S if reachable else RETRY_S)
            try:
                await self.flush()
            except UnavailableError as error:
                if reachable:
                    log.warning("verdicts_held_back", reason=str(error), held=sum(map(len, self._completed)))
                reachable = False
            else:
                reachable = True

    async def flush(self) -> None:
        """Sends everything. Raises UnavailableError, and keeps what the buffer has not answered for."""
        while self._completed or self._released:
            if self._completed:
                await self._send_completed(self._first_completed())
            else:
                await self._send_released(self._released[: self._samples_per_rpc])
        self._filled.clear()

    def _first_completed(self) -> list[list[pb.CompletedSample]]:
        """As many as one call may have."""
        taken, room = 0, self._samples_per_rpc
        for together in self._completed:
            room -= len(together)
            if room < 0:
                break
            taken += 1
        return self._completed[:taken]

    async def _send_completed(self, parcels: list[list[pb.CompletedSample]]) -> None:
        """Sends the first of what is completed. A sample that the buffer refuses is given back instead, alone."""
        samples = [sample for parcel in parcels for sample in parcel]
        try:
            response = await self._buffer.complete(sample_pb2.STAGE_SCORE, self._replica_id, samples)
        except (UnavailableError, ConfigError):
            raise
        except PolyheadError as error:
            if len(samples) > 1:
                if len(parcels) == 1:
                    self._completed[:1] = parcels = [[sample] for sample in samples]
                await self._send_completed(parcels[: len(parcels) // 2])
                return
            log.warning("verdict_refused", sample_id=samples[0].sample_id, reason=str(error))
            del self._completed[:1]
            self.release(
                pb.ReleasedSample(
                    sample_id=samples[0].sample_id,
                    lease_id=samples[0].lease_id,
                    reason=pb.RELEASE_REASON_SAMPLE_ERROR,
                    error=f"the verdict was refused: {error}",
                )
            )
            return
        del self._completed[: len(parcels)]
        self._settle("complete", [sample.lease_id for sample in samples], response.results)

    async def _send_released(self, samples: list[pb.ReleasedSample]) -> None:
        """Sends the first released samples. The lease of one that the buffer refuses, alone, is left to expire."""
        results: Sequence[pb.SampleResult] = ()
        try:
            response = await self._buffer.release(sample_pb2.STAGE_SCORE, self._replica_id, samples)
            results = response.results
        except (UnavailableError, ConfigError):
            raise
        except PolyheadError as error:
            if len(samples) > 1:
                await self._send_released(samples[: len(samples) // 2])
                return
            log.warning("release_refused", sample_id=samples[0].sample_id, reason=str(error))
        del self._released[: len(samples)]
        self._settle("release", [sample.lease_id for sample in samples], results)

    def _settle(self, verb: str, lease_ids: Sequence[int], results: Sequence[pb.SampleResult]) -> None:
        for result in results:
            if result.outcome not in (pb.OUTCOME_OK, pb.OUTCOME_DUPLICATE):
                log.info("too_late", verb=verb, sample_id=result.sample_id, outcome=pb.Outcome.Name(result.outcome))
        self._on_settled(lease_ids)
