"""The engine client: what it sends, how it reads streams, and what it makes of failures."""

from __future__ import annotations

import asyncio
import math

import pytest
from aiohttp import web

from polyhead.v1 import weights_pb2
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import (
    EngineLoad,
    EngineRefusedError,
    EngineUnavailableError,
    Finish,
    GenerateRequest,
    RequestRefusedError,
)
from services.rollout.engines.self_report import read_loads, read_server_info
from services.rollout.engines.stream import ChunkReader
from tests.kit.rollout_fake_engine import FakeEngine, token_at
from tests.kit.rollout_rig import until


@pytest.fixture
async def engine():
    fake = FakeEngine()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def client(engine):
    async with EngineClient(engine.url, "key", idle_timeout_s=0.5) as made:
        yield made


def request(rid: str, **changes) -> GenerateRequest:
    fields = {
        "rid": rid,
        "input_ids": [5, 6],
        "max_new_tokens": 5,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "stop": [],
        "stop_token_ids": [],
        "sampling_seed": 9,
    }
    return GenerateRequest(**(fields | changes))


@pytest.mark.parametrize("incremental", [True, False])
async def test_both_forms_of_streams_read_alike(engine, client, incremental):
    engine.incremental = incremental
    tokens: dict[int, list[int]] = {0: [], 1: []}
    finished = {}
    async for index, chunk in client.generate([request("a"), request("b", sampling_seed=4)], "e1.s1"):
        tokens[index] += chunk.token_ids
        assert chunk.total == len(tokens[index])
        assert len(chunk.logprobs) == len(chunk.token_ids)
        assert chunk.spans[-1].end == chunk.total
        if chunk.finish:
            finished[index] = chunk.finish
    assert tokens == {seed_index: [token_at(seed, 2 + at) for at in range(5)] for seed_index, seed in ((0, 9), (1, 4))}
    assert finished == {0: Finish.LENGTH, 1: Finish.LENGTH}


async def test_the_body_is_the_batch_form(engine, client):
    requests = [request("a", stop=["x"], stop_token_ids=[3]), request("b")]
    async for _ in client.generate(requests, "e1.s1"):
        pass
    (body,) = engine.requests
    assert body["rid"] == ["a", "b"]
    assert body["extra_key"] == "e1.s1"
    assert body["stream"]
    assert body["return_logprob"]
    assert body["sampling_params"][0] == {
        "max_new_tokens": 5,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "sampling_seed": 9,
        "stop": ["x"],
        "stop_token_ids": [3],
    }


async def test_a_refused_request_is_not_the_engines_fault(engine, client):
    engine.refuse_containing = 6
    with pytest.raises(RequestRefusedError, match="bad token"):
        async for _ in client.generate([request("a")], ""):
            pass


async def test_a_broken_stream_is_the_engines_fault(engine, client):
    engine.limit_tokens = 2
    stream = client.generate([request("a")], "")
    await anext(stream)
    engine.cut()
    with pytest.raises(EngineUnavailableError, match="engine /generate"):
        await anext(stream)


async def test_a_silent_stream_is_given_up(engine, client):
    engine.go.clear()
    with pytest.raises(EngineUnavailableError, match="Timeout"):
        async for _ in client.generate([request("a")], ""):
            pass


async def test_an_engine_that_is_not_there():
    async with EngineClient("http://127.0.0.1:1") as client:
        assert not await client.health()
        with pytest.raises(EngineUnavailableError, match="engine /server_info"):
            await client.server_info()
        with pytest.raises(EngineUnavailableError, match="engine /pause_generation"):
            await client.pause("in_place")


async def test_what_an_engine_says_about_itself(client):
    info = await client.server_info()
    assert (info.name, info.context_length) == ("fake_engine/1", 64)
    assert (await client.model_info())["weight_version"] == "default"


@pytest.mark.parametrize(
    ("answer", "overlapped"),
    [
        ({"version": "0.5.23", "disable_overlap_schedule": False}, True),
        ({"version": "0.5.23", "disable_overlap_schedule": True}, False),
        ({"version": "0.5.23"}, True),
        ({"kind": "torch_engine", "version": "0.1.0"}, False),
    ],
)
def test_an_engine_that_decodes_ahead_is_known_as_one(answer, overlapped):
    assert read_server_info(answer).overlapped is overlapped


def test_what_is_read_of_server_info():
    answer = {"version": "0.5.23", "tp_size": 2, "max_req_input_len": 250, "context_length": 256}
    sizes = {"max_running_requests": 16, "max_total_num_tokens": 4096, "model_path": "/model"}
    info = read_server_info(answer | sizes)
    assert (info.context_length, info.ranks) == (250, 2)
    assert (info.max_running_requests, info.kv_tokens, info.model_path) == (16, 4096, "/model")
    bare = read_server_info({"max_running_requests": None})
    assert (bare.name, bare.ranks, bare.max_running_requests, bare.kv_tokens) == ("sglang/unknown", 1, None, None)


