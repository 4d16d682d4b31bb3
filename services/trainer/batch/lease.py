"""A batch from the buffer: the lease of its records, then the samples."""

from __future__ import annotations

from collections.abc import Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import PreconditionError
from services.common.payloads import fetch_payloads


async def lease_batch(
    buffer: BufferClient, holder: str, *, epoch: int, step: int, wait_s: float, limits: LimitsConfig
) -> pb.LeaseResponse:
    """The batch of `step`, every sample with its payload; or no groups, and what is being waited for.

    Safe to repeat. Raises the typed errors of the buffer, and PreconditionError when a leased sample has no payload.
    """
    response = await buffer.lease(
        sample_pb2.STAGE_TRAIN, holder, wait_s=wait_s, epoch=epoch, step=step, include_payload=False
    )
    await fetch_all(buffer, [sample for group in response.groups for sample in group.samples], limits)
    return response


async def fetch_all(buffer: BufferClient, samples: Sequence[pb.LeasedSample], limits: LimitsConfig) -> None:
    """Sets the payload of each. Raises like `lease_batch`."""
    async for fetched in fetch_payloads(buffer, samples, limits):
        for sample in fetched:
            if not sample.sample:
                raise PreconditionError(
                    "the buffer has no payload of a leased sample that fits into a message", field=sample.sample_id
                )
