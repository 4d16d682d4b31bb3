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
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from services.common.config import Config, dump
from services.common.lifecycle import keep_loaded
from services.rollout.engines.client import EngineClient
from tests.gpu import push_variants as variants
from tests.gpu.models import QWEN3_0_6B, QWEN3_8B, write_model
from tests.gpu.push_bench import Bench, Scene
from tests.gpu.push_link import Link
from tests.gpu.push_process import JsonProcess
from tests.gpu.push_quantise import measure_quantiser
from tests.gpu.push_raw import raw_gb_per_s
from tests.gpu.push_versions import named_by_teacher_forcing
from tests.kit.sglang_fp8_python import fp8_python

ROOT = Path(__file__).parents[2]
BEGAN = time.monotonic()
LOADERS = 4
STEP_LIMIT_S = 60.0
# Teacher forcing tries several places for each turn of a request.
VERSIONS_LIMIT_S = 360.0
QUANTISE = "quantise"

SGLANG_ARGS = {
    "attention-backend": "triton",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-prefill-cuda-graph": True,
    "cuda-graph-bs-decode": [1, 32, 64],
    # A stall in the engine's own log, beside which a pause can be judged.
    "gc-warning-threshold-secs": 0.05,
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
# Parts of fused projections are whole blocks.
TINY_FP8 = TINY | {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
FP8_ARGS = SGLANG_ARGS | {"fp8-gemm-backend": "triton"}
SCENES = {
    "small": Scene("small", QWEN3_0_6B, 2000, {"args": SGLANG_ARGS | {"mem-fraction-static": 0.5}}, versions=True),
    "large": Scene("large", QWEN3_8B, 1150, {"args": SGLANG_ARGS | {"mem-fraction-static": 0.6}}),
    "small-fp8": Scene("small-fp8", QWEN3_0_6B, 2000, {"args": FP8_ARGS | {"mem-fraction-static": 0.5}}, fp8=True),
    "large-fp8": Scene("large-fp8", QWEN3_8B, 1150, {"args": FP8_ARGS | {"mem-fraction-static": 0.5}}, fp8=True),
    "versions": Scene(
        "versions",
        QWEN3_0_6B,
        2000,
        {"args": SGLANG_ARGS | {"mem-fraction-static": 0.5}},
        versions=True,
        steps=(variants.VERSIONS,),
    ),
    "versions-fp8": Scene(
        "versions-fp8",
        QWEN3_0_6B,
        2000,
        {"args": FP8_ARGS | {"mem-fraction-static": 0.5}},
        versions=True,
        fp8=True,
        steps=(variants.VERSIONS,),
    ),
    "tiny": Scene("tiny", TINY, 1200, {"args": {"gc-warning-threshold-secs": 0.05}}, versions=True),
    "tiny-fp8": Scene(
        "tiny-fp8", TINY_FP8, 300, {"args": {"gc-warning-threshold-secs": 0.05}}, versions=True, fp8=True
    ),
}


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


class Start:
    """A scene whose engine is on its way."""

    def __init__(self, scene: Scene, options: argparse.Namespace, gpu: int) -> None:
        self.scene, self.options, self.gpu = scene, options, gpu
        self.directory = options.work / scene.name

    def write_model(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        scene, options = self.scene, self.options
        dtype = torch.bfloat16 if scene.fp8 else options.dtype
        write_model(self.directory / "model", scene.shape, 0, dtype, options.device, fp8=scene.fp8)
        say(f"{scene.name}: the model is written, {time.monotonic() - began:.1f} s")

    async def begin(self, stack: AsyncExitStack) -> None:
        say(f"{self.scene.name}: starting the engine on GPU {self.gpu}")
        running = _replica(self.scene, self.options, self.directory / "model", self.gpu)
        self.replica = await stack.enter_async_context(running)

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
            bench.checksum = await link.checksum()
            options.host["engine"] = (await client.server_info()).name
            say(f"{scene.name}: {bench.params:,} parameters, checksum {bench.checksum[:12]}")
            keep_loaded()
            await _steps(bench, where)


async def _steps(bench: Bench, where: dict[str, str]) -> None:
    scene, options = bench.scene, bench.options
    rows: list[dict[str, Any]] = []
    slime_s: float | None = None
    for step in variants.STEPS:
        if step not in (scene.steps or options.variants):
            continue
        if step == variants.SLIME:
            slime_s = await _attempt(scene, step, variants.slime_sequence(bench), options.step_limit_s)
        elif step == variants.VERSIONS:
            if not scene.versions:
                continue
            limit_s = max(VERSIONS_LIMIT_S, options.step_limit_s)
            named = await _attempt(scene, step, named_by_teacher_forcing(bench, where), limit_s)
            if named is not None:
                say(f"  versions: {named}")
                _merge_side(options.out.with_name(f"{options.out.stem}-versions.json"), scene.name, named)
        else:
            (variant,) = (each for each in variants.VARIANTS if each.name == step)
            variant = variant.scaled(bench.num_bytes)
            if options.cpu:
                # Pauses are longer there, and have to end before the window that they are compared with.
                variant = replace(variant, pushes=2, apart_s=max(variant.apart_s, 2.0))
            row = await _attempt(scene, step, bench.measure(variant), options.step_limit_s)
            if row is not None:
                _tell(row)
                rows.append(row)
        for row in rows:
            row |= {"raw_nccl_gb_per_s": options.raw_gb_per_s, "slime_sequence_s": slime_s}
            _merge(options.out, row)


def _tell(row: dict[str, Any]) -> None:
    conditions = row["conditions"]
    say(
        f"  {conditions['variant']}: pause {row['pause_p50_s']} / {row['pause_max_s']} s of {row['running_requests']} "
        f"requests, without a push {conditions['control_p50_s']} / {conditions['control_max_s']} s, "
        f"digests equal: {row['digests_equal']}"
    )
    for figures in (conditions["phases_s"], *conditions["each_push"]):
        say("    " + " ".join(f"{name.removesuffix('_s')}={1e3 * value:.1f}" for name, value in figures.items()))


async def _attempt(scene: Scene, name: str, work: Any, limit_s: float) -> Any:
    """The other steps are still worth their time."""
    try:
        async with asyncio.timeout(limit_s):
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
        "float32_logits": False,  # older SGLangs copy the head's weights for it in each pass
        "base_gpu": 0 if options.cpu else gpu,
        "start_timeout_s": options.start_timeout_s,
        **scene.engine,
    }
    if options.engine_python is not None:
        python = options.engine_python
        engine["python"] = str(fp8_python(directory, python)) if scene.fp8 else python
    config = {
        # SGLang's sockets live below it, and their names must be short.
        "run": {"dir": str(directory / "run")},
        "model": {
            "hf_checkpoint": str(model),
            "dtype": "bfloat16" if scene.fp8 else str(options.dtype).removeprefix("torch."),
        },
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=sorted([*SCENES, QUANTISE]), required=True, help="engines")
    parser.add_argument("--variants", nargs="+", choices=variants.STEPS, default=variants.STEPS)
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
    # Other work on a machine without GPUs is no reason to give up.
    options.step_limit_s = STEP_LIMIT_S * (5 if options.cpu else 1)
    options.raw_gb_per_s = None
    if not options.cpu:
        options.engine_python = options.engine_python or sys.executable
        os.environ["NCCL_CUMEM_ENABLE"] = "0"
        torch.cuda.set_device(0)
    options.host = _host(options.cpu)
    if QUANTISE in options.rows:
        options.rows = [row for row in options.rows if row != QUANTISE]
        side = options.out.with_name(f"{options.out.stem}-quantise.json")
        measure_quantiser(options.device, options.host, lambda name, figures: _merge_side(side, name, figures))
    if options.rows:
        asyncio.run(_all(options))


async def _all(options: argparse.Namespace) -> None:
    """With a GPU for each engine, all start at once; else one after the other. What needs no engine is done while the
    first one starts.
    """
    spare = torch.cuda.device_count() - 1
    starts = [Start(SCENES[row], options, 1 + number % max(1, spare)) for number, row in enumerate(options.rows)]
    together = spare >= len(starts)
    async with AsyncExitStack() as shared:
        for number, start in enumerate(starts):
            start.write_model()
            if number == 0 or together:
                await start.begin(shared)
            if number == 0:
                await _raw(options)
        for number, start in enumerate(starts):
            async with AsyncExitStack() as own:
                if number and not together:
                    await shared.aclose()  # its GPU is needed
                    await start.begin(own)
                limit_s = options.start_timeout_s + VERSIONS_LIMIT_S + options.step_limit_s
                await _attempt(start.scene, "all", start.measure(), limit_s)
    say("done")


async def _raw(options: argparse.Namespace) -> None:
    try:
        raw = asyncio.to_thread(raw_gb_per_s, options.backend, options.device, 1, options.raw_bytes)
        options.raw_gb_per_s = await asyncio.wait_for(raw, 60)
    except Exception as error:
        say(f"raw broadcast FAILED: {type(error).__name__}: {error}")
    say(f"raw broadcast {options.raw_gb_per_s} GB/s")


def _host(cpu: bool) -> dict[str, Any]:
    gpu = "none" if cpu else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"gpu": gpu, "torch": torch.__version__, "cpu_cores": os.cpu_count()}


if __name__ == "__main__":
    main()
