"""One reward replica: the pool, the service, the puller and the heartbeat, from start to drain."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import UnavailableError
from services.common.lifecycle import Process
from services.common.registration import keep_registered
from services.reward.pool import ScorerPool
from services.reward.preference import keep_preferring
from services.reward.service import FULL_NAME, RewardServicer
from services.reward.settings import scorer_settings
from services.reward.stats import Stats
from services.reward.worker import Puller

HEARTBEAT_S = 1.0
GRACE_S = 1.0
GOODBYE_S = 0.5


async def serve(config: Config, process: Process) -> None:
    """Runs until `process.stop` is set. Raises ConfigError when the scorer does not load or the port is taken."""
    stats = Stats(config.reward.processes)
    async with (
        _pool(config) as pool,
        _server(config, pool, stats) as server,
        BufferClient(config.buffer.address, message_mb=config.buffer.limits.message_mb) as buffer,
    ):
        changed = asyncio.Event()

        def describe() -> pb.Replica:
            return _describe(process, server.address, pool, stats)

        heartbeat = asyncio.create_task(keep_registered(buffer, describe, changed, HEARTBEAT_S))
        stopping = asyncio.create_task(_announce(process.stop, changed, server))
        puller = asyncio.create_task(Puller(buffer, pool, process.replica_id, config, stats).run(process.stop))
        batch = config.batch
        groups = batch.over_sampling_batch_size or batch.rollout_batch_size
        preferring = asyncio.create_task(keep_preferring(buffer, pool, stats, groups))
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
async def _pool(config: Config) -> AsyncIterator[ScorerPool]:
    reward = config.reward
    pool = ScorerPool(scorer_settings(config), processes=reward.processes, timeout_s=reward.score_timeout_s)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def _server(config: Config, pool: ScorerPool, stats: Stats) -> AsyncIterator[rpc.Server]:
    limits = config.buffer.limits
    servicer = RewardServicer(pool, stats, max_items=limits.samples_per_rpc)
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


def _describe(process: Process, address: str, pool: ScorerPool, stats: Stats) -> pb.Replica:
    if process.stop.is_set():
        state = pb.REPLICA_STATE_DRAINING
    elif pool.available.is_set():
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
        child_pids={f"scorer-{number}": pid for number, pid in enumerate(pool.pids())},
    )
