"""What a score costs beyond the function itself, through a real reward service with one pool process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from polyhead.v1 import reward_pb2, reward_pb2_grpc, sample_pb2
from services.common import rpc
from services.common.config import Config, dump
from services.common.config.models import BufferConfig, RewardConfig
from services.reward.scorers.base import Item
from services.reward.scorers.exact import score
from tests.kit.reward_fake_buffer import FakeBuffer, generated

_WARM_UP = 500
_BATCH = 64
_IN_FLIGHT = 4
_WAIT_S = 120.0
_COMPLETION, _LABEL = "5 + 9 = 14, " * 40 + "so it is 14", "14"


async def measure_overhead(count: int) -> dict[str, Any]:
    """Milliseconds per sample, by the clock, of the `exact` scorer, whose own microsecond is subtracted.

    `overhead_ms` is of samples leased from a buffer, fetched, scored and completed through gRPC; `overhead_call_ms` of
    `RewardService.Score` with 64 samples a call, four calls at a time.
    """
    direct_s = _direct_s(count)
    async with _service() as (buffer, address):
        await _pulled_s(buffer, 0, _WARM_UP)
        pulled_s = await _pulled_s(buffer, _WARM_UP, count)
        called_s = await _called_s(address, count)
    return {
        "overhead_ms": round((pulled_s - direct_s) / count * 1e3, 3),
        "overhead_call_ms": round((called_s - direct_s) / count * 1e3, 3),
    }


def _direct_s(count: int) -> float:
    item = Item("", "", "", _COMPLETION, _LABEL, "", "completed", 0, 0, 0)
    begun = time.perf_counter()
    for _ in range(count):
        score(item)
    return time.perf_counter() - begun


async def _pulled_s(buffer: FakeBuffer, first: int, count: int) -> float:
    samples = [generated(number, _COMPLETION, _LABEL) for number in range(first, first + count)]
    begun = time.perf_counter()
    buffer.add(*samples)
    await buffer.until(lambda: len(buffer.scores) == first + count, _WAIT_S)
    return time.perf_counter() - begun


async def _called_s(address: str, count: int) -> float:
    prompt = sample_pb2.Prompt(text="What?", label=_LABEL)
    items = [
        reward_pb2.ScoreItem(sample_id=str(number), prompt=prompt, completion=_COMPLETION) for number in range(_BATCH)
    ]
    places = asyncio.Semaphore(_IN_FLIGHT)
    async with rpc.channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)

        async def call() -> None:
            async with places:
                await stub.Score(reward_pb2.ScoreRequest(items=items), timeout=_WAIT_S)

        await call()
        begun = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(count // _BATCH)))
        return (time.perf_counter() - begun) * count / (count // _BATCH * _BATCH)


@asynccontextmanager
async def _service() -> AsyncIterator[tuple[FakeBuffer, str]]:
    """A reward service in a process of its own, with a buffer that knows only the score stage."""
    buffer = FakeBuffer()
    await buffer.start()
    config = Config(buffer=BufferConfig(address=buffer.address), reward=RewardConfig(scorer="exact"))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "run.toml")
        await asyncio.to_thread(path.write_text, dump(config))
        command = [sys.executable, "-m", "services.reward", "-c", str(path)]
        service = await asyncio.to_thread(subprocess.Popen, command, stderr=subprocess.DEVNULL)
        try:
            await buffer.until(lambda: buffer.replicas, _WAIT_S)
            yield buffer, buffer.replicas[-1].address
        finally:
            service.terminate()
            await asyncio.to_thread(service.wait)
            await buffer.stop()
