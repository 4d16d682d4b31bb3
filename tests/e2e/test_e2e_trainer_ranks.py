"""A run whose trainer has two ranks, one of which is killed: both start again, and the run completes."""

from __future__ import annotations

import pytest

from tests.kit.runs import Run, surviving

pytestmark = pytest.mark.long

STEPS = 30
KILLED_AT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags):
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    run = Run(
        run_dir,
        *flags,
        *("--actor-num-nodes", "1", "--actor-num-gpus-per-node", "2"),
        *("--num-rollout", str(STEPS), "--save-interval", "5", "--run-dir", str(run_dir)),
    )
    run.wait_for(lambda: run.step() >= KILLED_AT, within_s=240)
    (second,) = [one for one in run.processes("trainer") if one.cmdline()[0].startswith("polyhead-trainer-1")]
    second.kill()
    assert run.finish(within_s=240) == 0, run.tail()
    return run


@pytest.mark.timeout(600)
def test_the_group_starts_again_as_one_and_the_run_completes(run):
    summary = run.summary()
    assert len(summary["processes"]["trainer"]) == 4
    assert sorted(surviving(run.steps())) == list(range(1, STEPS + 1))
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == 16 * STEPS
    assert run.left_behind() == []


def test_the_rank_that_was_left_says_so_in_a_line(run):
    logged = (run.dir / "logs" / "trainer-0.log").read_text()
    assert "polyhead trainer: trainer.ranks: rank 0 of 2 lost another one: " in logged
    assert logged.count("epoch_begins") == 2


def test_every_version_is_pushed(run):
    pushed = {push["version"] for push in run.lines("pushes") if push["ok"]}
    assert {f"e1.s{step}" for step in range(KILLED_AT - 2)} <= pushed
    assert f"e2.s{STEPS}" in pushed


def test_the_exported_model_loads(run):
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(run.dir / "hf").config.model_type == "qwen3"
