"""The buffer over real gRPC, on a real Valkey: validation, long polls, reasons, several buffers, lost stores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.buffer.prompts import PromptSource
from services.buffer.records import Extension
from services.buffer.redis_store import RedisStore
from services.buffer.settings import run_params
from services.common import rpc, wire
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import (
    ConfigError,
    FencedError,
    InvalidArgumentError,
    LimitError,
    PolyheadError,
    UnavailableError,
)
from services.common.versions import Version
from tests.kit import valkey
from tests.kit.buffer_driver import Driver, refs
from tests.kit.buffer_face import FIRST, GENERATE, SCORE, TRAIN, completed, scored, service_config, serving


@pytest.fixture(scope="module")
def server() -> Iterator[valkey.Valkey]:
    with valkey.running() as started:
        yield started


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return service_config(tmp_path)


@pytest.fixture
async def client(server: valkey.Valkey, config: Config) -> AsyncIterator[BufferClient]:
    async with serving(server.url, config) as address, BufferClient(address, retry_for_s=2) as connected:
        yield connected


async def start_trainer(client: BufferClient) -> None:
    epoch = (await client.acquire_epoch("t")).epoch
    await client.recover(epoch, 0)
    await client.publish_version(Version(epoch, 0))


async def generate(client: BufferClient, count: int = 16, wait_s: float = 0) -> pb.LeaseResponse:
    return await client.lease(GENERATE, "r", max_samples=count, weight_version=FIRST, wait_s=wait_s)


def outcomes(results: pb.CompleteResponse | pb.ExtendResponse | pb.ReleaseResponse) -> list[str]:
    return [pb.Outcome.Name(result.outcome).removeprefix("OUTCOME_") for result in results.results]


async def test_a_step_goes_round(client: BufferClient) -> None:
    await start_trainer(client)
    leased = await generate(client)
    assert [group.group_id for group in leased.groups] == [f"g0000000{n}" for n in range(4)]
    assert leased.groups[0].prompt.text == "prompt 0"
    assert leased.lease_ttl.seconds == 30
    samples = completed(leased)
    assert set(outcomes(await client.complete(GENERATE, "r", samples))) == {"OK"}
    to_score = await client.lease(SCORE, "s", max_samples=16)
    assert to_score.groups[0].samples[0].sample == samples[0].sample
    assert to_score.groups[0].samples[0].record.completion_tokens == 3
    await client.complete(SCORE, "s", scored(to_score))
    batch = await client.lease(TRAIN, "t", epoch=1, step=1)
    assert [group.order for group in batch.groups] == [0, 1]
    assert batch.groups[0].samples[1].score.reward == 1.0
    assert batch.groups[0].samples[1].sample == samples[1].sample
    assert (await client.commit_step(1, 1, batch.batch_lease_id)).applied
    assert not (await client.commit_step(1, 1, batch.batch_lease_id)).applied
    await client.publish_version(Version(1, 1))
    mark = await client.get_watermark(1, 1)
    assert (mark.low_water, list(mark.closed_ordinals)) == (2, [])
    assert (await client.confirm_checkpoint(1, 1)).retired_samples == 4
    ledger = await client.get_ledger()
    assert (ledger.imbalance, ledger.accepted, ledger.step) == (0, 8, 1)
    assert {(row.state, row.samples) for row in ledger.counts} == {
        (sample_pb2.SAMPLE_STATE_RETIRED, 4),
        (sample_pb2.SAMPLE_STATE_READY, 4),
    }


async def test_an_epoch_of_prompts_is_followed_by_the_next(client: BufferClient) -> None:
    await start_trainer(client)
    seen = []
    for step in range(1, 9):
        version = Version(1, step - 1)
        leased = await client.lease(GENERATE, "r", max_samples=16, weight_version=version)
        await client.complete(GENERATE, "r", completed(leased, version))
        await client.complete(SCORE, "s", scored(await client.lease(SCORE, "s", max_samples=16)))
        batch = await client.lease(TRAIN, "t", epoch=1, step=step)
        seen += [group.prompt_ordinal for group in batch.groups]
        await client.commit_step(1, step, batch.batch_lease_id)
        await client.publish_version(Version(1, step))
    assert seen == list(range(16))


async def test_partial_samples_come_back(client: BufferClient) -> None:
    await start_trainer(client)
    leased = (await generate(client, 1)).groups[0].samples[0]
    delta = sample_pb2.TokenDelta(
        from_token=0,
        token_ids=wire.encode_tokens([7, 8]),
        rollout_logprobs=wire.encode_logprobs([-1.0, -2.0]),
        spans=[sample_pb2.WeightVersionSpan(version=FIRST.to_proto(), start=0, end=2)],
    )
    extended = pb.ExtendedSample(sample_id=leased.sample_id, lease_id=leased.lease_id, delta=delta)
    assert outcomes(await client.extend("r", [extended])) == ["OK"]
    assert outcomes(await client.extend("r", [extended])) == ["DUPLICATE"]
    drained = pb.ReleasedSample(
        sample_id=leased.sample_id, lease_id=leased.lease_id, reason=pb.RELEASE_REASON_DRAIN, tokens_discarded=1
    )
    assert outcomes(await client.release(GENERATE, "r", [drained])) == ["OK"]
    again = (await generate(client, 1)).groups[0].samples[0]
    assert list(again.partial) == [delta]
    fetched = (await client.fetch([leased.sample_id])).samples[0]
    assert (fetched.state, list(fetched.partial)) == (sample_pb2.SAMPLE_STATE_GENERATING, [delta])


# Long polls


async def test_a_waiting_scorer_is_woken_by_an_arrival(client: BufferClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.buffer.wakeups.RECHECK_S", 30.0)
    await start_trainer(client)
    leased = await generate(client)
    waiting = asyncio.create_task(client.lease(SCORE, "s", max_samples=16, wait_s=20))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await client.complete(GENERATE, "r", completed(leased))
    assert len((await asyncio.wait_for(waiting, 10)).groups) == 4


async def test_each_role_is_woken_by_what_it_waits_for(client: BufferClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.buffer.wakeups.RECHECK_S", 30.0)
    waiting_rollout = asyncio.create_task(generate(client, wait_s=20))
    await asyncio.sleep(0.1)
    await start_trainer(client)
    leased = await asyncio.wait_for(waiting_rollout, 10)
    waiting_trainer = asyncio.create_task(client.lease(TRAIN, "t", epoch=1, step=1, wait_s=20))
    waiting_rollout = asyncio.create_task(
        client.lease(GENERATE, "r", max_samples=1, weight_version=Version(1, 1), wait_s=20)
    )
    await asyncio.sleep(0.1)
    await client.complete(GENERATE, "r", completed(leased))
    await client.complete(SCORE, "s", scored(await client.lease(SCORE, "s", max_samples=16)))
    batch = await asyncio.wait_for(waiting_trainer, 10)
    assert not waiting_rollout.done()
    await client.commit_step(1, 1, batch.batch_lease_id)
    await client.publish_version(Version(1, 1))
    assert (await asyncio.wait_for(waiting_rollout, 10)).groups


async def test_one_arrival_is_passed_on_until_all_is_taken(
    client: BufferClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.buffer.wakeups.RECHECK_S", 30.0)
    await start_trainer(client)
    leased = await generate(client)
    waiting = [asyncio.create_task(client.lease(SCORE, f"s{n}", max_samples=2, wait_s=20)) for n in range(4)]
    await asyncio.sleep(0.1)
    await client.complete(GENERATE, "r", completed(leased))
    taken = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert sorted(group.order for response in taken for group in response.groups) == [0, 1, 2, 3]


async def test_one_sample_that_arrives_makes_one_waiting_lease_look(
    client: BufferClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.buffer.wakeups.RECHECK_S", 30.0)
    looks, plain = [], RedisStore.lease_score

    async def counted(store: RedisStore, replica_id: str, *args: object, **kwargs: object) -> object:
        looks.append(replica_id)
        return await plain(store, replica_id, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(RedisStore, "lease_score", counted)
    await start_trainer(client)
    leased = await generate(client)
    waiting = [asyncio.create_task(client.lease(SCORE, f"s{n}", max_samples=1, wait_s=20)) for n in range(3)]
    while len(looks) < 3:
        await asyncio.sleep(0.01)
    await client.complete(GENERATE, "r", completed(leased)[:1])
    done, _ = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert [len(each.result().groups) for each in done] == [1]
    await client.get_ledger()
    assert len(looks) == 4
    for each in waiting:
        each.cancel()


async def test_a_caller_that_hangs_up_leaves_nothing_leased(client: BufferClient) -> None:
    await start_trainer(client)
    for _ in range(5):
        waiting = asyncio.create_task(generate(client, wait_s=20))
        await asyncio.sleep(0)
        waiting.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ledger = await client.get_ledger()
        if all(row.state == sample_pb2.SAMPLE_STATE_PENDING for row in ledger.counts):
            break
        await asyncio.sleep(0.05)
    assert sum(len(group.samples) for group in (await generate(client)).groups) == 8


# Lost answers, partly failed leases, big answers


async def test_a_lease_asked_again_after_a_lost_answer_is_the_same(client: BufferClient) -> None:
    await start_trainer(client)
    generating = pb.LeaseRequest(
        stage=GENERATE, replica_id="r", max_samples=5, weight_version=FIRST.to_proto(), request_id="a"
    )
    first = await client._stub.Lease(generating, timeout=5)
    assert sum(len(group.samples) for group in first.groups) == 5  # of two turns, prompts issued between
    assert await client._stub.Lease(generating, timeout=5) == first
    await client.complete(GENERATE, "r", completed(first))
    scoring = pb.LeaseRequest(stage=SCORE, replica_id="s", max_samples=9, include_payload=True, request_id="a")
    to_score = await client._stub.Lease(scoring, timeout=5)
    assert await client._stub.Lease(scoring, timeout=5) == to_score
    assert outcomes(await client.complete(SCORE, "s", scored(to_score))) == ["OK"] * 5


async def test_what_a_first_turn_leased_is_not_lost_with_the_second(
    client: BufferClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*args: object) -> int:
        raise UnavailableError("does not answer", field="store")

    await start_trainer(client)
    await client.submit("q", [sample_pb2.Prompt(text="submitted")])
    monkeypatch.setattr(RedisStore, "issue", fails)
    assert [group.prompt.text for group in (await generate(client)).groups] == ["submitted"]
    with pytest.raises(UnavailableError):
        await generate(client)


async def test_answers_fit_into_half_a_message(server: valkey.Valkey, config: Config) -> None:
    config.buffer.limits = config.buffer.limits.model_copy(update={"message_mb": 1, "sample_tokens": 50_000})
    async with serving(server.url, config) as address, BufferClient(address, message_mb=1) as client:
        await start_trainer(client)
        tokens = list(range(20_000))
        big = {
            "token_ids": wire.encode_tokens(tokens),
            "num_tokens": len(tokens),
            "prompt_length": len(tokens) - 3,
        }
        for _ in range(2):
            await client.complete(GENERATE, "r", completed(await generate(client, 4), **big))
        counts = []
        while (to_score := await client.lease(SCORE, "s", max_samples=16)).groups:
            counts.append(sum(len(group.samples) for group in to_score.groups))
            await client.complete(SCORE, "s", scored(to_score))
        assert counts == [6, 2]  # of 80 KB each
        batch = await client.lease(TRAIN, "t", epoch=1, step=1)
        assert all(sample.sample for group in batch.groups for sample in group.samples)


async def test_a_batch_over_half_a_message_is_fetched_instead(server: valkey.Valkey, config: Config) -> None:
    config.buffer.limits = config.buffer.limits.model_copy(update={"message_mb": 1, "sample_tokens": 50_000})
    async with serving(server.url, config) as address, BufferClient(address, message_mb=1) as client:
        await start_trainer(client)
        tokens = list(range(40_000))
        big = {"token_ids": wire.encode_tokens(tokens), "num_tokens": len(tokens), "prompt_length": len(tokens) - 3}
        await client.complete(GENERATE, "r", completed(await generate(client, 4), **big))
        for _ in range(2):
            await client.complete(SCORE, "s", scored(await client.lease(SCORE, "s", max_samples=2)))
        batch = await client.lease(TRAIN, "t", epoch=1, step=1)
        samples = [sample for group in batch.groups for sample in group.samples]
        assert [(sample.sample, sample.record.num_tokens) for sample in samples] == [(b"", 40_000)] * 4
        fetched = await client.fetch([sample.sample_id for sample in samples[:2]])
        assert all(row.sample for row in fetched.samples)


# Reasons


async def test_empty_answers_say_what_they_wait_for(client: BufferClient) -> None:
    reasons = [(await generate(client)).waiting_for]
    await start_trainer(client)
    assert GENERATE not in {row.stage for row in (await client.get_ledger()).waiting_for}
    leased = await generate(client)
    reasons.append((await generate(client)).waiting_for)
    reasons.append((await client.lease(SCORE, "s", max_samples=1)).waiting_for)
    reasons.append((await client.lease(TRAIN, "t", epoch=1, step=1)).waiting_for)
    await client.complete(GENERATE, "r", completed(leased)[:3])
    assert [(reason.stage, reason.reason, reason.count) for reason in reasons] == [
        (GENERATE, "no version published yet", 0),
        (GENERATE, "staleness bound: 4 of 4 groups live", 4),
        (SCORE, "samples in generation", 8),
        (TRAIN, "0 of 2 groups ready: 8 samples in generation, 0 to be scored", 2),
    ]
    texts = {row.stage: row.reason for row in (await client.get_ledger()).waiting_for}
    assert texts == {
        GENERATE: "staleness bound: 4 of 4 groups live",
        TRAIN: "0 of 2 groups ready: 5 samples in generation, 3 to be scored",
    }


async def test_without_a_data_set_the_prompts_end(server: valkey.Valkey, config: Config) -> None:
    config.data.prompt_data = ""
    async with serving(server.url, config) as address, BufferClient(address) as client:
        await start_trainer(client)
        assert (await generate(client)).waiting_for.reason == "end of prompts"
        (group_id,) = (await client.submit("q1", [sample_pb2.Prompt(text="hello")])).group_ids
        leased = await generate(client)
        assert leased.groups[0].group_id == group_id
        assert leased.groups[0].prompt_ordinal == 1 << 63


async def test_a_store_above_its_budget_admits_nothing(server: valkey.Valkey, config: Config) -> None:
    async with serving(server.url, config, max_memory_mb=1) as address, BufferClient(address) as client:
        await start_trainer(client)
        assert (await generate(client)).waiting_for.reason == "store memory"
        waiting = (await client.lease(TRAIN, "t", epoch=1, step=1)).waiting_for
        assert (waiting.stage, waiting.reason, waiting.count) == (TRAIN, "store memory", 2)
        assert {row.stage: row.reason for row in (await client.get_ledger()).waiting_for}[TRAIN] == "store memory"


@pytest.mark.parametrize(("max_memory_mb", "wanted"), [(1, True), (4096, False)])
async def test_a_filling_store_asks_for_a_checkpoint(
    server: valkey.Valkey, config: Config, max_memory_mb: int, wanted: bool
) -> None:
    async with serving(server.url, config) as address, BufferClient(address) as client:
        await start_trainer(client)
        await client.complete(GENERATE, "r", completed(await generate(client)))
        await client.complete(SCORE, "s", scored(await client.lease(SCORE, "s", max_samples=16)))
    async with serving(server.url, config, max_memory_mb) as address, BufferClient(address) as client:
        batch = await client.lease(TRAIN, "t", epoch=1, step=1)
        assert (await client.commit_step(1, 1, batch.batch_lease_id)).checkpoint_wanted == wanted


# Validation


async def refusal(call: object) -> PolyheadError:
    with pytest.raises(PolyheadError) as refused:
        await call  # type: ignore[misc]
    return refused.value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": b"\0" * 19}, "samples[0].sample.segments[0].token_ids"),
        ({"rollout_logprobs": wire.encode_logprobs([-1, float("nan"), -1])}, ".segments[0].rollout_logprobs[1]"),
        ({"loss_mask": b"\1\1\2"}, ".segments[0].loss_mask[2]"),
        ({"loss_mask": b"\1\1"}, ".segments[0].loss_mask"),
        ({"prompt_length": 9}, ".segments[0].prompt_length"),
        ({"num_tokens": 101}, "samples[0].sample.segments"),
    ],
)
async def test_a_malformed_sample_is_refused_by_its_field(
    client: BufferClient, changes: dict[str, object], field: str
) -> None:
    await start_trainer(client)
    rows = completed(await generate(client, 2), **changes)
    error = await refusal(client.complete(GENERATE, "r", rows))
    assert isinstance(error, InvalidArgumentError | LimitError)
    assert error.field.endswith(field)
    assert {row.state for row in (await client.get_ledger()).counts} <= {1, 2}


async def test_every_request_names_what_is_wrong_with_it(client: BufferClient) -> None:
    await start_trainer(client)
    rows = completed(await generate(client, 2))
    good = rows[0]
    swapped = pb.CompletedSample(sample_id=good.sample_id, lease_id=good.lease_id, sample=rows[1].sample)
    unscored = pb.CompletedSample(sample_id=good.sample_id, lease_id=good.lease_id)
    infinite = pb.CompletedSample(
        sample_id=good.sample_id, lease_id=good.lease_id, score=sample_pb2.Score(reward=float("inf"))
    )
    delta = sample_pb2.TokenDelta(from_token=0, token_ids=wire.encode_tokens([1]), rollout_logprobs=b"")
    garbage = pb.CompletedSample(sample_id=good.sample_id, lease_id=1, sample=b"\xff\xff")
    both = pb.CompletedSample(
        sample_id=good.sample_id, lease_id=1, score=sample_pb2.Score(reward=1.0), verdict=pb.GROUP_VERDICT_KEEP
    )
    calls = {
        "samples[0].sample": client.complete(GENERATE, "r", [swapped]),
        "samples[1].sample": client.complete(GENERATE, "r", [good, garbage]),
        "samples[0].score": client.complete(SCORE, "s", [unscored]),
        "samples[0].score.reward": client.complete(SCORE, "s", [infinite]),
        "samples[0].verdict": client.complete(SCORE, "s", [both]),
        "group_ids[1]": client.prefer_groups(["g00000000", "g1"]),
        "stage": client.complete(TRAIN, "t", []),
        "samples[0].sample_id": client.extend("r", [pb.ExtendedSample(sample_id="../x", lease_id=1)]),
        "samples[0].lease_id": client.extend("r", [pb.ExtendedSample(sample_id=good.sample_id)]),
        "samples[0].delta.rollout_logprobs": client.extend(
            "r", [pb.ExtendedSample(sample_id=good.sample_id, lease_id=1, delta=delta)]
        ),
        "known_epoch": client.acquire_epoch("t", 2_000_000_000),
        "replica_id": client.lease(SCORE, "", max_samples=1),
        "max_samples": client.lease(SCORE, "s"),
        "weight_version": client.lease(GENERATE, "s", max_samples=1),
        "step": client.lease(TRAIN, "t", epoch=1),
        "samples[0].reason": client.release(GENERATE, "r", [pb.ReleasedSample(sample_id=good.sample_id, lease_id=1)]),
        "samples[0].drop_reason": client.release(
            GENERATE, "r", [pb.ReleasedSample(sample_id=good.sample_id, lease_id=1, reason=pb.RELEASE_REASON_DROP)]
        ),
        "request_id": client.submit("", [sample_pb2.Prompt(text="x")]),
        "prompts[0].input": client.submit("q", [sample_pb2.Prompt()]),
        "sample_ids[0]": client.fetch(["g1-2"]),
        "outcome": client.commit_step(1, 1, 1, pb.STEP_OUTCOME_UNSPECIFIED),
        "replica.role": client.register_replica(pb.Replica(replica_id="r")),
        "watermark.step": client.recover(1, 3, pb.Watermark(step=2)),
        "sample_ids": client.fetch(["g00000000-000"] * 17),
    }
    fields = {expected: (await refusal(call)).field for expected, call in calls.items()}
    assert fields == {expected: expected for expected in calls}


async def test_fencing_arrives_as_its_own_error(client: BufferClient) -> None:
    await start_trainer(client)
    assert (await client.acquire_epoch("t2", known_epoch=6)).epoch == 7
    error = await refusal(client.lease(TRAIN, "t", epoch=1, step=1))
    assert isinstance(error, FencedError)
    assert str(error) == "epoch: 1 was superseded by 7"


async def test_replicas_register_and_learn_the_floor(client: BufferClient) -> None:
    replica = pb.Replica(replica_id="rollout-0.1", role=pb.ROLE_ROLLOUT, state=pb.REPLICA_STATE_JOINING, pid=7)
    assert not (await client.register_replica(replica)).HasField("floor_version")
    await start_trainer(client)
    response = await client.register_replica(replica)
    assert Version.from_proto(response.floor_version) == Version(1, 0)
    assert response.ttl.seconds == 10
    assert await client.list_replicas(pb.ROLE_ROLLOUT) == [replica]
    assert await client.list_replicas(pb.ROLE_REWARD) == []


async def test_health_and_negative_waits(server: valkey.Valkey, config: Config) -> None:
    async with serving(server.url, config) as address, rpc.channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        request = pb.LeaseRequest(stage=SCORE, replica_id="s", max_samples=1, wait=Duration(seconds=-1))
        with pytest.raises(grpc.aio.AioRpcError, match="wait: must not be negative"):
            await buffer_pb2_grpc.BufferServiceStub(channel).Lease(request, timeout=5)


# Several buffers, lost stores


async def test_two_buffers_on_one_store_issue_no_prompt_twice(server: valkey.Valkey, config: Config) -> None:
    config.staleness.max_staleness = 19
    async with (
        serving(server.url, config) as one,
        serving(server.url, config) as two,
        BufferClient(one) as first,
        BufferClient(two) as second,
    ):
        await start_trainer(first)
        leases = await asyncio.gather(*(generate(client, 3) for _ in range(20) for client in (first, second)))
        samples = [sample.sample_id for lease in leases for group in lease.groups for sample in group.samples]
        by_group = {group.group_id: group.prompt_ordinal for lease in leases for group in lease.groups}
        ledger = await first.get_ledger()
    assert len(samples) == len(set(samples)) == 80
    assert sorted(by_group.values()) == list(range(40))
    assert ledger.prompt_cursor == ledger.accepted / 2 >= 40


async def test_what_one_buffer_completes_another_one_leases(server: valkey.Valkey, config: Config) -> None:
    async with (
        serving(server.url, config) as one,
        serving(server.url, config) as two,
        BufferClient(one) as first,
        BufferClient(two) as second,
    ):
        await start_trainer(first)
        leased = await generate(first)
        waiting = asyncio.create_task(second.lease(SCORE, "s", max_samples=16, wait_s=20))
        await asyncio.sleep(0.05)
        await first.complete(GENERATE, "r", completed(leased))
        assert len((await asyncio.wait_for(waiting, 10)).groups) == 4


async def test_a_killed_store_loses_nothing_that_was_acknowledged(config: Config) -> None:
    with valkey.running(appendfsync="always") as server:
        async with serving(server.url, config) as address, BufferClient(address, retry_for_s=20) as client:
            await start_trainer(client)
            acknowledged: dict[str, bytes] = {}
            for _ in range(3):
                rows = completed(await generate(client, 2))
                await client.complete(GENERATE, "r", rows)
                acknowledged |= {row.sample_id: row.sample for row in rows}
                before = await client.get_ledger()
                server.kill()
                call = asyncio.create_task(client.get_ledger())
                await asyncio.sleep(0.1)
                server.start()
                assert await call == before
            fetched = await client.fetch(sorted(acknowledged))
            assert {row.sample_id: row.sample for row in fetched.samples} == acknowledged


async def test_a_store_that_lost_everything_is_set_up_again(config: Config) -> None:
    with valkey.running() as server:
        async with serving(server.url, config) as address, BufferClient(address, retry_for_s=20) as client:
            await start_trainer(client)
            await generate(client)
            server.kill()
            for path in (server.directory / "appendonlydir").iterdir():
                path.unlink()
            server.start()
            assert (await client.get_ledger()).accepted == 0
            mark = pb.Watermark(step=7, low_water=4, dataset_digest=(await _digest(config)), seed=0)
            await client.recover((await client.acquire_epoch("t")).epoch, 7, mark)
            assert (await client.get_ledger()).prompt_cursor == 4


async def _digest(config: Config) -> str:
    return PromptSource(config.data, config.buffer.limits).digest


async def test_a_store_that_is_away_is_unavailable(config: Config) -> None:
    with valkey.running() as server:
        async with serving(server.url, config) as address, BufferClient(address, retry_for_s=0.2) as client:
            server.kill()
            error = await refusal(client.get_ledger())
            assert isinstance(error, UnavailableError)
            assert f"store unix://{server.socket_path}: does not answer" in str(error)


async def fill_up(server: valkey.Valkey) -> None:
    """From now on the server is out of memory."""
    admin = RedisStore(server.url, run_name="admin")
    await admin._scripts._redis.config_set("maxmemory", 1)
    await admin.close()


async def test_in_a_full_store_only_what_needs_room_waits(config: Config) -> None:
    with valkey.running() as server:
        async with serving(server.url, config) as address, BufferClient(address, retry_for_s=0.2) as client:
            await start_trainer(client)
            leased = await generate(client, 6)
            drained = [
                pb.ReleasedSample(sample_id=row.sample_id, lease_id=row.lease_id, reason=pb.RELEASE_REASON_DRAIN)
                for row in completed(await generate(client, 2))
            ]
            await client.release(GENERATE, "r", drained)
            await client.complete(GENERATE, "r", completed(leased)[:2])
            await fill_up(server)
            error = await refusal(client.submit("q", [sample_pb2.Prompt(text="x")]))
            assert isinstance(error, UnavailableError)
            assert "out of memory" in str(error)
            rest = await generate(client, 2)
            beats = [pb.ExtendedSample(sample_id=row.sample_id, lease_id=row.lease_id) for row in completed(rest)]
            assert outcomes(await client.extend("r", beats)) == ["OK", "OK"]
            await client.complete(GENERATE, "r", [*completed(leased)[2:], *completed(rest)])
            await client.complete(SCORE, "s", scored(await client.lease(SCORE, "s", max_samples=16)))
            batch = await client.lease(TRAIN, "t", epoch=1, step=1)
            assert (await client.commit_step(1, 1, batch.batch_lease_id)).applied
            assert (await client.confirm_checkpoint(1, 1)).retired_samples == 4


async def test_tokens_that_find_no_room_cost_no_lease(config: Config) -> None:
    with valkey.running() as server:
        store = RedisStore(server.url, run_name=config.run.name)
        await store.open(run_params(config, None))
        driver = Driver(store)
        await driver.start()
        leased = refs(await driver.generate_lease(2))
        await fill_up(server)
        key = f"{{{config.run.name}}}:lease:1"
        before = dict(await store._scripts._redis.zrange(key, 0, -1, withscores=True))
        await asyncio.sleep(0.02)
        with pytest.raises(UnavailableError, match="out of memory"):
            await store.extend([Extension(ref, lease_id, 0, 1, b"t") for ref, lease_id in leased])
        after = dict(await store._scripts._redis.zrange(key, 0, -1, withscores=True))
        assert [after[each] > before[each] for each in before] == [True, True]
        assert [each.partial for each in await store.fetch([ref for ref, _ in leased])] == [b"", b""]
        await store.close()


async def _outcome(call: object) -> object:
    try:
        return await call  # type: ignore[misc]
    except PolyheadError as error:
        return error


async def test_a_password_is_asked_for_in_one_line(config: Config) -> None:
    with valkey.running() as server:
        admin = RedisStore(server.url, run_name="admin")
        await admin._scripts._redis.config_set("requirepass", "secret")
        await admin.close()
        store = RedisStore(server.url, run_name=config.run.name)
        with pytest.raises(ConfigError, match=r"refused: .*uthentication"):
            await store.open(run_params(config, None))
        await store.close()
        allowed = RedisStore(server.url, password="secret", run_name=config.run.name)
        await allowed.open(run_params(config, None))
        await allowed.close()


async def test_a_store_that_refuses_writes_is_unavailable(config: Config) -> None:
    with valkey.running() as server:
        store = RedisStore(server.url, run_name=config.run.name)
        await store._scripts._redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(UnavailableError, match=r"refuses writes: .*read only"):
            await store.open(run_params(config, None))
        await store.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"appendfsync": "always"}, []),
        ({"appendfsync": "everysec"}, ["loses up to two seconds of acknowledged work"]),
        ({"appendonly": "no"}, ["appendonly is off"]),
    ],
)
async def test_what_a_store_can_lose_is_said_at_the_start(
    config: Config, settings: dict[str, str], words: list[str]
) -> None:
    with valkey.running() as server:
        store = RedisStore(server.url, run_name=config.run.name)
        for name, value in settings.items():
            await store._scripts._redis.config_set(name, value)
        with capture_logs() as lines:
            await store.open(run_params(config, None))
            await store.open(run_params(config, None))
        await store.close()
    warnings = [line["why"] for line in lines if line["log_level"] == "warning"]
    assert len(warnings) == len(words)
    assert all(word in line for word, line in zip(words, warnings, strict=True))


async def test_a_store_that_evicts_is_refused(config: Config) -> None:
    with valkey.running() as server:
        store = RedisStore(server.url, run_name=config.run.name)
        await store._scripts._redis.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigError, match="maxmemory-policy is allkeys-lru"):
            await store.open(run_params(config, None))
        await store._scripts._redis.config_set("maxmemory", 0)
        await store.open(run_params(config, None))
        await store.close()


async def test_a_store_that_hides_its_settings_is_used_with_a_warning(config: Config) -> None:
    with valkey.running() as server:
        admin = RedisStore(server.url, run_name="admin")
        await admin._scripts._redis.execute_command("ACL", "SETUSER", "default", "-config")
        with capture_logs() as lines:
            await admin.open(run_params(config, None))
        await admin.close()
    assert ["does not tell its appendfsync" in line["why"] for line in lines] == [True]
