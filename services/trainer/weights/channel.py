"""The way to one engine of a rollout replica: a collective for the bytes, RPCs for the order of events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc
from polyhead.v1.sample_pb2 import WeightVersion
from services.common import rpc
from services.common.config.models import WeightsConfig
from services.common.errors import FencedError, PolyheadError, UnavailableError, from_rpc_error
from services.common.process import free_port
from services.common.versions import Version
from services.common.weight_group import WeightGroup, nccl_cumem, nccl_version
from services.trainer.detached import in_thread
from services.trainer.weights.shared import IPC, SharedGroup
from services.trainer.weights.snapshot import Snapshot, weights_device

log = structlog.get_logger()

T = TypeVar("T")

# A replica that is told to give up or to leave does so at once, or is left to itself.
FAREWELL_S = 2.0
_WIRE = ("ahead_s", "send_s", "load_version_s")
_EFFECTS = ("tokens_kept", "tokens_recomputed")


@dataclass(frozen=True)
class Pushed:
    """What the replica reported about a complete push to one of its engines."""

    pause_s: float
    requests_continued: int
    requests_aborted: int
    trace: Mapping[str, float]
    """Seconds of each phase."""
    effect: Mapping[str, int]
    """On running requests, where the replica knows: tokens_kept, tokens_recomputed, salt_race."""

    def gb_per_s(self, num_bytes: int) -> float | None:
        """Over the phases in which bytes are on their way, loading included where they are loaded as they come. None
        when there were none.
        """
        seconds = sum(self.trace.get(phase, 0.0) for phase in _WIRE)
        return num_bytes / seconds / 1e9 if seconds else None


class Laps:
    """How long each phase took, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._at = now - self._at, now


