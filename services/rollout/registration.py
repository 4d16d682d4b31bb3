"""What a rollout replica says of itself at the buffer."""

from __future__ import annotations

import asyncio
import os

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError
from services.rollout.replica import Replica

log = structlog.get_logger()

FAREWELL_S = 2.0


def describe(replica: Replica, address: str) -> pb.Replica:
    """The replica as others see it."""
    version = replica.life.version
    return pb.Replica(
        replica_id=replica.replica_id,
        role=pb.ROLE_ROLLOUT,
        address=address,
        state=replica.life.state,
        weight_version=version.to_proto() if version is not None else None,
        pid=os.getpid(),
        stats=replica.stats.snapshot(),
        child_pids={"engine": replica.engine_pid} if replica.engine_pid is not None else {},
    )


async def say_farewell(buffer: BufferClient, replica: Replica, address: str) -> None:
    """Registers the replica as ended, if the buffer hears it soon."""
    replica.life.end()
    try:
        async with asyncio.timeout(FAREWELL_S):
            await buffer.register_replica(describe(replica, address))
    except (TimeoutError, PolyheadError) as error:
        log.info("farewell_unheard", reason=str(error))
