"""What a weight push costs the trainer's process in control, beside the bytes. `polyhead bench push --json FILE`.

Eight replicas over real gRPC and gloo, a tiny model; they and the registry are another process. The trainer's end is
the one of the service: publisher, peers and channels on an event loop, the collective in threads of its own. A *push*
is one version, from its offer until all eight replicas have committed it and it is published.

* `control_cpu_ms`: CPU time of the thread that runs the event loop, over a push. The loop runs nothing but the driving
  coroutines, so that this is their time outside the collective (other threads) and outside waiting for replies (which
  takes no CPU). gRPC's share on that thread is in it.
* `control_busy_ms`: the same by the wall: what was not spent waiting in the loop's selector. Other threads that hold
  the interpreter's lock, and other processes on the machine, make it longer.
* `push_ms`: all of it by the wall.

`staged`: the first bucket arrives ahead of the pause; `direct`: each is loaded as it arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file

from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.versions import Version
from services.trainer.weights.publisher import Publisher
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest
from tests.kit.tiny_model import build_tiny_qwen3

MODES = ("direct", "staged")
ASKED_MS = 20.0
# Two buckets of at most 1 MiB.
SHAPE = {"intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}


class Selector(selectors.DefaultSelector):
    """Adds up how long the loop waited in it."""

    waited_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        began = time.perf_counter()
        try:
            return super().select(timeout)
        finally:
            self.waited_s += time.perf_counter() - began


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    busy_s: float
    push_s: float


class Trainer:
    """A publisher without a training loop. Its weights are the same in every version."""

    def __init__(self, config: Config, buffer: BufferClient, epoch: int, selector: Selector) -> None:
        self._publisher = Publisher(buffer, config, epoch, self._record)
        self._epoch, self._selector = epoch, selector
        self._pushed = asyncio.Semaphore(0)
        self.failed: list[Mapping[str, Any]] = []

    def _record(self, line: Mapping[str, Any]) -> None:
        if not line["ok"]:
            self.failed.append(line)
        self._pushed.release()

    async def start(self) -> None:
        await self._publisher.start(lambda task: task.cancelled() or task.result())

    async def take(self, weights: Mapping[str, torch.Tensor]) -> Snapshot:
        snapshot = await self._publisher.take_snapshot(weights)
        snapshot.fill(weights.items())
        return snapshot

    async def push(self, step: int, snapshot: Snapshot, replicas: int) -> Cost:
        version = Version(self._epoch, step)
        cpu, wall, waited = time.thread_time(), time.perf_counter(), self._selector.waited_s
        await self._publisher.offer(version, snapshot)
        for _ in range(replicas):
            await self._pushed.acquire()
        await self._publisher.wait_published(version)
        push_s = time.perf_counter() - wall
        return Cost(time.thread_time() - cpu, push_s - (self._selector.waited_s - waited), push_s)

    async def close(self) -> None:
        await self._publisher.close()


@contextlib.contextmanager
def replicas(count: int, directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The registry's address, and the process."""
    command = [sys.executable, "-m", "tests.bench.push_replicas", str(count), str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the replicas did not start")
        yield address, process


async def measure(options: argparse.Namespace, selector: Selector) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = build_tiny_qwen3(directory / "model", hidden=128, **SHAPE)
        weights = load_file(model / "model.safetensors")
        trainer = {"weights": {"bucket_mb": 1, "timeout_s": 30.0}}
        config = Config.model_validate(
            {"run": {"dir": directory}, "model": {"hf_checkpoint": model}, "trainer": trainer}
        )
        with replicas(options.replicas, directory / "replicas") as (address, process):
            rows = {}
            for epoch, mode in enumerate(MODES, start=1):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(f"{mode}\n")
                process.stdin.flush()
                process.stdout.readline()
                rows[mode] = await _mode(options, config, address, epoch, weights, selector)
            process.stdin.close()
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    return {
        "replicas": options.replicas,
        "pushes": options.pushes,
        "tensors": len(weights),
        "bytes": bytes_,
        "buckets": len(build_manifest(weights, MIB).buckets),
        "asked_ms": ASKED_MS,
        **rows,
        "host": {
            "cpu_cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
        },
    }


async def _mode(
    options: argparse.Namespace,
    config: Config,
    address: str,
    epoch: int,
    weights: Mapping[str, torch.Tensor],
    selector: Selector,
) -> dict[str, Any]:
    buffer = BufferClient(address)
    trainer = Trainer(config, buffer, epoch, selector)
    await trainer.start()
    steps = range(1 + options.pushes)
    costs = [await trainer.push(step, await trainer.take(weights), options.replicas) for step in steps]
    await trainer.close()
    await buffer.close()
    assert not trainer.failed, trainer.failed[0]
    steady = costs[1:]  # the first one joins
    return {
        "control_cpu_ms": _figures([cost.cpu_s for cost in steady]),
        "control_busy_ms": _figures([cost.busy_s for cost in steady]),
        "push_ms": _figures([cost.push_s for cost in steady]),
        "first_push_control_cpu_ms": round(1e3 * costs[0].cpu_s, 2),
    }


def _figures(seconds: list[float]) -> dict[str, float]:
    return {"p50": round(1e3 * statistics.median(seconds), 2), "max": round(1e3 * max(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--pushes", type=int, default=30, help="in each mode, after one that joins")
    options = parser.parse_args()
    selector = Selector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        figures = runner.run(measure(options, selector))
    text = orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode()
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