class Channel:
    """Pushes to one engine, one push at a time. After an error it is closed; a new channel takes its place."""

    def __init__(
        self, replica: pb.Replica, engine: int, epoch: int, config: WeightsConfig, pause_mode: rpb.PauseMode
    ) -> None:
        """`engine` is the index of one of the replica's engines."""
        self._name = f"{replica.replica_id}/{engine}"
        self._engine = engine
        self._epoch = epoch
        self._config = config
        self._pause_mode = pause_mode
        self._grpc = rpc.channel(replica.address)
        self._stub = rollout_pb2_grpc.RolloutServiceStub(self._grpc)
        self._group_name = f"polyhead-e{epoch}-{replica.replica_id}-{engine}-{uuid.uuid4().hex[:8]}"
        self._group: WeightGroup | SharedGroup | None = None
        self._stages = False
        self._collective: asyncio.Future[Any] | None = None

    @property
    def joined(self) -> bool:
        """Whether there is a group to push over; `status` needs none."""
        return self._group is not None

    @property
    def broadcast(self) -> asyncio.Future[Any] | None:
        """The last broadcast: while it is not done, it may still read from a bucket. Joining reads from none."""
        return self._collective if self._group is not None else None

    async def join(self, ranks: int) -> None:
        """Forms the process group with the engine, which brings `ranks` members. Raises PolyheadError."""
        port = free_port(self._config.address)
        world_size = 1 + ranks
        request = rpb.JoinWeightGroupRequest(
            epoch=self._epoch,
            group_name=self._group_name,
            backend=self._config.backend,
            master_address=self._config.address,
            master_port=port,
            world_size=world_size,
            rank_offset=1,
            engine=self._engine,
            nccl_version=nccl_version(),
            nccl_cumem=nccl_cumem(),
        )

        def join() -> WeightGroup | SharedGroup:
            if self._config.backend == IPC:
                return SharedGroup()
            return WeightGroup(
                backend=self._config.backend,
                address=self._config.address,
                port=port,
                rank=0,
                world_size=world_size,
                name=self._group_name,
                timeout_s=self._config.timeout_s,
                device=str(weights_device(self._config.backend)),
            )

        try:
            joined, self._group = await self._beside("JoinWeightGroup", request, join)
            self._stages = joined.stages
        except BaseException:
            assert self._collective is not None
            self._collective.add_done_callback(_close_late)
            raise

    async def push(self, version: Version, snapshot: Snapshot) -> Pushed:
        """Sends every bucket and commits. Raises PolyheadError; the replica has been told to abort by then."""
        assert self._group is not None, "join comes before push"
        wire_version = version.to_proto()
        laps = Laps()
        begin = rpb.BeginUpdateRequest(
            epoch=self._epoch,
            version=wire_version,
            manifest=snapshot.manifest,
            group_name=self._group_name,
            pause_mode=self._pause_mode,
            engine=self._engine,
        )
        try:
            staged = await self._stage(wire_version, snapshot, laps) if self._stages else 0
            await self._call("BeginUpdate", begin)
            laps.end("begin_s")
            if self._stages:
                await self._send_staged(wire_version, snapshot, staged)
            else:
                await self._send_buckets(wire_version, snapshot)
            laps.end("send_s")
            commit = rpb.CommitUpdateRequest(epoch=self._epoch, version=wire_version, engine=self._engine)
            done = await self._call("CommitUpdate", commit)
            laps.end("commit_s")
        except BaseException as error:
            abort = rpb.AbortUpdateRequest(
                epoch=self._epoch, version=wire_version, reason=str(error), engine=self._engine
            )
            await self._last_words("AbortUpdate", abort)
            await self._leave_group()
            raise
        return pushed(done, laps)

    async def _stage(self, version: WeightVersion, snapshot: Snapshot, laps: Laps) -> int:
        """Sends what the engine takes ahead of its pause: how many buckets that is."""
        assert self._group is not None
        request = rpb.StageUpdateRequest(
            epoch=self._epoch,
            version=version,
            manifest=snapshot.manifest,
            group_name=self._group_name,
            engine=self._engine,
            shared=snapshot.shared,
        )
        buckets: int = (await self._call("StageUpdate", request)).buckets
        laps.end("stage_s")
        await self._collect(partial(self._group.broadcast, *snapshot.buckets[:buckets], after=snapshot.filled))
        laps.end("ahead_s")
        return buckets

    async def _send_staged(self, version: WeightVersion, snapshot: Snapshot, staged: int) -> None:
        assert self._group is not None
        request = rpb.LoadStagedRequest(epoch=self._epoch, version=version, engine=self._engine)
        rest = snapshot.buckets[staged:]
        if rest:
            await self._beside("LoadStaged", request, partial(self._group.broadcast, *rest))
        else:
            await self._call("LoadStaged", request)

    async def _send_buckets(self, version: WeightVersion, snapshot: Snapshot) -> None:
        assert self._group is not None
        for index, bucket in enumerate(snapshot.buckets):
            load = rpb.LoadBucketRequest(epoch=self._epoch, version=version, bucket=index, engine=self._engine)
            await self._beside("LoadBucket", load, partial(self._group.broadcast, bucket, after=snapshot.filled))

    async def status(self) -> pb.Replica:
        """What the replica says of itself and its engines. Raises PolyheadError."""
        response = await self._call("GetStatus", rpb.RolloutServiceGetStatusRequest(), timeout_s=FAREWELL_S)
        return response.replica

    async def leave(self) -> None:
        """Parts in order: the replica may dissolve its end of the group."""
        if self._group is not None:
            await self._leave_group()
        await self.close()

    async def close(self) -> None:
        """Lets go of the group and the connection. Waits for nothing."""
        group, self._group = self._group, None
        if group is not None:
            if self._collective is not None and not self._collective.done():
                # Closing it under a call that still runs in it would crash: the last one out closes it.
                self._collective.add_done_callback(lambda _: group.close())
                group.abort()
            else:
                group.close()
        await self._grpc.close()

    async def _leave_group(self) -> None:
        request = rpb.LeaveWeightGroupRequest(epoch=self._epoch, group_name=self._group_name, engine=self._engine)
        await self._last_words("LeaveWeightGroup", request)

    async def _last_words(self, verb: str, request: Any) -> None:
        try:
            await self._call(verb, request, timeout_s=FAREWELL_S)
        except PolyheadError as error:
            log.info("replica_not_told", verb=verb, engine=self._name, reason=str(error))

    async def _beside(self, verb: str, request: Any, blocking: Callable[[], T]) -> tuple[Any, T]:
        """The RPC and the blocking call of the collective at the same time; the first failure of either is raised.

        The collective cannot be interrupted: when the RPC fails, it is left behind until its own timeout.
        """
        self._collective = collective = in_thread(blocking)
        call = asyncio.ensure_future(self._call(verb, request))
        try:
            await asyncio.wait({call, collective}, return_when=asyncio.FIRST_EXCEPTION)
            if call.done():
                call.result()
            return call.result() if call.done() else None, self._result(collective)
        finally:
            call.cancel()

    async def _collect(self, blocking: Callable[[], T]) -> T:
        """A blocking call of the collective by itself, within the deadline of a call."""
        self._collective = collective = in_thread(blocking)
        done, _ = await asyncio.wait({collective}, timeout=self._config.timeout_s)
        if not done:
            raise UnavailableError(f"collective not done after {self._config.timeout_s:g} s", field=self._name)
        return self._result(collective)

    def _result(self, collective: asyncio.Future[T]) -> T:
        try:
            return collective.result()
        except RuntimeError as error:  # torch's DistError is one
            raise UnavailableError(f"collective failed: {error}", field=self._name) from error

    async def _call(self, verb: str, request: Any, timeout_s: float | None = None) -> Any:
        try:
            method: Callable[..., Awaitable[Any]] = getattr(self._stub, verb)
            return await method(request, timeout=timeout_s or self._config.timeout_s)
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            if isinstance(typed, FencedError):
                raise typed from None
            reason = str(typed) if typed else f"{error.code().name} {error.details()}"
            raise UnavailableError(f"{verb} failed: {reason}", field=self._name) from error


def pushed(done: rpb.CommitUpdateResponse | rpb.LoadVersionResponse, laps: Laps) -> Pushed:
    """What the replica answered at the end, and what was measured here."""
    trace = laps.seconds | {field.name: value for field, value in done.trace.ListFields()}
    effect = {name: getattr(done.effect, name) for name in _EFFECTS if done.effect.HasField(name)}
    effect["salt_race"] = done.effect.salt_race
    return Pushed(done.pause.ToNanoseconds() / 1e9, done.requests_continued, done.requests_aborted, trace, effect)


def _close_late(joined: asyncio.Future[WeightGroup | SharedGroup]) -> None:
    """The engine joined after all, when nobody waited for it any more."""
    if joined.exception() is None:
        joined.result().close()
