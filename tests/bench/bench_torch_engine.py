"""Speed of the in-house engine, as one JSON object on standard output.

`PYTHONPATH=.:protos python -m tests.bench.bench_torch_engine` starts an engine of its own: 2 layers, hidden 128,
vocabulary 128, one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tests.kit.engine_process import EngineApi, start_torch_engine
from tests.kit.tiny_model import build_tiny_qwen3

SLOTS = 64
PROMPT = [5, 6, 7, 8]


async def decode_ms_per_step(api: EngineApi, tokens: int) -> float:
    """Time inside the engine's steps, sampling and bookkeeping included, with all slots running."""
    before = (await api.get("/server_info"))[1]
    await api.generate([PROMPT] * SLOTS, max_new_tokens=tokens, ignore_eos=True)
    after = (await api.get("/server_info"))[1]
    steps = (after["generated_tokens"] - before["generated_tokens"]) / SLOTS
    return float((after["busy_seconds"] - before["busy_seconds"]) / steps * 1e3)


async def short_requests(api: EngineApi, seconds: float, clients: int, *, stream: bool) -> dict[str, float]:
    """Batches of 8 prompts with 5-token answers, by `clients` that each wait for their answer."""
    deadline, done = time.monotonic() + seconds, 0
    before = (await api.get("/server_info"))[1]["busy_seconds"]

    async def client(number: int) -> None:
        nonlocal done
        while time.monotonic() < deadline:
            fields: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True, "sampling_seed": number}
            if stream:
                async for _ in api.stream([PROMPT] * 8, **fields):
                    pass
            else:
                await api.generate([PROMPT] * 8, **fields)
            done += 1

    started = time.monotonic()
    await asyncio.gather(*(client(number) for number in range(clients)))
    elapsed = time.monotonic() - started
    busy = (await api.get("/server_info"))[1]["busy_seconds"] - before
    return {"requests_per_s": done / elapsed, "samples_per_s": 8 * done / elapsed, "busy_share": busy / elapsed}


async def pause_ms(api: EngineApi, pauses: int) -> dict[str, float]:
    """From the call to the answer, which says that no forward pass is running."""
    running = asyncio.create_task(api.generate([PROMPT] * SLOTS, max_new_tokens=480, ignore_eos=True))
    await asyncio.sleep(0.1)
    taken = []
    for _ in range(pauses):
        started = time.perf_counter()
        await api.ok("/pause_generation", {"mode": "in_place"})
        taken.append((time.perf_counter() - started) * 1e3)
        await api.ok("/continue_generation")
        await asyncio.sleep(0.005)
    await running
    return {"p50": statistics.median(taken), "max": max(taken)}


async def measure(url: str, seconds: float) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        api = EngineApi(url, session)
        await decode_ms_per_step(api, 16)
        return {
            "decode_ms_per_step_64_requests": {
                f"{tokens}_tokens": min([await decode_ms_per_step(api, tokens) for _ in range(5)])
                for tokens in (12, 60, 250)
            },
            "batches_of_8_with_5_tokens": {
                f"{clients}_clients{'_streaming' if stream else ''}": await short_requests(
                    api, seconds, clients, stream=stream
                )
                for clients in (1, 8)
                for stream in (False, True)
            },
            "pause_in_place_ms": await pause_ms(api, 30),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each throughput measurement")
    parser.add_argument("--deterministic", action="store_true")
    arguments = parser.parse_args()
    flags = ["--incremental-streaming-output", "--skip-tokenizer-init"]
    if arguments.deterministic:
        flags += ["--enable-deterministic-inference", "--prefill-chunk", "8"]
    with tempfile.TemporaryDirectory() as directory:
        model = build_tiny_qwen3(Path(directory), hidden=128, max_position_embeddings=512)
        context_length = 32 if arguments.deterministic else 512
        with start_torch_engine(model, context_length=context_length, flags=tuple(flags)) as engine:
            figures = asyncio.run(measure(engine.url, arguments.seconds))
    sys.stdout.buffer.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    main()
