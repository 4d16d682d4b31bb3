"""Weight pushes between two GPUs: figures for docs/benchmarks/push.json.

`python -m tests.gpu.push --rows small large --out push.json --work DIR`, see README.md here. The trainer's end of the
push is this process, on the first GPU; a rollout replica with real SGLang, on another one, is the other end, over the
real protocol; requests stream from processes of their own. `--cpu` runs every step with a tiny model, over gloo.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.common.config import Config, dump
from services.rollout.engines.client import EngineClient
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest
from tests.gpu import push_variants as variants
from tests.gpu.models import QWEN3_0_6B, QWEN3_8B, random_weights, write_model
from tests.gpu.push_copy import copy_seconds
from tests.gpu.push_link import Link
from tests.gpu.push_pause import Pauses, lost, pauses
from tests.gpu.push_process import JsonProcess
from tests.gpu.push_raw import raw_gb_per_s
from tests.gpu.push_versions import named_by_teacher_forcing

ROOT = Path(__file__).parents[2]
BEGAN = time.monotonic()
PROMPT = 32
LOADERS = 4
# Between two pushes of a variant: the median gap is of undisturbed decoding.
APART_S = 0.7
ROW_LIMIT_S = 100.0

FIELDS = (
    "model_params",
    "dtype",
    "mode",
    "transport",
    "running_requests",
    "pause_p50_s",
    "pause_max_s",
    "gb_per_s",
    "raw_nccl_gb_per_s",
    "slime_sequence_s",
    "aborted",
    "tokens_lost",
    "tokens_recomputed",
    "digests_equal",
    "conditions",
)


@dataclass(frozen=True)
class Scene:
    """One engine start, and all that is measured on it."""

    name: str
    shape: dict[str, Any]
    length: int
    """Tokens of each request: as many as last for all pushes of a variant."""
    engine: dict[str, Any]
    versions: bool = False
    """Whether the version of each token is found by teacher forcing too."""


SGLANG_ARGS = {
    "attention-backend": "triton",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-prefill-cuda-graph": True,
    "cuda-graph-bs-decode": [1, 32, 64],
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SCENES = {
    "small": Scene("small", QWEN3_0_6B, 1700, {"args": SGLANG_ARGS | {"mem-fraction-static": 0.5}}, versions=True),
    "large": Scene("large", QWEN3_8B, 800, {"args": SGLANG_ARGS | {"mem-fraction-static": 0.6}}),
    "tiny": Scene("tiny", TINY, 500, {}, versions=True),
}


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


class Bench:
    """What all rows of one engine share."""

    def __init__(self, scene: Scene, options: argparse.Namespace, link: Link, loaders: list[JsonProcess]) -> None:
        self.scene = scene
        self.options = options
        self.link = link
        self.loaders = loaders
        self.weights = [random_weights(scene.shape, seed, options.dtype, options.device) for seed in (0, 1)]
        """The engine's own, and others."""
        self.raw_gb_per_s = 0.0
        self.slime_s: float | None = None
        self.checksum = ""
        """Of the engine that loaded the exported directory."""
        self.requests = options.requests

    @property
    def params(self) -> int:
        return sum(tensor.numel() for tensor in self.weights[0].values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights[0].values())

    def snapshot(self, bucket_mb: float) -> Snapshot:
        return Snapshot(build_manifest(self.weights[0], int(bucket_mb * MIB)), torch.device(self.options.device))

    async def start_requests(self, label: str) -> None:
        each = self.requests // len(self.loaders)
        start = {"requests": each, "length": self.scene.length, "prompt": PROMPT, "label": label}
        start["vocab"] = self.scene.shape["vocab_size"]
        await asyncio.gather(
            *(loader.ask({"start": start | {"first": each * index}}, 120) for index, loader in enumerate(self.loaders))
        )

    async def finish_requests(self) -> list[dict[str, Any]]:
        answers = await asyncio.gather(*(loader.ask({"finish": True}, 240) for loader in self.loaders))
        return [request for answer in answers for request in answer["requests"]]

    async def measure(self, variant: variants.Variant) -> dict[str, Any]:
        """One row: several pushes under load, after one without that makes buffers and connections."""
        await self.link.stage_memory(variant.staging_mb)
        await self.link.join(variant.mode)
        snapshot = self.snapshot(variant.bucket_mb)
        snapshot.fill(self.weights[0])
        await self.link.push(snapshot)  # repairs the engine too, if the variant before has failed
        await self.start_requests(variant.name)
        times, traces = [], []
        for number in range(variant.pushes):
            # The engine's own weights come last.
            snapshot.fill(self.weights[(variant.pushes - 1 - number) % 2])
            begin = time.monotonic()
            pushed = await self.link.push(snapshot)
            times.append((begin, time.monotonic()))
            traces.append(dict(pushed.trace) | {"pause_s": pushed.pause_s} | await self.link.timings())
            await asyncio.sleep(APART_S)
        say(f"  {variant.name}: {len(times)} pushes, {_ms(traces[-1])}")
        requests = await self.finish_requests()
        await self.link.leave()
        equal = await self.link.checksum() == self.checksum
        return self._row(variant, requests, times, traces, equal)

    def _row(
        self,
        variant: variants.Variant,
        requests: list[dict[str, Any]],
        times: list[tuple[float, float]],
        traces: list[dict[str, float]],
        equal: bool,
    ) -> dict[str, Any]:
        arrivals = [request["arrivals"] for request in requests]
        seen = [pauses(arrivals, begin, end) for begin, end in times]
        aborted, missing = lost(requests, self.scene.length)
        running = min(each.requests for each in seen)
        phases = {name: statistics.median(trace.get(name, 0.0) for trace in traces) for name in sorted(traces[-1])}
        wire_s = phases.get("ahead_s", 0.0) + phases["send_s"]
        row = {
            "model_params": self.params,
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "mode": variant.mode,
            "transport": self.options.backend,
            "running_requests": running,
            "pause_p50_s": round(statistics.median(each.p50_s for each in seen), 4),
            "pause_max_s": round(max(each.max_s for each in seen), 4),
            "gb_per_s": round(self.num_bytes / wire_s / 1e9, 1),
            "raw_nccl_gb_per_s": self.raw_gb_per_s,
            "slime_sequence_s": self.slime_s,
            "aborted": aborted,
            "tokens_lost": missing,
            "tokens_recomputed": _recomputed(variant.mode, arrivals, [begin for begin, _ in times]),
            "digests_equal": equal,
            "conditions": {
                "variant": variant.name,
                "bucket_mb": variant.bucket_mb,
                "staging_mb": variant.staging_mb,
                "bytes": self.num_bytes,
                "pushes": len(seen),
                "each_push_pause_s": [_rounded(each) for each in seen],
                "push_s": round(statistics.median(end - begin for begin, end in times), 4),
                "median_gap_s": round(seen[-1].median_gap_s, 5),
                "phases_s": {name: round(value, 5) for name, value in phases.items()},
                "request_tokens": self.scene.length,
                **self.options.host,
            },
        }
        assert set(row) == set(FIELDS)
        return row


