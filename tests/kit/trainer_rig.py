"""A trainer's surroundings in one process: the real buffer over its in-memory store, replicas, and a feeder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.buffer.memory_store import MemoryStore
from services.buffer.memory_watch import MemoryWatch
from services.buffer.prompts import PromptSource
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.trainer.io_thread import Io
from services.trainer.status import TrainerStatus
from services.trainer.trainer import train
from tests.kit.trainer_batch import make_sample
from tests.kit.trainer_replica import FakeEngine, FakeReplica


class Rig:
    """Everything but the trainer runs on the test's loop; the trainer runs on a thread, as in its process."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.replicas: list[FakeReplica] = []
        self.status = TrainerStatus()
        self.stop = asyncio.Event()
        self.feeding: asyncio.Task[None] | None = None
        self._io = Io(asyncio.get_running_loop(), self.stop)

    async def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        prompts = self.directory / "prompts.jsonl"
        prompts.write_text("".join(f'{{"input": "{n}+{n}=", "label": "{2 * n}"}}\n' for n in range(10)))
        self.config.data.prompt_data = str(prompts)
        source = PromptSource(self.config.data, self.config.buffer.limits)
        store = MemoryStore()
        await store.open(run_params(self.config, source))
        self.service = BufferService(
            store, source, MemoryWatch(store, 1000), self.config.buffer, self.config.batch.n_samples_per_prompt
        )
        self._server = await rpc.serve(
            "127.0.0.1:0",
            lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(self.service, server),
            ["polyhead.v1.BufferService"],
        )
        self.address = self._server.address
        self.buffer = BufferClient(self.address, retry_for_s=5.0)

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.stop()
        await self.buffer.close()
        await self.stop_buffer()

    async def stop_buffer(self) -> None:
        await self._server.stop(0)

    @property
    def engines(self) -> list[FakeEngine]:
        """Of all replicas."""
        return [engine for replica in self.replicas for engine in replica.engines]

    async def add_replica(self, *, engines: int = 1, ranks: int = 1) -> FakeReplica:
        number = len(self.replicas)
        directory = self.directory / f"replica-{number}"
        replica = FakeReplica(f"rollout-{number}", directory, engines=engines, ranks=ranks)
        await replica.start(self.buffer)
        self.replicas.append(replica)
        return replica

    async def train(self) -> bool:
        return await asyncio.to_thread(train, self.config, self._io, self.buffer, self.status, "trainer-0")

    async def feed(self, seed: int = 0) -> None:
        """Generates and scores whatever there is to do, until cancelled."""
        rng = np.random.default_rng(seed)
        while True:
            serving = [replica for replica in self.replicas if replica.serving]
            if serving:
                await self._generate(random.Random(int(rng.integers(1 << 30))).choice(serving), rng)
                await self._score(rng)
            await asyncio.sleep(0.005)

    async def _generate(self, replica: FakeReplica, rng: np.random.Generator) -> None:
        version = replica.serving
        assert version is not None
        lease = await self.buffer.lease(
            sample_pb2.STAGE_GENERATE, replica.replica_id, max_samples=64, weight_version=version
        )
        done = []
        for group in lease.groups:
            prompt = [3 + ord(c) % 100 for c in group.prompt.text]
            for leased in group.samples:
                sample = make_sample(
                    rng,
                    sample_id=leased.sample_id,
                    prompt=prompt,
                    completion_length=int(rng.integers(1, 7)),
                    versions=[version],
                )
                sample.index = leased.index
                done.append(
                    pb.CompletedSample(
                        sample_id=leased.sample_id, lease_id=leased.lease_id, sample=sample.SerializeToString()
                    )
                )
        if done:
            await self.buffer.complete(sample_pb2.STAGE_GENERATE, replica.replica_id, done)

    async def _score(self, rng: np.random.Generator) -> None:
        lease = await self.buffer.lease(sample_pb2.STAGE_SCORE, "reward-0", max_samples=64, include_payload=False)
        done = [
            pb.CompletedSample(
                sample_id=leased.sample_id,
                lease_id=leased.lease_id,
                score=sample_pb2.Score(reward=float(rng.integers(0, 2)), scorer="coin"),
            )
            for group in lease.groups
            for leased in group.samples
        ]
        if done:
            await self.buffer.complete(sample_pb2.STAGE_SCORE, "reward-0", done)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Those that are whole: the last one may be being written."""
        path = self.config.run.dir / f"{name}.jsonl"
        text = path.read_bytes() if path.exists() else b""
        return [orjson.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


@asynccontextmanager
async def running_rig(
    config: Config, directory: Path, *, replicas: int = 1, engines: int = 1, feed: bool = True
) -> AsyncIterator[Rig]:
    rig = Rig(config, directory)
    await rig.start()
    rig.feeding = asyncio.create_task(rig.feed()) if feed else None
    try:
        for _ in range(replicas):
            await rig.add_replica(engines=engines)
        yield rig
    finally:
        if rig.feeding is not None:
            rig.feeding.cancel()
            with suppress(asyncio.CancelledError):
                await rig.feeding
        await rig.close()


def make_config(model: Path, run_dir: Path, *, steps: int = 4, **sections: Any) -> Config:
    """A small run: 2 groups of 4 samples a step."""
    return Config(
        run={"dir": run_dir, "num_rollout": steps},
        model={"hf_checkpoint": model},
        batch={"rollout_batch_size": 2, "n_samples_per_prompt": 4, **sections.pop("batch", {})},
        staleness={"max_staleness": 2, **sections.pop("staleness", {})},
        trainer={
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"save_interval": 2},
            "weights": {"bucket_mb": 1, "timeout_s": 10.0},
            **sections.pop("trainer", {}),
        },
        **sections,
    )


async def until(condition: Any, within_s: float = 20.0) -> None:
    """Waits for a condition; a test that waits in vain says so by its timeout."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def steps_of(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]