async def test_an_engine_without_the_route_has_no_load(client):
    assert await client.load() is None


def test_the_load_is_that_of_all_data_parallel_ranks():
    rank = {
        "num_running_reqs": 3,
        "num_waiting_reqs": 1,
        "num_used_tokens": 70,
        "max_total_num_tokens": 100,
        "max_running_requests": 8,
    }
    assert read_loads({"loads": [rank, rank]}) == EngineLoad(6, 2, 140, 200, 16)
    for broken in ({}, {"loads": None}, {"loads": [{}]}, {"loads": [rank | {"num_used_tokens": None}]}):
        with pytest.raises(EngineUnavailableError, match="engine /v1/loads"):
            read_loads(broken)


@pytest.mark.parametrize(("touched", "harm"), [(None, True), (True, True), (False, False)])
async def test_a_refused_update_says_whether_it_did_harm(engine, client, touched, harm):
    engine.fail_update, engine.fail_update_touched = "no", touched
    with pytest.raises(EngineRefusedError, match="no") as caught:
        await client.update_from_distributed(weights_pb2.WeightBucket(), group_name="g", version=None, timeout_s=1)
    assert caught.value.weights_touched is harm


async def test_admin_calls_carry_the_key_and_old_engines_lack_sessions():
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"error": "Not Found"}, status=404)

    app = web.Application()
    app.router.add_route("*", "/{verb}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with EngineClient(f"http://127.0.0.1:{runner.addresses[0][1]}", "key") as client:
        await client.begin_update()
        await client.end_update()
        with pytest.raises(EngineRefusedError, match="Not Found"):
            await client.flush()
    await runner.cleanup()
    assert seen == ["Bearer key"] * 2, "after the first, nothing is asked about sessions"


@pytest.mark.parametrize("answer", [[], "text", None, 3])
async def test_an_answer_that_is_no_object_is_the_engines_fault(answer):
    async def respond(request: web.Request) -> web.Response:
        return web.json_response(answer)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with EngineClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
        for call in (client.server_info, client.model_info, client.load):
            with pytest.raises(EngineUnavailableError, match="is no JSON object"):
                await call()
    await runner.cleanup()


def event(index=0, output_ids=(), completion_tokens=0, finish=None, logprobs=None, **meta):
    values = [-1.0] * len(output_ids) if logprobs is None else logprobs
    return {
        "index": index,
        "output_ids": list(output_ids),
        "meta_info": {
            "completion_tokens": completion_tokens,
            "finish_reason": finish,
            "output_token_logprobs": [[value, 0, None] for value in values],
            **meta,
        },
    }


def test_a_repeated_last_token_of_an_aborted_request_is_not_new():
    reader = ChunkReader(1)
    reader.read(event(output_ids=[4, 5], completion_tokens=2))
    _, chunk = reader.read(event(output_ids=[5], completion_tokens=2, finish={"type": "abort", "message": "Aborted"}))
    assert (list(chunk.token_ids), chunk.finish) == ([], Finish.ABORT)


def test_an_abort_for_a_bad_request_is_final():
    reader = ChunkReader(1)
    _, chunk = reader.read(event(finish={"type": "abort", "message": "too long", "status_code": 400}))
    assert (chunk.finish, chunk.message) == (Finish.ERROR, "too long")


def test_a_log_prob_without_a_value_is_not_a_number():
    _, chunk = ChunkReader(1).read(event(output_ids=[4], completion_tokens=1, logprobs=[None]))
    assert math.isnan(chunk.logprobs[0])


@pytest.mark.parametrize(
    "broken",
    [
        {"index": 0},
        event(index=3, output_ids=[1], completion_tokens=1),
        event(output_ids=[1], completion_tokens=2),
        event(output_ids=[1], completion_tokens=1, logprobs=[]),
        event(output_ids=[1], completion_tokens=1, finish={"type": "odd"}),
        event(output_ids=[1], completion_tokens=1, finish={"type": "lost"}),
        event(output_ids=[1], completion_tokens=1, weight_versions=[{"version": "e1.s1", "start": 0, "end": 2}]),
        event(output_ids=[1], completion_tokens=1, weight_versions=[]),
    ],
)
def test_nonsense_is_the_engines_fault(broken):
    with pytest.raises(EngineUnavailableError):
        ChunkReader(1).read(broken)


def test_an_error_inside_a_stream_is_a_refusal():
    with pytest.raises(RequestRefusedError, match="too long"):
        ChunkReader(1).read({"error": {"message": "too long", "code": 400}})


async def test_many_streams_at_once_do_not_wait_for_connections(engine):
    engine.go.clear()
    async with EngineClient(engine.url) as client:

        async def one(number: int) -> None:
            async for _ in client.generate([request(f"r{number}", max_new_tokens=1)], ""):
                pass

        streams = [asyncio.create_task(one(number)) for number in range(150)]
        await until(lambda: len(engine.requests) == 150)
        engine.go.set()
        await asyncio.gather(*streams)
