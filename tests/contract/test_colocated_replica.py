"""A replica that yields its GPUs and has them back: real processes, the trainer's own publisher and turns."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import numpy as np
import psutil
import pytest
import torch

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, rollout_pb2_grpc, sample_pb2
from services.common import rpc, wire
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError
from services.common.shared_directory import clear_shared_directory
from services.common.versions import Version
from services.rollout.engines.torch_engine.options import ADMIN_KEY_VARIABLE
from services.trainer.turns import Turns
from services.trainer.weights.publisher import Publisher
from tests.contract.test_rollout_service import GROUPS, SAMPLES, Replica, logprobs, running


class Buffer:
    """Versions of steps that nobody has committed are pushed here, and published to nobody."""

    def __init__(self, buffer: BufferClient) -> None:
        self._buffer = buffer
        self.list_replicas = buffer.list_replicas

    async def publish_version(self, version: Version) -> None:
        if version.step == 0:
            await self._buffer.publish_version(version)


class Trainer:
    """What a colocated trainer does with a replica, one thing after the other."""

    def __init__(self, replica: Replica, epoch: int) -> None:
        self.replica = replica
        self.pushes: list[Any] = []
        self.publisher = Publisher(cast("Any", Buffer(replica.buffer)), replica.config, epoch, self.pushes.append)
        self.turns = Turns(replica.buffer, epoch, 10.0)

    async def publish(self, version: Version) -> None:
        weights = {name: parameter.detach() for name, parameter in self.replica.model.named_parameters()}
        snapshot = await self.publisher.take_snapshot(weights)
        snapshot.fill(weights.items())
        await self.publisher.offer(version, snapshot)
        await asyncio.wait_for(self.publisher.withdraw(), 30)

    async def turn(self, version: Version) -> None:
        assert await asyncio.wait_for(self.turns.take(), 30)
        await self.publish(version)
        await self.turns.give_back()


@asynccontextmanager
async def trainer_of(replica: Replica, epoch: int) -> AsyncIterator[Trainer]:
    trainer = Trainer(replica, epoch)
    await trainer.publisher.start(lambda task: task.cancelled() or task.exception())
    try:
        yield trainer
    finally:
        await trainer.turns.close()
        await trainer.publisher.close()


class Engine:
    """The replica's engine, asked by itself."""

    def __init__(self, pid: int) -> None:
        process = psutil.Process(pid)
        arguments = process.cmdline()
        port = next(
            part.partition("=")[2] or arguments[number + 1] for number, part in enumerate(arguments) if "--port" in part
        )
        self._url = f"http://127.0.0.1:{port}"
        self._headers = {"Authorization": f"Bearer {process.environ()[ADMIN_KEY_VARIABLE]}"}

    async def info(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"{self._url}/server_info") as response:
            return await response.json()

    async def status_of(self, path: str, body: dict[str, Any]) -> int:
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.post(self._url + path, json=body) as response,
        ):
            return response.status


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    async with running(tmp_path, engines=1, colocate=True) as made:
        yield made
    clear_shared_directory(made.config.run.dir)


async def stub_of(replica: Replica) -> rollout_pb2_grpc.RolloutServiceStub:
    return rollout_pb2_grpc.RolloutServiceStub(rpc.channel((await replica.state()).address))


