"""The replica's gRPC face and its heartbeat."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, rollout_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, InvalidArgumentError, PreconditionError, from_rpc_error
from services.common.registration import keep_registered
from services.common.versions import Version
from services.rollout.registration import describe
from services.rollout.service import SERVICE_NAME, RolloutService
from tests.kit.fuzz.calls import send_malformed
from tests.kit.rollout_rig import GROUP, manifest, until

PROMPT = "3+4="
V1 = Version(1, 1)


@pytest.fixture
async def served(make_rig):
    """A rig, a stub of its service, and the event that ends the process."""
    rig = await make_rig()
    stop = asyncio.Event()
    service = RolloutService(rig.replica, rig.receivers, rig.worker, rig.turns(), stop)
    async with service.listening("127.0.0.1:0", message_mb=4) as address, rpc.channel(address) as channel:
        yield rig, rollout_pb2_grpc.RolloutServiceStub(channel), stop


def begin(version: Version = V1) -> rollout_pb2.BeginUpdateRequest:
    return rollout_pb2.BeginUpdateRequest(
        epoch=version.epoch, version=version.to_proto(), manifest=manifest(1), group_name=GROUP, pause_mode=1
    )


async def join(stub, epoch: int = 1) -> None:
    request = rollout_pb2.JoinWeightGroupRequest(epoch=epoch, group_name=GROUP, backend="gloo", world_size=2)
    await stub.JoinWeightGroup(request, timeout=5)


async def test_a_push_over_the_wire(served):
    rig, stub, _ = served
    rig.engine.limit_tokens = 2
    rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    await join(stub)
    assert (await stub.BeginUpdate(begin(), timeout=5)).running_requests == 4
    version = V1.to_proto()
    await stub.LoadBucket(rollout_pb2.LoadBucketRequest(epoch=1, version=version, bucket=0), timeout=5)
    done = await stub.CommitUpdate(rollout_pb2.CommitUpdateRequest(epoch=1, version=version), timeout=5)
    assert (done.requests_continued, done.requests_aborted) == (4, 0)
    assert done.pause.ToNanoseconds() > 0
    await stub.LeaveWeightGroup(rollout_pb2.LeaveWeightGroupRequest(epoch=1, group_name=GROUP), timeout=5)
    assert rig.engine.names()[-1] == "destroy_weights_update_group"
    status = await stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=5)
    (engine,) = status.replica.engines
    assert (engine.index, engine.name, engine.ranks) == (0, "fake_engine/1", 1)
    assert (engine.state, Version.from_proto(engine.weight_version)) == (pb.REPLICA_STATE_SERVING, V1)
    assert status.running_requests == 4
    assert status.replica.stats["pushes"] == 1
    assert Version.from_proto(status.replica.weight_version) == V1
    await stub.AbortUpdate(rollout_pb2.AbortUpdateRequest(epoch=1, version=version), timeout=5)
    assert rig.life.version == V1


async def test_refusals_are_typed(served):
    _, stub, _ = served
    await join(stub, epoch=3)
    with pytest.raises(grpc.aio.AioRpcError) as fenced:
        await stub.BeginUpdate(begin(), timeout=5)
    assert isinstance(from_rpc_error(fenced.value), FencedError)
    with pytest.raises(grpc.aio.AioRpcError) as early:
        await stub.LoadBucket(rollout_pb2.LoadBucketRequest(epoch=3, version=V1.to_proto()), timeout=5)
    assert isinstance(from_rpc_error(early.value), PreconditionError)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Drain(rollout_pb2.DrainRequest(epoch=2), timeout=5)


async def test_an_engine_that_is_not_there_is_named(served):
    _, stub, _ = served
    request = rollout_pb2.JoinWeightGroupRequest(epoch=1, group_name=GROUP, backend="gloo", world_size=2, engine=1)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.JoinWeightGroup(request, timeout=5)
    error = from_rpc_error(unknown.value)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == "engine"


async def test_a_draining_replica_is_not_updated(served):
    rig, stub, _ = served
    await join(stub)
    await stub.Drain(rollout_pb2.DrainRequest(epoch=1), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await stub.BeginUpdate(begin(), timeout=5)
    assert isinstance(from_rpc_error(late.value), PreconditionError)
    await rig.lose()
    await rig.engine.start()
    await rig.attach()
    assert rig.replica.state == pb.REPLICA_STATE_DRAINING


async def test_a_caller_that_hangs_up_does_not_leave_the_engine_paused(served):
    rig, stub, _ = served
    await join(stub)
    rig.engine.hang_update = True
    await stub.BeginUpdate(begin(), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.LoadBucket(rollout_pb2.LoadBucketRequest(epoch=1, version=V1.to_proto(), bucket=0), timeout=0.1)
    assert rig.life.updating == V1
    state = (await stub.AbortUpdate(rollout_pb2.AbortUpdateRequest(epoch=1, version=V1.to_proto()), timeout=5)).state
    assert state == pb.REPLICA_STATE_QUARANTINED


async def test_drain_over_the_wire_ends_the_process(served):
    rig, stub, stop = served
    rig.engine.limit_tokens = 2
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    assert (await stub.Drain(rollout_pb2.DrainRequest(epoch=1), timeout=10)).samples_returned == 4
    assert stop.is_set()
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_DRAIN}
    assert rig.replica.state == pb.REPLICA_STATE_DRAINING


async def test_the_heartbeat_tells_state_changes_at_once(make_rig):
    rig = await make_rig(serving=False)
    address = rig.buffer._server.address
    async with BufferClient(address, retry_for_s=0.2) as buffer:
        beating = asyncio.create_task(
            keep_registered(buffer, lambda: describe(rig.replica, "127.0.0.1:7"), rig.replica.changed, 1.0)
        )
        await until(lambda: len(rig.buffer.replicas) == 1)
        assert rig.buffer.replicas[0].state == pb.REPLICA_STATE_JOINING
        assert rig.buffer.replicas[0].role == pb.ROLE_ROLLOUT
        assert rig.buffer.replicas[0].address == "127.0.0.1:7"
        assert dict(rig.buffer.replicas[0].child_pids) == {"engine-0": 1}
        assert not rig.buffer.replicas[0].HasField("weight_version")
        await rig.push(V1)
        await until(lambda: rig.buffer.replicas[-1].state == pb.REPLICA_STATE_SERVING, 0.9)
        assert Version.from_proto(rig.buffer.replicas[-1].weight_version) == V1
        rig.buffer.down = True
        rig.first.detach()
        await asyncio.sleep(0.3)
        rig.buffer.down = False
        await until(lambda: rig.buffer.replicas[-1].state == pb.REPLICA_STATE_SUSPECT)
        beating.cancel()


async def test_malformed_requests_are_refused_by_name_and_harm_nobody(served, tmp_path):
    rig, stub, _ = served
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: all(sample.sample is not None for sample in held))
    version = V1.to_proto()
    group = {"epoch": 1, "group_name": GROUP}
    requests = {
        "JoinWeightGroup": rollout_pb2.JoinWeightGroupRequest(**group, backend="gloo", world_size=2),
        "LeaveWeightGroup": rollout_pb2.LeaveWeightGroupRequest(**group),
        "BeginUpdate": begin(),
        "LoadBucket": rollout_pb2.LoadBucketRequest(epoch=1, version=version),
        "CommitUpdate": rollout_pb2.CommitUpdateRequest(epoch=1, version=version),
        "AbortUpdate": rollout_pb2.AbortUpdateRequest(epoch=1, version=version, reason="test"),
        "LoadVersion": rollout_pb2.LoadVersionRequest(epoch=1, version=version, directory=str(tmp_path)),
        "GetStatus": rollout_pb2.RolloutServiceGetStatusRequest(),
    }
    async with rpc.channel((await stub.GetStatus(requests["GetStatus"], timeout=5)).replica.address) as channel:
        unavailable = frozenset({grpc.StatusCode.UNAVAILABLE})
        await send_malformed(channel, SERVICE_NAME, requests, seed=0, count=1000, also=unavailable)
        assert (await stub.GetStatus(requests["GetStatus"], timeout=5)).replica.replica_id
