"""The replica's heartbeat at the buffer: where it is, what state it is in, what it has done."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError
from services.rollout.replica import Replica

log = structlog.get_logger()

INTERVAL_S = 1.0
FAREWELL_S = 2.0
_BEATS_PER_TTL = 3.0


class Registration:
    """Beats every second, and at once when the state changes."""

    def __init__(self, buffer: BufferClient, replica: Replica, address: str) -> None:
        self._buffer = buffer
        self._replica = replica
        self._address = address
        self._interval_s = INTERVAL_S

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._replica.changed.clear()
            await self.beat()
            try:
                await asyncio.wait_for(self._replica.changed.wait(), self._interval_s)
            except TimeoutError:
                continue

    async def farewell(self) -> None:
        """Says that the replica has ended, if the buffer hears it soon."""
        self._replica.life.end()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.beat(), FAREWELL_S)

    async def beat(self) -> None:
        """Registers once. A buffer that does not answer is tried again at the next beat."""
        try:
            response = await self._buffer.register_replica(describe(self._replica, self._address))
        except PolyheadError as error:
            log.warning("register_failed", reason=str(error))
            return
        ttl_s = response.ttl.ToTimedelta().total_seconds()
        if ttl_s > 0:
            self._interval_s = min(INTERVAL_S, ttl_s / _BEATS_PER_TTL)


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
