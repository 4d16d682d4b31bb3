"""One run that is interrupted, resumed, told to stop and resumed again: it ends as planned."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from services.common.lifecycle import STOPPED_EARLY
from tests.kit.runs import Run, polyhead

ENDLESS = 5000
# Steps after the last interruption.
MORE = 8


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> list[str]:
    run_dir = tmp_path_factory.mktemp("train") / "run"
    # A few steps a second, so that the run is still going on when it has been asked for its status.
    slow = ("--rollout.engine.decode_rate", "40", "--rollout.max_inflight", "16")
    return [*flags, *slow, "--run-dir", str(run_dir)]


@pytest.fixture(scope="module")
def interrupted(command: list[str]) -> Run:
    """By Ctrl-C."""
    run = begun(command, ENDLESS)
    run.wait_for(lambda: run.step() >= 6, within_s=90)
    status = polyhead("status", str(run.dir))
    assert "ledger imbalance 0" in status.stdout, status.stderr
    assert "rollout-0" in status.stdout
    assert "engine-0" in status.stdout
    run.process.send_signal(signal.SIGINT)
    assert run.finish(within_s=60) == 128 + signal.SIGINT, run.tail()
    assert run.left_behind() == []
    return run


@pytest.fixture(scope="module")
def stopped(command: list[str], interrupted: Run) -> Run:
    """By the trainer, which was told to stop."""
    run = begun(command, ENDLESS)
    due = interrupted.step() + 4
    run.wait_for(lambda: run.step() >= due, within_s=90)
    trainer = run.victim("trainer")
    assert trainer is not None
    trainer.terminate()
    assert run.finish(within_s=60) == STOPPED_EARLY, run.tail()
    assert run.left_behind() == []
    return run


@pytest.fixture(scope="module")
def ended(command: list[str], stopped: Run) -> Run:
    """After some more steps."""
    run = begun(command, stopped.step() + MORE)
    assert run.finish(within_s=120) == 0, run.tail()
    return run


def begun(command: list[str], steps: int) -> Run:
    return Run(Path(command[-1]), *command, "--num-rollout", str(steps))


@pytest.mark.timeout(180)
def test_an_interrupted_run_says_how_to_go_on(command, interrupted):
    assert "no launcher is running" in polyhead("down", str(interrupted.dir)).stderr
    assert "was begun with 4, not 8" in polyhead(*command, "--n-samples-per-prompt", "8").stderr


@pytest.mark.timeout(180)
def test_a_trainer_that_is_told_to_stop_ends_the_run_unfinished(stopped):
    assert not (stopped.dir / "summary.json").exists()
    assert list((stopped.dir / "checkpoints").glob("step_*"))


@pytest.mark.timeout(240)
def test_a_resumed_run_repeats_and_skips_no_prompt(ended):
    lines = ended.steps()
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)), "an orderly stop repeats no step"
    ordinals = [ordinal for line in lines for ordinal in line["prompt_ordinals"]]
    assert len(ordinals) == len(set(ordinals)) == 4 * len(steps)
    # Nothing is filtered here, so what was not trained is still in the works: no prompt was passed over.
    ledger = ended.summary()["ledger"]
    assert ledger["accepted"] // 4 >= max(ordinals) + 1
    assert sum(ledger["dropped"].values()) == ledger["dead"] == 0


def test_it_pushes_after_each_step_and_both_sides_agree_on_log_probs(ended):
    assert all(line["mismatch_kl"] < 1e-3 for line in ended.steps())
    summary = ended.summary()
    pushed = {line["version"] for line in ended.lines("pushes") if line["ok"]}
    assert len(pushed) >= len(ended.steps()) + 3, "each start and each step"
    assert summary["requests_aborted"] == 0
    assert summary["engine"].pop("name").startswith("torch_engine/")
    assert summary["engine"] == {"engines": 1, "replicas": 1, "router": False}
    assert summary["ledger_imbalance"] == 0


def test_it_leaves_its_results_and_no_process(ended):
    for name in ("config.toml", "metrics.jsonl", "report.html", "curve.png", "hf/config.json", "logs/trainer-0.log"):
        assert (ended.dir / name).exists(), name
    assert ended.left_behind() == []
