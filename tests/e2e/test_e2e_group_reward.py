"""A run whose rewards are given to whole groups, by slime's flags, over the real store, with a kill of the scorer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.runs import Run

STEPS = 12
KILL_AT = 3
REWARD = """
async def ranks(args, samples, **kwargs):
    assert [sample.index % args.n_samples_per_prompt for sample in samples] == list(range(len(samples))), "not whole"
    assert len(samples) == args.n_samples_per_prompt == 4, "not whole"
    return [{"score": sample.index % 4, "group": sample.group_index} for sample in samples]

def halved(args, sample, reward):
    return reward / 2
"""


@pytest.mark.long
@pytest.mark.timeout(180)
def test_groups_are_scored_as_a_whole_though_the_reward_service_is_killed(tmp_path: Path, flags: list[str]):
    (tmp_path / "group_reward.py").write_text(REWARD)
    run_dir = tmp_path / "run"
    run = Run(
        run_dir,
        *flags,
        *("--custom-rm-path", "group_reward:ranks", "--group-rm", "--plugins.paths", json.dumps([str(tmp_path)])),
        *("--reward.shaping", "group_reward:halved", "--reward.max_inflight", "2"),
        *("--num-rollout", str(STEPS), "--run-dir", str(run_dir)),
    )
    run.wait_for(lambda: run.step() >= KILL_AT, within_s=90)
    victim = run.victim("reward")
    assert victim is not None
    victim.kill()
    assert run.finish(within_s=120) == 0, run.tail()
    summary = run.summary()
    assert (summary["ledger_imbalance"], summary["ledger"]["dead"]) == (0, 0)
    assert sum(summary["ledger"]["dropped"].values()) == 0
    assert [line["step"] for line in run.steps()] == list(range(1, STEPS + 1))
    # 0, 0.5, 1 and 1.5 in each group, and in no other way.
    assert {line["reward_mean"] for line in run.steps()} == {0.75}
    assert run.left_behind() == []
