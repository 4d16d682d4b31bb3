"""What the buffer costs and how fast it is, over gRPC on a Valkey with its file on disk. `polyhead bench buffer`.

* `samples_per_s`, `ratio_to_scripts`: 8k-token samples from prompt to commit, beside the same scripts without gRPC
  (`buffer_flow.py`); `lease_p99_ms` beside `fsync_p99_ms` of this disk.
* `waiting_leases_*`, `answered_per_arrival`: ten thousand leases that wait (`buffer_waiting.py`).
* `small_samples`: CPU and wall time of a step of 64 short samples by verb; CPU times are the kernel's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import psutil
import stamina.instrumentation

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.redis_store import RedisStore
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.process import free_port
from services.common.versions import Version
from tests.bench.buffer_flow import COMPLETION, PROMPT, Side, ThroughGrpc, ThroughScripts, Timings, fsync_ms
from tests.bench.buffer_waiting import measure_waiting
from tests.kit.valkey import Valkey, running

GROUPS, GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 8, 12, 12
# Of long samples: how many share a call, and steps before measuring.
BATCH, WARM_UP = 16, 3

CONFIG = """
[run]
name = "bench"
[data]
prompt_data = "{data}"
[batch]
rollout_batch_size = {groups}
n_samples_per_prompt = {size}
[store]
url = "{store}"
[buffer]
address = "{address}"
"""


def make_sample(leased: pb.LeasedSample, group: pb.LeasedGroup, version: Version) -> bytes:
    segment = sample_pb2.Segment(
        token_ids=wire.encode_tokens(range(PROMPT_TOKENS + COMPLETION_TOKENS)),
        num_tokens=PROMPT_TOKENS + COMPLETION_TOKENS,
        prompt_length=PROMPT_TOKENS,
        loss_mask=wire.encode_mask([1] * COMPLETION_TOKENS),
        rollout_logprobs=wire.encode_logprobs([-0.5] * COMPLETION_TOKENS),
        spans=[sample_pb2.WeightVersionSpan(version=version.to_proto(), start=0, end=COMPLETION_TOKENS)],
    )
    sample = sample_pb2.Sample(
        sample_id=leased.sample_id,
        group_id=group.group_id,
        index=leased.index,
        prompt=group.prompt,
        segments=[segment],
        completion="the answer is 7",
        finish_reason=sample_pb2.FINISH_REASON_STOP,
    )
    return sample.SerializeToString()


class Step:
    """One training step as all three services would make it, with the time of each verb."""

    def __init__(self, client: BufferClient, chunk: int) -> None:
        self._client = client
        self._chunk = chunk
        self.seconds: dict[str, float] = {}

    async def _timed(self, name: str, call: object) -> object:
        began = time.perf_counter()
        answer = await call  # type: ignore[misc]
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return answer

    async def run(self, epoch: int, step: int) -> None:
        version = Version(epoch, step - 1)
        for _ in range(GROUPS * GROUP_SIZE // self._chunk):
            await self._generate(version)
            await self._score()
        lease = await self._timed(
            "lease_train", self._client.lease(sample_pb2.STAGE_TRAIN, "t", epoch=epoch, step=step)
        )
        await self._timed("commit", self._client.commit_step(epoch, step, lease.batch_lease_id))  # type: ignore[attr-defined]
        await self._timed("publish", self._client.publish_version(Version(epoch, step)))

    async def _generate(self, version: Version) -> None:
        lease = await self._timed(
            "lease_generate",
            self._client.lease(
                sample_pb2.STAGE_GENERATE, "r", max_samples=self._chunk, weight_version=version, include_payload=True
            ),
        )
        samples = [
            pb.CompletedSample(sample_id=s.sample_id, lease_id=s.lease_id, sample=make_sample(s, group, version))
            for group in lease.groups  # type: ignore[attr-defined]
            for s in group.samples
        ]
        await self._timed("complete_generate", self._client.complete(sample_pb2.STAGE_GENERATE, "r", samples))

    async def _score(self) -> None:
        lease = await self._timed(
            "lease_score", self._client.lease(sample_pb2.STAGE_SCORE, "s", max_samples=self._chunk)
        )
        samples = [
            pb.CompletedSample(
                sample_id=s.sample_id, lease_id=s.lease_id, score=sample_pb2.Score(reward=s.index % 2, scorer="exact")
            )
            for group in lease.groups  # type: ignore[attr-defined]
            for s in group.samples
        ]
        await self._timed("complete_score", self._client.complete(sample_pb2.STAGE_SCORE, "s", samples))


async def measure(address: str, steps: int, chunk: int, pids: dict[str, int]) -> dict[str, object]:
    async with BufferClient(address) as client:
        epoch = (await client.acquire_epoch("bench")).epoch
        await client.recover(epoch, 0)
        await client.publish_version(Version(epoch, 0))
        step = Step(client, chunk)
        for number in range(1, 6):
            await step.run(epoch, number)
        step.seconds.clear()
        before, began = {name: _cpu(pid) for name, pid in pids.items()}, time.perf_counter()
        for number in range(6, 6 + steps):
            await step.run(epoch, number)
        wall = time.perf_counter() - began
        cpu = {f"{name}_cpu_ms_per_step": (_cpu(pid) - before[name]) * 1e3 / steps for name, pid in pids.items()}
        ledger = await client.get_ledger()
    figures = {
        "wall_ms_per_step": wall * 1e3 / steps,
        **cpu,
        **{f"{name}_ms": seconds * 1e3 / steps for name, seconds in step.seconds.items()},
    }
    return {
        "steps": steps,
        "chunk": chunk,
        "imbalance": ledger.imbalance,
        "samples_per_s": round(steps * GROUPS * GROUP_SIZE / wall),
        **{name: round(value, 2) for name, value in figures.items()},
    }


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def compare(address: str, url: str, pid: int, rounds: int) -> dict[str, object]:
    """8k-token samples through gRPC and through the scripts alone, in turn."""
    store = RedisStore(url, run_name="scripts")
    async with BufferClient(address) as client:
        sides: list[Side] = [ThroughGrpc(client, BATCH), ThroughScripts(store, BATCH)]
        for side in sides:
            await side.begin()
        for number in range(1, WARM_UP + 1):
            for side in sides:
                await side.step(number)
        for side in sides:
            side.timings = Timings()
        cpu = _cpu(pid)
        for number in range(WARM_UP + 1, WARM_UP + 1 + rounds):
            for side in sides:
                await side.step(number)
        cpu = _cpu(pid) - cpu
        ledger = await client.get_ledger()
    await store.close()
    grpc_side, scripts = (side.timings for side in sides)
    return {
        "samples_per_s": round(grpc_side.samples / grpc_side.seconds),
        "scripts_samples_per_s": round(scripts.samples / scripts.seconds),
        "ratio_to_scripts": round(scripts.seconds / grpc_side.seconds, 3),
        "lease_p99_ms": round(1e3 * float(np.percentile(grpc_side.leases_s, 99)), 2),
        "buffer_cpu_ms_per_sample": round(1e3 * cpu / grpc_side.samples, 3),
        "payload_bytes": sides[0].payload_bytes,
        "imbalance": ledger.imbalance,
    }


@contextmanager
def started(appendfsync: Literal["always", "everysec"], **store: Any) -> Iterator[tuple[str, Valkey, int]]:
    """A new store and a buffer before it: its address, the server, the buffer's pid."""
    with running(appendfsync=appendfsync, **store) as server, tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        data.write_text("".join(json.dumps({"input": f"{n} + 1 ="}) + "\n" for n in range(100)))
        address = f"127.0.0.1:{free_port()}"
        config = Path(directory) / "run.toml"
        config.write_text(CONFIG.format(data=data, groups=GROUPS, size=GROUP_SIZE, store=server.url, address=address))
        command = [sys.executable, "-m", "services.buffer", "-c", str(config)]
        buffer = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ".:protos"}, stderr=subprocess.DEVNULL)
        try:
            grpc.channel_ready_future(grpc.insecure_channel(address)).result(timeout=20)
            yield address, server, buffer.pid
        finally:
            buffer.terminate()
            buffer.wait()


