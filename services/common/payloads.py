"""The samples of a lease, fetched a few at a time: who else calls the buffer stands behind one small answer only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import LimitError

_CHUNK_BYTES = 1 << 20
"""Of the samples that one call fetches, by what the index says of their lengths."""
_TOKEN_BYTES = 9
"""Of a token on the wire: id, log-probability, mask."""
_OVERLAP = 2
"""So many calls are under way: the next answer is made while one is read."""


async def fetch_payloads(
    buffer: BufferClient, samples: Sequence[pb.LeasedSample], limits: LimitsConfig
) -> AsyncIterator[list[pb.LeasedSample]]:
    """Sets `sample` of each, and yields those of each call when they are there.

    It is set to nothing where the buffer has none, or one that does not fit into a message. Raises the typed errors of
    the buffer.
    """
    chunks = _chunks(samples, limits)
    under_way: list[asyncio.Task[list[pb.LeasedSample]]] = []
    try:
        while True:
            while len(under_way) < _OVERLAP and (chunk := next(chunks, None)):
                under_way.append(asyncio.create_task(_fill(buffer, chunk)))
            if not under_way:
                return
            filled = await under_way[0]
            del under_way[0]
            yield filled
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _chunks(samples: Sequence[pb.LeasedSample], limits: LimitsConfig) -> Iterator[list[pb.LeasedSample]]:
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


async def _fill(buffer: BufferClient, samples: list[pb.LeasedSample]) -> list[pb.LeasedSample]:
    try:
        response = await buffer.fetch([sample.sample_id for sample in samples])
    except LimitError:
        # Text and metadata may be far longer than the tokens tell.
        if len(samples) == 1:
            samples[0].sample = b""
            return samples
        half = len(samples) // 2
        return await _fill(buffer, samples[:half]) + await _fill(buffer, samples[half:])
    payloads = {fetched.sample_id: fetched.sample for fetched in response.samples}
    for sample in samples:
        sample.sample = payloads.get(sample.sample_id, b"")
    return samples
