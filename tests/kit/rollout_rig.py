"""A worker and a weight receiver around a fake engine and a fake buffer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, weights_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.engines.engine import Engine
from services.rollout.engines.router import RouterKeeper
from services.rollout.engines.router_launch import router_command
from services.rollout.fleet import EngineLife
from services.rollout.layout import ModelLayout
from services.rollout.prompting import Prompter
from services.rollout.replica import Replica
from services.rollout.turns import Turns
from services.rollout.update import Committed
from services.rollout.weights import WeightReceiver
from services.rollout.worker import Worker
from tests.kit.rollout_fake_buffer import FakeBuffer
from tests.kit.rollout_fake_engine import FakeEngine

FIRST = Version(1, 0)
GROUP = "push"


@dataclass
class Rig:
    """One replica, not yet running. What takes an `engine` means the first one unless told otherwise."""

    config: Config
    engines: list[FakeEngine]
    buffer: FakeBuffer
    replica: Replica
    worker: Worker
    receivers: list[WeightReceiver]
    killed: list[int] = field(default_factory=list)
    """Engines that the replica has ended."""
    clients: list[EngineClient] = field(default_factory=list)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    @property
    def receiver(self) -> WeightReceiver:
        return self.receivers[0]

    @property
    def first(self) -> Engine:
        """The replica's idea of its first engine."""
        return self.replica.engines[0]

    @property
    def life(self) -> EngineLife:
        return self.first.life

    def turns(self) -> Turns:
        return Turns(self.replica, self.receivers, self.worker.let_go, timeout_s=10.0, stall_limit_s=300.0)

    async def attach(self, engine: int = 0, *, external: bool = False) -> None:
        """A fresh engine answers in this place."""
        client = EngineClient(self.engines[engine].url, "key")
        self.clients.append(client)
        info = await client.server_info()
        place = self.replica.engines[engine]
        place.attach(client, info, pid=None if external else engine + 1, kill=None if external else self._kill(engine))

    async def lose(self, engine: int = 0, *, died: bool = True) -> None:
        """As when its process ends."""
        await self.engines[engine].stop()
        self.replica.engines[engine].detach(died=died)

    def serve(self, version: Version = FIRST, engine: int | None = None) -> None:
        """As after a complete push, of all engines or of one."""
        for index in range(len(self.engines)) if engine is None else [engine]:
            self.engines[index].version = str(version)
            life = self.replica.engines[index].life
            if not life.may_generate:
                life.begin_update(version)
                life.commit_update()
        self.replica.turned()

    async def begin(self, version: Version, buckets: int = 2, mode: str = "IN_PLACE", engine: int = 0) -> int:
        await self.join(version.epoch, engine)
        return await self.receivers[engine].begin(
            rollout_pb2.BeginUpdateRequest(
                epoch=version.epoch,
                version=version.to_proto(),
                manifest=manifest(buckets),
                group_name=GROUP,
                pause_mode=rollout_pb2.PauseMode.Value(f"PAUSE_MODE_{mode}"),
            )
        )

    async def join(self, epoch: int, engine: int = 0) -> None:
        await self.receivers[engine].join(
            rollout_pb2.JoinWeightGroupRequest(epoch=epoch, group_name=GROUP, backend="gloo", world_size=2)
        )

    async def load(self, version: Version, bucket: int, engine: int = 0) -> None:
        await self.receivers[engine].load(
            rollout_pb2.LoadBucketRequest(epoch=version.epoch, version=version.to_proto(), bucket=bucket)
        )

    def commit(self, version: Version, engine: int = 0) -> Awaitable[Committed]:
        return self.receivers[engine].commit(
            rollout_pb2.CommitUpdateRequest(epoch=version.epoch, version=version.to_proto())
        )

    def abort(self, version: Version, engine: int = 0) -> Awaitable[pb.ReplicaState]:
        return self.receivers[engine].abort(
            rollout_pb2.AbortUpdateRequest(epoch=version.epoch, version=version.to_proto(), reason="test")
        )

    async def push(self, version: Version, mode: str = "IN_PLACE", engine: int = 0) -> None:
        await self.begin(version, mode=mode, engine=engine)
        await self.load(version, 0, engine)
        await self.load(version, 1, engine)
        await self.commit(version, engine)

    def _kill(self, engine: int) -> Callable[[], None]:
        def kill() -> None:
            self.killed.append(engine)
            self.engines[engine].cut()
            asyncio.get_running_loop().call_soon(self.replica.engines[engine].detach)

        return kill


def manifest(buckets: int) -> weights_pb2.WeightManifest:
    tensors = [[weights_pb2.TensorSpec(name=f"w{number}", dtype="float32", shape=[2])] for number in range(buckets)]
    return weights_pb2.WeightManifest(
        buckets=[weights_pb2.WeightBucket(tensors=tensor, num_bytes=8) for tensor in tensors], num_bytes=8 * buckets
    )


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Waits for a condition; fails when it does not come."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running_rig(
    config: Config, prompter: Prompter, *, serving: bool = True, engines: int = 1
) -> AsyncIterator[Rig]:
    """A rig whose worker runs, and a real router when there are several engines. At the end none must have failed."""
    async with AsyncExitStack() as stack:
        store = FakeBuffer()
        buffer = BufferClient(await store.start(), retry_for_s=0.2)
        stack.push_async_callback(store.stop)
        stack.push_async_callback(buffer.close)
        fakes = [FakeEngine() for _ in range(engines)]
        for fake in fakes:
            await fake.start()
            stack.push_async_callback(fake.stop)
        replica = Replica("rollout-0.test", engines)
        rig = Rig(config, fakes, store, replica, Worker(config, replica, prompter, buffer), [])
        rig.receivers += _receivers(rig)
        for index in range(engines):
            await rig.attach(index)
        parts = [rig.worker.run()]
        if engines > 1:
            directory = stack.enter_context(TemporaryDirectory())
            replica.router = RouterKeeper(
                router_command(config),
                Path(directory) / "router.log",
                replica.wanted,
                start_timeout_s=30.0,
                on_change=replica.turned,
            )
            parts.append(replica.router.run())
        await stack.enter_async_context(_running(parts))
        if serving:
            rig.serve()
            await until(lambda: replica.may_generate)
        try:
            yield rig
        finally:
            rig.worker.give_back(pb.RELEASE_REASON_DRAIN)
            for client in rig.clients:
                await client.close()


@asynccontextmanager
async def _running(parts: list[Coroutine[None, None, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        yield
    finally:
        failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not failed, failed


def _receivers(rig: Rig) -> list[WeightReceiver]:
    return [
        WeightReceiver(
            rig.replica,
            engine,
            ModelLayout({}),
            rig.worker.give_back,
            timeout_s=rig.config.trainer.weights.timeout_s,
            load_pause_mode="in_place",
        )
        for engine in rig.replica.engines
    ]


def changed(
    config: Config, *, sampling: dict[str, Any] | None = None, deterministic: bool = False, **settings: Any
) -> Config:
    """A copy with other rollout settings."""
    tree = config.model_dump()
    if deterministic:
        tree["run"]["deterministic"], tree["staleness"]["max_staleness"] = True, 0
    tree["rollout"] |= settings
    tree["rollout"]["sampling"] |= sampling or {}
    return Config.model_validate(tree)
