"""A batch from the buffer: the lease of its records, then the samples, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import LimitError, PolyheadError, PreconditionError

_CHUNK_BYTES = 1 << 20
"""Of the payloads that one call fetches, by what the index says of their lengths: whoever else calls the buffer stands
behind one such answer, not behind a whole step's."""
_TOKEN_BYTES = 9
"""Of a token on the wire: id, log-probability, mask."""
_OVERLAP = 2
"""So many calls are under way: the next answer is made while one is read."""


async def lease_batch(
    buffer: BufferClient, holder: str, *, epoch: int, step: int, wait_s: float, limits: LimitsConfig
) -> pb.LeaseResponse:
    """The batch of `step`, every sample with its payload; or no groups, and what is being waited for.

    Safe to repeat. Raises the typed errors of the buffer, and PreconditionError when a leased sample has no payload.
    """
    response = await buffer.lease(
        sample_pb2.STAGE_TRAIN, holder, wait_s=wait_s, epoch=epoch, step=step, include_payload=False
    )
    samples = [sample for group in response.groups for sample in group.samples]
    free = asyncio.Semaphore(_OVERLAP)

    async def fill(chunk: Sequence[pb.LeasedSample]) -> None:
        async with free:
            await _fill(buffer, chunk)

    try:
        async with asyncio.TaskGroup() as tasks:
            for chunk in _chunks(samples, limits):
                tasks.create_task(fill(chunk))
    except* PolyheadError as errors:
        raise errors.exceptions[0] from None
    return response


def _chunks(samples: Sequence[pb.LeasedSample], limits: LimitsConfig) -> Iterator[list[pb.LeasedSample]]:
    """Runs of samples of about so many bytes."""
    chunk: list[pb.LeasedSample] = []
    size = 0
    for sample in samples:
        expected = sample.record.num_tokens * _TOKEN_BYTES
        if chunk and (size + expected > _CHUNK_BYTES or len(chunk) == limits.samples_per_rpc):
            yield chunk
            chunk, size = [], 0
        chunk.append(sample)
        size += expected
    if chunk:
        yield chunk


async def _fill(buffer: BufferClient, samples: Sequence[pb.LeasedSample]) -> None:
    try:
        response = await buffer.fetch([sample.sample_id for sample in samples])
    except LimitError:
        # Text and metadata may be far longer than the tokens tell.
        if len(samples) == 1:
            raise
        half = len(samples) // 2
        await _fill(buffer, samples[:half])
        await _fill(buffer, samples[half:])
        return
    payloads = {fetched.sample_id: fetched.sample for fetched in response.samples}
    for sample in samples:
        if not (payload := payloads.get(sample.sample_id)):
            raise PreconditionError("the buffer has no payload of a leased sample", field=sample.sample_id)
        sample.sample = payload
