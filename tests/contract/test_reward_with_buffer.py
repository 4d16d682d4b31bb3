"""The reward replica against the real buffer: samples end as READY groups or as dead letters, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.buffer.memory_store import MemoryStore
from services.buffer.memory_watch import MemoryWatch
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.common import rpc, wire
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.lifecycle import Process
from services.common.process import free_port
from services.common.versions import Version
from services.reward.replica import serve
from tests.kit.reward_items import BY_ORDER, KIT

GROUP = 4
READY = sample_pb2.SAMPLE_STATE_READY
DEAD = sample_pb2.SAMPLE_STATE_DEAD


@dataclass
class Rig:
    """A buffer with a memory store, a reward replica, and the test as rollout replica."""

    client: BufferClient
    config: Config
    stop: asyncio.Event
    replica: asyncio.Task[None]
    version: Version
    """The published one."""

    async def generate(self, *completions: str) -> None:
        """Submits one group for every GROUP completions, and completes their generation."""
        groups = len(completions) // GROUP
        prompts = [sample_pb2.Prompt(text="What?", label="42", metadata_json='{"difficulty": 2}')] * groups
        await self.client.submit(f"request-{completions}", prompts)
        leased = await self.client.lease(
            sample_pb2.STAGE_GENERATE,
            "rollout-0.t",
            max_samples=len(completions),
            wait_s=5,
            weight_version=self.version,
        )
        work = [(group, sample) for group in leased.groups for sample in group.samples]
        assert len(work) == len(completions)
        done = [
            pb.CompletedSample(
                sample_id=sample.sample_id,
                lease_id=sample.lease_id,
                sample=_generated(group, sample, completion, self.version).SerializeToString(),
            )
            for (group, sample), completion in zip(work, completions, strict=True)
        ]
        response = await self.client.complete(sample_pb2.STAGE_GENERATE, "rollout-0.t", done)
        assert {result.outcome for result in response.results} == {pb.OUTCOME_OK}

    async def counts(self) -> dict[int, int]:
        ledger = await self.client.get_ledger()
        assert ledger.imbalance == 0
        return {count.state: count.samples for count in ledger.counts if count.samples}

    async def until(self, expected: dict[int, int]) -> None:
        async with asyncio.timeout(20):
            while (counts := await self.counts()) != expected:
                await asyncio.sleep(0.02)
        assert counts == expected


def _generated(group: pb.LeasedGroup, sample: pb.LeasedSample, completion: str, version: Version) -> sample_pb2.Sample:
    tokens = [1, 2, 3, 4]
    span = sample_pb2.WeightVersionSpan(version=version.to_proto(), start=0, end=3)
    return sample_pb2.Sample(
        sample_id=sample.sample_id,
        group_id=group.group_id,
        index=sample.index,
        prompt=group.prompt,
        segments=[
            sample_pb2.Segment(
                token_ids=wire.encode_tokens(tokens),
                num_tokens=4,
                prompt_length=1,
                loss_mask=wire.encode_mask([1, 1, 1]),
                rollout_logprobs=wire.encode_logprobs([-1, -1, -1]),
                spans=[span],
            )
        ],
        completion=completion,
        finish_reason=sample_pb2.FINISH_REASON_STOP,
        behaviour_exact=True,
        engine="test/1",
    )


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    address = f"127.0.0.1:{free_port()}"
    config = Config.model_validate(
        {
            "batch": {"rollout_batch_size": 2, "n_samples_per_prompt": GROUP},
            "buffer": {"address": address, "max_attempts": 2, "lease_ttl_s": 1.0},
            "reward": {"scorer": BY_ORDER, "score_timeout_s": 0.5},
            "plugins": {"paths": [str(KIT)]},
        }
    )
    store = MemoryStore()
    await store.open(run_params(config, None))
    service = BufferService(store, None, MemoryWatch(store, 1000), config.buffer, GROUP)
    server = await rpc.serve(
        address,
        lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(service, server),
        ["polyhead.v1.BufferService"],
    )
    stop = asyncio.Event()
    replica = asyncio.create_task(serve(config, Process("reward", 0, "reward-0.t", stop)))
    async with BufferClient(address) as client:
        version = Version((await client.acquire_epoch("test")).epoch, 0)
        await client.recover(version.epoch, 0)
        await client.publish_version(version)
        yield Rig(client, config, stop, replica, version)
        stop.set()
        await replica
    await server.stop(0)


async def test_groups_become_ready_with_their_scores(rig: Rig) -> None:
    await rig.generate("ok", "dict", "numpy", "ok", "reward", "ok", "ok", "ok")
    await rig.until({READY: 8})
    epoch = rig.version.epoch
    batch = await rig.client.lease(sample_pb2.STAGE_TRAIN, "trainer-0.t", wait_s=5, epoch=epoch, step=1)
    scores = [sample.score for group in batch.groups for sample in group.samples]
    assert [score.reward for score in scores] == [1.0, 0.5, 0.25, 1.0, 0.75, 1.0, 1.0, 1.0]
    assert dict(scores[1].parts) == {"acc": 1.0, "length": 3.0}
    assert {score.scorer for score in scores} == {BY_ORDER}


async def test_what_cannot_be_scored_is_tried_again_and_then_a_dead_letter(rig: Rig) -> None:
    await rig.generate("ok", "raise it", "ok", "ok", "ok", "ok", "ok", "hang")
    await rig.generate("ok", "ok", "ok", "ok")
    await rig.until({READY: 4, DEAD: 2, sample_pb2.SAMPLE_STATE_DROPPED: 6})


async def test_a_slow_score_keeps_its_lease(rig: Rig) -> None:
    await rig.generate("sleep 0.4", "sleep 0.4", "sleep 0.4", "sleep 0.4")
    await rig.until({READY: 4})
    assert (await rig.client.get_ledger()).counters.get("leases_expired", 0) == 0


async def test_a_replica_that_leaves_gives_its_samples_to_the_next(rig: Rig) -> None:
    await rig.generate("sleep 0.4", "sleep 0.4", "sleep 0.4", "ok")
    while sample_pb2.SAMPLE_STATE_SCORING not in await rig.counts():
        await asyncio.sleep(0.01)
    rig.stop.set()
    await rig.replica
    assert sample_pb2.SAMPLE_STATE_SCORING not in await rig.counts()
    stop = asyncio.Event()
    following = asyncio.create_task(serve(rig.config, Process("reward", 1, "reward-1.t", stop)))
    await rig.until({READY: 4})
    stop.set()
    await following


async def test_the_registry_knows_the_replica(rig: Rig) -> None:
    async with asyncio.timeout(10):
        while not (replicas := await rig.client.list_replicas(pb.ROLE_REWARD)):
            await asyncio.sleep(0.02)
    assert (replicas[0].replica_id, replicas[0].state) == ("reward-0.t", pb.REPLICA_STATE_SERVING)
