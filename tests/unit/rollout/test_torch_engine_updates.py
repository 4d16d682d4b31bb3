"""What the in-house engine promises beyond SGLang: a refused update touches nothing, torn weights never run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from tests.kit.engine_process import EngineApi, EngineProcess, logprobs_of, start_torch_engine
from tests.kit.engine_push import Channel, Collector
from tests.kit.hf_reference import greedy, load_reference, teacher_forced, teacher_forced_after_swap
from tests.kit.tiny_model import build_tiny_qwen3

CONTEXT = 4096
PROMPT = [7, 9, 11]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [build_tiny_qwen3(root / str(seed), seed=seed, max_position_embeddings=CONTEXT) for seed in (0, 1)]


@pytest.fixture(scope="module")
def old(models: list[Path]) -> Any:
    return load_reference(models[0])


@pytest.fixture(scope="module")
def new(models: list[Path]) -> Any:
    return load_reference(models[1])


@pytest.fixture(scope="module")
def engine(models: list[Path]) -> Iterator[EngineProcess]:
    flags = ("--incremental-streaming-output", "--stream-interval", "4", "--max-running-requests", "4")
    with start_torch_engine(models[0], context_length=CONTEXT, flags=flags) as process:
        yield process


@pytest.fixture
async def api(engine: EngineProcess) -> AsyncIterator[EngineApi]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        api = EngineApi(engine.url, session)
        yield api
        await api.post("/end_weight_update")
        await api.ok("/update_weights_from_disk", {"model_path": str(engine.model_path), "weight_version": "default"})


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


async def generates_as(api: EngineApi, model: Any, version: str) -> bool:
    answer = await api.generate(PROMPT, temperature=0, max_new_tokens=8)
    assert answer["meta_info"]["weight_version"] == version
    return bool(answer["output_ids"] == greedy(model, PROMPT, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"names": ["model.norm.weights"]}, "model.norm.weights: is not a tensor of this model"),
        ({"shapes": [[32]]}, "has shape [32], the model's is [64]"),
        ({"dtypes": ["float128"]}, "dtypes"),
        ({"names": ["model.norm.weight"] * 2}, "as many"),
        ({"load_format": "flat"}, "load_format"),
        ({"shapes": [["x"]]}, "shapes"),
        ({"group_name": "another"}, "init_weights_update_group"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_wrong_buckets_are_refused_before_the_first_byte(
    api: EngineApi, old: Any, change: dict[str, Any], reason: str
) -> None:
    async with Channel(api) as channel:
        await api.ok("/begin_weight_update")
        body = {
            "names": ["model.norm.weight"],
            "dtypes": ["float32"],
            "shapes": [[64]],
            "group_name": channel.name,
            "load_format": "flattened_bucket",
            "weight_version": "v1",
            **change,
        }
        status, answer = await api.post("/update_weights_from_distributed", body)
        assert (status, answer["success"], answer["weights_touched"]) == (400, False, False)
        assert reason in answer["message"]
        await api.ok("/end_weight_update")
    assert await generates_as(api, old, "default")


async def test_a_refused_bucket_ends_the_group(api: EngineApi, old: Any, new: Any) -> None:
    async with Channel(api) as channel:
        await api.ok("/begin_weight_update")
        # The sender's broadcast fails at once: it is not left waiting for its timeout.
        status, answer = await channel.send_refused({"no.such.tensor": torch.zeros(1 << 22)})
        assert (status, answer["weights_touched"]) == (400, False)
        status, answer = await api.post(
            "/update_weights_from_distributed",
            {
                "names": ["model.norm.weight"],
                "dtypes": ["float32"],
                "shapes": [[64]],
                "group_name": channel.name,
                "load_format": "flattened_bucket",
            },
        )
        assert (status, answer["weights_touched"]) == (400, False)
        assert "left it when a bucket was refused" in answer["message"]
        await api.ok("/end_weight_update")
        assert await generates_as(api, old, "default")
    async with Channel(api) as channel:
        await channel.push(new, "v1")
    assert await generates_as(api, new, "v1")


async def test_an_update_without_a_pause_takes_effect_between_two_steps(api: EngineApi, old: Any, new: Any) -> None:
    async with Channel(api) as channel:
        stream = Collector(api, PROMPT, max_new_tokens=CONTEXT, ignore_eos=True)
        await stream.has(8)
        await channel.push(new, "v1", buckets=4)
        await stream.has(len(stream.token_ids) + 12)
        await api.ok("/abort_request", {"abort_all": True})
        await stream.ended()
    spans = stream.meta["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "v1"]
    expected = teacher_forced_after_swap(old, new, PROMPT, stream.token_ids, spans[0]["end"])
    assert stream.logprobs == pytest.approx(expected, abs=2e-4)


async def test_torn_weights_generate_nothing_until_they_are_whole(api: EngineApi, new: Any) -> None:
    tensors = tensors_of(new)
    names = list(tensors)
    async with Channel(api) as channel:
        await api.ok("/begin_weight_update")
        assert (await channel.send({name: tensors[name] for name in names[:5]}, None))[0] == 200
        waiting = asyncio.create_task(api.generate(PROMPT, temperature=0, max_new_tokens=8))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert (await api.get("/server_info"))[1]["weights"] == "loading"
        assert (await api.get("/health"))[0] == 200
        status, answer = await channel.send_refused({"no.such.tensor": torch.zeros(3)})
        assert (status, answer["weights_touched"]) == (400, True)
        status, answer = await api.post("/end_weight_update")
        assert (status, answer["weights_touched"]) == (400, True)
    assert (await api.get("/server_info"))[1]["weights"] == "torn"
    assert (await api.get("/health"))[0] == 503
    assert not waiting.done()
    async with Channel(api) as channel:
        await channel.push(new, "v2", buckets=2)
    assert (await api.get("/health"))[0] == 200
    assert (await waiting)["output_ids"] == greedy(new, PROMPT, 8)
    assert await generates_as(api, new, "v2")


async def test_a_sender_that_goes_away_leaves_an_answer(api: EngineApi, old: Any) -> None:
    async with Channel(api) as channel:
        await api.ok("/begin_weight_update")
        body = {
            "names": ["model.norm.weight"],
            "dtypes": ["float32"],
            "shapes": [[64]],
            "group_name": channel.name,
            "load_format": "flattened_bucket",
        }
        receiving = asyncio.create_task(api.post("/update_weights_from_distributed", body))
        await asyncio.sleep(0.1)
        # Requests are served meanwhile.
        assert await generates_as(api, old, "default")
        channel.group.close()
        status, answer = await receiving
        assert (status, answer["success"], answer["weights_touched"]) == (400, False, False)
        assert "receiving failed" in answer["message"]
        await api.ok("/end_weight_update")
    assert await generates_as(api, old, "default")


async def test_buckets_of_mixed_types_are_converted(api: EngineApi, new: Any) -> None:
    tensors = tensors_of(new)
    # An odd number of two-byte elements leaves what follows unaligned.
    narrow = {name: tensor.bfloat16() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    async with Channel(api) as channel:
        await api.ok("/begin_weight_update")
        assert (await channel.send(narrow, "v1"))[0] == 200
        await api.ok("/end_weight_update")
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.copy_(narrow[name].float())
    answer = await api.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert logprobs_of(answer) == pytest.approx(teacher_forced(new, PROMPT, answer["output_ids"]), abs=1e-4)


async def test_an_update_that_cannot_flush_says_so(api: EngineApi, models: list[Path]) -> None:
    running = Collector(api, PROMPT, max_new_tokens=CONTEXT, ignore_eos=True, rid="runs")
    await running.has(4)
    status, answer = await api.post("/update_weights_from_disk", {"model_path": str(models[1]), "weight_version": "v1"})
    assert (status, answer["success"], answer["weights_touched"]) == (400, False, True)
    await api.ok("/abort_request", {"rid": "runs"})
    await running.ended()
    assert running.meta["weight_versions"][0]["version"] == "default"


async def test_joining_a_group_that_nobody_leads_fails_in_time(api: EngineApi) -> None:
    body = {
        "master_address": "127.0.0.1",
        "master_port": 9,
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
        "timeout_s": 0.3,
    }
    status, answer = await api.post("/init_weights_update_group", body)
    assert (status, answer["success"], answer["weights_touched"]) == (400, False, False)
    assert "cannot join" in answer["message"]
    for field, value in {"rank_offset": 0, "master_port": "x", "world_size": None}.items():
        status, answer = await api.post("/init_weights_update_group", {**body, field: value})
        assert status == 400
        assert field in answer["message"]
