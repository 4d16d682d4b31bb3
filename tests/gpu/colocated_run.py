"""A run of all four services with trainer and engine on one GPU."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from services.cli.demo.smollm2 import convert_file
from services.common.config import Config, dump
from tests.gpu.first_run import write_prompts
from tests.gpu.models import build_qwen3
from tests.gpu.rollout import ENGINE_ARGS, ROOT, engine_settings
from tests.kit.tiny_model import build_tiny_qwen3

# Of a run that is stuck, the figures of the steps before are lost with it.
LIMIT_S = 480.0


def train(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the run. `options`: steps, cpu, gguf."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    file = directory / "run.toml"
    file.write_text(dump(Config.model_validate(_config(directory, options))))
    command = [sys.executable, "-m", "services.cli.main", "up", "-c", str(file)]
    try:
        subprocess.run(command, check=True, cwd=ROOT, timeout=LIMIT_S)
    finally:
        for log in sorted((directory / "run" / "logs").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-8:]
            print(f"--- {log.name}", *(line[:400] for line in lines), sep="\n", flush=True)
    return _figures(directory / "run")


def _config(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    if options.cpu:
        model, dtype = build_tiny_qwen3(directory / "model"), "float32"
        engine: dict[str, Any] = {"context_length": 64, "stream_interval": 2, "decode_rate": 80.0}
        groups, length = 4, 24
    else:
        dtype, groups, length = "bfloat16", 16, 256
        engine = engine_settings(
            stream_interval=1,
            max_running_requests=128,
            context_length=1024,
            python=options.engine_python,
            args=ENGINE_ARGS | {"mem-fraction-static": 0.5},
        )
        if options.gguf is not None:
            model = directory / "model"
            convert_file(options.gguf, model)
        else:
            model = build_qwen3(directory / "model")
    chat = options.gguf is not None and not options.cpu
    prompts = directory / "prompts.jsonl"
    if chat:
        write_prompts(prompts, 4096)
    else:
        prompts.write_text("".join(json.dumps({"messages": f"{number}+{number}="}) + "\n" for number in range(4096)))
    data: dict[str, Any] = {"prompt_data": str(prompts), "input_key": "messages"}
    return {
        "run": {"name": "colocated", "dir": str(directory / "run"), "num_rollout": options.steps, "colocate": True},
        "model": {"hf_checkpoint": str(model), "dtype": dtype},
        "data": data | ({"label_key": "label", "apply_chat_template": True} if chat else {}),
        "batch": {"rollout_batch_size": groups, "n_samples_per_prompt": 8 if not options.cpu else 4},
        "staleness": {"max_staleness": 2},
        "rollout": {"sampling": {"max_response_len": length}, "engine": engine},
        "reward": {"scorer": "math" if chat else "tests.gpu.scorers:even_characters"},
        "plugins": {"paths": [str(ROOT)]},
        "trainer": {
            "device": "cpu" if options.cpu else "cuda",
            "max_tokens_per_gpu": 8192,
            "optimizer": {"lr": 1e-5},
            "checkpoint": {"save_interval": 1000, "export_hf": False},
            "weights": {"bucket_mb": 512},
        },
    }


def _figures(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_bytes())
    steps = _lines(run_dir / "metrics.jsonl")
    pushes = [line for line in _lines(run_dir / "pushes.jsonl") if line["ok"]]
    turns = [line for line in _lines(run_dir / "logs" / "rollout-0.log") if line.get("event") == "yielded"]
    resumed = [line for line in _lines(run_dir / "logs" / "rollout-0.log") if line.get("event") == "resumed"]
    tenth = max(1, len(steps) // 10)
    warm = steps[tenth:]
    seconds = warm[-1]["time"] - steps[tenth - 1]["time"]
    return {
        "steps": len(steps),
        "ledger_imbalance": summary["ledger_imbalance"],
        "samples_per_s": round(sum(line["samples"] for line in warm) / seconds, 1),
        "step_s": round(seconds / len(warm), 3),
        **{name: _median(line[name] for line in warm) for name in ("yield_s", "train_s", "publish_wait_s", "wait_s")},
        "drain_s": _median(line["drain_s"] for line in turns),
        "sleep_s": _median(line["sleep_s"] for line in turns),
        "wake_weights_s": _median(line["phases"]["wake_s"] for line in pushes),
        "push_after_wake_s": _median(line["seconds"] - line["phases"]["wake_s"] for line in pushes),
        "wake_kv_s": _median(line["wake_s"] for line in resumed),
        "samples_returned": sum(line["samples_returned"] for line in turns),
        "multi_span_samples": sum(line["multi_span_samples"] for line in steps),
        "mismatch_kl_max": max(line["mismatch_kl"] for line in steps),
        "mismatch_kl_fresh_max": max((line["mismatch_kl_fresh"] or 0.0 for line in steps), default=0.0),
        "reward_by_step": [round(line["reward_mean"], 4) for line in steps],
        "engine": summary["engine"],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(errors="replace").splitlines() if line.startswith("{")]


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)
