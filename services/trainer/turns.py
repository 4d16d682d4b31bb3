"""Colocated mode: whose turn it is on the GPUs, as the trainer tells the rollout replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, PolyheadError, UnavailableError, from_rpc_error
from services.common.versions import Version

log = structlog.get_logger()

LOOK_S = 0.25
LIST_S = 5.0
STATUS_S = 2.0
_LEAVING = (pb.REPLICA_STATE_DRAINING, pb.REPLICA_STATE_DEAD)


class Turns:
    """Lives on the process's asyncio loop. Every call may raise FencedError: then this trainer is at its end."""

    def __init__(self, buffer: BufferClient, epoch: int, timeout_s: float) -> None:
        """`timeout_s`: of each step that a replica takes."""
        self._buffer = buffer
        self._epoch = epoch
        # To end the requests, to be idle, to free the memory.
        self._timeout_s = 3 * timeout_s
        self._stubs: dict[str, tuple[Any, rollout_pb2_grpc.RolloutServiceStub]] = {}
        self._yielded: set[str] = set()
        """Ids of replicas that have given their GPUs up to this trainer."""

    async def take(self, replicas: Sequence[pb.Replica] | None = None) -> bool:
        """Returns True when all replicas, or those given, have yielded, or have left."""
        wanted = None if replicas is None else {replica.replica_id for replica in replicas}
        began = time.monotonic()
        while True:
            listed = await self._listed()
            missing = [
                replica
                for replica in listed or ()
                if replica.replica_id not in self._yielded and (wanted is None or replica.replica_id in wanted)
            ]
            if listed is not None and not missing:
                log.info("gpus_taken", seconds=time.monotonic() - began, replicas=len(self._yielded))
                return True
            await asyncio.gather(*(self._yield(replica) for replica in missing))
            if listed is None or any(replica.replica_id not in self._yielded for replica in missing):
                await asyncio.sleep(LOOK_S)

    async def give_back(self) -> None:
        """Tells every replica that has yielded to go on. One that does not hear it is told with the next push."""
        began = time.monotonic()
        yielded = [replica for replica in await self._listed() or () if replica.replica_id in self._yielded]
        self._yielded.clear()
        await asyncio.gather(*(self._resume(replica) for replica in yielded))
        log.info("gpus_given_back", seconds=time.monotonic() - began, replicas=len(yielded))

    async def behind(self, version: Version) -> list[pb.Replica]:
        """Replicas with an engine that waits for `version`, by their own word: a registry lags a little behind."""
        listed = [replica for replica in await self._listed() or () if _waits(replica, version)]
        asked = await asyncio.gather(*(self._status(replica) for replica in listed))
        return [replica for replica in asked if replica is not None and _waits(replica, version)]

    async def close(self) -> None:
        for channel, _ in self._stubs.values():
            await channel.close()
        self._stubs.clear()

    async def _listed(self) -> list[pb.Replica] | None:
        """None while the buffer is away."""
        try:
            async with asyncio.timeout(LIST_S):
                replicas = await self._buffer.list_replicas(pb.ROLE_ROLLOUT)
        except (TimeoutError, UnavailableError) as error:
            log.warning("turn_waits", waiting_for="the buffer", reason=str(error))
            return None
        return [replica for replica in replicas if replica.state not in _LEAVING]

    async def _yield(self, replica: pb.Replica) -> None:
        try:
            await self._call(replica, "Yield", rpb.YieldRequest(epoch=self._epoch), self._timeout_s)
        except UnavailableError as error:
            log.warning("turn_waits", waiting_for=replica.replica_id, reason=str(error))
        else:
            self._yielded.add(replica.replica_id)

    async def _resume(self, replica: pb.Replica) -> None:
        try:
            await self._call(replica, "Resume", rpb.ResumeRequest(epoch=self._epoch), self._timeout_s)
        except UnavailableError as error:
            log.warning("not_resumed", replica=replica.replica_id, reason=str(error))

    async def _status(self, replica: pb.Replica) -> pb.Replica | None:
        request = rpb.RolloutServiceGetStatusRequest()
        try:
            answer: rpb.RolloutServiceGetStatusResponse = await self._call(replica, "GetStatus", request, STATUS_S)
        except UnavailableError:
            return None
        return answer.replica

    async def _call(self, replica: pb.Replica, verb: str, request: Any, timeout_s: float) -> Any:
        if replica.address not in self._stubs:
            channel = rpc.channel(replica.address)
            self._stubs[replica.address] = channel, rollout_pb2_grpc.RolloutServiceStub(channel)
        try:
            return await getattr(self._stubs[replica.address][1], verb)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            typed: PolyheadError | None = from_rpc_error(error)
            if isinstance(typed, FencedError):
                raise typed from None
            raise UnavailableError(f"{verb}: {typed or error.code().name}", field=replica.replica_id) from error


def _waits(replica: pb.Replica, version: Version) -> bool:
    """Whether it, or an engine of it that could be pushed to, does not serve `version`."""
    if replica.state in _LEAVING:
        return False
    return replica.state == pb.REPLICA_STATE_YIELDED or any(_engine_waits(each, version) for each in replica.engines)


def _engine_waits(engine: pb.Engine, version: Version) -> bool:
    if engine.state == pb.REPLICA_STATE_SERVING:
        return Version.from_proto(engine.weight_version) < version
    return engine.state in (pb.REPLICA_STATE_JOINING, pb.REPLICA_STATE_QUARANTINED, pb.REPLICA_STATE_YIELDED)
