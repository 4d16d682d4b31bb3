# ruff: noqa: N802 (the contract names the methods)
"""The replica's gRPC face: the trainer pushes weights and asks for an orderly end through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from polyhead.v1 import rollout_pb2 as pb
from polyhead.v1 import rollout_pb2_grpc
from services.common import rpc
from services.common.errors import InvalidArgumentError
from services.rollout.registration import describe
from services.rollout.replica import Replica
from services.rollout.turns import Turns
from services.rollout.weights import WeightReceiver
from services.rollout.worker import Worker

SERVICE_NAME = "polyhead.v1.RolloutService"
STOP_GRACE_S = 1.0

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RolloutService(rollout_pb2_grpc.RolloutServiceServicer):
    """Every call but GetStatus carries the trainer's epoch; an older one gets FencedError."""

    def __init__(
        self, replica: Replica, receivers: Sequence[WeightReceiver], worker: Worker, turns: Turns, stop: asyncio.Event
    ) -> None:
        """One receiver for each engine, by its index."""
        self._replica = replica
        self._receivers = receivers
        self._worker = worker
        self._turns = turns
        self._stop = stop
        self._address = ""
        self._calls: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def listening(self, address: str, *, message_mb: int) -> AsyncIterator[str]:
        """Serves while the block runs, at the address it is given. Raises ConfigError when it cannot be bound."""
        server = await rpc.serve(
            address,
            lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(self, server),
            [SERVICE_NAME],
            message_mb=message_mb,
        )
        self._address = server.address
        try:
            yield server.address
        finally:
            await server.stop(STOP_GRACE_S)

    async def JoinWeightGroup(self, request: pb.JoinWeightGroupRequest, context: Context) -> pb.JoinWeightGroupResponse:
        return pb.JoinWeightGroupResponse(stages=await self._to_the_end(self._receiver(request.engine).join(request)))

    async def LeaveWeightGroup(
        self, request: pb.LeaveWeightGroupRequest, context: Context
    ) -> pb.LeaveWeightGroupResponse:
        await self._to_the_end(self._receiver(request.engine).leave(request))
        return pb.LeaveWeightGroupResponse()

    async def StageUpdate(self, request: pb.StageUpdateRequest, context: Context) -> pb.StageUpdateResponse:
        return pb.StageUpdateResponse(buckets=await self._to_the_end(self._receiver(request.engine).stage(request)))

    async def BeginUpdate(self, request: pb.BeginUpdateRequest, context: Context) -> pb.BeginUpdateResponse:
        running = await self._to_the_end(self._receiver(request.engine).begin(request))
        return pb.BeginUpdateResponse(running_requests=running)

    async def LoadBucket(self, request: pb.LoadBucketRequest, context: Context) -> pb.LoadBucketResponse:
        await self._to_the_end(self._receiver(request.engine).load(request))
        return pb.LoadBucketResponse()

    async def LoadStaged(self, request: pb.LoadStagedRequest, context: Context) -> pb.LoadStagedResponse:
        await self._to_the_end(self._receiver(request.engine).load_staged(request))
        return pb.LoadStagedResponse()

    async def CommitUpdate(self, request: pb.CommitUpdateRequest, context: Context) -> pb.CommitUpdateResponse:
        done = await self._to_the_end(self._receiver(request.engine).commit(request))
        return pb.CommitUpdateResponse(
            pause=_duration(done.pause_s),
            requests_continued=done.continued,
            requests_aborted=done.aborted,
            trace=done.trace,
            effect=done.effect,
        )

    async def AbortUpdate(self, request: pb.AbortUpdateRequest, context: Context) -> pb.AbortUpdateResponse:
        return pb.AbortUpdateResponse(state=await self._to_the_end(self._receiver(request.engine).abort(request)))

    async def LoadVersion(self, request: pb.LoadVersionRequest, context: Context) -> pb.LoadVersionResponse:
        done = await self._to_the_end(self._receiver(request.engine).load_version(request))
        return pb.LoadVersionResponse(
            pause=_duration(done.pause_s),
            requests_continued=done.continued,
            requests_aborted=done.aborted,
            trace=done.trace,
            effect=done.effect,
        )

    async def Yield(self, request: pb.YieldRequest, context: Context) -> pb.YieldResponse:
        return await self._to_the_end(self._turns.yield_(request.epoch))

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        return await self._to_the_end(self._turns.resume(request.epoch))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        self._replica.fence.check(request.epoch)
        returned = await self._to_the_end(self._worker.drain())
        self._stop.set()
        return pb.DrainResponse(samples_returned=returned)

    async def GetStatus(
        self, request: pb.RolloutServiceGetStatusRequest, context: Context
    ) -> pb.RolloutServiceGetStatusResponse:
        return pb.RolloutServiceGetStatusResponse(
            replica=describe(self._replica, self._address),
            running_requests=self._replica.stats.busy.running,
        )

    def _receiver(self, engine: int) -> WeightReceiver:
        if engine >= len(self._receivers):
            raise InvalidArgumentError(f"{engine}, of {len(self._receivers)} engines", field="engine")
        return self._receivers[engine]

    async def _to_the_end(self, call: Coroutine[Any, Any, T]) -> T:
        """A caller that hangs up must not leave an engine paused half-way: the call goes on without it."""
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
