"""A batch from the buffer: the lease, and the samples, which may be too many for one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import LimitError, PreconditionError

# A token on the wire: id, log-probability, mask, and its text in the completion, which may be several bytes.
_TOKEN_BYTES = 24


async def lease_batch(
    buffer: BufferClient, holder: str, *, epoch: int, step: int, wait_s: float, limits: LimitsConfig
) -> pb.LeaseResponse:
    """The batch of `step`, every sample with its payload; or no groups, and what is being waited for.

    Safe to repeat. Raises the typed errors of the buffer, and PreconditionError when a leased sample has no payload.
    """
    response = await buffer.lease(sample_pb2.STAGE_TRAIN, holder, wait_s=wait_s, epoch=epoch, step=step)
    missing = [sample for group in response.groups for sample in group.samples if not sample.sample]
    for chunk in _chunks(missing, limits):
        await _fill(buffer, chunk)
    return response


def _chunks(samples: Sequence[pb.LeasedSample], limits: LimitsConfig) -> Iterator[list[pb.LeasedSample]]:
    """Runs of samples that will fit into a quarter of a message each, by what the index says of their lengths."""
    budget = limits.message_mb * (1 << 20) // 4
    chunk: list[pb.LeasedSample] = []
    size = 0
    for sample in samples:
        expected = sample.record.num_tokens * _TOKEN_BYTES + limits.metadata_kb * 1024
        if chunk and (size + expected > budget or len(chunk) == limits.samples_per_rpc):
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
