"""The reward replica with a scorer elsewhere: what is counted, what waits, and what the registry says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.config import Config
from services.common.errors import UnavailableError
from services.common.lifecycle import Process
from services.common.process import free_port
from services.reward.check import check_scorer
from services.reward.replica import serve
from tests.kit.reward_fake_buffer import FakeBuffer, generated
from tests.kit.reward_items import KIT
from tests.kit.reward_servers import QUICK, HttpServer, http_server


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer()
    await fake.start()
    yield fake
    await fake.stop()


def config_for(buffer: FakeBuffer, server: HttpServer, judge: str = "none", **settings: Any) -> Config:
    return Config.model_validate(
        {
            "buffer": {"address": buffer.address},
            "batch": {"dynamic_sampling_filter": judge},
            "reward": {
                "address": f"127.0.0.1:{free_port()}",
                "scorer": "remote",
                "remote": {**QUICK, "urls": server.url, **settings},
            },
            "plugins": {"paths": [str(KIT)]},
        }
    )


@asynccontextmanager
async def replica(config: Config, buffer: FakeBuffer) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, Process("reward", 0, "reward-0.test", stop)))
    await buffer.until(lambda: buffer.replicas)
    try:
        yield
    finally:
        stop.set()
        await task


async def test_scores_carry_where_they_come_from_and_no_process_is_needed(buffer: FakeBuffer) -> None:
    async with (
        http_server(lambda body: {"score": 0.5, "fluency": 2}) as server,
        replica(config_for(buffer, server), buffer),
    ):
        buffer.add(*(generated(number, str(number)) for number in range(40)))
        await buffer.until(lambda: len(buffer.scores) == 40)
        last = buffer.replicas[-1]
    score = buffer.scores["g00000001-007"]
    assert (score.reward, dict(score.parts), score.scorer) == (0.5, {"fluency": 2.0}, "remote/http")
    assert score.seconds > 0
    assert dict(last.child_pids) == {}


async def test_an_outage_leaves_samples_generated_says_why_and_ends_by_itself(buffer: FakeBuffer) -> None:
    async with (
        http_server(lambda body: web.Response(status=503, text="loading the model")) as server,
        replica(config_for(buffer, server, breaker_reset_s=0.2), buffer),
    ):
        buffer.add(*(generated(number, "ok") for number in range(100)))
        await buffer.until(lambda: buffer.replicas[-1].trouble)
        await buffer.until(lambda: not buffer.leased)
        last = buffer.replicas[-1]
        assert "HTTP 503: loading the model" in last.trouble
        assert last.state == pb.REPLICA_STATE_SUSPECT
        assert {sample.reason for sample in buffer.released} == {pb.RELEASE_REASON_UNAVAILABLE}
        assert all("HTTP 503" in sample.error for sample in buffer.released)
        before = len(buffer.released)
        await asyncio.sleep(1.5)
        assert len(buffer.released) - before <= 10, "only what finds out whether it is back is leased"
        server.answer = lambda body: 1
        await buffer.until(lambda: len(buffer.scores) == 100)
        await buffer.until(lambda: buffer.replicas[-1].state == pb.REPLICA_STATE_SERVING)
        assert buffer.replicas[-1].trouble == ""
    assert {score.reward for score in buffer.scores.values()} == {1.0}


async def test_a_verdict_on_the_sample_counts_and_is_no_number(buffer: FakeBuffer) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return web.json_response({"detail": "empty"}, status=422) if body["response"] == "bad" else 1

    async with http_server(answer) as server, replica(config_for(buffer, server), buffer):
        buffer.add(generated(0, "ok"), generated(1, "bad"), generated(2, "ok"))
        await buffer.until(lambda: len(buffer.scores) == 2 and buffer.released)
    [released] = buffer.released
    assert (released.sample_id, released.reason) == ("g00000001-001", pb.RELEASE_REASON_SAMPLE_ERROR)
    assert released.error == 'HTTP 422: {"detail": "empty"}'


async def test_a_filter_runs_beside_a_scorer_elsewhere(buffer: FakeBuffer) -> None:
    async with (
        http_server(lambda body: 1) as server,
        replica(config_for(buffer, server, "reward_functions:keeps_by_label"), buffer),
    ):
        buffer.add(generated(0, "ok"))
        await buffer.until(lambda: buffer.scores)
        assert list(buffer.replicas[-1].child_pids) == ["scorer-0"]


async def test_before_a_run_the_server_is_asked_once(buffer: FakeBuffer) -> None:
    prompt = sample_pb2.Prompt(text="What?", label="42")
    async with http_server(lambda body: 1) as server:
        config = config_for(buffer, server)
        await check_scorer(config, prompt)
        assert server.calls == [{"prompt": "What?", "response": "42", "label": "42"}]
        server.answer = lambda body: "good"
        with pytest.raises(UnavailableError, match="the returned reward is a str"):
            await check_scorer(config, prompt)
    with pytest.raises(UnavailableError, match="cannot be connected to"):
        await check_scorer(config, prompt)


async def test_the_penalty_for_length_is_on_scores_from_elsewhere_too(buffer: FakeBuffer) -> None:
    """A completion of 8 tokens, of 10 at most, the last four of which cost."""
    async with http_server(lambda body: {"score": 0.5, "fluency": 2}) as server:
        config = config_for(buffer, server)
        config.reward.overlong_buffer_len = 4
        config.rollout.sampling.max_response_len = 10
        async with replica(config, buffer):
            buffer.add(generated(0, "ok"))
            await buffer.until(lambda: buffer.scores)
    [score] = buffer.scores.values()
    assert (score.reward, dict(score.parts)) == (0.0, {"fluency": 2.0, "overlong": -0.5})
