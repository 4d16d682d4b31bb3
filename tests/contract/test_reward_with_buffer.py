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
        await self.client.submit(f"request-{completions}"[:128], prompts)
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


RANKS = "reward_functions:ranks"
RANKS_AND_FILTER = "reward_functions:ranks and a filter"
BUFFER_FILTERS = ("reward_functions:newest_first", "reward_functions:cannot_choose", "reward_functions:never_chooses")


@pytest.fixture
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """The parameter, if there is one, is the run's filter; then rewards alternate. Or it scores groups as a whole."""
    judge = getattr(request, "param", "none")
    whole = judge.startswith(RANKS)
    judge = {RANKS: "none", RANKS_AND_FILTER: "reward_functions:keeps_by_label"}.get(judge, judge)
    judge, buffer_filter = ("none", judge) if judge in BUFFER_FILTERS else (judge, "")
    address = f"127.0.0.1:{free_port()}"
    config = Config.model_validate(
        {
            "batch": {
                "rollout_batch_size": 2,
                "n_samples_per_prompt": GROUP,
                "dynamic_sampling_filter": judge,
                "max_refill_rounds": 1,
            },
            "buffer": {"address": address, "max_attempts": 2, "lease_ttl_s": 1.0},
            "reward": {
                "scorer": RANKS if whole else BY_ORDER if judge == "none" else "reward_functions:alternates",
                "group_rm": whole,
                "max_inflight": 2 if whole else 256,
                "score_timeout_s": 0.5,
                "buffer_filter": buffer_filter,
            },
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


WHOLE = pytest.mark.parametrize("rig", [RANKS], indirect=True)


@WHOLE
async def test_groups_are_scored_as_a_whole(rig: Rig) -> None:
    await rig.generate("aaaa", "a", "aaa", "aa", "b", "bb", "bbb", "bbbb")
    await rig.until({READY: 8})
    epoch = rig.version.epoch
    batch = await rig.client.lease(sample_pb2.STAGE_TRAIN, "trainer-0.t", wait_s=5, epoch=epoch, step=1)
    scores = [sample.score for group in batch.groups for sample in group.samples]
    assert [score.reward for score in scores] == [3.0, 0.0, 2.0, 1.0, 0.0, 1.0, 2.0, 3.0]
    assert [score.parts["index"] for score in scores] == list(range(8))
    assert {score.parts["group"] for score in scores} == {GROUP}


@WHOLE
async def test_a_rest_of_a_group_is_scored_among_all_of_it(rig: Rig) -> None:
    """One of the group was given back by another replica after the others had been scored."""
    rig.stop.set()
    await rig.replica
    await rig.generate("aaaa", "a", "aaa", "aa")
    leased = await rig.client.lease(sample_pb2.STAGE_SCORE, "reward-1.t", max_samples=1, wait_s=5)
    [group] = leased.groups
    first, *others = group.samples
    score = sample_pb2.Score(reward=9.0, scorer="another")
    done = [pb.CompletedSample(sample_id=each.sample_id, lease_id=each.lease_id, score=score) for each in others]
    await rig.client.complete(sample_pb2.STAGE_SCORE, "reward-1.t", done)
    back = pb.ReleasedSample(
        sample_id=first.sample_id, lease_id=first.lease_id, reason=pb.RELEASE_REASON_SAMPLE_ERROR, error="odd"
    )
    await rig.client.release(sample_pb2.STAGE_SCORE, "reward-1.t", [back])
    rig.stop.clear()
    rig.replica = asyncio.create_task(serve(rig.config, Process("reward", 0, "reward-2.t", rig.stop)))
    await rig.until({READY: 4})
    fetched = await rig.client.fetch([each.sample_id for each in group.samples])
    assert [each.score.reward for each in fetched.samples] == [3.0, 9.0, 9.0, 9.0]
    assert fetched.samples[0].score.parts["group"] == GROUP


@WHOLE
async def test_a_group_that_cannot_be_scored_is_tried_again_and_then_given_up(rig: Rig) -> None:
    """With the dead letter of its first sample, the group is too small."""
    await rig.generate("ok", "raise", "ok", "ok", "ok", "hang", "ok", "ok")
    await rig.generate("a", "aa", "aaa", "aaaa")
    await rig.until({READY: 4, DEAD: 2, sample_pb2.SAMPLE_STATE_DROPPED: 6})


@pytest.mark.parametrize("rig", [RANKS_AND_FILTER], indirect=True)
async def test_groups_that_are_scored_as_a_whole_are_judged_as_others(rig: Rig) -> None:
    await rig.generate("spread", "a", "aa", "aaa", *["spread"] * GROUP)
    await rig.until({READY: 4, sample_pb2.SAMPLE_STATE_DROPPED: 4})


FILTER = pytest.mark.parametrize("rig", ["reward_functions:keeps_by_label"], indirect=True)
FILTERED = sample_pb2.DROP_REASON_FILTERED


@FILTER
async def test_a_filter_keeps_and_drops_whole_groups_by_both_forms_of_result(rig: Rig) -> None:
    await rig.generate(*["bool"] * GROUP, *["same"] * GROUP, *["spread"] * GROUP)
    await rig.until({READY: 8, sample_pb2.SAMPLE_STATE_DROPPED: 4})
    ledger = await rig.client.get_ledger()
    assert {count.drop_reason for count in ledger.counts if count.drop_reason} == {FILTERED}
    assert (ledger.counters["filter.kept"], ledger.counters["filter.drop_unnamed"]) == (2, 1)


@FILTER
async def test_a_filter_that_fails_keeps_its_group_and_is_counted(rig: Rig) -> None:
    words = ["raise", "none", "hang", "die"]
    await rig.generate(*(word for word in words for _ in range(GROUP)))
    await rig.until({READY: 16})
    assert (await rig.client.get_ledger()).counters["filter.failed"] == len(words)
    async with asyncio.timeout(10):
        while True:
            [replica] = await rig.client.list_replicas(pb.ROLE_REWARD)
            if replica.stats["filter_failures"] == len(words):
                return
            await asyncio.sleep(0.05)


@FILTER
async def test_what_a_filter_would_rather_not_have_is_kept_when_nothing_else_comes(rig: Rig) -> None:
    await rig.generate(*["rather not"] * 2 * GROUP)
    await rig.until({sample_pb2.SAMPLE_STATE_DROPPED: 8})
    await rig.generate(*["rather not"] * GROUP)
    await rig.until({sample_pb2.SAMPLE_STATE_DROPPED: 8, READY: 4})
    assert (await rig.client.get_ledger()).counters["filter.drop_rather"] == 2


@pytest.mark.parametrize("rig", ["reward_functions.keeps_later"], indirect=True)
async def test_an_async_filter_sees_parts_of_the_reward(rig: Rig) -> None:
    await rig.generate(*["ok"] * GROUP)
    await rig.until({READY: 4})
    assert (await rig.client.get_ledger()).counters["filter.kept"] == 1


async def interrupt(rig: Rig, groups: int) -> None:
    """Groups whose generation is begun and given back."""
    await rig.client.submit("interrupted", [sample_pb2.Prompt(text="What?")] * groups)
    work = await rig.client.lease(
        sample_pb2.STAGE_GENERATE, "rollout-0.t", max_samples=groups * GROUP, wait_s=5, weight_version=rig.version
    )
    span = sample_pb2.WeightVersionSpan(version=rig.version.to_proto(), start=0, end=1)
    delta = sample_pb2.TokenDelta(
        token_ids=wire.encode_tokens([5]), rollout_logprobs=wire.encode_logprobs([-1]), spans=[span]
    )
    held = [(each.sample_id, each.lease_id) for group in work.groups for each in group.samples]
    rows = [pb.ExtendedSample(sample_id=sample_id, lease_id=lease, delta=delta) for sample_id, lease in held]
    await rig.client.extend("rollout-0.t", rows)
    back = [
        pb.ReleasedSample(sample_id=sample_id, lease_id=lease, reason=pb.RELEASE_REASON_DRAIN)
        for sample_id, lease in held
    ]
    await rig.client.release(sample_pb2.STAGE_GENERATE, "rollout-0.t", back)


async def first_leased(rig: Rig) -> int:
    work = await rig.client.lease(
        sample_pb2.STAGE_GENERATE, "rollout-1.t", max_samples=1, wait_s=5, weight_version=rig.version
    )
    sample = work.groups[0].samples[0]
    back = pb.ReleasedSample(sample_id=sample.sample_id, lease_id=sample.lease_id, reason=pb.RELEASE_REASON_DRAIN)
    await rig.client.release(sample_pb2.STAGE_GENERATE, "rollout-1.t", [back])
    return work.groups[0].order


@pytest.mark.parametrize("rig", ["reward_functions:newest_first"], indirect=True)
async def test_a_buffer_filter_says_which_partial_groups_go_first(rig: Rig) -> None:
    await interrupt(rig, 4)
    async with asyncio.timeout(20):
        while await first_leased(rig) != 3:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("rig", ["reward_functions:cannot_choose", "reward_functions:never_chooses"], indirect=True)
async def test_a_buffer_filter_that_raises_or_hangs_leaves_the_oldest_first_and_is_counted(rig: Rig) -> None:
    await interrupt(rig, 2)
    async with asyncio.timeout(20):
        while True:
            replicas = await rig.client.list_replicas(pb.ROLE_REWARD)
            if replicas and replicas[0].stats["buffer_filter_failures"] > 0:
                break
            await asyncio.sleep(0.05)
    assert await first_leased(rig) == 0