async def measure_all(arguments: argparse.Namespace) -> dict[str, object]:
    """In one event loop: gRPC does not outlive the one it was first used in."""
    figures: dict[str, object] = {}
    with started(arguments.appendfsync, max_memory_mb=2048) as (address, server, pid):
        fsync = fsync_ms(server.directory)
        figures |= await compare(address, server.url, pid, arguments.rounds)
        figures |= {"fsync_p50_ms": fsync["p50"], "fsync_p99_ms": fsync["p99"]}
    with started(arguments.appendfsync) as (address, _, pid):
        figures |= await measure_waiting(address, pid)
    with started(arguments.appendfsync) as (address, server, pid):
        pids = {"buffer": pid, "store": server.pid}
        figures["small_samples"] = await measure(address, arguments.steps, arguments.chunk, pids)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="polyhead bench buffer", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--steps", type=int, default=100, help="of 64 small samples")
    parser.add_argument("--rounds", type=int, default=30, help="of 64 long samples, each side")
    parser.add_argument("--chunk", type=int, default=64, help="small samples per call")
    parser.add_argument("--appendfsync", choices=["always", "everysec"], default="always")
    arguments = parser.parse_args()
    stamina.instrumentation.set_on_retry_hooks([])
    figures = asyncio.run(measure_all(arguments))
    figures["conditions"] = {
        "store": f"Valkey, AOF {arguments.appendfsync}",
        "long_samples": f"{PROMPT} + {COMPLETION} tokens, {BATCH} to a call",
        "processes": "one client, one buffer, one store",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    content = json.dumps(figures, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(content)
    print(content, end="")


if __name__ == "__main__":
    main()
