"""Trainer and engine on one GPU, in turn: figures for docs/benchmarks/push.json, and a run of all four services.

`python -m tests.gpu.colocated --rows small large --out push.json --work DIR`, see README.md here. This process is the
trainer's end: it holds a model's weights as the trainer does, off-loads them, and pushes over ipc into real SGLang,
which a rollout replica puts to sleep and wakes. `--cpu` runs every step with a tiny model and the in-house engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc
from services.common import rpc
from services.common.config import Config, dump
from services.common.shared_directory import clear_shared_directory, shared_directory
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import GenerateRequest
from services.trainer.backends.torch.offload import Offload
from services.trainer.weights.shared import SharedMemory
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest
from tests.gpu.colocated_run import train
from tests.gpu.models import QWEN3_0_6B, QWEN3_8B, random_weights, write_model
from tests.gpu.push import SGLANG_ARGS, TINY, _host, _merge, say
from tests.gpu.push_bench import FIELDS
from tests.gpu.push_link import Link
from tests.gpu.push_process import JsonProcess

RUN = "run"
START_S = 400.0
TURN_S = 120.0


@dataclass(frozen=True)
class Scene:
    name: str
    shape: Mapping[str, Any]
    mem_fraction: float
    bucket_mb: int


SCENES = {
    "large": Scene("large", QWEN3_8B, 0.55, 2048),
    "small": Scene("small", QWEN3_0_6B, 0.4, 2048),
    "tiny": Scene("tiny", TINY, 0.0, 1),
}


class Trainer(torch.nn.Module):
    """A model's weights, held as the trainer holds them. It has no optimizer: that of 8.2 B fits no GPU of 80 GB."""

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._draw: Callable[[int], dict[str, torch.Tensor]] = lambda seed: random_weights(
            shape, seed, dtype, str(device)
        )
        weights = self._draw(0)
        self._names = list(weights)
        self.parts = torch.nn.ParameterList(torch.nn.Parameter(weight, False) for weight in weights.values())
        self.offload = Offload(self, lambda: (), device)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: part.detach() for name, part in zip(self._names, self.parts, strict=True)}

    def change(self) -> None:
        with torch.no_grad():
            for part in self.parts:
                part.add_(0.01)


