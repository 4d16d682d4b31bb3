"""One run in which every role is killed in turn. It ends as if nothing had happened."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.kit.runs import Run, surviving

VICTIMS = ("rollout", "engine", "reward", "buffer", "store", "trainer")
STEPS = 180
# Steps between two kills.
APART = 20


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[Run, dict[str, int]]:
    """The finished run, and the step at which each victim was killed."""
    run_dir = tmp_path_factory.mktemp("kill") / "run"
    run = Run(run_dir, *flags, "--num-rollout", str(STEPS), "--run-dir", str(run_dir), "--save-interval", "40")
    killed_at = {}
    for number, role in enumerate(VICTIMS):
        run.wait_for(lambda due=5 + APART * number: run.step() >= due, within_s=90)
        run.wait_for(lambda role=role: run.victim(role) is not None, within_s=30)
        victim = run.victim(role)
        assert victim is not None
        victim.kill()
        killed_at[role] = run.step()
    assert run.finish(within_s=120) == 0, run.tail()
    return run, killed_at


@pytest.mark.timeout(400)
@pytest.mark.parametrize("role", VICTIMS)
def test_a_killed_role_comes_back_and_training_goes_on(killed, role):
    run, killed_at = killed
    assert len(run.summary()["processes"][role]) >= 2
    assert max(surviving(run.steps())) >= killed_at[role] + APART


def test_every_step_is_trained_once_in_the_surviving_history(killed):
    run, _ = killed
    assert sorted(surviving(run.steps())) == list(range(1, STEPS + 1))


def test_no_sample_is_committed_twice(killed):
    run, _ = killed
    trained = [group for line in surviving(run.steps()).values() for group in line["group_ids"]]
    assert len(trained) == len(set(trained)) == 4 * STEPS


def test_a_replayed_step_trains_the_batch_it_had(killed):
    run, _ = killed
    by_step = itertools.groupby(sorted(run.steps(), key=lambda line: line["step"]), key=lambda line: line["step"])
    replayed = {step: lines for step, lines in ((step, list(group)) for step, group in by_step) if len(lines) > 1}
    assert replayed, "the trainer was killed between two checkpoints"
    for lines in replayed.values():
        assert all(line["group_ids"] == lines[0]["group_ids"] for line in lines)


def test_the_ledger_balances(killed):
    run, _ = killed
    summary = run.summary()
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == 16 * STEPS
    assert summary["ledger"]["dead"] == 0


def test_staleness_stays_within_the_bound(killed):
    run, _ = killed
    assert run.summary()["max_staleness"] <= 4


def test_no_process_is_left(killed):
    run, _ = killed
    assert run.left_behind() == []


def test_the_exported_model_loads(killed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = killed
    exported: Path = run.dir / "hf"
    assert AutoModelForCausalLM.from_pretrained(exported).config.model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(exported)("1+1=").input_ids
