"""RewardService over real gRPC, and the process from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2, reward_pb2_grpc, sample_pb2
from services.common import rpc
from services.common.config import Config, dump
from services.common.config.models import BufferConfig, LimitsConfig, PluginsConfig, RewardConfig
from services.common.errors import InvalidArgumentError, LimitError, from_rpc_error
from services.common.lifecycle import Process
from services.common.process import free_port
from services.reward import pool
from services.reward.replica import serve
from services.reward.service import FULL_NAME
from tests.kit.fuzz.calls import send_malformed
from tests.kit.reward_fake_buffer import FakeBuffer, generated
from tests.kit.reward_items import BY_ORDER, KIT

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer()
    await fake.start()
    yield fake
    await fake.stop()


def config_for(buffer: FakeBuffer, scorer: str = BY_ORDER, **reward: object) -> Config:
    return Config(
        buffer=BufferConfig(address=buffer.address, limits=LimitsConfig(samples_per_rpc=64)),
        reward=RewardConfig(address=f"127.0.0.1:{free_port()}", scorer=scorer, **reward),
        plugins=PluginsConfig(paths=[KIT]),
    )


@contextlib.asynccontextmanager
async def replica(config: Config, buffer: FakeBuffer) -> AsyncIterator[grpc.aio.Channel]:
    """A running replica in this process, and a channel to it."""
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, Process("reward", 0, "reward-0.test", stop)))
    await buffer.until(lambda: buffer.replicas)
    channel = rpc.channel(config.reward.address)
    try:
        yield channel
    finally:
        await channel.close()
        stop.set()
        await task


def score_item(completion: str, number: int = 0) -> reward_pb2.ScoreItem:
    prompt = sample_pb2.Prompt(text="What?", label="42")
    return reward_pb2.ScoreItem(sample_id=f"s{number}", prompt=prompt, completion=completion)


async def score(channel: grpc.aio.Channel, *items: reward_pb2.ScoreItem, **fields: object) -> reward_pb2.ScoreResponse:
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    return await stub.Score(reward_pb2.ScoreRequest(items=items, **fields), timeout=20)


async def test_each_item_is_answered_with_a_score_or_a_reason(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer, score_timeout_s=0.5), buffer) as channel:
        words = ["ok", "raise it", "dict", "hang", "die", "ok"]
        response = await score(channel, *(score_item(word, number) for number, word in enumerate(words)))
    assert [result.sample_id for result in response.results] == [f"s{number}" for number in range(6)]
    assert [result.WhichOneof("result") for result in response.results] == [
        *("score", "error", "score"),
        *("error", "error", "score"),
    ]
    assert response.results[0].score.reward == 1.0
    assert response.results[0].score.scorer == BY_ORDER
    assert dict(response.results[2].score.parts) == {"acc": 1.0, "length": 3.0}
    errors = [result.error for result in response.results if result.HasField("error")]
    assert {error.kind for error in errors} == {reward_pb2.SCORE_ERROR_KIND_FAILED}
    assert errors[1].message == "timed out after 0.5 s"


async def test_refusals_name_the_field(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer, "exact"), buffer) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await score(channel, scorer="os:system")
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidArgumentError)
        assert str(error) == "scorer: this server has 'exact', not 'os:system'"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await score(channel, *[score_item("x")] * 65)
        error = from_rpc_error(caught.value)
        assert isinstance(error, LimitError)
        assert str(error) == "items: 65 items, at most 64"
        assert (await score(channel, score_item("42"), scorer="exact")).results[0].score.reward == 1.0
        assert len((await score(channel)).results) == 0


async def test_a_call_that_nobody_waits_for_stops_taking_up_the_pool(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer), buffer) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        slow = reward_pb2.ScoreRequest(items=[score_item("sleep 0.3")] * 64)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Score(slow, timeout=0.4)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        response = await stub.Score(reward_pb2.ScoreRequest(items=[score_item("ok")]), timeout=5)
    assert response.results[0].score.reward == 1.0


async def test_direct_calls_and_the_puller_share_the_pool(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer), buffer) as channel:
        buffer.add(*(generated(number, "pid") for number in range(10)))
        response = await score(channel, score_item("pid"))
        await buffer.until(lambda: len(buffer.scores) == 10)
        replica_now = buffer.replicas[-1]
    pids = {score.reward for score in buffer.scores.values()} | {response.results[0].score.reward}
    assert pids == set(replica_now.child_pids.values())


async def test_the_heartbeat_tells_role_state_and_counters(buffer: FakeBuffer) -> None:
    config = config_for(buffer)
    async with replica(config, buffer):
        buffer.add(generated(0, "ok"), generated(1, "raise it"))
        await buffer.until(lambda: buffer.replicas[-1].stats["samples_scored"] == 1)
        last = buffer.replicas[-1]
        assert (last.role, last.state, last.pid) == (pb.ROLE_REWARD, pb.REPLICA_STATE_SERVING, os.getpid())
        assert (last.replica_id, last.address) == ("reward-0.test", config.reward.address)
        assert last.stats["failures"] == 1
        assert 0 < last.stats["busy_seconds"] < last.stats["uptime_seconds"]
        assert list(last.child_pids) == ["scorer-0"]
    assert buffer.replicas[-1].state == pb.REPLICA_STATE_DRAINING


async def test_health_and_reflection_answer(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer, "exact"), buffer) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def run_process(config: Config, tmp_path: Path, **env: str) -> asyncio.subprocess.Process:
    path = tmp_path / "run.toml"
    path.write_text(dump(config))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.reward", "-c", str(path)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_process_serves_and_leaves_on_sigterm(buffer: FakeBuffer, tmp_path: Path) -> None:
    process = await run_process(config_for(buffer, processes=2), tmp_path)
    buffer.add(generated(0, "ok"))
    await buffer.until(lambda: buffer.scores and buffer.replicas)
    children = [psutil.Process(pid) for pid in buffer.replicas[-1].child_pids.values()]
    assert len(children) == 2
    process.send_signal(signal.SIGTERM)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert [child for child in children if child.is_running()] == []


async def test_pool_processes_do_not_outlive_a_killed_parent(buffer: FakeBuffer, tmp_path: Path) -> None:
    process = await run_process(config_for(buffer, processes=2), tmp_path)
    buffer.add(generated(0, "hang"))
    await buffer.until(lambda: buffer.leased and buffer.replicas)
    children = [psutil.Process(pid) for pid in buffer.replicas[-1].child_pids.values()]
    process.kill()
    await process.communicate()
    gone, left = await asyncio.to_thread(psutil.wait_procs, children, timeout=10)
    assert (len(gone), left) == (2, [])


@pytest.mark.parametrize(
    ("scorer", "line"),
    [
        ("no_such_module:fn", "polyhead reward: reward.scorer: no_such_module does not import: ModuleNotFoundError"),
        ("maths", "polyhead reward: reward.scorer: unknown scorer 'maths'"),
    ],
)
async def test_a_scorer_that_does_not_load_ends_the_process_with_one_line(
    buffer: FakeBuffer, tmp_path: Path, scorer: str, line: str
) -> None:
    process = await run_process(config_for(buffer, scorer, processes=2), tmp_path)
    _, errors = await process.communicate()
    assert process.returncode == 2
    plain = [text for text in errors.decode().splitlines() if not text.startswith("{")]
    assert len(plain) == 1
    assert plain[0].startswith(line)


async def test_a_port_in_use_ends_the_process_with_one_line(buffer: FakeBuffer, tmp_path: Path) -> None:
    config = config_for(buffer, "exact")
    config.reward.address = buffer.address
    process = await run_process(config, tmp_path)
    _, errors = await process.communicate()
    assert process.returncode == 2
    [line] = [text for text in errors.decode().splitlines() if text.startswith("polyhead")]
    assert line == f"polyhead reward: {buffer.address}: cannot be bound: is another process listening there?"


async def test_malformed_requests_are_refused_by_name_and_harm_nobody(buffer: FakeBuffer) -> None:
    request = reward_pb2.ScoreRequest(scorer="exact", items=[score_item("ok", number) for number in range(2)])
    async with replica(config_for(buffer, "exact"), buffer) as channel:
        seen = await send_malformed(channel, FULL_NAME, {"Score": request}, seed=0, count=1000)
        response = await score(channel, score_item("42"))
    assert response.results[0].score.reward == 1.0
    assert seen["Score OK"] > 0
    assert seen["Score INVALID_ARGUMENT"] > 0


async def test_a_call_is_a_group_where_groups_are_scored(buffer: FakeBuffer) -> None:
    config = config_for(buffer, "reward_functions:ranks", group_rm=True)
    async with replica(config, buffer) as channel:
        response = await score(channel, *(score_item("a" * (3 - number), number) for number in range(3)))
        failed = await score(channel, score_item("ok"), score_item("raise"))
    assert [result.score.reward for result in response.results] == [2.0, 1.0, 0.0]
    assert {result.score.parts["group"] for result in response.results} == {3.0}
    assert [result.error.kind for result in failed.results] == [reward_pb2.SCORE_ERROR_KIND_FAILED] * 2


async def test_a_score_names_what_the_sample_chose(buffer: FakeBuffer) -> None:
    async with replica(config_for(buffer, "exact"), buffer) as channel:
        chosen = score_item("the 42")
        chosen.prompt.metadata_json = '{"rm_type": "f1"}'
        response = await score(channel, score_item("42"), chosen)
    assert [(result.score.scorer, result.score.reward) for result in response.results] == [("exact", 1.0), ("f1", 1.0)]


async def test_a_scorer_that_lacks_what_it_needs_is_unavailable(
    buffer: FakeBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left in the buffer, which is not asked again at once; other scores go on."""
    monkeypatch.setattr(pool, "PAUSE_S", 0.2)
    (tmp_path / "broken_sandbox.py").write_text(
        "from services.reward.scorers.base import ScorerUnavailableError\n"
        "def fn(args, sample):\n"
        "    if sample.response == 'code': raise ScorerUnavailableError('no sandbox')\n"
        "    return 1.0\n"
    )
    config = config_for(buffer, "broken_sandbox:fn")
    config.plugins.paths.append(tmp_path)
    async with replica(config, buffer) as channel:
        response = await score(channel, score_item("code"), score_item("ok"))
        assert response.results[0].error.kind == reward_pb2.SCORE_ERROR_KIND_UNAVAILABLE
        assert response.results[1].score.reward == 1.0
        buffer.add(generated(0, "code"), generated(1, "ok"))
        await buffer.until(lambda: buffer.scores and len(buffer.released) >= 2)
        await buffer.until(lambda: any(replica.trouble == "no sandbox" for replica in buffer.replicas))
    assert {sample.reason for sample in buffer.released} <= {
        pb.RELEASE_REASON_UNAVAILABLE,
        pb.RELEASE_REASON_DRAIN,
    }
    assert list(buffer.scores) == ["g00000001-001"]