class Bench:
    def __init__(self, scene: Scene, options: argparse.Namespace, link: Link, address: str, trainer: Trainer) -> None:
        self.scene, self.options, self.link, self.trainer = scene, options, link, trainer
        self.device = torch.device(options.device)
        self._stub = rollout_pb2_grpc.RolloutServiceStub(rpc.channel(address))
        self._shared = shared_directory(options.work / scene.name / "run")
        self.turns: list[dict[str, float]] = []
        self.equal: list[bool] = []

    def used_gb(self) -> float:
        """Of the GPU, by everybody."""
        if self.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / 1e9

    async def turn(self, *, original: bool) -> None:
        """One turn of the trainer, from the engine serving to the engine serving again."""
        figures: dict[str, float] = {"used_serving_gb": self.used_gb()}
        clock = _Clock(figures, self.device)
        done = await self._stub.Yield(rpb.YieldRequest(epoch=1), timeout=TURN_S)
        clock.end("yield_s")
        figures |= {"sleep_s": done.sleep_s, "used_asleep_gb": self.used_gb()}
        figures["given_back_gb"] = figures["used_serving_gb"] - figures["used_asleep_gb"]
        clock.begin()
        self.trainer.offload.wake()
        clock.end("train_on_s")
        if not original:
            self.trainer.change()
        clock.begin()
        weights = self.trainer.weights()
        manifest = build_manifest(weights, self.scene.bucket_mb * MIB)
        snapshot = Snapshot(manifest, self.device, memory=SharedMemory(self._shared, self.device))
        clock.end("allocate_s")
        snapshot.fill(weights.items())
        clock.end("fill_s")
        figures["used_training_gb"] = self.used_gb()
        clock.begin()
        del weights
        self.trainer.offload.sleep()
        clock.end("train_off_s")
        pushed = await self.link.push(snapshot)
        clock.end("push_and_wake_s")
        figures["used_pushed_gb"] = self.used_gb()
        figures |= dict(pushed.trace) | {"engine_held_s": pushed.pause_s} | await self._timings()
        figures["push_s"] = figures["push_and_wake_s"] - figures["wake_s"]
        figures["gb_per_s"] = manifest.num_bytes / figures["push_s"] / 1e9
        clock.begin()
        snapshot.close()
        clock.end("free_s")
        resumed = await self._stub.Resume(rpb.ResumeRequest(epoch=1), timeout=TURN_S)
        clock.end("resume_s")
        figures["wake_kv_s"] = resumed.wake_s
        await self._generates()
        clock.end("first_tokens_s")
        self.turns.append({name: round(value, 5) for name, value in figures.items()})
        say("  " + " ".join(f"{name}={value:.4g}" for name, value in self.turns[-1].items()))

    async def _timings(self) -> dict[str, float]:
        return await self.link.timings() if not self.options.cpu else {}

    async def _generates(self) -> None:
        """The engine serves: a few tokens, with log-probs that are numbers."""
        request = GenerateRequest(f"check-{len(self.turns)}", [1, 2, 3], 8, 1.0, 1.0, -1, [], [], 0)
        tokens = 0
        async for _, chunk in self.link.client.generate([request], str(self.link.version)):
            tokens += len(chunk.token_ids)
            assert all(logprob <= 1e-4 for logprob in chunk.logprobs), chunk.logprobs
        assert tokens == 8, tokens

    def row(self) -> dict[str, Any]:
        weights = self.trainer.weights()
        warm = self.turns[1:] or self.turns
        phases = {name: round(statistics.median(turn[name] for turn in warm), 5) for name in sorted(warm[-1])}
        longest = {f"{name}_max": max(turn[name] for turn in warm) for name in ("push_s", "sleep_s", "wake_kv_s")}
        row: dict[str, Any] = dict.fromkeys(FIELDS)
        row |= {
            "model_params": sum(weight.numel() for weight in weights.values()),
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "mode": "colocated",
            "transport": "ipc",
            "running_requests": 0,
            "gb_per_s": phases["gb_per_s"],
            "digests_equal": bool(self.equal) and all(self.equal),
            "conditions": {
                "variant": f"colocated-{self.scene.name}",
                "bucket_mb": self.scene.bucket_mb,
                "bytes": sum(weight.numel() * weight.element_size() for weight in weights.values()),
                "turns": len(self.turns),
                "turns_that_count": len(warm),
                "mem_fraction_static": self.scene.mem_fraction,
                "trainer": "parameters only: no gradients, no optimizer state",
                "digests_compared": len(self.equal),
                "push_s": phases["push_s"],
                **longest,
                "phases_s": phases,
                "each_turn": self.turns,
                **self.options.host,
            },
        }
        return row


class _Clock:
    def __init__(self, figures: dict[str, float], device: torch.device) -> None:
        self._figures, self._device = figures, device
        self.begin()

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._at = time.monotonic()

    def end(self, name: str) -> None:
        """Since `begin`, or since the last end."""
        before = self._at
        self.begin()
        self._figures[name] = self._at - before


async def measure(scene: Scene, options: argparse.Namespace) -> None:
    directory = options.work / scene.name
    (directory / "run" / "logs").mkdir(parents=True, exist_ok=True)
    write_model(directory / "model", scene.shape, 0, options.dtype, options.device)
    if not options.cpu:
        torch.cuda.empty_cache()
    say(f"{scene.name}: the model is written; starting the engine")
    async with AsyncExitStack() as stack:
        stack.callback(clear_shared_directory, directory / "run")
        command = [sys.executable, "-m", "tests.gpu.push_replica", str(_replica_file(scene, options, directory))]
        replica = await stack.enter_async_context(JsonProcess.running(command))
        where = await replica.answer(START_S)
        say(f"{scene.name}: the engine generates")
        client = await stack.enter_async_context(EngineClient(where["url"], where["key"]))
        info = await client.server_info()
        assert info.sleeps, "the engine was started without its memory saver"
        options.host["engine"] = info.name
        link = Link(replica, where["address"], client, "ipc", options.timeout_s)
        expected = await link.checksum()
        say(f"{scene.name}: checksum {expected[:12]}")
        trainer = await asyncio.to_thread(Trainer, scene.shape, options.dtype, torch.device(options.device))
        trainer.offload.sleep()
        bench = Bench(scene, options, link, where["address"], trainer)
        await link.join("in_place")
        for number in range(options.turns):
            # The engine's own weights: what it holds afterwards is what was pushed, since it gave everything up.
            await bench.turn(original=True)
            bench.equal.append(await link.checksum() == expected)
            _merge(options.out, bench.row())
            say(f"{scene.name}: turn {number + 1} of {options.turns}, digests equal: {bench.equal[-1]}")
        await bench.turn(original=False)
        bench.turns.pop()
        differs = await link.checksum() != expected
        say(f"{scene.name}: other weights have another digest: {differs}")
        if not differs:
            bench.equal.append(False)
        _merge(options.out, bench.row())
        _tell(bench.row())
        await link.leave()


