"""Runs that end as planned, and runs that are interrupted."""

from __future__ import annotations

import signal

import pytest

from services.common.lifecycle import STOPPED_EARLY
from tests.kit.runs import Run, polyhead, surviving


@pytest.mark.timeout(180)
def test_train_pushes_after_each_step_and_both_sides_agree_on_log_probs(tmp_path, flags):
    run = Run(tmp_path / "run", *flags, "--num-rollout", "3", "--run-dir", str(tmp_path / "run"))
    assert run.finish(within_s=120) == 0, run.tail()
    lines = surviving(run.steps())
    assert sorted(lines) == [1, 2, 3]
    assert all(line["mismatch_kl"] < 1e-3 for line in lines.values())
    summary = run.summary()
    assert summary["weight_pushes"] >= 4, "the start and each step"
    assert summary["requests_aborted"] == 0
    assert summary["engine"].pop("name").startswith("torch_engine/")
    assert summary["engine"] == {"engines": 1, "replicas": 1, "router": False}
    assert summary["ledger_imbalance"] == 0
    for name in ("config.toml", "metrics.jsonl", "report.html", "curve.png", "hf/config.json", "logs/trainer-0.log"):
        assert (run.dir / name).exists(), name
    assert run.left_behind() == []


@pytest.mark.timeout(240)
def test_an_interrupted_run_resumes_without_repeating_or_skipping_a_prompt(tmp_path, flags):
    # A few steps a second, so that the run is still going on when it has been asked for its status.
    slow = ("--rollout.engine.decode_rate", "40", "--rollout.max_inflight", "16")
    command = [*flags, *slow, "--num-rollout", "24", "--run-dir", str(tmp_path / "run")]
    first = Run(tmp_path / "run", *command)
    first.wait_for(lambda: first.step() >= 8, within_s=90)
    status = polyhead("status", str(first.dir))
    assert "ledger imbalance 0" in status.stdout, status.stderr
    assert "rollout-0" in status.stdout
    assert "engine-0" in status.stdout
    first.process.send_signal(signal.SIGINT)
    assert first.finish(within_s=60) == 128 + signal.SIGINT, first.tail()
    assert first.left_behind() == []
    reached = first.step()
    assert reached < 24

    assert "no launcher is running" in polyhead("down", str(first.dir)).stderr
    assert "was begun with 4, not 8" in polyhead(*command, "--n-samples-per-prompt", "8").stderr

    second = Run(tmp_path / "run", *command)
    assert second.finish(within_s=120) == 0, second.tail()
    lines = second.steps()
    assert [line["step"] for line in lines] == list(range(1, 25)), "an orderly stop repeats no step"
    ordinals = [ordinal for line in lines for ordinal in line["prompt_ordinals"]]
    assert len(ordinals) == len(set(ordinals)) == 4 * 24
    # Nothing is filtered here, so what was not trained is still in the works: no prompt was passed over.
    ledger = second.summary()["ledger"]
    assert ledger["accepted"] // 4 >= max(ordinals) + 1
    assert sum(ledger["dropped"].values()) == ledger["dead"] == 0
    assert second.left_behind() == []


@pytest.mark.timeout(240)
def test_a_trainer_that_is_told_to_stop_ends_the_run_unfinished(tmp_path, flags):
    run = Run(tmp_path / "run", *flags, "--num-rollout", "5000", "--run-dir", str(tmp_path / "run"))
    run.wait_for(lambda: run.step() >= 3, within_s=90)
    trainer = run.victim("trainer")
    assert trainer is not None
    trainer.terminate()
    assert run.finish(within_s=60) == STOPPED_EARLY, run.tail()
    assert not (run.dir / "summary.json").exists()
    assert list((run.dir / "checkpoints").glob("step_*"))
    assert run.left_behind() == []
