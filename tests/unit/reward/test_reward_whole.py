"""Groups that are scored as a whole: what the function gets, what it may return, and what the puller makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.config.models import BatchConfig, PluginsConfig, RewardConfig
from services.common.errors import ConfigError, PolyheadError
from services.reward.check import check_scorer
from services.reward.jobs import FailureKind
from services.reward.outbox import Outbox
from services.reward.stats import Stats
from services.reward.worker import Puller
from tests.kit.reward_fake_buffer import FakeBuffer, generated
from tests.kit.reward_items import item, running_pool

RANKS = "reward_functions:ranks"
RANKED = {f"g00000001-{index:03}": float(index) for index in range(4)}


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer(whole=True)
    await fake.start()
    yield fake
    await fake.stop()


@asynccontextmanager
async def pulling(
    buffer: FakeBuffer, *, max_inflight: int = 64, timeout_s: float = 10.0
) -> AsyncIterator[tuple[asyncio.Event, Stats]]:
    config = Config(reward=RewardConfig(max_inflight=max_inflight))
    stop, stats = asyncio.Event(), Stats(1)
    async with (
        running_pool(RANKS, timeout_s=timeout_s, group_rm=True) as pool,
        BufferClient(buffer.address) as client,
    ):
        task = asyncio.create_task(Puller(client, pool, "reward-0.test", config, stats).run(stop))
        try:
            yield stop, stats
        finally:
            stop.set()
            with suppress(PolyheadError):
                await task


def rewards(buffer: FakeBuffer) -> dict[str, float]:
    return {name: score.reward for name, score in buffer.scores.items()}


async def test_the_function_gets_all_and_each_sample_its_own_score() -> None:
    async with running_pool(RANKS, group_rm=True) as pool:
        results = await pool.score([item("aaa", sample_index=4), item("a", sample_index=5), item("aa", sample_index=6)])
    assert [result.verdict for result in results] == [
        (2.0, {"group": 3.0, "index": 4.0}, ()),
        (0.0, {"group": 3.0, "index": 5.0}, ()),
        (1.0, {"group": 3.0, "index": 6.0}, ()),
    ]


async def test_an_array_is_a_list() -> None:
    async with running_pool("reward_functions:ranks_as_array", group_rm=True) as pool:
        results = await pool.score([item("")] * 3)
        assert await pool.score([]) == []
    assert [result.verdict for result in results] == [(0.0, {}, ()), (0.25, {}, ()), (0.5, {}, ())]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "ValueError: cannot rank (reward_functions.py:"),
        ("one", "1 rewards were returned for a group of 3 samples"),
        ("number", "1.0 was returned for a group, not a list"),
        ("text", "'111' was returned for a group, not a list"),
        ("nan", "b: the returned reward is nan, not a finite number"),
    ],
)
async def test_one_that_has_no_score_leaves_none_to_the_group(word: str, reason: str) -> None:
    async with running_pool(RANKS, group_rm=True) as pool:
        results = await pool.score([item("ok"), item(word, sample_id="b"), item("ok")])
    assert {(result.verdict, result.failure) for result in results} == {(None, FailureKind.RAISED)}
    assert all(result.reason.startswith(reason) for result in results)


async def test_a_function_that_takes_no_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be called as fn\(args, samples\)"):
        async with running_pool("reward_functions:takes_nothing", group_rm=True):
            pass


@pytest.mark.parametrize("scorer", ["math", "remote", "boxed_gpqa"])
def test_what_scores_one_by_one_is_refused(scorer: str) -> None:
    remote = {"urls": "http://127.0.0.1:9"} if scorer == "remote" else {}
    with pytest.raises(
        ValueError, match=f"group_rm needs a function of yours as scorer, pkg.mod:fn; '{scorer}' scores"
    ):
        RewardConfig.model_validate({"scorer": scorer, "group_rm": True, "remote": remote})


async def test_a_group_is_completed_in_one_call(buffer: FakeBuffer) -> None:
    buffer.add(*(generated(index, "a" * index) for index in range(4)))
    async with pulling(buffer, max_inflight=1) as (_, stats):
        await buffer.until(lambda: len(buffer.scores) == 4)
        assert rewards(buffer) == RANKED
        assert [dict(score.parts)["index"] for score in buffer.scores.values()] == [4.0, 5.0, 6.0, 7.0]
        assert {score.scorer for score in buffer.scores.values()} == {RANKS}
        assert (buffer.calls.count("Fetch"), buffer.calls.count("Complete")) == (1, 1)
        assert stats.as_dict()["samples_scored"] == 4


async def test_a_rest_is_scored_with_its_siblings_and_alone_completed(buffer: FakeBuffer) -> None:
    """Sample 1 is dead, 0 and 2 were scored before."""
    for index in (0, 2):
        buffer.known(generated(index, "a" * index))
    buffer.add(generated(3, "aaa"))
    async with pulling(buffer):
        await buffer.until(lambda: buffer.scores)
    assert rewards(buffer) == {"g00000001-003": 2.0}
    assert dict(buffer.scores["g00000001-003"].parts) == {"group": 3.0, "index": 7.0}


@pytest.mark.parametrize("word", ["raise", "hang"])
async def test_a_failure_of_the_group_is_each_samples(buffer: FakeBuffer, word: str) -> None:
    buffer.add(*(generated(index, word if index == 1 else "ok") for index in range(4)))
    async with pulling(buffer, timeout_s=0.5) as (_, stats):
        await buffer.until(lambda: len(buffer.released) == 4)
        assert stats.as_dict()["failures"] == 4
    assert {sample.reason for sample in buffer.released} == {pb.RELEASE_REASON_SAMPLE_ERROR}
    assert not buffer.scores


async def test_one_that_cannot_be_read_is_given_up_and_the_others_scored(buffer: FakeBuffer) -> None:
    buffer.add(b"\xff\xff\xff", *(generated(index, "a" * index) for index in range(1, 4)))
    async with pulling(buffer):
        await buffer.until(lambda: len(buffer.scores) == 3 and buffer.released)
    assert [sample.reason for sample in buffer.released] == [pb.RELEASE_REASON_FATAL]
    assert sorted(rewards(buffer).values()) == [0.0, 1.0, 2.0]


async def test_a_lease_that_is_lost_leaves_the_others_of_the_group(buffer: FakeBuffer) -> None:
    buffer.lease_ttl_s = 0.3
    buffer.lost = {"g00000001-002"}
    buffer.add(*(generated(index, "sleep " + "a" * index) for index in range(4)))
    async with pulling(buffer):
        await buffer.until(lambda: len(buffer.scores) == 3)
    assert rewards(buffer) == {name: reward for name, reward in RANKED.items() if name != "g00000001-002"}


async def test_a_replica_that_leaves_gives_the_group_back(buffer: FakeBuffer) -> None:
    buffer.add(*(generated(index, "hang") for index in range(4)))
    async with pulling(buffer) as (stop, _):
        await buffer.until(lambda: "Fetch" in buffer.calls)
        await asyncio.sleep(0.1)
        stop.set()
        await buffer.until(lambda: len(buffer.released) == 4)
    assert {sample.reason for sample in buffer.released} == {pb.RELEASE_REASON_DRAIN}


async def test_a_group_that_is_being_fetched_keeps_its_lease_and_is_given_back_on_stop(
    buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()
    monkeypatch.setattr(buffer, "Fetch", lambda request, context: never.wait())
    buffer.lease_ttl_s = 0.3
    await buffer.stop()
    await buffer.start()
    buffer.add(*(generated(index, "ok") for index in range(4)))
    async with pulling(buffer) as (stop, _):
        await buffer.until(lambda: len(buffer.extended) >= 8)
        stop.set()
        await buffer.until(lambda: len(buffer.released) == 4)
    assert {sample.reason for sample in buffer.released} == {pb.RELEASE_REASON_DRAIN}
    never.set()


async def test_what_belongs_together_is_parted_only_where_a_call_is_too_small_or_refused(buffer: FakeBuffer) -> None:
    settled: list[int] = []
    async with BufferClient(buffer.address) as client:
        outbox = Outbox(client, "reward-0.test", samples_per_rpc=4, on_settled=settled.extend)
        for first, size in ((0, 3), (3, 3), (6, 6)):
            together = [pb.CompletedSample(sample_id=f"s{n}", lease_id=n + 1) for n in range(first, first + size)]
            outbox.complete(*together)
        buffer.refuse = {"s4"}
        await outbox.flush()
    assert sorted(settled) == list(range(1, 13))
    assert buffer.completed_together[0] == ["s0", "s1", "s2"]
    assert ["s6", "s7", "s8", "s9"] in buffer.completed_together
    assert sorted(name for call in buffer.completed_together for name in call) == sorted(
        f"s{number}" for number in range(12) if number != 4
    )


async def test_the_trial_before_a_run_is_a_group(tmp_path: Path) -> None:
    (tmp_path / "of_group.py").write_text(
        "def fn(args, samples):\n    assert len(samples) == args.n_samples_per_prompt == 4\n    return [1.0] * 4\n"
    )
    reward = RewardConfig(scorer="of_group:fn", group_rm=True)
    config = Config(reward=reward, plugins=PluginsConfig(paths=[tmp_path]), batch=BatchConfig(n_samples_per_prompt=4))
    await check_scorer(config, sample_pb2.Prompt(text="What?", label="42"))
