"""What `make learn` makes of a run's lines, and of runs."""

from tests.bench import learn
from tests.bench.learn_curves import draw


def lines(start, end, steps=60):
    rewards = [start + (end - start) * step / (steps - 1) for step in range(steps)]
    return [
        {"step": step, "reward_mean": reward, "staleness": {"0": 3, "4": 1}, "mismatch_kl": 0.5}
        for step, reward in enumerate(rewards, 1)
    ]


def test_a_run_has_its_gain_and_a_replayed_step_counts_once():
    replayed = {**lines(0.1, 0.7)[0], "step": 1, "reward_mean": -1.0}
    figures = learn.run_figures([replayed, *lines(0.1, 0.7)])
    assert figures["start"] < 0.25 < 0.55 < figures["end"]
    assert figures["gain"] == round(figures["end"] - figures["start"], 4)
    assert (figures["staleness_mean"], figures["mismatch_kl"], len(figures["reward"])) == (1.0, 0.5, 6)


def test_seeds_are_summed_up_and_drawn(tmp_path):
    ends = {0: 0.6, 1: 0.8, 2: 0.7}
    found = {"grpo": {seed: learn.run_figures(lines(0.1, end)) for seed, end in ends.items()}, "rloo": {}}
    rows = learn.summary(found)
    assert list(rows) == ["grpo"]
    assert rows["grpo"]["gain_min"] < rows["grpo"]["gain_mean"] < rows["grpo"]["gain_max"]
    assert "| grpo |" in learn.table(rows)
    draw(tmp_path / "curves.png", rows, {"algorithms": ["grpo", "rloo"], "asynchrony": []}, 10)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_every_variant_is_a_valid_configuration(tmp_path):
    for variant in learn.VARIANTS.values():
        learn.load(learn.config_file("demo.toml"), learn._settings(tmp_path, tmp_path / "run", 400, 0) | variant)
