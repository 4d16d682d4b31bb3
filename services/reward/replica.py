"""One reward replica: what scores, the service, the puller and the heartbeat, from start to drain."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import UnavailableError
from services.common.lifecycle import Process
from services.common.registration import keep_registered
from services.reward.opening import running_station
from services.reward.preference import keep_preferring
from services.reward.service import FULL_NAME, RewardServicer
from services.reward.station import Station
from services.reward.stats import Stats
from services.reward.worker import Puller

HEARTBEAT_S = 1.0
GRACE_S = 1.0
GOODBYE_S = 0.5
_MAX_TROUBLE = 500


async def serve(config: Config, process: Process) -> None:
    """Runs until `process.stop` is set. Raises ConfigError when the scorer does not load or the port is taken."""
    async with AsyncExitStack() as stack:
        station = await stack.enter_async_context(running_station(config))
        stats = Stats(station.width)
        server = await stack.enter_async_context(_server(config, station, stats))
        client = BufferClient(config.buffer.address, message_mb=config.buffer.limits.message_mb)
        buffer = await stack.enter_async_context(client)
        changed = asyncio.Event()

        def describe() -> pb.Replica:
            return _describe(process, server.address, station, stats)

        heartbeat = asyncio.create_task(keep_registered(buffer, describe, changed, HEARTBEAT_S))
        stopping = asyncio.create_task(_announce(process.stop, changed, server))
        puller = asyncio.create_task(Puller(buffer, station, process.replica_id, config, stats).run(process.stop))
        batch = config.batch
        groups = batch.over_sampling_batch_size or batch.rollout_batch_size
        preferring = asyncio.create_task(keep_preferring(buffer, station, stats, groups))
        tasks = (puller, heartbeat, preferring)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
        await _say_goodbye(buffer, describe())


@asynccontextmanager
async def _server(config: Config, station: Station, stats: Stats) -> AsyncIterator[rpc.Server]:
    limits = config.buffer.limits
    servicer = RewardServicer(station, stats, max_items=limits.samples_per_rpc)
    server = await rpc.serve(
        config.reward.address,
        lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
        [FULL_NAME],
        message_mb=limits.message_mb,
    )
    try:
        yield server
    finally:
        await server.stop(GRACE_S)


async def _announce(stop: asyncio.Event, changed: asyncio.Event, server: rpc.Server) -> None:
    """Tells registry and health checks at once that this replica is leaving."""
    await stop.wait()
    changed.set()
    await server.set_serving(False)


async def _say_goodbye(buffer: BufferClient, last: pb.Replica) -> None:
    """Leaves the final counters in the registry, if the buffer is still there to take them."""
    with suppress(TimeoutError, UnavailableError):
        async with asyncio.timeout(GOODBYE_S):
            await buffer.register_replica(last)


def _describe(process: Process, address: str, station: Station, stats: Stats) -> pb.Replica:
    if process.stop.is_set():
        state = pb.REPLICA_STATE_DRAINING
    elif station.available.is_set() and station.room is None:
        state = pb.REPLICA_STATE_SERVING
    else:
        state = pb.REPLICA_STATE_SUSPECT
    return pb.Replica(
        replica_id=process.replica_id,
        role=pb.ROLE_REWARD,
        address=address,
        state=state,
        pid=os.getpid(),
        stats=stats.as_dict(),
        trouble=station.trouble[:_MAX_TROUBLE],
        child_pids={f"scorer-{number}": pid for number, pid in enumerate(station.pids())},
    )
