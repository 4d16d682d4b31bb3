from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.tiny_model import build_tiny_qwen3


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model and a prompt file."""
    directory = tmp_path_factory.mktemp("inputs")
    build_tiny_qwen3(directory / "model")
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(1, 10) for b in range(1, 10)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="session")
def flags(inputs: Path) -> list[str]:
    """A small `polyhead train`: 4 groups of 4 a step, up to 16 tokens each, so that kills find work in flight."""
    return [
        "train",
        *("--hf-checkpoint", str(inputs / "model"), "--prompt-data", str(inputs / "prompts.jsonl")),
        *("--input-key", "prompt", "--label-key", "label", "--rm-type", "exact"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "16"),
        *("--rollout.engine.context_length", "64", "--rollout.engine.stream_interval", "2"),
        *("--rollout.save_interval_s", "0.05", "--buffer.lease_ttl_s", "3"),
        *("--lr", "1e-5"),
    ]
