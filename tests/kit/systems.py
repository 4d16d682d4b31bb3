"""A small system for tests that need a whole run: a tiny random model, sums to do, and its command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kit.tiny_model import build_tiny_qwen3


def small_inputs(directory: Path) -> Path:
    """`directory` with a model and a prompt file."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tiny_qwen3(directory / "model")
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(1, 10) for b in range(1, 10)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def small_flags(inputs: Path) -> list[str]:
    """`polyhead train` with 4 groups of 4 a step, up to 16 tokens each, so that kills find work in flight."""
    return [
        "train",
        *("--hf-checkpoint", str(inputs / "model"), "--prompt-data", str(inputs / "prompts.jsonl")),
        *("--input-key", "prompt", "--label-key", "label", "--rm-type", "exact"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "16"),
        *("--rollout.engine.context_length", "64", "--rollout.engine.stream_interval", "2"),
        *("--rollout.save_interval_s", "0.05", "--buffer.lease_ttl_s", "3"),
        *("--lr", "1e-5"),
    ]


def small_train(directory: Path) -> list[str]:
    """For ``directory/run``: goes on until it is stopped, and saves often. `small_inputs` made ``../inputs``."""
    run_dir = directory / "run"
    # Paced, so that an engine is in the middle of samples whenever it is struck.
    paced = ("--rollout.engine.decode_rate", "30", "--rollout.max_inflight", "32", "--buffer.replica_ttl_s", "4")
    ends = ("--num-rollout", "100000", "--save-interval", "5", "--run-dir", str(run_dir))
    # Struck again and again, and back at once.
    ends += ("--run.stable_after_s", "4")
    return [*small_flags(directory.parent / "inputs"), *paced, *ends]