def _rounded(each: Pauses) -> list[float]:
    return [round(each.p50_s, 4), round(each.max_s, 4)]


def _recomputed(mode: str, requests: list[list[Any]], begins: list[float]) -> int:
    """In place nothing is. Retracted requests are prefilled again: their prompts and what they had."""
    if mode != "retract":
        return 0
    had = [
        max((count for at, count in arrivals if at <= begin), default=0) for arrivals in requests for begin in begins
    ]
    return sum(PROMPT + count for count in had)


def _ms(trace: dict[str, float]) -> str:
    return " ".join(f"{name.removesuffix('_s')}={1e3 * value:.1f}" for name, value in sorted(trace.items()))


class Start:
    """A scene whose engine is on its way."""

    def __init__(self, scene: Scene, options: argparse.Namespace, gpu: int) -> None:
        self.scene, self.options, self.gpu = scene, options, gpu
        self.raw_gb_per_s = 0.0

    async def begin(self, stack: AsyncExitStack) -> None:
        scene, options = self.scene, self.options
        directory = options.work / scene.name
        directory.mkdir(parents=True, exist_ok=True)
        model = write_model(directory / "model", scene.shape, 0, options.dtype, options.device)
        say(f"{scene.name}: the model is written")
        raw = asyncio.to_thread(raw_gb_per_s, options.backend, options.device, self.gpu, options.raw_bytes)
        self.raw_gb_per_s = await asyncio.wait_for(raw, 60)
        say(f"{scene.name}: raw broadcast {self.raw_gb_per_s} GB/s; starting the engine on GPU {self.gpu}")
        self.replica = await stack.enter_async_context(_replica(scene, options, model, self.gpu))

    async def measure(self) -> None:
        scene, options = self.scene, self.options
        where = await self.replica.answer(options.start_timeout_s)
        say(f"{scene.name}: the engine generates")
        async with AsyncExitStack() as stack:
            loader = [sys.executable, "-m", "tests.gpu.push_load", where["url"], where["key"]]
            loaders = [await stack.enter_async_context(JsonProcess.running(loader)) for _ in range(options.loaders)]
            client = await stack.enter_async_context(EngineClient(where["url"], where["key"]))
            link = Link(self.replica, where["address"], client, options.backend, options.timeout_s)
            bench = Bench(scene, options, link, loaders)
            bench.raw_gb_per_s = self.raw_gb_per_s
            bench.checksum = await link.checksum()
            options.host["engine"] = (await client.server_info()).name
            say(f"{scene.name}: {bench.params:,} parameters, checksum {bench.checksum[:12]}")
            if not options.cpu:
                snapshot = bench.snapshot(1024)
                snapshot.fill(bench.weights[1])
                copied = copy_seconds(
                    [bench.weights[1][name] for name in snapshot.views], list(snapshot.views.values())
                )
                say(f"{scene.name}: from buckets into weights, [CPU, all] seconds: {copied}")
            await _rows(bench)
            if scene.versions and "versions" in options.variants:
                named = await _attempt(scene, "versions", named_by_teacher_forcing(bench, where))
                if named is not None:
                    say(f"  versions: {named}")
                    _merge_side(options.out.with_name(f"{options.out.stem}-versions.json"), scene.name, named)


