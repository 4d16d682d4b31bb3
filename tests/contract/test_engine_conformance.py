"""What every engine has to do, over HTTP only: the same suite for each kind in `STARTS`."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from services.rollout.engines.self_report import read_loads, read_server_info
from tests.kit.engine_process import ADMIN_KEY, CONTEXT, STREAM_INTERVAL, EngineApi, logprobs_of
from tests.kit.engine_push import Channel, Collector
from tests.kit.hf_reference import greedy, teacher_forced, teacher_forced_after_swap
from tests.kit.tiny_model import EOS_ID, build_tokenizer

# One worker for all that shares an engine.
# The first test starts SGLang, beside the engines of the demo.
pytestmark = pytest.mark.timeout(400)

LONG = 4000
"""Tokens that no test waits for: what runs so long is still running when the test acts."""
PROMPTS = [[5], [7, 9, 11], list(range(3, 40)), [20] * 32, list(range(60, 99)) + list(range(3, 60))]


# --- generation -------------------------------------------------------------------------------------------------------


async def test_greedy_is_what_hugging_face_generates(api: EngineApi, references: dict[str, Any]) -> None:
    answers = await api.generate(PROMPTS, temperature=0, max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["output_ids"] == greedy(references["old"], prompt, 12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_the_temperature_scaled_log_softmax(
    api: EngineApi, references: dict[str, Any], temperature: float
) -> None:
    params = {"temperature": temperature, "max_new_tokens": 24, "ignore_eos": True, "top_p": 0.9, "top_k": 50}
    answers = await api.generate(PROMPTS, **params)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer["output_ids"]) == 24
        expected = teacher_forced(references["old"], prompt, answer["output_ids"], temperature)
        assert logprobs_of(answer) == pytest.approx(expected, abs=1e-4)
        assert [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]


async def test_greedy_logprobs_are_at_temperature_one(api: EngineApi, references: dict[str, Any]) -> None:
    answer = await api.generate([7, 9], temperature=0, max_new_tokens=8, ignore_eos=True)
    assert logprobs_of(answer) == pytest.approx(
        teacher_forced(references["old"], [7, 9], answer["output_ids"]), abs=1e-4
    )


async def test_meta_info(api: EngineApi) -> None:
    answer = await api.generate([7, 9, 11], max_new_tokens=6, ignore_eos=True, rid="a-request", extra_key="v0")
    meta = answer["meta_info"]
    assert meta["id"] == "a-request"
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 6, 0)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
    assert meta["e2e_latency"] > 0
    assert answer["text"] == build_tokenizer().decode(answer["output_ids"], skip_special_tokens=True)


async def test_single_and_batch_agree(api: EngineApi) -> None:
    singles = [await api.generate(prompt, temperature=0, max_new_tokens=9) for prompt in PROMPTS]
    batch = await api.generate(PROMPTS, temperature=0, max_new_tokens=9, rid="b")
    assert [answer["meta_info"]["id"] for answer in batch] == [f"b_{index}" for index in range(len(PROMPTS))]
    for single, member in zip(singles, batch, strict=True):
        assert single["output_ids"] == member["output_ids"]
        assert single["meta_info"]["finish_reason"] == member["meta_info"]["finish_reason"]


async def test_a_batch_takes_parameters_for_each(api: EngineApi) -> None:
    params = [{"max_new_tokens": count, "temperature": 0, "ignore_eos": True} for count in (1, 5, 3)]
    body = {"input_ids": [[5], [6], [7]], "sampling_params": params, "rid": ["x", "y", "z"]}
    answers = await api.ok("/generate", body)
    assert [len(answer["output_ids"]) for answer in answers] == [1, 5, 3]
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y", "z"]
    assert "output_token_logprobs" not in answers[0]["meta_info"]


async def test_more_requests_than_slots(api: EngineApi, references: dict[str, Any]) -> None:
    prompts = [[3 + index, 4 + index] for index in range(20)]
    answers = await api.generate(prompts, temperature=0, max_new_tokens=5)
    assert [answer["output_ids"] for answer in answers] == [greedy(references["old"], prompt, 5) for prompt in prompts]


async def test_text_prompt(api: EngineApi) -> None:
    ids = build_tokenizer().encode("1+2=")
    params = {"temperature": 0, "max_new_tokens": 6}
    by_text = await api.ok("/generate", {"text": "1+2=", "sampling_params": params})
    assert by_text["output_ids"] == (await api.generate(ids, **params))["output_ids"]
    assert by_text["meta_info"]["prompt_tokens"] == len(ids)


async def test_input_logprobs(api: EngineApi, references: dict[str, Any]) -> None:
    prompt = PROMPTS[-1]
    for start in (0, 5):
        answer = await api.generate(prompt, max_new_tokens=1, logprob_start_len=start)
        entries = answer["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in entries] == prompt[start:]
        assert entries[0][0] is None
        expected = teacher_forced(references["old"], prompt[: start + 1], prompt[start + 1 :])
        assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=1e-4)


async def test_top_logprobs(api: EngineApi) -> None:
    answer = await api.generate([7, 9], temperature=0, max_new_tokens=4, top_logprobs_num=3, ignore_eos=True)
    top = answer["meta_info"]["output_top_logprobs"]
    assert [len(entries) for entries in top] == [3] * 4
    assert [entries[0][1] for entries in top] == answer["output_ids"]
    assert [entries[0][0] for entries in top] == pytest.approx(logprobs_of(answer))
    assert all(a[0] >= b[0] for entries in top for a, b in itertools.pairwise(entries))


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_incremental_stream_adds_up_to_the_answer(api: EngineApi) -> None:
    params = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    answer = await api.generate([7, 9], **params)
    events = [event async for event in api.stream([7, 9], **params)]
    assert len(events) > 2
    assert [token for event in events for token in event["output_ids"]] == answer["output_ids"]
    assert [value for event in events for value in logprobs_of(event)] == pytest.approx(logprobs_of(answer), abs=1e-5)
    assert "".join(event["text"] for event in events) == answer["text"]
    totals = [event["meta_info"]["completion_tokens"] for event in events]
    assert totals == sorted(totals)
    assert totals[-1] == 30
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True] * (len(events) - 1) + [False]


async def test_batch_stream_names_the_index(api: EngineApi) -> None:
    params = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
    answers = await api.generate(PROMPTS[:3], **params)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for event in api.stream(PROMPTS[:3], **params):
        tokens[event["index"]] += event["output_ids"]
    assert [tokens[index] for index in range(3)] == [answer["output_ids"] for answer in answers]


async def test_a_request_may_choose_its_stream_interval(api: EngineApi) -> None:
    params = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
    sizes = {}
    for interval in (1, 4):
        events = [event async for event in api.stream([7, 9], **params, stream_interval=interval)]
        sizes[interval] = [len(event["output_ids"]) for event in events if event["output_ids"]]
        assert sum(sizes[interval]) == 9
    # An HTTP server that is behind sends what has come together.
    assert max(sizes[4]) >= 4
    assert len(sizes[1]) > len(sizes[4])


async def test_a_client_that_goes_away_frees_its_slots(api: EngineApi) -> None:
    async for _ in api.stream([[7], [8]], max_new_tokens=LONG, ignore_eos=True):
        break
    # Only an idle engine flushes.
    async with asyncio.timeout(10):
        while (await api.post("/flush_cache"))[0] != 200:
            await asyncio.sleep(0.02)


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_stop_token_ids(api: EngineApi) -> None:
    free = await api.generate([7, 9], temperature=0, max_new_tokens=12, ignore_eos=True)
    stop = free["output_ids"][5]
    first = free["output_ids"].index(stop)
    answer = await api.generate([7, 9], temperature=0, max_new_tokens=12, stop_token_ids=[stop, EOS_ID])
    assert answer["output_ids"] == free["output_ids"][: first + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(logprobs_of(answer)) == first + 1
    decode = build_tokenizer().decode
    assert answer["text"] == decode(free["output_ids"][:first], skip_special_tokens=True)
    ignored = await api.generate([7, 9], temperature=0, max_new_tokens=12, stop_token_ids=[stop], ignore_eos=True)
    assert ignored["output_ids"] == free["output_ids"]
    untrimmed = await api.generate([7, 9], temperature=0, max_new_tokens=12, stop_token_ids=[stop], no_stop_trim=True)
    assert untrimmed["text"] == decode(free["output_ids"][: first + 1], skip_special_tokens=True)


async def test_the_end_of_sequence_token_stops(api: EngineApi) -> None:
    prompts = [[3 + index] for index in range(32)]
    answers = await api.generate(prompts, max_new_tokens=64)
    stopped = [answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert stopped, "no completion in 32 drew <eos> within 64 tokens"
    for answer in stopped:
        assert answer["meta_info"]["finish_reason"]["matched"] == EOS_ID
        assert answer["output_ids"].index(EOS_ID) == len(answer["output_ids"]) - 1


async def test_stop_strings(api: EngineApi) -> None:
    tokenizer = build_tokenizer()
    params = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    free = await api.generate([30, 31], **params)
    text = tokenizer.decode(free["output_ids"], skip_special_tokens=True)
    stop = text[4:7]
    answer = await api.generate([30, 31], **params, stop=["no such text", stop])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[: text.index(stop)]
    # The tokens of the stop string are there, and nothing after the one that completes it.
    assert tokenizer.decode(answer["output_ids"], skip_special_tokens=True) == text[: text.index(stop) + len(stop)]
    assert len(logprobs_of(answer)) == len(answer["output_ids"])
    events = [event async for event in api.stream([30, 31], **params, stop=stop)]
    assert "".join(event["text"] for event in events) == answer["text"]


async def test_min_new_tokens_holds_the_stop_back(api: EngineApi) -> None:
    free = await api.generate([7, 9], temperature=0, max_new_tokens=4, ignore_eos=True)
    stop = free["output_ids"][0]
    params = {"temperature": 0, "max_new_tokens": 12, "stop_token_ids": [stop]}
    assert len((await api.generate([7, 9], **params))["output_ids"]) == 1
    held = await api.generate([7, 9], **params, min_new_tokens=6)
    assert len(held["output_ids"]) >= 6
    assert stop not in held["output_ids"][:6]


async def test_no_new_tokens_at_all(api: EngineApi) -> None:
    answer = await api.generate([7, 9, 4], max_new_tokens=0, logprob_start_len=0)
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert len(answer["meta_info"]["input_token_logprobs"]) == 3


async def test_abort_by_rid(api: EngineApi) -> None:
    one = Collector(api, [7], max_new_tokens=LONG, ignore_eos=True, rid="one")
    other = asyncio.create_task(api.generate([8], max_new_tokens=40, ignore_eos=True, rid="other"))
    await one.has(4)
    await api.ok("/abort_request", {"rid": "one"})
    await one.ended()
    assert one.meta["finish_reason"]["type"] == "abort"
    assert 4 <= len(one.token_ids) < LONG
    assert len(one.token_ids) == one.meta["completion_tokens"] == len(one.logprobs)
    assert (await other)["meta_info"]["finish_reason"]["type"] == "length"
    await api.ok("/abort_request", {"rid": "never heard of"})


async def test_abort_all(api: EngineApi) -> None:
    running = [Collector(api, [7], max_new_tokens=LONG, ignore_eos=True) for _ in range(12)]
    await asyncio.wait([asyncio.ensure_future(stream.has(4)) for stream in running[:8]])
    await api.ok("/abort_request", {"abort_all": True})
    for stream in running:
        await stream.ended()
    assert {stream.meta["finish_reason"]["type"] for stream in running} == {"abort"}


# --- pauses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_pause_changes_nothing_but_time(api: EngineApi, mode: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    expected = await api.generate([7, 9], **params)
    stream = Collector(api, [7, 9], **params)
    await stream.has(8)
    await api.ok("/pause_generation", {"mode": mode})
    queued = asyncio.create_task(api.generate([5], temperature=0, max_new_tokens=3, ignore_eos=True))
    assert await stream.quiet() < 400
    assert not queued.done()
    await api.ok("/continue_generation")
    await stream.ended()
    assert stream.token_ids == expected["output_ids"]
    assert stream.logprobs == pytest.approx(logprobs_of(expected), abs=1e-4)
    assert len((await queued)["output_ids"]) == 3


async def test_pause_with_abort_ends_what_runs(api: EngineApi) -> None:
    running = Collector(api, [7], max_new_tokens=LONG, ignore_eos=True)
    await running.has(4)
    await api.ok("/pause_generation", {"mode": "abort"})
    await running.ended()
    assert running.meta["finish_reason"]["type"] == "abort"
    assert 4 <= len(running.token_ids) < LONG
    queued = asyncio.create_task(api.generate([5], max_new_tokens=3, ignore_eos=True))
    await asyncio.sleep(0.1)
    assert not queued.done()
    await api.ok("/continue_generation")
    assert len((await queued)["output_ids"]) == 3


async def test_flush_is_refused_while_requests_run(api: EngineApi) -> None:
    await api.ok("/flush_cache")
    running = Collector(api, [7], max_new_tokens=LONG, ignore_eos=True)
    await running.has(4)
    assert (await api.post("/flush_cache"))[0] == 400
    await api.ok("/pause_generation", {"mode": "retract"})
    await api.ok("/flush_cache")
    await api.ok("/abort_request", {"abort_all": True})
    await api.ok("/continue_generation")
    await running.ended()


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_weights_change_in_the_middle_of_a_generation(
    api: EngineApi, references: dict[str, Any], mode: str
) -> None:
    old, new = references["old"], references["new"]
    async with Channel(api) as channel:
        streams = [Collector(api, prompt, max_new_tokens=LONG, ignore_eos=True) for prompt in PROMPTS]
        for stream in streams:
            await stream.has(8)
        await api.ok("/pause_generation", {"mode": mode})
        # What is prefilled again must not find the old version's KV.
        await channel.push(new, "v1", buckets=3, flush=mode == "retract")
        await api.ok("/continue_generation")
        fresh = await api.generate([7, 9], max_new_tokens=6, ignore_eos=True, extra_key="v1")
        for stream in streams:
            await stream.has(len(stream.token_ids) + 12)
        await api.ok("/abort_request", {"abort_all": True})
    late = mode == "in_place" and await _decodes_ahead(api)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        await stream.ended()
        # The last token of a pass that was running at the pause is claimed for the version that came after it.
        swapped_at = _boundary(stream, ["default", "v1"]) + late
        assert stream.logprobs == pytest.approx(
            teacher_forced_after_swap(old, new, prompt, stream.token_ids, swapped_at)
            if mode == "in_place"
            else teacher_forced(old, prompt, stream.token_ids)[:swapped_at]
            + teacher_forced(new, prompt, stream.token_ids)[swapped_at:],
            abs=2e-4,
        )
    assert fresh["meta_info"]["weight_version"] == "v1"
    assert logprobs_of(fresh) == pytest.approx(teacher_forced(new, [7, 9], fresh["output_ids"]), abs=1e-4)


async def test_one_broadcast_per_tensor(api: EngineApi, references: dict[str, Any]) -> None:
    async with Channel(api) as channel:
        await channel.push(references["new"], "v1", flattened=False)
    answer = await api.generate([7, 9], temperature=0, max_new_tokens=8, extra_key="v1")
    assert answer["output_ids"] == greedy(references["new"], [7, 9], 8)


async def test_a_salt_keeps_the_caches_of_two_versions_apart(api: EngineApi, references: dict[str, Any]) -> None:
    prompt = PROMPTS[-1]
    for _ in range(2):
        answer = await api.generate(prompt, max_new_tokens=6, ignore_eos=True, extra_key="v0")
        assert logprobs_of(answer) == pytest.approx(
            teacher_forced(references["old"], prompt, answer["output_ids"]), abs=1e-4
        )
    async with Channel(api) as channel:
        await channel.push(references["new"], "v1")
    answer = await api.generate(prompt, max_new_tokens=6, ignore_eos=True, extra_key="v1")
    assert answer["meta_info"]["cached_tokens"] == 0
    assert logprobs_of(answer) == pytest.approx(
        teacher_forced(references["new"], prompt, answer["output_ids"]), abs=1e-4
    )


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_every_token_drawn_before_a_push_is_of_the_old_version(
    api: EngineApi, references: dict[str, Any], mode: str
) -> None:
    """What had streamed when the pause was confirmed is old, and what is stated as new comes after it."""
    async with Channel(api) as channel:
        streams = [Collector(api, prompt, max_new_tokens=LONG, ignore_eos=True) for prompt in PROMPTS]
        for stream in streams:
            await stream.has(8)
        await api.ok("/pause_generation", {"mode": mode})
        await api.get("/server_info")
        await channel.push(references["new"], "v1", flush=mode == "retract")
        streamed = [len(stream.token_ids) for stream in streams]
        await api.ok("/continue_generation")
        for stream, count in zip(streams, streamed, strict=True):
            await stream.has(count + 12)
        await api.ok("/abort_request", {"abort_all": True})
    for stream, count in zip(streams, streamed, strict=True):
        await stream.ended()
        # At most one event's worth is still in the engine.
        assert 0 <= _boundary(stream, ["default", "v1"]) - count < STREAM_INTERVAL
        first_new = next(index for index, (_, version) in enumerate(stream.stated) if version == "v1")
        assert stream.stated[first_new - 1][0] <= _boundary(stream, ["default", "v1"])


async def test_update_from_disk(api: EngineApi, models: dict[str, Path], references: dict[str, Any]) -> None:
    body = {"model_path": str(models["new"]), "weight_version": "v7"}
    answer = await api.ok("/update_weights_from_disk", body)
    assert answer["success"] is True
    answer = await api.generate([7, 9], temperature=0, max_new_tokens=8)
    assert answer["output_ids"] == greedy(references["new"], [7, 9], 8)
    assert answer["meta_info"]["weight_version"] == "v7"
    assert (await api.get("/model_info"))[1]["weight_version"] == "v7"


async def test_update_from_a_directory_that_is_not_one(api: EngineApi, tmp_path: Path) -> None:
    status, answer = await api.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "v7"})
    assert (status, answer["success"]) == (400, False)
    assert answer["message"]
    assert (await api.generate([7], max_new_tokens=1))["meta_info"]["weight_version"] == "default"


async def test_checksums_tell_weights_apart(
    api: EngineApi, models: dict[str, Path], references: dict[str, Any]
) -> None:
    before = (await api.ok("/weights_checker", {"action": "checksum"}))["per_engine_checksum"]
    await api.ok("/update_weights_from_disk", {"model_path": str(models["new"]), "weight_version": "v1"})
    from_disk = (await api.ok("/weights_checker", {"action": "checksum"}))["per_engine_checksum"]
    async with Channel(api) as channel:
        await channel.push(references["new"], "v2")
    pushed = (await api.ok("/weights_checker", {"action": "checksum"}))["per_engine_checksum"]
    assert before != from_disk == pushed


async def test_an_update_needs_a_session_and_a_group(api: EngineApi, references: dict[str, Any]) -> None:
    body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]], "load_format": "flattened_bucket"}
    status, answer = await api.post("/update_weights_from_distributed", body)
    assert (status, answer["success"]) == (400, False)
    assert "begin_weight_update" in answer["message"]
    await api.ok("/begin_weight_update")
    assert (await api.post("/begin_weight_update"))[0] == 400
    status, answer = await api.post("/update_weights_from_distributed", body)
    assert (status, answer["success"]) == (400, False)
    await api.ok("/end_weight_update")
    assert (await api.post("/end_weight_update"))[0] == 400
    assert (await api.post("/destroy_weights_update_group", {"group_name": "never made"}))[0] == 400


# --- keys and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/flush_cache",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weights_from_distributed",
        "/update_weights_from_disk",
        "/weights_checker",
    ],
)
async def test_admin_routes_need_the_key(api: EngineApi, path: str) -> None:
    for key in (None, "wrong", ADMIN_KEY + "x"):
        status, answer = await api.post(path, {}, key=key)
        assert (status, answer) == (401, {"error": "Unauthorized"})


async def test_information_and_health(api: EngineApi) -> None:
    for path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info"):
        assert (await api.get(path))[0] == 200
    for path in ("/health", "/health_generate"):
        assert (await api.get(path, key=None))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"[]",
        {},
        {"input_ids": []},
        {"input_ids": "text"},
        {"input_ids": [5] * CONTEXT},
        {"input_ids": [5], "sampling_params": {"temperature": -1}},
        {"input_ids": [5], "sampling_params": {"top_p": 0}},
        {"input_ids": [5], "sampling_params": {"top_k": 0}},
        {"input_ids": [5], "sampling_params": {"max_new_tokens": -1}},
        {"input_ids": [5], "sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}},
        {"input_ids": [5], "sampling_params": {"sampling_seed": "x"}},
        {"input_ids": [[5], [6]], "rid": ["same", "same"]},
        {"input_ids": [[5], [6]], "rid": ["only one"]},
    ],
    ids=lambda body: str(body)[:60],
)
async def test_bad_requests_are_answered_and_harm_nobody(api: EngineApi, body: Any) -> None:
    good = asyncio.create_task(api.generate([7, 9], temperature=0, max_new_tokens=30, ignore_eos=True))
    status, answer = await api.post("/generate", body)
    assert status in (400, 422), answer
    assert answer.get("error") or answer.get("message")
    assert len((await good)["output_ids"]) == 30


async def test_unknown_routes_and_methods(api: EngineApi) -> None:
    assert (await api.get("/no_such_route"))[0] == 404
    assert (await api.get("/pause_generation"))[0] in (401, 405)
    assert (await api.post("/model_info"))[0] == 405


async def test_server_info(api: EngineApi) -> None:
    status, info = await api.get("/server_info")
    assert status == 200
    assert info["version"]
    assert info["context_length"] == CONTEXT
    read = read_server_info(info)
    assert (read.ranks, read.max_running_requests) == (1, 8)
    assert read.kv_tokens is not None
    assert read.kv_tokens >= CONTEXT


async def test_load(api: EngineApi) -> None:
    running = [Collector(api, [7] * 20, max_new_tokens=LONG, ignore_eos=True) for _ in range(12)]
    await asyncio.wait([asyncio.ensure_future(stream.has(4)) for stream in running[:8]])
    await api.ok("/pause_generation", {"mode": "in_place"})
    status, answer = await api.get("/v1/loads?include=core")
    assert status == 200
    load = read_loads(answer)
    assert (load.slots, load.running, load.waiting) == (8, 8, 4)
    assert 0 < load.used_tokens <= load.max_tokens
    await api.ok("/abort_request", {"abort_all": True})
    await api.ok("/continue_generation")
    for stream in running:
        await stream.ended()


async def _decodes_ahead(api: EngineApi) -> bool:
    return read_server_info((await api.get("/server_info"))[1]).overlapped


def _boundary(stream: Collector, versions: list[str]) -> int:
    """Where the second version begins; the spans cover the completion."""
    spans = stream.meta["weight_versions"]
    assert [span["version"] for span in spans] == versions
    assert spans[0]["start"] == 0
    assert spans[0]["end"] == spans[1]["start"] > 0
    assert spans[1]["end"] == len(stream.token_ids) == stream.meta["completion_tokens"]
    return int(spans[0]["end"])
