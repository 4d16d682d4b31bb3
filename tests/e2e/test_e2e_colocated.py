"""Colocated mode: engines and trainer in turn, and a trainer that is killed in the middle of its turn."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from services.common.shared_directory import shared_directory
from tests.kit.runs import Run

STEPS = 8
# Longer than a turn of the engines: each batch is ready while others are still being generated.
PACED = ("--rollout.engine.decode_rate", "60", "--rollout.max_inflight", "16", "--rollout-max-response-len", "24")


def colocated(run_dir: Path, flags: list[str], steps: int) -> Run:
    slime = ("--colocate", "--offload-train", "--offload-rollout")
    return Run(run_dir, *flags, *PACED, *slime, "--num-rollout", str(steps), "--run-dir", str(run_dir))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Run:
    run = colocated(tmp_path_factory.mktemp("colocated") / "run", flags, STEPS)
    assert run.finish(within_s=120) == 0, run.tail()
    return run


def logged(run: Run, name: str, event: str) -> list[dict[str, Any]]:
    text = (run.dir / "logs" / f"{name}.log").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.timeout(180)
def test_each_step_is_a_turn_of_the_trainer(ended):
    assert [line["step"] for line in ended.steps()] == list(range(1, STEPS + 1))
    assert all(line["yield_s"] > 0 for line in ended.steps())
    turns = logged(ended, "rollout-0", "yielded")
    assert len(turns) == len(logged(ended, "rollout-0", "resumed")) >= STEPS
    assert sum(turn["samples_returned"] for turn in turns) > 0, "samples in flight are given back"
    pushes = ended.lines("pushes")
    assert all(push["ok"] and push["phases"]["wake_s"] > 0 for push in pushes)
    assert logged(ended, "rollout-0", "joined_weight_group")[0]["backend"] == "ipc"


def test_samples_that_were_given_back_are_resumed_with_their_log_probs(ended):
    # Each began under one version, and went on with the KV of the next.
    assert sum(line["multi_span_samples"] for line in ended.steps()) > 0
    assert max(line["staleness_max"] for line in ended.steps()) >= 1
    assert all(line["mismatch_kl"] < 1e-3 for line in ended.steps())


def test_nothing_is_lost_and_nothing_left(ended):
    summary = ended.summary()
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == 16 * STEPS
    assert ended.left_behind() == []
    assert not shared_directory(ended.dir).exists()


@pytest.mark.timeout(240)
def test_a_trainer_killed_in_its_turn_is_followed_by_the_next_one(tmp_path, flags):
    run = colocated(tmp_path / "run", flags, 14)
    run.wait_for(lambda: run.step() >= 4, within_s=120)
    log = run.dir / "logs" / "trainer-0.log"
    while True:
        trainer = run.victim("trainer")
        assert trainer is not None
        taken = log.read_text().count('"gpus_taken"')
        deadline = time.monotonic() + 30
        while log.read_text().count('"gpus_taken"') == taken:
            assert time.monotonic() < deadline, run.tail()
            time.sleep(0.002)
        trainer.kill()
        if len(logged(run, "rollout-0", "yielded")) > len(logged(run, "rollout-0", "resumed")):
            break
        due = run.step() + 1
        run.wait_for(lambda due=due: run.step() >= due, within_s=90)
    epoch = logged(run, "rollout-0", "yielded")[-1]["epoch"]
    assert run.finish(within_s=150) == 0, run.tail()
    after = logged(run, "rollout-0", "resumed")
    assert not [line for line in after if line["epoch"] == epoch and line["timestamp"] > _last(run, epoch)]
    assert after[-1]["epoch"] > epoch
    assert run.step() == 14
    assert run.summary()["ledger_imbalance"] == 0


def _last(run: Run, epoch: int) -> str:
    """When the replica yielded to this epoch for the last time."""
    return max(line["timestamp"] for line in logged(run, "rollout-0", "yielded") if line["epoch"] == epoch)
