"""The whole system on two GPUs: GRPO on SmolLM2-135M-Instruct, asynchronous and synchronous, for docs/benchmarks.

The trainer has the first GPU and SGLang the second; weights go over NCCL. `python -m tests.gpu.first_run --gguf FILE
--work DIR --out first-run.json`. All modes train the same prompts with the same settings; `max_staleness` differs, and
in what form the engine has the weights: bf16 or block-wise fp8 (block_model.py).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.cli.demo.smollm2 import convert_file
from services.common.config import Config, dump
from tests.gpu.block_model import write_fp8
from tests.gpu.rollout import ENGINE_ARGS, ROOT, engine_settings, host

FP8 = "fp8"
# max_staleness.
MODES = {"async": 4, "sync": 0, f"{FP8}-async": 4, f"{FP8}-sync": 0}
GROUPS, GROUP_SIZE, LENGTH = 32, 8, 256


def train(directory: Path, model: Path, prompts: Path, max_staleness: int, steps: int) -> dict[str, Any]:
    """One run of all four services. Its summary, and its curves by step."""
    engine = engine_settings(
        base_gpu=1,
        stream_interval=1,
        context_length=1024,
        args=ENGINE_ARGS | {"mem-fraction-static": 0.6, "fp8-gemm-backend": "triton"},
    )
    config = {
        "run": {"name": "first", "dir": str(directory), "num_rollout": steps},
        "model": {"hf_checkpoint": str(model), "dtype": "bfloat16"},
        "data": {
            "prompt_data": str(prompts),
            "input_key": "messages",
            "label_key": "label",
            "apply_chat_template": True,
        },
        "batch": {"rollout_batch_size": GROUPS, "n_samples_per_prompt": GROUP_SIZE},
        "staleness": {"max_staleness": max_staleness},
        "rollout": {"sampling": {"max_response_len": LENGTH}, "engine": engine},
        "reward": {"scorer": "math", "processes": 4},
        "trainer": {
            "device": "cuda",
            "max_tokens_per_gpu": 16384,
            "optimizer": {"lr": 1e-5, "beta2": 0.98},
            "checkpoint": {"save_interval": 1000, "export_hf": False},
            "weights": {"backend": "nccl"},
        },
    }
    file = directory.with_suffix(".toml")
    file.write_text(dump(Config.model_validate(config)))
    subprocess.run([sys.executable, "-m", "services.cli.main", "up", "-c", str(file)], check=True, cwd=ROOT)
    summary = json.loads((directory / "summary.json").read_bytes())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return figures(summary, lines)


def figures(summary: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run: `samples_per_s` and `step_s` leave out the first tenth, in which kernels are compiled."""
    tenth = max(1, len(lines) // 10)
    warm = lines[tenth:]
    seconds = warm[-1]["time"] - lines[tenth - 1]["time"]
    lengths: Counter[str] = Counter()
    for line in lines:
        lengths.update(line["completion_lengths"])
    return {
        "reward_first_tenth": mean(line["reward_mean"] for line in lines[:tenth]),
        "reward_last_tenth": mean(line["reward_mean"] for line in lines[-tenth:]),
        "samples_per_s": round(sum(line["samples"] for line in warm) / seconds, 1),
        "trained_tokens_per_s": round(sum(line["completion_tokens"] for line in warm) / seconds, 1),
        "step_s": round(seconds / len(warm), 3),
        "trainer_busy": round(sum(line["train_s"] for line in warm) / seconds, 4),
        "mismatch_kl_fresh_max": max((line["mismatch_kl_fresh"] or 0.0 for line in lines), default=0.0),
        "trained_lengths": {bound: lengths[bound] for bound in sorted(lengths, key=int)},
        "curves": {
            name: [round(line[name], 8) if line[name] is not None else None for line in lines]
            for name in (
                "reward_mean",
                "mismatch_kl",
                "mismatch_kl_fresh",
                "mean_completion_length",
                "train_s",
                "wait_s",
            )
        },
        "summary": {key: value for key, value in summary.items() if key not in ("processes", "config")},
    }


def draw(path: Path, rows: Mapping[str, Any]) -> None:
    """The curves of all modes by step."""
    from matplotlib import pyplot as plt

    names = ("reward_mean", "mismatch_kl", "mean_completion_length")
    figure, axes = plt.subplots(1, len(names), figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for mode in (mode for mode in MODES if mode in rows):
            curve = rows[mode]["curves"][name]
            axis.plot(range(1, len(curve) + 1), curve, label=mode, linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 4)


def write_prompts(path: Path, count: int = 20_000) -> Path:
    """Sums and differences of two numbers below 100, in words."""
    rng = random.Random(0)
    asked = {"+": "plus", "-": "minus"}
    with path.open("w") as file:
        for _ in range(count):
            a, b, sign = rng.randint(1, 99), rng.randint(1, 99), rng.choice("+-")
            text = f"What is {a} {asked[sign]} {b}? Give only the number."
            label = a + b if sign == "+" else a - b
            file.write(json.dumps({"messages": [{"role": "user", "content": text}], "label": str(label)}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the other mode's figures are kept")
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["async", "sync"])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / "model"
    convert_file(options.gguf, model)
    fp8_model = write_fp8(model, options.work / "model-fp8")
    prompts = write_prompts(options.work / "prompts.jsonl")
    merged = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    for mode in options.modes:
        began = time.monotonic()
        directory = options.work / mode
        shutil.rmtree(directory, ignore_errors=True)
        row = train(directory, fp8_model if mode.startswith(FP8) else model, prompts, MODES[mode], options.steps)
        merged[mode] = {**row, "wall_s": round(time.monotonic() - began, 1), "host": host()}
        options.out.write_text(json.dumps(merged) + "\n")
        print(f"{mode}: {time.monotonic() - began:.0f} s, {row['samples_per_s']} samples/s", flush=True)
    if find_spec("matplotlib") is not None:
        draw(options.out.with_suffix(".png"), merged)


if __name__ == "__main__":
    main()
