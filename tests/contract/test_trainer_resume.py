"""A trainer that is killed, wherever that is, resumes bit for bit: given the same batches, it makes the same weights.

One run is struck by SIGKILL at one point of a start, a step, a push and a checkpoint after the other. It is held
against a run of the same prompts that nobody strikes: each step that either of them trained, as often as it did, and
what they end with.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.buffer.__main__ import serve as serve_buffer
from services.buffer.records import Generated, Scored
from services.buffer.redis_store import RedisStore
from services.common.buffer_client import BufferClient
from services.common.config import Config, dump
from services.common.lifecycle import Process
from tests.kit import trainer_points, valkey
from tests.kit.buffer_driver import Driver, refs
from tests.kit.faults import points
from tests.kit.in_process import free_port
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_batch import make_sample
from tests.kit.trainer_replica import FakeReplica
from tests.kit.warm import warm

STEPS = 50
GROUPS = 2 * STEPS
# What a line of metrics.jsonl says of the step rather than of the time and the trainer.
SAME = ("prompt_ordinals", "loss", "grad_norm", "lr", "entropy", "ratio_mean", "clip_fraction", "trained_tokens")


def configured(directory: Path, name: str, store_url: str) -> Config:
    """Every group of the run is admitted at once, so that all of them are of one age, whatever is undone."""
    return Config(
        run={"dir": directory / name, "name": name, "num_rollout": STEPS},
        model={"hf_checkpoint": directory / "model"},
        data={"prompt_data": str(directory / "prompts.jsonl")},
        batch={"rollout_batch_size": 2, "n_samples_per_prompt": 3},
        staleness={"max_staleness": STEPS},
        store={"url": store_url},
        buffer={"address": f"127.0.0.1:{free_port()}", "lease_ttl_s": 600.0, "replica_ttl_s": 5.0},
        trainer={
            "optimizer": {"lr": 1e-3, "warmup_steps": 20, "weight_decay": 0.1},
            "checkpoint": {"save_interval": 2, "keep_last": 2, "export_hf": False},
            "weights": {"bucket_mb": 1, "timeout_s": 10.0},
        },
    )


@asynccontextmanager
async def surroundings(config: Config) -> AsyncIterator[None]:
    """A buffer whose groups are all READY, and a replica that takes weights."""
    config.run.dir.mkdir(parents=True)
    (config.run.dir / "config.toml").write_text(dump(config))
    stop = asyncio.Event()
    buffer = asyncio.create_task(serve_buffer(config, Process("buffer", 0, "buffer-0", stop)))
    replica = FakeReplica("rollout-0", config.run.dir / "replica")
    async with BufferClient(config.buffer.address, retry_for_s=20.0) as client:
        await client.get_ledger()
        await fill(config)
        await replica.start(client)
        try:
            yield
        finally:
            await replica.stop()
            stop.set()
            await buffer


async def fill(config: Config) -> None:
    """Generates and scores by the prompt and the place of each sample alone."""
    store = RedisStore(config.store.url, run_name=config.run.name)
    driver = Driver(store)
    await driver.start()
    lease = await driver.generate_lease(GROUPS * 3)
    ordinal = {group.order: group.ordinal for group in lease.groups}
    made, scored = [], []
    for ref, lease_id in refs(lease):
        rng = np.random.default_rng([ordinal[ref.order], ref.index])
        length = int(rng.integers(1, 7))
        sample = make_sample(rng, sample_id="", prompt=[5, 9, 12], completion_length=length, versions=[driver.version])
        made.append(Generated(ref, lease_id, 3 + length, length, 1, ((1, 0, 0),), sample.SerializeToString()))
    await store.complete_generate(made)
    lease = await store.lease_score("reward", GROUPS * 3, payload=False)
    for ref, lease_id in refs(lease):
        reward = float(np.random.default_rng([7, ordinal[ref.order], ref.index]).integers(0, 2))
        scored.append(Scored(ref, lease_id, reward, b"\x09" + np.float64(reward).tobytes()))
    await store.complete_score(scored)
    await store.close()


@pytest.mark.timeout(240)
async def test_a_trainer_killed_anywhere_resumes_bit_for_bit(tmp_path: Path) -> None:
    build_tiny_qwen3(tmp_path / "model", hidden=32, layers=1)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"input": "{n}="}}\n' for n in range(7)))
    at = points.Points(tmp_path / "faults")
    with valkey.running(appendfsync="always") as store:
        struck, calm = (configured(tmp_path, name, store.url) for name in ("struck", "calm"))
        async with surroundings(struck):
            for point in trainer_points.names():
                at.arm(point)
                status = await train(struck, at)
                assert (status, len(at.hits(point))) == (-signal.SIGKILL, 1), (point, log(struck))
            assert await train(struck, at) == 0, log(struck)
        async with surroundings(calm):
            assert await train(calm, at) == 0, log(calm)
    expected = {line["step"]: line for line in lines(calm)}
    assert sorted(expected) == list(range(1, STEPS + 1))
    for line in lines(struck):
        for field in SAME:
            assert line[field] == expected[line["step"]][field], (line["step"], line["epoch"], field)
    assert {line["step"] for line in lines(struck)} == set(expected)
    for part in ("model", "optimizer", "rng"):
        ends = [load_file(newest(config) / f"{part}-00000.safetensors") for config in (struck, calm)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1]), part


async def train(config: Config, at: points.Points) -> int:
    """A trainer from start to end. Returns its exit status."""
    environment = {**os.environ, "FAULT_POINTS": str(at.directory)}
    install = f"{trainer_points.__name__}:{trainer_points.install.__name__}"
    start = partial(warm().start, environment=environment, log=config.run.dir / "trainer.log", before=install)
    process = await asyncio.to_thread(start, "services.trainer", "-c", str(config.run.dir / "config.toml"))
    return await process.ended(100)


def newest(config: Config) -> Path:
    return config.run.dir / "checkpoints" / f"step_{STEPS:08d}"


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def log(config: Config) -> str:
    return (config.run.dir / "trainer.log").read_text()[-3000:]
