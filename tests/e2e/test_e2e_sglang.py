"""The demo over real SGLang: one engine; and two behind sglang-router, one of them and the router killed on the way."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import psutil
import pytest

from tests.kit.runs import Run, surviving

pytestmark = [
    pytest.mark.skipif(not os.environ.get("POLYHEAD_SGLANG"), reason="make test-long"),
    pytest.mark.long,
]

# By the number of engines. The engine first: SGLang needs half of the run to start again.
STEPS = {1: 120, 2: 200}
KILLS = {1: {}, 2: {"engine-0": 10, "router": 30}}


@pytest.fixture(scope="module", params=STEPS, ids=["one", "two"])
def engines(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, engines: int) -> Run:
    """The finished run."""
    run_dir: Path = tmp_path_factory.mktemp("sglang") / "run"
    overrides = {
        "run.dir": run_dir,
        "run.num_rollout": STEPS[engines],
        "rollout.engine.kind": "sglang",
        "rollout.engines": engines,
        # One batch in the works keeps the samples young, and the learning steady.
        "rollout.max_inflight": 64,
        "rollout.save_interval_s": 0.2,
        "trainer.optimizer.lr": 5e-4,
    }
    run = Run(run_dir, "demo", *(part for key, value in overrides.items() for part in (f"--{key}", str(value))))
    for name, step in KILLS[engines].items():
        run.wait_for(lambda step=step: run.step() >= step, within_s=500)
        psutil.Process(run.child(name)).kill()
    assert run.finish(within_s=500) == 0, run.tail()
    return run


@pytest.mark.timeout(700)
def test_sglang_learns(run):
    rewards = [line["reward_mean"] for _, line in sorted(surviving(run.steps()).items())]
    assert statistics.fmean(rewards[-20:]) >= statistics.fmean(rewards[:20]) + 0.15


def test_the_summary_names_sglang_and_its_version(run, engines):
    engine = run.summary()["engine"]
    assert engine["name"].startswith("sglang/0.5.")
    assert (engine["engines"], engine["router"]) == (engines, engines > 1)


def test_nothing_is_lost_with_sglang(run, engines):
    summary = run.summary()
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert sum(summary["ledger"]["dropped"].values()) == 0
    assert sorted(surviving(run.steps())) == list(range(1, STEPS[engines] + 1))
    assert summary["requests_aborted"] == 0


def test_both_sides_agree_on_the_log_probs_of_sglang(run):
    assert run.summary()["mismatch_kl_fresh"] < 1e-3
    assert run.summary()["max_staleness"] <= 4


def test_what_was_killed_of_sglang_came_back(run, engines):
    processes = run.summary()["processes"]
    assert all(len(processes[name]) == 2 for name in KILLS[engines])
    assert run.left_behind() == []
