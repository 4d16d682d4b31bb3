"""A rollout, a reward service and a trainer as processes that keep a store busy, and how fast they are."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import stamina.instrumentation
import uvloop

from services.common.process import keep_freed_memory
from services.common.versions import Version
from tests.bench.buffer_flow import BATCH, STEP_SAMPLES, Side

WARM_UP = 4
"""Steps before measuring."""
PAUSE_S = 0.01
"""Before a client that found nothing asks again."""
OVERLAP = 2
"""Calls under way of one client: what comes next is leased while what is there is completed."""
LIMIT_S = 120.0
STAGES = {"rollout": "generate", "reward": "score", "trainer": "train"}
"""Of which each role leases: a call's worth to generate or to score, a step to train."""

_spawned = multiprocessing.get_context("spawn")


@dataclass
class _Shared:
    """What the clients of a run tell each other: a rollout has to know the version it serves."""

    epoch: Synchronized[int]
    step: Synchronized[int]
    stop: Event


@dataclass(frozen=True)
class Load:
    samples_per_s: float
    leases_ms: dict[str, list[float]]
    """Of each lease that was granted something, by stage."""
    cpu_ms: dict[str, float]
    """Per sample: of the three clients together, and of each process that was watched."""


def run(open_side: Callable[[], Side], steps: int, watched: dict[str, int], rate: float = 0.0) -> Load:
    """`steps` training steps after the warm-up. `rate`: samples a second, 0 for as many as go.

    `watched` are pids. Raises RuntimeError when a client fails or takes too long.
    """
    shared = _Shared(_spawned.Value("Q"), _spawned.Value("Q"), _spawned.Event())
    answers = _spawned.Queue()
    roles = {"rollout": (_rollout, rate), "reward": (_reward,), "trainer": (_trainer, steps, list(watched.values()))}
    processes = [
        _spawned.Process(target=_run_role, args=(name, open_side, shared, answers, *role))
        for name, role in roles.items()
    ]
    for each in processes:
        each.start()
    found: dict[str, Any] = {}
    try:
        for _ in processes:
            name, answer = answers.get(timeout=LIMIT_S)
            if isinstance(answer, str):
                raise RuntimeError(f"{name} failed: {answer}")
            found[name] = answer
    except queue.Empty:
        raise RuntimeError(f"no answer in {LIMIT_S} s beside those of {sorted(found)}") from None
    finally:
        shared.stop.set()
        for each in processes:
            each.join(timeout=5.0)
            each.kill()
    began, ended, *watched_s = found["trainer"]["result"]
    samples = steps * STEP_SAMPLES
    leases = {
        STAGES[name]: [1e3 * took for at, took in each["leases"] if began <= at <= ended]
        for name, each in found.items()
    }
    clients_s = sum(each["cpu_s"] for each in found.values()) * steps / (steps + WARM_UP)
    cpu_s = {"clients": clients_s} | dict(zip(watched, watched_s, strict=True))
    return Load(samples / (ended - began), leases, {name: round(1e3 * s / samples, 3) for name, s in cpu_s.items()})


def _run_role(
    name: str, open_side: Callable[[], Side], shared: _Shared, answers: Any, role: Callable[..., Any], *arguments: Any
) -> None:
    keep_freed_memory()
    stamina.instrumentation.set_on_retry_hooks([])

    async def live() -> None:
        side = open_side()
        cpu = time.process_time()
        try:
            result = await role(side, shared, *arguments)
            answers.put((name, {"result": result, "leases": side.leases, "cpu_s": time.process_time() - cpu}))
        except Exception as error:
            answers.put((name, str(error)))
            raise
        finally:
            await side.close()

    uvloop.run(live())


async def _rollout(side: Side, shared: _Shared, rate: float) -> None:
    due = time.monotonic()

    async def generate() -> int:
        nonlocal due
        moved = await side.generate(Version(shared.epoch.value, shared.step.value))
        if rate and moved:
            due = max(due + moved / rate, time.monotonic() - BATCH / rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return moved

    await _overlapping(generate, shared)


async def _reward(side: Side, shared: _Shared) -> None:
    await _overlapping(side.score, shared)


async def _overlapping(verb: Callable[[], Awaitable[int]], shared: _Shared) -> None:
    async def repeat() -> None:
        while not shared.epoch.value:
            await asyncio.sleep(PAUSE_S)
        while not shared.stop.is_set():
            if not await verb():
                await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(repeat() for _ in range(OVERLAP)))


async def _trainer(side: Side, shared: _Shared, steps: int, watched: list[int]) -> list[float]:
    """When the first step after the warm-up began and the last one ended, and the CPU seconds of the watched."""
    epoch, first = await side.begin()
    shared.step.value, shared.epoch.value = first, epoch
    began, cpu = 0.0, [0.0] * len(watched)
    for step in range(first + 1, first + WARM_UP + steps + 1):
        while not (trained := await side.train(Version(epoch, step))):
            await asyncio.sleep(PAUSE_S)
        assert trained == STEP_SAMPLES, trained
        shared.step.value = step
        if step == first + WARM_UP:
            began, cpu = time.monotonic(), [cpu_s(pid) for pid in watched]
    ended = time.monotonic()
    shared.stop.set()
    return [began, ended, *(cpu_s(pid) - before for pid, before in zip(watched, cpu, strict=True))]


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def p99(values: list[float]) -> float:
    return round(float(np.percentile(values, 99)), 2)


def fsync_ms(directory: Path, writes: int = 200, size: int = BATCH * 71_228) -> list[float]:
    """Of appends as large as the store makes for the payloads of one call."""
    block, took = os.urandom(size), []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(writes):
            file.write(block)
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(1e3 * (time.perf_counter() - began))
    return took
