"""A worker and a weight receiver around a fake engine and a fake buffer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, weights_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.layout import ModelLayout
from services.rollout.prompting import Prompter
from services.rollout.replica import Replica
from services.rollout.weights import WeightReceiver
from services.rollout.worker import Worker
from tests.kit.rollout_fake_buffer import FakeBuffer
from tests.kit.rollout_fake_engine import FakeEngine

FIRST = Version(1, 0)
GROUP = "push"


@dataclass
class Rig:
    """One replica, not yet running."""

    config: Config
    engine: FakeEngine
    buffer: FakeBuffer
    replica: Replica
    worker: Worker
    receiver: WeightReceiver

    def serve(self, version: Version = FIRST) -> None:
        """As after a complete push."""
        self.engine.version = str(version)
        if not self.replica.life.may_generate:
            self.replica.life.begin_update(version)
            self.replica.life.commit_update()
        self.replica.turned()

    async def begin(self, version: Version, buckets: int = 2, mode: str = "IN_PLACE") -> int:
        await self.join(version.epoch)
        return await self.receiver.begin(
            rollout_pb2.BeginUpdateRequest(
                epoch=version.epoch,
                version=version.to_proto(),
                manifest=manifest(buckets),
                group_name=GROUP,
                pause_mode=rollout_pb2.PauseMode.Value(f"PAUSE_MODE_{mode}"),
            )
        )

    async def join(self, epoch: int) -> None:
        await self.receiver.join(
            rollout_pb2.JoinWeightGroupRequest(epoch=epoch, group_name=GROUP, backend="gloo", world_size=2)
        )

    async def load(self, version: Version, bucket: int) -> None:
        await self.receiver.load(
            rollout_pb2.LoadBucketRequest(epoch=version.epoch, version=version.to_proto(), bucket=bucket)
        )

    def commit(self, version: Version) -> Awaitable[object]:
        return self.receiver.commit(rollout_pb2.CommitUpdateRequest(epoch=version.epoch, version=version.to_proto()))

    def abort(self, version: Version) -> Awaitable[pb.ReplicaState]:
        return self.receiver.abort(
            rollout_pb2.AbortUpdateRequest(epoch=version.epoch, version=version.to_proto(), reason="test")
        )

    async def push(self, version: Version, mode: str = "IN_PLACE") -> None:
        await self.begin(version, mode=mode)
        await self.load(version, 0)
        await self.load(version, 1)
        await self.commit(version)


def manifest(buckets: int) -> weights_pb2.WeightManifest:
    tensors = [[weights_pb2.TensorSpec(name=f"w{number}", dtype="float32", shape=[2])] for number in range(buckets)]
    return weights_pb2.WeightManifest(
        buckets=[weights_pb2.WeightBucket(tensors=tensor, num_bytes=8) for tensor in tensors], num_bytes=8 * buckets
    )


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Waits for a condition; fails when it does not come."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running_rig(config: Config, prompter: Prompter, *, serving: bool = True) -> AsyncIterator[Rig]:
    """A rig whose worker runs. At the end the worker must not have failed."""
    engine, store = FakeEngine(), FakeBuffer()
    await engine.start()
    buffer = BufferClient(await store.start(), retry_for_s=0.2)
    replica = Replica("rollout-0.test")
    worker = Worker(config, replica, prompter, buffer)
    receiver = WeightReceiver(
        replica,
        ModelLayout({}),
        worker.give_back,
        timeout_s=config.trainer.weights.timeout_s,
        load_pause_mode="in_place",
    )
    client = EngineClient(engine.url, "key")
    replica.attach(client, await client.server_info(), 1)
    rig = Rig(config, engine, store, replica, worker, receiver)
    if serving:
        rig.serve()
    running = asyncio.create_task(worker.run())
    try:
        yield rig
    finally:
        failed = running.done() and not running.cancelled() and running.exception()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        worker.give_back(pb.RELEASE_REASON_DRAIN)
        await client.close()
        await engine.stop()
        await buffer.close()
        await store.stop()
        assert not failed, failed


def changed(config: Config, *, sampling: dict[str, Any] | None = None, **settings: Any) -> Config:
    """A copy with other rollout settings."""
    tree = config.model_dump()
    tree["rollout"] |= settings
    tree["rollout"]["sampling"] |= sampling or {}
    return Config.model_validate(tree)
