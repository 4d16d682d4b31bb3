"""Groups that are scored as a whole: who belongs to them."""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.payloads import fetch_payloads


async def fetch_members(buffer: BufferClient, group: pb.LeasedGroup, limits: LimitsConfig) -> list[pb.LeasedSample]:
    """All living samples of the group with their payloads, in index order.

    What is leased may be a rest: the others were scored before, or are dead. Those come without a lease id, and only
    the living ones. Raises the typed errors of the buffer.
    """
    leased = {sample.index: sample for sample in group.samples}
    members = [leased.get(index) or _sibling(group, index) for index in range(group.group_size)]
    async for _ in fetch_payloads(buffer, members, limits):
        pass
    return [member for member in members if member.lease_id or member.sample]


def _sibling(group: pb.LeasedGroup, index: int) -> pb.LeasedSample:
    return pb.LeasedSample(sample_id=f"{group.group_id}-{index:03d}", index=index)
