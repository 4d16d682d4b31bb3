"""A Hugging Face reward model in real SGLang: its rewards are transformers' logits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForSequenceClassification

from services.common import wire
from services.reward.jobs import Job
from tests.kit.engine_process import ADMIN_KEY, start_sglang
from tests.kit.reward_items import item
from tests.kit.reward_servers import remote
from tests.kit.runs import Run
from tests.kit.systems import small_flags, small_inputs
from tests.kit.tiny_model import build_tiny_reward_model

pytestmark = [
    pytest.mark.skipif(not os.environ.get("POLYHEAD_SGLANG"), reason="make conformance"),
    pytest.mark.timeout(800),
]

COMPLETIONS = ["4", "What is it?", "a longer answer, of some length, with\ntwo lines", "0" * 150]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny_reward_model(tmp_path_factory.mktemp("reward-model"))
    # Without one, SGLang adds a random bias (docs/rewards_remote.md).
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, "score.bias": torch.zeros(1)}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with start_sglang(model, context_length=512, flags=("--is-embedding",)) as engine:
        yield engine.url


@pytest.mark.parametrize("kind", ["tokens", "text"])
async def test_rewards_of_sglang_are_those_of_transformers(model: Path, url: str, kind: str) -> None:
    reference = Qwen3ForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rewards: dict[str, Any] = {}

    def job(completion: str) -> Job:
        ids = wire.encode_tokens(tokenizer(f"What?{completion}").input_ids) if kind == "tokens" else b""
        # Only the token ids say what it is.
        text = "" if kind == "tokens" else completion
        each = item(text, sample_id=completion, token_ids=ids)
        return Job(each, lambda result: rewards.setdefault(completion, result))

    async with remote("classify", url, token=ADMIN_KEY, timeout_s=60, classify={"input": kind}) as station:
        station.submit([job(each) for each in COMPLETIONS])
        # Without token ids it goes as text.
        await station.score([item("the end")])
    wanted = {}
    with torch.no_grad():
        for each in COMPLETIONS:
            wanted[each] = reference(**tokenizer(f"What?{each}", return_tensors="pt")).logits.item()
    assert max(wanted.values()) - min(wanted.values()) > 0.1
    assert {each: result.verdict.reward for each, result in rewards.items()} == pytest.approx(wanted, abs=1e-4, rel=0)


def test_a_run_has_its_rewards_from_sglang(url: str, tmp_path: Path) -> None:
    remote_flags = {"kind": "classify", "urls": url, "timeout_s": "60"}
    command = [
        *small_flags(small_inputs(tmp_path / "inputs")),
        *("--reward.scorer", "remote", "--num-rollout", "4", "--run-dir", str(tmp_path / "run")),
        *(part for key, value in remote_flags.items() for part in (f"--reward.remote.{key}", value)),
    ]
    run = Run(tmp_path / "run", *command, environment={"POLYHEAD_REWARD__REMOTE__TOKEN": ADMIN_KEY})
    assert run.finish(within_s=200) == 0, run.tail()
    summary = run.summary()
    assert (summary["ledger_imbalance"], summary["ledger"]["dead"]) == (0, 0)
    assert len({line["reward_mean"] for line in run.steps()}) == 4
    assert ADMIN_KEY not in (run.dir / "config.toml").read_text()


def test_a_run_starts_its_reward_model_and_starts_it_again(model: Path, tmp_path: Path) -> None:
    engine = {"model": str(model), "dtype": "float32", "args.context-length": "512", "args.max-total-tokens": "8192"}
    command = [
        *small_flags(small_inputs(tmp_path / "inputs")),
        *("--reward.scorer", "remote", "--reward.remote.kind", "classify", "--reward.remote.timeout_s", "60"),
        *(part for key, value in engine.items() for part in (f"--reward.engine.{key}", value)),
        *("--num-rollout", "40", "--run-dir", str(tmp_path / "run")),
    ]
    run = Run(tmp_path / "run", *command)
    run.wait_for(lambda: run.step() >= 3, within_s=300)
    [victim] = [each for each in run.look() if each.ppid() == run.process.pid and "--is-embedding" in each.cmdline()]
    assert not any("--api-key" in part for part in victim.cmdline())
    victim.kill()
    assert run.finish(within_s=400) == 0, run.tail()
    summary = run.summary()
    assert (summary["ledger_imbalance"], summary["ledger"]["dead"]) == (0, 0)
    assert len(summary["processes"]["reward-engine"]) == 2
    assert [line["step"] for line in run.steps()] == list(range(1, 41))
    assert len({line["reward_mean"] for line in run.steps()}) > 30
    assert run.left_behind() == []
