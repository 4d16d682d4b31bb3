"""The rollout service on one GPU, over real SGLang: figures for docs/benchmarks/rollout.json.

`python -m tests.gpu.rollout --out rollout.json --rows record overhead services`, see README.md here. One GPU holds
trainer and engine together, and NCCL refuses two ranks on one device: weights are pushed over gloo.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from services.common.config import Config
from services.common.process import free_port, last_lines
from services.rollout.engines.client import EngineClient
from services.rollout.engines.launch import engine_command
from tests.gpu.models import build_qwen3

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 400.0
# Kernels that every wheel brings; no prefill graphs, which take longer to capture than these runs last.
ENGINE_ARGS = {
    "attention-backend": "triton",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-prefill-cuda-graph": True,
    "cuda-graph-bs-decode": [1, 8, 32, 64, 128, 256],
    "mem-fraction-static": 0.35,
}


def engine_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "kind": "sglang",
        "device": "cuda",
        "python": sys.executable,
        "args": ENGINE_ARGS,
        "context_length": 2048,
        "max_running_requests": 256,
        "start_timeout_s": START_LIMIT_S,
    }
    return settings | changes


@contextlib.contextmanager
def running_engine(model: Path, log: Path, **changes: Any) -> Iterator[tuple[str, str]]:
    """SGLang as a replica starts it: its address and its key, once it generates."""
    tree = {
        "run": {"dir": log.with_suffix("")},
        "model": {"hf_checkpoint": model, "dtype": "bfloat16"},
        "rollout": {"engine": engine_settings(**changes)},
    }
    port, key = free_port(), secrets.token_urlsafe(16)
    launch = engine_command(Config.model_validate(tree))(port, key)
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command, env={**os.environ, **launch.environment}, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_healthy(url, key, process, log))
        yield url, key
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


async def _until_healthy(url: str, key: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    async with EngineClient(url, key) as client:
        while not await client.health():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SGLang did not start:\n{last_lines(log, 40)}")
            await asyncio.sleep(1)


def overhead(directory: Path) -> dict[str, Any]:
    """`polyhead bench rollout` on this engine, 64 and 256 requests."""
    model = build_qwen3(directory / "model")
    figures = directory / "bench.json"
    with running_engine(model, directory / "engine.log") as (url, key):
        command = [sys.executable, "-m", "tests.bench.bench_rollout", "--url", url, "--key", key, "--kind", "sglang"]
        command += ["--model", str(model), "--label", "random Qwen3-0.6B, bf16", "--requests", "64", "256"]
        command += ["--length", "512", "--seconds", "10", "--repeat", "2", "--json", str(figures)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads(figures.read_bytes())


def services(directory: Path) -> dict[str, Any]:
    """All four services: GRPO on a reward that a random model can learn, a push after each step while it generates."""
    model = build_qwen3(directory / "model")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{number}+{number}="}) + "\n" for number in range(4096)))
    config = {
        "run": {"name": "gpu", "dir": str(directory / "run"), "num_rollout": 30},
        "model": {"hf_checkpoint": str(model), "dtype": "bfloat16"},
        "data": {"prompt_data": str(prompts)},
        "batch": {"rollout_batch_size": 16, "n_samples_per_prompt": 8},
        "rollout": {
            "sampling": {"max_response_len": 256},
            "engine": engine_settings(stream_interval=1, max_running_requests=128),
        },
        "reward": {"scorer": "tests.gpu.scorers:even_characters"},
        "plugins": {"paths": [str(ROOT)]},
        "trainer": {
            "device": "cuda",
            "max_tokens_per_gpu": 8192,
            "optimizer": {"lr": 1e-5},
            "checkpoint": {"save_interval": 1000, "export_hf": False},
            "weights": {"bucket_mb": 512},
        },
    }
    file = directory / "run.toml"
    file.write_text(_toml(config))
    subprocess.run([sys.executable, "-m", "services.cli.main", "up", "-c", str(file)], check=True, cwd=ROOT)
    summary = json.loads((directory / "run" / "summary.json").read_bytes())
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    summary["reward_by_step"] = [round(line["reward_mean"], 4) for line in lines]
    summary["mismatch_kl_by_step"] = [line["mismatch_kl"] for line in lines]
    del summary["processes"], summary["config"]
    return summary


def _toml(tree: dict[str, Any]) -> str:
    from services.common.config import Config, dump

    return dump(Config.model_validate(tree))


def record(directory: Path) -> dict[str, Any]:
    """Every token's claimed version against teacher forcing, across pushes in place."""
    from tests.gpu.independent_record import measure

    models = [build_qwen3(directory / f"model-{number}", seed=number) for number in range(3)]
    figures = {}
    for interval in (1, 8):
        log = directory / f"engine-{interval}.log"
        with running_engine(models[0], log, stream_interval=interval, max_running_requests=64) as (url, key):
            figures[f"stream_interval_{interval}"] = asyncio.run(measure(url, key, models))
    return figures


ROWS = {"record": record, "overhead": overhead, "services": services}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows that are there already are kept")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--work", type=Path, required=True, help="for models, logs and runs: some gigabytes")
    options = parser.parse_args()
    merged = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    failed = False
    for row in options.rows:
        directory = options.work / row
        directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            figures = ROWS[row](directory)
        except Exception as error:  # the other rows are still worth their time
            print(f"{row} failed: {error}", flush=True)
            failed = True
            continue
        merged[row] = {**figures, "wall_s": round(time.monotonic() - began, 1), "host": host()}
        options.out.write_text(json.dumps(merged, indent=2) + "\n")
        print(f"{row}: {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failed)


def host() -> dict[str, str]:
    import sglang
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sglang": sglang.__version__,
        "cpu_cores": str(os.cpu_count()),
    }


if __name__ == "__main__":
    main()
