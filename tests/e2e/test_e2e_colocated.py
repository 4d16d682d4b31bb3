"""Colocated mode: engines and trainer in turn. The trainer is killed in the middle of one of its turns."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from services.common.shared_directory import shared_directory
from tests.kit.runs import Run, surviving

STEPS = 14
KILLED_FROM = 4
# Longer than a turn of the engines: each batch is ready while others are still being generated.
PACED = ("--rollout.engine.decode_rate", "60", "--rollout.max_inflight", "16", "--rollout-max-response-len", "24")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[Run, int]:
    """The finished run, and the epoch of the trainer that was killed while it had the GPUs."""
    run_dir = tmp_path_factory.mktemp("colocated") / "run"
    slime = ("--colocate", "--offload-train", "--offload-rollout")
    run = Run(run_dir, *flags, *PACED, *slime, "--num-rollout", str(STEPS), "--run-dir", str(run_dir))
    run.wait_for(lambda: run.step() >= KILLED_FROM, within_s=120)
    while not kill_in_its_turn(run):
        due = run.step() + 1
        run.wait_for(lambda due=due: run.step() >= due, within_s=90)
    epoch = logged(run, "rollout-0", "yielded")[-1]["epoch"]
    assert run.finish(within_s=150) == 0, run.tail()
    return run, epoch


def kill_in_its_turn(run: Run) -> bool:
    """False when the turn was over before the trainer was dead."""
    trainer = run.victim("trainer")
    assert trainer is not None
    log = run.dir / "logs" / "trainer-0.log"
    taken = log.read_text().count('"gpus_taken"')
    deadline = time.monotonic() + 30
    while log.read_text().count('"gpus_taken"') == taken:
        assert time.monotonic() < deadline, run.tail()
        time.sleep(0.002)
    trainer.kill()
    return len(logged(run, "rollout-0", "yielded")) > len(logged(run, "rollout-0", "resumed"))


def logged(run: Run, name: str, event: str) -> list[dict[str, Any]]:
    text = (run.dir / "logs" / f"{name}.log").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.timeout(400)
def test_each_step_is_a_turn_of_the_trainer(killed):
    run, _ = killed
    assert sorted(surviving(run.steps())) == list(range(1, STEPS + 1))
    assert all(line["yield_s"] > 0 for line in run.steps())
    turns = logged(run, "rollout-0", "yielded")
    assert len(turns) >= STEPS
    assert sum(turn["samples_returned"] for turn in turns) > 0, "samples in flight are given back"
    pushes = [push for push in run.lines("pushes") if push["ok"]]
    assert len(pushes) >= STEPS
    assert all(push["phases"]["wake_s"] > 0 for push in pushes)
    assert logged(run, "rollout-0", "joined_weight_group")[0]["backend"] == "ipc"


def test_samples_that_were_given_back_are_resumed_with_their_log_probs(killed):
    # Each began under one version, and went on with the KV of the next.
    run, _ = killed
    assert sum(line["multi_span_samples"] for line in run.steps()) > 0
    assert max(line["staleness_max"] for line in run.steps()) >= 1
    assert all(line["mismatch_kl"] < 1e-3 for line in run.steps())


def test_the_turn_of_a_killed_trainer_is_followed_by_that_of_the_next_one(killed):
    run, epoch = killed
    yielded = [line for line in logged(run, "rollout-0", "yielded") if line["epoch"] == epoch]
    last = max(line["timestamp"] for line in yielded)
    resumed = logged(run, "rollout-0", "resumed")
    assert not [line for line in resumed if line["epoch"] == epoch and line["timestamp"] > last]
    assert resumed[-1]["epoch"] > epoch


def test_nothing_is_lost_and_nothing_left(killed):
    run, _ = killed
    summary = run.summary()
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == 16 * STEPS
    assert run.left_behind() == []
    assert not shared_directory(run.dir).exists()
