"""The roles of a training run, through the buffer's gRPC face or through its scripts alone.

Both sides are the same client processes, a rollout, a reward service and a trainer that overlap, with the same verbs,
batches and payloads in the same order; what finds nothing asks again after the same pause. Between the first side's
clients and the store stands one buffer process, which the second side does not have: it does not pay for gRPC, the
checks of every message, nor the hop.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.records import Generated, IssuedPrompt, Scored
from services.buffer.redis_store import RedisStore
from services.buffer.store import UNBOUNDED
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.versions import Version
from tests.kit.buffer_driver import params, refs

T = TypeVar("T")
GROUPS, GROUP_SIZE, MAX_STALENESS = 8, 8, 4
STEP_SAMPLES = GROUPS * GROUP_SIZE
# Samples that share a call.
BATCH = 16
PROMPT, COMPLETION = 512, 7680
# Checkpoints free the store's memory.
CONFIRM_EVERY = 4


class Side(ABC):
    """The verbs of one role's process. Each answers how many samples it moved; 0 is to be asked again."""

    def __init__(self) -> None:
        self.leases: list[tuple[float, float]] = []
        """(when, seconds) of those that were granted something."""

    @contextmanager
    def timed(self) -> Iterator[list[object]]:
        """What is granted goes into the list."""
        began, granted = time.monotonic(), list[object]()
        yield granted
        if granted:
            self.leases.append((time.monotonic(), time.monotonic() - began))

    @abstractmethod
    async def begin(self) -> Version:
        """A trainer comes up, and goes on from the last step. Returns the version it has published."""

    @abstractmethod
    async def generate(self, version: Version) -> int: ...

    @abstractmethod
    async def score(self) -> int: ...

    @abstractmethod
    async def train(self, version: Version) -> int:
        """The step that makes `version`, pushed and every so often confirmed."""

    @abstractmethod
    async def close(self) -> None: ...


def _pairs(items: Sequence[T]) -> Iterator[list[Sequence[T]]]:
    """Of calls' worth of them: two calls overlap."""
    for first in range(0, len(items), 4 * BATCH):
        yield [items[at : at + BATCH] for at in range(first, min(first + 4 * BATCH, len(items)), BATCH)]


class ThroughGrpc(Side):
    """`wait_s`: how long a lease that finds nothing waits in the buffer."""

    def __init__(self, address: str, wait_s: float = 0.0) -> None:
        super().__init__()
        self._wait_s = wait_s
        self._client = BufferClient(address)

    async def begin(self) -> Version:
        acquired = await self._client.acquire_epoch("bench")
        version = Version(acquired.epoch, acquired.step)
        await self._client.recover(*version)
        await self._client.publish_version(version)
        return version

    async def generate(self, version: Version) -> int:
        with self.timed() as granted:
            lease = await self._client.lease(
                sample_pb2.STAGE_GENERATE,
                "r",
                max_samples=BATCH,
                weight_version=version,
                include_payload=False,
                wait_s=self._wait_s,
            )
            granted += lease.groups
        samples = [
            pb.CompletedSample(
                sample_id=each.sample_id,
                lease_id=each.lease_id,
                sample=payload(each.sample_id, group.group_id, each.index, version),
            )
            for group in lease.groups
            for each in group.samples
        ]
        if samples:
            await self._client.complete(sample_pb2.STAGE_GENERATE, "r", samples)
        return len(samples)

    async def score(self) -> int:
        with self.timed() as granted:
            lease = await self._client.lease(
                sample_pb2.STAGE_SCORE, "s", max_samples=BATCH, wait_s=self._wait_s, include_payload=False
            )
            granted += lease.groups
        leased = [each for group in lease.groups for each in group.samples]
        if not leased:
            return 0
        fetched = await self._client.fetch([each.sample_id for each in leased])
        assert all(each.sample for each in fetched.samples)
        samples = [
            pb.CompletedSample(
                sample_id=each.sample_id, lease_id=each.lease_id, score=sample_pb2.Score(reward=float(each.index % 2))
            )
            for each in leased
        ]
        await self._client.complete(sample_pb2.STAGE_SCORE, "s", samples)
        return len(samples)

    async def train(self, version: Version) -> int:
        epoch, step = version
        with self.timed() as granted:
            lease = await self._client.lease(
                sample_pb2.STAGE_TRAIN, "t", epoch=epoch, step=step, include_payload=False, wait_s=self._wait_s
            )
            granted += lease.groups
        trained = 0
        ids = [each.sample_id for group in lease.groups for each in group.samples]
        for pair in _pairs(ids):
            for fetched in await asyncio.gather(*(self._client.fetch(some) for some in pair)):
                trained += sum(bool(each.sample) for each in fetched.samples)
        if not trained:
            return 0
        await self._client.commit_step(epoch, step, lease.batch_lease_id)
        await self._client.publish_version(version)
        if step % CONFIRM_EVERY == 0:
            await self._client.confirm_checkpoint(epoch, step)
        return trained

    async def close(self) -> None:
        await self._client.close()