async def _rows(bench: Bench) -> None:
    scene, options = bench.scene, bench.options
    if "slime" in options.variants:
        bench.slime_s = await _attempt(scene, "slime", variants.slime_sequence(bench))
    for variant in variants.VARIANTS:
        if variant.name not in options.variants:
            continue
        row = await _attempt(scene, variant.name, bench.measure(variant.scaled(bench.num_bytes)))
        if row is not None:
            paused = f"pause {row['pause_p50_s']} / {row['pause_max_s']} s of {row['running_requests']} requests"
            say(f"  {variant.name}: {paused}, digests equal: {row['digests_equal']}")
            _merge(options.out, row)


async def _attempt(scene: Scene, name: str, work: Any) -> Any:
    """The other rows are still worth their time."""
    try:
        async with asyncio.timeout(ROW_LIMIT_S):
            return await work
    except Exception as error:
        traceback.print_exc()
        say(f"{scene.name}/{name} FAILED: {type(error).__name__}: {error}")
        return None


@contextlib.asynccontextmanager
async def _replica(scene: Scene, options: argparse.Namespace, model: Path, gpu: int) -> AsyncIterator[JsonProcess]:
    directory = options.work / scene.name
    engine = {
        "kind": "sglang",
        "device": "cpu" if options.cpu else "cuda",
        "stream_interval": 1,
        "max_running_requests": max(64, options.requests),
        "context_length": 4096,
        "base_gpu": 0 if options.cpu else gpu,
        "start_timeout_s": options.start_timeout_s,
        **scene.engine,
    }
    if options.engine_python is not None:
        engine["python"] = options.engine_python
    config = {
        # SGLang's sockets live below it, and their names must be short.
        "run": {"dir": str(directory / "run")},
        "model": {"hf_checkpoint": str(model), "dtype": str(options.dtype).removeprefix("torch.")},
        "rollout": {"engine": engine},
        "trainer": {"weights": {"timeout_s": options.timeout_s}},
    }
    file = directory / "replica.toml"
    file.write_text(dump(Config.model_validate(config)))
    (directory / "run" / "logs").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.gpu.push_replica", str(file)]
    async with JsonProcess.running(command) as process:
        yield process


def _merge(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_bytes()) if path.exists() else []

    def key(each: dict[str, Any]) -> tuple[Any, ...]:
        return each["model_params"], each["dtype"], each["transport"], each["conditions"]["variant"]

    rows = [each for each in rows if key(each) != key(row)] + [row]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _merge_side(path: Path, name: str, figures: dict[str, Any]) -> None:
    merged = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(merged | {name: figures}, indent=1) + "\n")


def main() -> None:
    names = [variant.name for variant in variants.VARIANTS] + ["slime", "versions"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=sorted(SCENES), required=True, help="engines, one after the other")
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows that are there already are kept")
    parser.add_argument("--work", type=Path, required=True, help="for the model, logs: in memory if there is room")
    parser.add_argument("--cpu", action="store_true", help="dry run: gloo, SGLang on the CPU, a tiny model")
    parser.add_argument("--engine-python", help="SGLang's interpreter")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="of each call of a push")
    options = parser.parse_args()
    options.backend, options.device = ("gloo", "cpu") if options.cpu else ("nccl", "cuda:0")
    options.dtype = torch.float32 if options.cpu else torch.bfloat16
    options.raw_bytes = 1 << 24 if options.cpu else 2 << 30
    options.loaders = 1 if options.cpu else LOADERS
    options.start_timeout_s = 400.0
    if not options.cpu:
        options.engine_python = options.engine_python or sys.executable
        os.environ["NCCL_CUMEM_ENABLE"] = "0"
        torch.cuda.set_device(0)
    options.host = _host(options.cpu)
    asyncio.run(_all(options))


async def _all(options: argparse.Namespace) -> None:
    """With a GPU for each engine, all start at once; else one after the other."""
    spare = torch.cuda.device_count() - 1
    starts = [Start(SCENES[row], options, 1 + number % max(1, spare)) for number, row in enumerate(options.rows)]
    if spare >= len(starts):
        async with AsyncExitStack() as stack:
            for start in starts:
                await start.begin(stack)
            for start in starts:
                await start.measure()
    else:
        for start in starts:
            async with AsyncExitStack() as stack:
                await start.begin(stack)
                await start.measure()
    say("done")


def _host(cpu: bool) -> dict[str, Any]:
    gpu = "none" if cpu else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"gpu": gpu, "torch": torch.__version__, "cpu_cores": os.cpu_count()}


if __name__ == "__main__":
    main()
