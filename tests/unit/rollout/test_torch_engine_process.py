"""The engine as a process: how it ends, what it refuses to start with, what it tells about itself."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import EngineLoad
from tests.kit.engine_process import (
    ADMIN_KEY,
    ROOT,
    EngineApi,
    engine_environment,
    logprobs_of,
    start_torch_engine,
)
from tests.kit.engine_push import Collector
from tests.kit.tiny_model import build_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"))


def run(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.rollout.engines.torch_engine", "--model-path", str(model), *flags]
    return subprocess.run(command, cwd=ROOT, env=engine_environment(), capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_one_line_and_status_2(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(model, "--port", str(port))
    assert result.returncode == 2
    assert result.stderr == f"torch_engine: 127.0.0.1:{port}: the port is in use\n"


def test_models_that_cannot_be_served_are_one_line_and_status_2(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "--port", "0")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "config.json" in result.stderr
    path = build_tiny_qwen3(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    result = run(path, "--port", "0")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "MambaForCausalLM" in result.stderr
    assert "Qwen3ForCausalLM" in result.stderr


async def test_sigterm_ends_it_at_once_with_status_0(model: Path) -> None:
    with start_torch_engine(model, context_length=512) as engine:
        async with aiohttp.ClientSession() as session:
            api = EngineApi(engine.url, session)
            running = asyncio.create_task(api.post("/generate", {"input_ids": [[5]] * 70}))
            await api.ok("/pause_generation", {"mode": "in_place"})
            await asyncio.sleep(0.05)
            engine.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(engine.process.wait, 10) == 0
            with pytest.raises(aiohttp.ClientError):
                await running


async def test_without_a_tokenizer_there_is_no_text(model: Path) -> None:
    flags = ("--skip-tokenizer-init", "--enable-deterministic-inference", "--weight-version", "e1.s0")
    with start_torch_engine(model, context_length=64, flags=flags) as engine:
        async with aiohttp.ClientSession() as session:
            api = EngineApi(engine.url, session)
            answer = await api.generate([5, 6], max_new_tokens=3, ignore_eos=True)
            assert set(answer) == {"output_ids", "meta_info"}
            assert answer["meta_info"]["weight_version"] == "e1.s0"
            assert (await api.post("/generate", {"text": "x"}))[0] == 400
            body = {"input_ids": [5], "sampling_params": {"stop": "x"}}
            assert (await api.post("/generate", body))[0] == 400


async def test_server_info_counts_work(model: Path) -> None:
    with start_torch_engine(model, context_length=512, flags=("--max-running-requests", "2")) as engine:
        async with aiohttp.ClientSession() as session:
            api = EngineApi(engine.url, session)
            before = (await api.get("/server_info"))[1]
            expected = {"kind": "torch_engine", "max_running_requests": 2, "weights": "whole", "generated_tokens": 0}
            assert expected.items() <= before.items()
            await api.generate([[5], [6]], max_new_tokens=10, ignore_eos=True)
            after = (await api.get("/server_info"))[1]
            assert after["generated_tokens"] == 20
            assert after["busy_seconds"] > before["busy_seconds"]
            await api.ok("/pause_generation", {"mode": "in_place"})
            waiting = asyncio.create_task(api.generate([[5], [6], [7]], max_new_tokens=10, rid="w"))
            deadline = time.monotonic() + 10
            while (info := (await api.get("/server_info"))[1])["num_waiting_requests"] < 3:
                assert time.monotonic() < deadline
            assert info["paused"] == "in_place"
            # Requests in the works keep their ids to themselves.
            assert (await api.post("/generate", {"input_ids": [5], "rid": "w_1"}))[0] == 400
            await api.ok("/continue_generation")
            await waiting


async def test_the_log_says_which_weights_served_a_request(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    flags = ("--log-requests", "--weight-version", "e1.s0", "--incremental-streaming-output")
    with start_torch_engine(model, context_length=512, flags=flags, log=log) as engine:
        async with aiohttp.ClientSession() as session:
            api = EngineApi(engine.url, session)
            await api.generate([5, 6, 7], max_new_tokens=3, ignore_eos=True, rid="before")
            across = Collector(api, [5, 6], max_new_tokens=400, ignore_eos=True, rid="across")
            await across.has(5)
            # It waits for a slot again, and is the same request.
            await api.ok("/pause_generation", {"mode": "retract"})
            await api.ok("/update_weights_from_disk", {"model_path": str(model), "weight_version": "e1.s1"})
            await api.ok("/continue_generation")
            await across.has(len(across.token_ids) + 5)
            await api.ok("/abort_request", {"rid": "across"})
            await across.ended()
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"rid"' in line]
    told = [(line["event"], line["rid"], line["weight_version"]) for line in lines]
    assert told == [
        ("request_started", "before", "e1.s0"),
        ("request_ended", "before", "e1.s0"),
        ("request_started", "across", "e1.s0"),
        ("request_ended", "across", "e1.s1"),
    ]
    assert [line["tokens"] for line in lines if "tokens" in line] == [3, len(across.token_ids)]
    assert lines[-1]["weight_versions"] == across.meta["weight_versions"]
    assert lines[-1]["reason"] == "abort"


async def test_loads_are_told_in_sglangs_form(model: Path) -> None:
    with start_torch_engine(model, context_length=512, flags=("--max-running-requests", "2")) as engine:
        async with EngineClient(engine.url, ADMIN_KEY) as client, aiohttp.ClientSession() as session:
            assert await client.load() == EngineLoad(0, 0, 0, 1024, 2)
            info = await client.server_info()
            assert (info.ranks, info.overlapped, info.max_running_requests, info.kv_tokens) == (1, False, 2, 1024)
            assert info.model_path == str(model)
            api = EngineApi(engine.url, session)
            streams = [Collector(api, [5] * 9, max_new_tokens=400, ignore_eos=True) for _ in range(3)]
            await streams[0].has(8)
            await client.pause("in_place")
            load = await client.load()
            assert load is not None
            assert (load.running, load.waiting) == (2, 1)
            assert load.used_tokens >= 2 * 9 + 8
            await client.abort_all()
            await client.resume()
            for stream in streams:
                await stream.ended()


async def test_a_cumulative_stream_is_the_default(model: Path) -> None:
    flags = ("--stream-interval", "4")
    with start_torch_engine(model, context_length=256, flags=flags) as engine:
        async with aiohttp.ClientSession() as session:
            api = EngineApi(engine.url, session)
            params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
            answer = await api.generate([7, 9], **params)
            events = [event async for event in api.stream([7, 9], **params)]
            for body in ({"input_ids": [[5], []]}, {"input_ids": [5], "text": "both"}):
                assert (await api.post("/generate", body))[0] == 400
    for event in events:
        count = event["meta_info"]["completion_tokens"]
        assert event["output_ids"] == answer["output_ids"][:count]
        assert len(logprobs_of(event)) == count
        assert answer["text"].startswith(event["text"])
    assert events[-1]["output_ids"] == answer["output_ids"]
    assert events[-1]["text"] == answer["text"]