def _tell(row: dict[str, Any]) -> None:
    phases = row["conditions"]["phases_s"]
    wanted = ("push_s", "gb_per_s", "sleep_s", "given_back_gb", "wake_s", "wake_kv_s", "train_off_s", "train_on_s")
    figures = " ".join(f"{name}={phases[name]}" for name in wanted)
    say(f"{row['conditions']['variant']}: {figures}; digests equal: {row['digests_equal']}")


def _replica_file(scene: Scene, options: argparse.Namespace, directory: Path) -> Path:
    engine: dict[str, Any] = {"context_length": 4096 if not options.cpu else 128, "stream_interval": 1}
    if not options.cpu:
        engine |= {
            "kind": "sglang",
            "device": "cuda",
            "python": options.engine_python,
            "max_running_requests": 64,
            "start_timeout_s": START_S,
            "args": SGLANG_ARGS | {"mem-fraction-static": scene.mem_fraction},
        }
    config = {
        # SGLang's sockets live below it, and their names must be short.
        "run": {"dir": str(directory / "run"), "colocate": True},
        "model": {
            "hf_checkpoint": str(directory / "model"),
            "dtype": str(options.dtype).removeprefix("torch."),
        },
        "rollout": {"engine": engine},
        "trainer": {"device": "cpu" if options.cpu else "cuda", "weights": {"timeout_s": options.timeout_s}},
    }
    file = directory / "replica.toml"
    file.write_text(dump(Config.model_validate(config)))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=[*sorted(SCENES), RUN], required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows that are there already are kept")
    parser.add_argument("--work", type=Path, required=True, help="for the model, logs: in memory if there is room")
    parser.add_argument("--cpu", action="store_true", help="dry run: the in-house engine, a tiny model")
    parser.add_argument("--engine-python", default=sys.executable, help="SGLang's interpreter")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct for the run; else a random 0.6 B model")
    parser.add_argument("--turns", type=int, default=6, help="the first one is left out of the medians")
    parser.add_argument("--steps", type=int, default=20, help="of the run")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="of each call of a push")
    options = parser.parse_args()
    options.device = "cpu" if options.cpu else "cuda:0"
    options.dtype = torch.float32 if options.cpu else torch.bfloat16
    options.host = _host(options.cpu)
    if not options.cpu:
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        torch.cuda.set_device(0)
    failed = [row for row in options.rows if not _attempt(row, options)]
    say(f"failed: {' '.join(failed)}" if failed else "done")
    sys.exit(bool(failed))


def _attempt(row: str, options: argparse.Namespace) -> bool:
    """The other rows are still worth their time."""
    try:
        if row == RUN:
            figures = train(options.work / RUN, options)
            file = options.out.with_name(f"{options.out.stem}-colocated-run.json")
            file.write_text(json.dumps({**figures, "host": options.host}, indent=1) + "\n")
            say(f"run: {json.dumps({key: value for key, value in figures.items() if not isinstance(value, list)})}")
        else:
            asyncio.run(measure(SCENES[row], options))
    except Exception as error:
        traceback.print_exc()
        say(f"{row} FAILED: {type(error).__name__}: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