@pytest.mark.timeout(180)
async def test_a_replica_yields_and_goes_on(replica: Replica) -> None:
    joining = await replica.until_state(pb.REPLICA_STATE_JOINING)
    engine = Engine(joining.child_pids["engine-0"])
    awake_bytes = (await engine.info())["memory_bytes"]
    epoch = (await replica.buffer.acquire_epoch("test")).epoch
    await replica.buffer.recover(epoch, 0)
    prompts = [sample_pb2.Prompt(text=f"{number}+{number}=", label="1") for number in range(GROUPS)]
    groups = list((await replica.buffer.submit("first", prompts)).group_ids)
    old = copy.deepcopy(replica.model)
    v0, v1 = Version(epoch, 0), Version(epoch, 1)
    replica.stub = await stub_of(replica)
    async with trainer_of(replica, epoch) as trainer:
        await trainer.turn(v0)
        await replica.until_more_tokens(60)

        # It lets go of everything: samples are in the buffer with what they have, the memory is free.
        assert await trainer.turns.take()
        assert await replica.counters(sample_pb2.SAMPLE_STATE_GENERATING) == 0
        pending = (await replica.buffer.list_samples(sample_pb2.SAMPLE_STATE_PENDING, limit=100)).samples
        assert len(pending) + await replica.counters(sample_pb2.SAMPLE_STATE_GENERATED) == GROUPS * SAMPLES
        asleep = await engine.info()
        assert (asleep["memory_bytes"], asleep["asleep"]) == (0, ["kv_cache", "weights"])
        assert awake_bytes > 1_000_000
        seen = await replica.until_state(pb.REPLICA_STATE_YIELDED)
        assert f"yielded to epoch {epoch}" in seen.trouble
        assert seen.engines[0].state == pb.REPLICA_STATE_YIELDED
        request = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        assert await engine.status_of("/generate", request) == 503
        assert await engine.status_of("/weights_checker", {"action": "checksum"}) == 400
        # Yielding twice changes nothing.
        await replica.stub.Yield(rollout_pb2.YieldRequest(epoch=epoch), timeout=10)

        # With new weights, but without its cache, it serves nothing yet.
        with torch.no_grad():
            for parameter in replica.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        await trainer.publish(v1)
        assert (await engine.info())["asleep"] == ["kv_cache"]
        assert await engine.status_of("/generate", request) == 503
        assert (await replica.until(lambda seen: seen.engines[0].weight_version == v1.to_proto())).state == (
            pb.REPLICA_STATE_YIELDED
        )
        await trainer.turns.give_back()
        assert (await engine.info())["memory_bytes"] == awake_bytes
        await replica.until_generated(GROUPS * SAMPLES)

    # Resumed samples keep what they had: each token's log-prob is that of the version it names.
    resumed = 0
    for sample in await replica.samples(groups):
        segment = sample.segments[0]
        got = wire.decode_logprobs(segment.rollout_logprobs)
        under = {v0: logprobs(old, sample), v1: logprobs(replica.model, sample)}
        resumed += len(segment.spans) == 2
        for span in segment.spans:
            expected = under[Version.from_proto(span.version)]
            np.testing.assert_allclose(got[span.start : span.end], expected[span.start : span.end], atol=2e-4)
    assert resumed > 0
    assert all(push["ok"] for push in trainer.pushes)


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_an_engine_that_dies_asleep_and_a_trainer_that_does_not_come_back(replica: Replica) -> None:
    joining = await replica.until_state(pb.REPLICA_STATE_JOINING)
    first = (await replica.buffer.acquire_epoch("test")).epoch
    await replica.buffer.recover(first, 0)
    async with trainer_of(replica, first) as trainer:
        await trainer.turn(Version(first, 0))
        assert await trainer.turns.take()
        pid = joining.child_pids["engine-0"]
        os.kill(pid, signal.SIGKILL)
        # Another one takes its place, and sleeps at once: the GPU is the trainer's.
        back = await replica.until(
            lambda seen: (
                seen.child_pids.get("engine-0", pid) != pid
                and [each.state for each in seen.engines] == [pb.REPLICA_STATE_YIELDED]
            )
        )
        engine = Engine(back.child_pids["engine-0"])
        assert (await engine.info())["memory_bytes"] == 0
        assert back.state == pb.REPLICA_STATE_YIELDED

    # The next trainer begins with a turn of its own.
    second = (await replica.buffer.acquire_epoch("next")).epoch
    await replica.buffer.recover(second, 0)
    async with trainer_of(replica, second) as following:
        assert await following.turns.behind(Version(second, 0))
        assert await following.turns.take()
        stub = await stub_of(replica)
        for call in (
            stub.Resume(rollout_pb2.ResumeRequest(epoch=first), timeout=10),
            stub.Yield(rollout_pb2.YieldRequest(epoch=first), timeout=10),
        ):
            with pytest.raises(Exception, match="older than"):
                await call
        with pytest.raises(FencedError):
            await trainer_turns_of(replica, first)
        await following.publish(Version(second, 0))
        await following.turns.give_back()
        await replica.until_state(pb.REPLICA_STATE_SERVING)
        assert await following.turns.behind(Version(second, 0)) == []


async def trainer_turns_of(replica: Replica, epoch: int) -> None:
    turns = Turns(replica.buffer, epoch, 10.0)
    try:
        await turns.take()
    finally:
        await turns.close()
