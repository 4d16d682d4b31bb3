"""Process rewards: what a scorer may give to spans of tokens, and that they come through to the buffer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2, sample_pb2
from services.buffer.validation import score_bytes
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, PolyheadError
from services.reward.jobs import FailureKind
from services.reward.pool import ScorerPool
from services.reward.scorers.base import RewardSpan, SampleError, Verdict, keyed, to_verdict
from services.reward.scorers.overlong import Overlong
from services.reward.scorers.weighted import WeightedScorer
from services.reward.stats import Stats
from services.reward.worker import Puller
from tests.kit.reward_fake_buffer import FakeBuffer, generated
from tests.kit.reward_items import item, running_pool
from tests.kit.reward_servers import grpc_server, http_server, remote

STEPS = "reward_functions:steps"
TOKENS = wire.encode_tokens([7, 8, 11, 12, 13, 14])
BAD = [
    (3, "'spans' is a int, not a list of [start, end, reward]"),
    ("abc", "'spans' is a str, not a list of [start, end, reward]"),
    ([[0, 1]], "spans[0] is not [start, end, reward]"),
    ([[0, 1, 1.0], 5], "spans[1] is not [start, end, reward]"),
    ([[0, 0, 1.0]], "spans[0] is from 0 to 0"),
    ([[2, 1, 1.0]], "spans[0] is from 2 to 1"),
    ([[-1, 1, 1.0]], "spans[0] is from -1 to 1"),
    ([[0, 1.5, 1.0]], "spans[0] has a bound that is a float, not a whole number"),
    ([[None, 1, 1.0]], "spans[0] has a bound that is None, not a whole number"),
    ([[0, 1, math.nan]], "spans[0] is nan, not a finite number"),
    ([[0, 1, None]], "spans[0] is None, not a number"),
]


async def test_a_function_rewards_spans_of_the_tokens_it_is_given() -> None:
    async with running_pool(STEPS, send_tokens=True) as pool:
        assert pool.wants_tokens
        [result] = await pool.score([item("abcd", completion_tokens=4, token_ids=TOKENS)])
    assert result.verdict == (1.0, {"prompt": 2.0, "first": 11.0}, (RewardSpan(0, 2, 0.25), RewardSpan(2, 4, 0.5)))


@pytest.mark.parametrize(("spans", "reason"), BAD)
def test_what_is_no_span_is_no_score(spans: object, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        to_verdict({"score": 1.0, "spans": spans})
    assert str(caught.value) == reason


def test_spans_may_overlap_and_come_in_any_order() -> None:
    verdict = to_verdict({"score": 1.0, "spans": [[3, 5, 1], (0, 4, -1.0)]})
    assert verdict.spans == ((3, 5, 1.0), (0, 4, -1.0))
    assert to_verdict({"score": 1.0, "spans": None}).spans == ()


def test_what_changes_a_reward_leaves_those_of_its_spans() -> None:
    verdict = Verdict(1.0, {"acc": 0.5}, (RewardSpan(0, 1, 2.0),))
    assert keyed(verdict, "acc").spans == verdict.spans
    assert Overlong(10, 5, 1.0)(item("", completion_tokens=10), verdict).spans == verdict.spans
    weighted = WeightedScorer({"a": lambda _: verdict, "b": lambda _: verdict}, {"a": 0.5, "b": -1.0})
    assert weighted(item("")).spans == ((0, 1, 1.0), (0, 1, -2.0))


@asynccontextmanager
async def pulling(buffer: FakeBuffer, pool: ScorerPool) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with BufferClient(buffer.address) as client:
        task = asyncio.create_task(Puller(client, pool, "reward-0.test", Config(), Stats(1)).run(stop))
        try:
            yield
        finally:
            stop.set()
            with suppress(PolyheadError):
                await task


def of_four_tokens(number: int, completion: str) -> sample_pb2.Sample:
    sample = generated(number, completion)
    sample.segments[0].CopyFrom(sample_pb2.Segment(token_ids=TOKENS, num_tokens=6, prompt_length=2))
    return sample


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer()
    await fake.start()
    yield fake
    await fake.stop()


async def test_they_come_to_the_buffer_and_those_behind_the_completion_do_not(buffer: FakeBuffer) -> None:
    buffer.add(of_four_tokens(0, "abcd"), of_four_tokens(1, "spans [[0, 5, 1.0]]"))
    async with running_pool(STEPS, send_tokens=True) as pool, pulling(buffer, pool):
        await buffer.until(lambda: buffer.scores and buffer.released)
    [score] = buffer.scores.values()
    assert [(span.start, span.end, span.reward) for span in score.spans] == [(0, 2, 0.25), (2, 4, 0.5)]
    assert score.parts["first"] == 11.0
    [released] = buffer.released
    assert released.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert released.error == "spans[0] ends at 5, and the completion has 4 tokens"


async def test_samples_of_a_group_each_have_their_own(buffer: FakeBuffer) -> None:
    buffer.whole = True
    buffer.add(*(of_four_tokens(number, "abcd") for number in range(4)))
    async with running_pool("reward_functions:steps_of_group", group_rm=True) as pool, pulling(buffer, pool):
        await buffer.until(lambda: len(buffer.scores) == 4)
    assert [score.spans[0].reward for _, score in sorted(buffer.scores.items())] == [4.0, 5.0, 6.0, 7.0]


async def test_servers_over_http_and_grpc_give_them() -> None:
    seen: list[reward_pb2.ScoreItem] = []

    def over_grpc(asked: reward_pb2.ScoreItem) -> Any:
        seen.append(asked)
        result = reward_pb2.ScoreResult(sample_id=asked.sample_id)
        result.score.reward = 1.0
        result.score.spans.add(start=int(asked.completion), end=4, reward=0.5)
        return result

    each = item("1", completion_tokens=4, token_ids=TOKENS)
    async with grpc_server(over_grpc) as server, remote("grpc", server.url) as station:
        good, bad = await station.score([each, each._replace(completion="4")])
    assert good.verdict == (1.0, {}, ((1, 4, 0.5),))
    assert (bad.failure, bad.reason) == (FailureKind.RAISED, "spans[0] is from 4 to 4")
    assert (seen[0].token_ids, seen[0].prompt_length) == (TOKENS, 2)
    async with (
        http_server(lambda _: {"score": 1.0, "spans": [[1, 4, 0.5]]}) as server,
        remote("http", server.url) as station,
    ):
        [result] = await station.score([each])
    assert result.verdict == (1.0, {}, ((1, 4, 0.5),))


@pytest.mark.parametrize(
    ("span", "field"),
    [
        ({"start": 2, "end": 2}, r"score\.spans\[1\]\.end"),
        ({"end": 1, "reward": float("inf")}, r"score\.spans\[1\]\.reward"),
    ],
)
def test_the_buffer_refuses_what_is_none(span: dict[str, Any], field: str) -> None:
    score = sample_pb2.Score(
        reward=1.0, spans=[sample_pb2.RewardSpan(end=3, reward=1.0), sample_pb2.RewardSpan(**span)]
    )
    with pytest.raises(InvalidArgumentError, match=field):
        score_bytes(score, LimitsConfig(), "score")