class ThroughScripts(Side):
    def __init__(self, url: str, run_name: str) -> None:
        super().__init__()
        self._store = RedisStore(url, run_name=run_name)
        self._request = 0

    async def begin(self) -> Version:
        await self._store.open(params(group_size=GROUP_SIZE, batch_groups=GROUPS, max_staleness=MAX_STALENESS))
        version = Version(*await self._store.acquire_epoch())
        await self._store.recover(*version, None)
        await self._store.publish_version(version)
        return version

    def _request_id(self) -> str:
        self._request += 1
        return f"{self._request:032x}"

    async def generate(self, version: Version) -> int:
        leased, request_id = [], self._request_id()
        with self.timed() as granted:
            while True:
                left = BATCH - len(leased)
                lease = await self._store.lease_generate(
                    "r", left, version, admit=True, request_id=request_id, more=bool(leased), max_bytes=UNBOUNDED
                )
                leased += refs(lease)
                if not lease.wanted:
                    break
                await self._store.issue(lease.cursor, [IssuedPrompt(at, b"\n\x06prompt") for at in lease.wanted])
            granted += leased
        spans = ((version.epoch, version.step, version.step),)
        rows = [
            Generated(ref, lease_id, PROMPT + COMPLETION, COMPLETION, 1, spans, data)
            for ref, lease_id in leased
            for data in [payload(f"g{ref.order:08d}-{ref.index:03d}", f"g{ref.order:08d}", ref.index, version)]
        ]
        if rows:
            await self._store.complete_generate(rows)
        return len(rows)

    async def score(self) -> int:
        with self.timed() as granted:
            lease = await self._store.lease_score("s", BATCH, payload=False, request_id=self._request_id())
            granted += lease.groups
        if not lease.groups:
            return 0
        assert all(each.payload for each in await self._store.fetch([ref for ref, _ in refs(lease)]))
        scores = [
            Scored(ref, lease_id, reward, sample_pb2.Score(reward=reward).SerializeToString())
            for ref, lease_id in refs(lease)
            for reward in [float(ref.index % 2)]
        ]
        await self._store.complete_score(scores)
        return len(scores)

    async def train(self, version: Version) -> int:
        epoch, step = version
        with self.timed() as granted:
            lease = await self._store.lease_train(epoch, step, payload=False)
            granted += lease.groups
        trained = 0
        leased = [ref for ref, _ in refs(lease)]
        for pair in _pairs(leased):
            for fetched in await asyncio.gather(*(self._store.fetch(some) for some in pair)):
                trained += sum(bool(each.payload) for each in fetched)
        if not trained:
            return 0
        await self._store.commit_step(epoch, step, lease.batch_lease_id, trained=True)
        await self._store.publish_version(version)
        if step % CONFIRM_EVERY == 0:
            await self._store.confirm_checkpoint(epoch, step)
        return trained

    async def close(self) -> None:
        await self._store.close()


_TOKENS = wire.encode_tokens(range(PROMPT + COMPLETION))
_MASK = wire.encode_mask([1] * COMPLETION)
_LOGPROBS = wire.encode_logprobs([-0.5] * COMPLETION)


def payload(sample_id: str, group_id: str, index: int, version: Version) -> bytes:
    """A serialized Sample of 8,192 tokens, about 71 KB."""
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
