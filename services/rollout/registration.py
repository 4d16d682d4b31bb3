"""What a rollout replica says of itself at the buffer."""

from __future__ import annotations

import asyncio
import os

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError
from services.common.versions import Version
from services.rollout.engines.engine import Engine
from services.rollout.replica import Replica

log = structlog.get_logger()

FAREWELL_S = 2.0


def describe(replica: Replica, address: str) -> pb.Replica:
    """The replica as others see it."""
    return pb.Replica(
        replica_id=replica.replica_id,
        role=pb.ROLE_ROLLOUT,
        address=address,
        state=replica.state,
        weight_version=_to_proto(replica.version),
        pid=os.getpid(),
        stats=replica.stats.snapshot(),
        child_pids=_child_pids(replica),
        engines=[_engine(engine) for engine in replica.engines],
        trouble=replica.trouble,
    )


def _engine(engine: Engine) -> pb.Engine:
    info = engine.info
    return pb.Engine(
        index=engine.index,
        state=engine.life.state,
        weight_version=_to_proto(engine.life.version),
        name=info.name if info else "",
        ranks=info.ranks if info else 1,
    )


def _child_pids(replica: Replica) -> dict[str, int]:
    pids = {f"engine-{engine.index}": engine.pid for engine in replica.engines}
    pids["router"] = replica.router.pid if replica.router is not None else None
    return {name: pid for name, pid in pids.items() if pid is not None}


def _to_proto(version: Version | None) -> sample_pb2.WeightVersion | None:
    return version.to_proto() if version is not None else None


async def say_farewell(buffer: BufferClient, replica: Replica, address: str) -> None:
    """Registers the replica as ended, if the buffer hears it soon."""
    replica.end()
    try:
        async with asyncio.timeout(FAREWELL_S):
            await buffer.register_replica(describe(replica, address))
    except (TimeoutError, PolyheadError) as error:
        log.info("farewell_unheard", reason=str(error))
