"""Long samples from the prompt to the commit, through the buffer's gRPC face and through its scripts alone.

Both sides make the same calls with the same batches and payloads, from one client process. The second has no buffer
process between it and the store: what it does not pay for is gRPC, the checks of every message and their records.
"""

from __future__ import annotations

import os
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.records import Generated, IssuedPrompt, Scored
from services.buffer.redis_store import RedisStore
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.versions import Version
from tests.kit.buffer_driver import params, refs

GROUPS, GROUP_SIZE = 8, 8
PROMPT, COMPLETION = 512, 7680
# Checkpoints free the store's memory.
CONFIRM_EVERY = 4


@dataclass
class Timings:
    samples: int = 0
    seconds: float = 0.0
    leases_s: list[float] = field(default_factory=list)


class Side(ABC):
    """The calls of one training step; `batch` samples at a time."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.timings = Timings()
        self.payload_bytes = 0

    @abstractmethod
    async def begin(self) -> None:
        """A trainer comes up."""

    @abstractmethod
    async def generate_and_score(self) -> None: ...

    @abstractmethod
    async def train(self, step: int) -> None: ...

    async def step(self, step: int) -> None:
        began = time.perf_counter()
        for _ in range(GROUPS * GROUP_SIZE // self.batch):
            await self.generate_and_score()
        await self.train(step)
        self.timings.seconds += time.perf_counter() - began
        self.timings.samples += GROUPS * GROUP_SIZE

    def note_lease(self, began: float) -> None:
        self.timings.leases_s.append(time.perf_counter() - began)


class ThroughGrpc(Side):
    def __init__(self, client: BufferClient, batch: int) -> None:
        super().__init__(batch)
        self._client = client
        self._epoch = 0
        self._version = Version(0, 0)

    async def begin(self) -> None:
        self._epoch = (await self._client.acquire_epoch("bench")).epoch
        await self._client.recover(self._epoch, 0)
        await self._publish(0)

    async def _publish(self, step: int) -> None:
        self._version = Version(self._epoch, step)
        await self._client.publish_version(self._version)

    async def generate_and_score(self) -> None:
        began = time.perf_counter()
        lease = await self._client.lease(
            sample_pb2.STAGE_GENERATE, "r", max_samples=self.batch, weight_version=self._version
        )
        self.note_lease(began)
        samples = [
            pb.CompletedSample(
                sample_id=each.sample_id,
                lease_id=each.lease_id,
                sample=payload(each.sample_id, group.group_id, each.index, self._version),
            )
            for group in lease.groups
            for each in group.samples
        ]
        self.payload_bytes = len(samples[0].sample)
        await self._client.complete(sample_pb2.STAGE_GENERATE, "r", samples)
        began = time.perf_counter()
        lease = await self._client.lease(sample_pb2.STAGE_SCORE, "s", max_samples=self.batch)
        self.note_lease(began)
        scored = [
            pb.CompletedSample(
                sample_id=each.sample_id, lease_id=each.lease_id, score=sample_pb2.Score(reward=each.index % 2)
            )
            for group in lease.groups
            for each in group.samples
        ]
        await self._client.complete(sample_pb2.STAGE_SCORE, "s", scored)

    async def train(self, step: int) -> None:
        lease = await self._client.lease(sample_pb2.STAGE_TRAIN, "t", epoch=self._epoch, step=step)
        assert sum(bool(each.sample) for group in lease.groups for each in group.samples) == GROUPS * GROUP_SIZE
        await self._client.commit_step(self._epoch, step, lease.batch_lease_id)
        await self._publish(step)
        if step % CONFIRM_EVERY == 0:
            await self._client.confirm_checkpoint(self._epoch, step)


class ThroughScripts(Side):
    def __init__(self, store: RedisStore, batch: int) -> None:
        super().__init__(batch)
        self._store = store
        self._epoch = 0
        self._version = Version(0, 0)
        self._score = sample_pb2.Score(reward=1.0).SerializeToString()

    async def begin(self) -> None:
        await self._store.open(params(group_size=GROUP_SIZE, batch_groups=GROUPS, max_staleness=4))
        self._epoch, _ = await self._store.acquire_epoch()
        await self._store.recover(self._epoch, 0, None)
        await self._publish(0)

    async def _publish(self, step: int) -> None:
        self._version = Version(self._epoch, step)
        await self._store.publish_version(self._version)

    async def generate_and_score(self) -> None:
        groups, left = [], self.batch
        while left:
            began = time.perf_counter()
            lease = await self._store.lease_generate("r", left, self._version, admit=True, more=bool(groups))
            self.note_lease(began)
            groups += refs(lease)
            left = self.batch - len(groups)
            if not lease.wanted:
                break
            await self._store.issue(lease.cursor, [IssuedPrompt(at, b"prompt") for at in lease.wanted])
        spans = ((self._version.epoch, self._version.step, self._version.step),)
        rows = []
        for ref, lease_id in groups:
            data = payload("g00000000-000", "g00000000", ref.index, self._version)
            rows.append(Generated(ref, lease_id, PROMPT + COMPLETION, COMPLETION, 1, spans, data))
        await self._store.complete_generate(rows)
        began = time.perf_counter()
        to_score = await self._store.lease_score("s", self.batch, payload=True)
        self.note_lease(began)
        scores = [Scored(ref, lease_id, float(ref.index % 2), self._score) for ref, lease_id in refs(to_score)]
        await self._store.complete_score(scores)

    async def train(self, step: int) -> None:
        lease = await self._store.lease_train(self._epoch, step, payload=True)
        await self._store.commit_step(self._epoch, step, lease.batch_lease_id, trained=True)
        await self._publish(step)
        if step % CONFIRM_EVERY == 0:
            await self._store.confirm_checkpoint(self._epoch, step)


_TOKENS = wire.encode_tokens(range(PROMPT + COMPLETION))
_MASK = wire.encode_mask([1] * COMPLETION)
_LOGPROBS = wire.encode_logprobs([-0.5] * COMPLETION)


def payload(sample_id: str, group_id: str, index: int, version: Version) -> bytes:
    """A serialized Sample of 8,192 tokens, about 74 KB."""
    segment = sample_pb2.Segment(
        token_ids=_TOKENS,
        num_tokens=PROMPT + COMPLETION,
        prompt_length=PROMPT,
        loss_mask=_MASK,
        rollout_logprobs=_LOGPROBS,
        spans=[sample_pb2.WeightVersionSpan(version=version.to_proto(), start=0, end=COMPLETION)],
    )
    return sample_pb2.Sample(
        sample_id=sample_id,
        group_id=group_id,
        index=index,
        segments=[segment],
        finish_reason=sample_pb2.FINISH_REASON_STOP,
    ).SerializeToString()


def fsync_ms(directory: Path, writes: int = 200, size: int = 64 * 74_000) -> dict[str, float]:
    """Of appends as large as the store makes for a batch: p50 and p99."""
    block, took = os.urandom(size), []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(writes):
            file.write(block)
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(1e3 * (time.perf_counter() - began))
            if file.tell() > 1 << 29:
                file.seek(0)
    return {"p50": round(float(np.percentile(took, 50)), 2), "p99": round(float(np.percentile(took, 99)), 2)}
