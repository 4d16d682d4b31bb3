"""Several scorers, weighted: the sum, its parts, and that one without a score leaves none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.common.config import Config, dump, load
from services.common.config.models import RewardConfig
from services.common.errors import ConfigError
from services.reward.jobs import FailureKind
from services.reward.scorers import build_weighted
from services.reward.scorers.base import SampleError
from services.reward.scorers.builtin import Options
from services.reward.settings import scorer_settings
from tests.kit.reward_items import BY_ORDER, KIT, item, running_pool

OPTIONS = Options()


def weighted(**weights: float) -> Any:
    return build_weighted(weights, paths=[KIT], args={}, options=OPTIONS)


def test_the_sum_and_its_parts() -> None:
    scorer = build_weighted({"exact": 0.5, "f1": 2.0, BY_ORDER: -0.25}, paths=[KIT], args={}, options=OPTIONS)
    verdict = scorer(item("dict", label="dict 7"))
    assert verdict.reward == pytest.approx(0.5 * 0 + 2.0 * (2 / 3) - 0.25 * 0.5)
    assert verdict.parts == {
        "exact": 0.0,
        "f1": pytest.approx(2 / 3),
        "f1.precision": 1.0,
        "f1.recall": 0.5,
        BY_ORDER: 0.5,
        f"{BY_ORDER}.acc": 1.0,
        f"{BY_ORDER}.length": 3.0,
    }


def test_one_without_a_score_leaves_none() -> None:
    with pytest.raises(SampleError, match=r"^dapo: "):
        weighted(exact=1.0, dapo=1.0)(item("Answer: 1", label="no number"))


def test_a_sum_that_is_not_finite_is_none() -> None:
    with pytest.raises(SampleError, match="the weighted sum is inf"):
        weighted(exact=1.7e308, f1=1.7e308)(item("42"))


def test_a_sample_does_not_choose_among_them() -> None:
    chooses = item("the 42", metadata_json='{"rm_type": "f1"}')
    assert weighted(exact=1.0)(chooses) == (0.0, {"exact": 0.0}, ())
    assert weighted(f1=1.0)(chooses).reward == 1.0


async def test_they_run_in_the_pool_and_a_slow_one_fails_the_sample() -> None:
    weights = {"exact": 1.0, BY_ORDER: 0.5}
    async with running_pool("weighted", timeout_s=0.5, weights=weights) as pool:
        good, raises, hangs = await pool.score([item("ok", "ok"), item("raise it"), item("hang")])
    assert good.verdict == (1.5, {"exact": 1.0, BY_ORDER: 1.0}, ())
    assert (raises.verdict, raises.failure) == (None, FailureKind.RAISED)
    assert (hangs.verdict, hangs.failure) == (None, FailureKind.TIMED_OUT)


@pytest.mark.parametrize("name", ["maths", "nowhere:fn", "reward_functions:takes_nothing"])
async def test_a_scorer_that_does_not_load_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"reward.weights: .*{name.partition(':')[0]}"):
        async with running_pool("weighted", weights={"exact": 1.0, name: 1.0}):
            pass


def test_weights_are_a_table_and_make_the_scorer(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[reward.weights]\nmath = 1\n"pkg.mod:fn" = -0.5\n')
    config = load(file)
    assert (config.reward.scorer, config.reward.weights) == ("weighted", {"math": 1.0, "pkg.mod:fn": -0.5})
    assert scorer_settings(config).weights == config.reward.weights
    file.write_text(dump(config))
    assert load(file) == config
    assert load(None, {"reward.weights.math": 2}).reward.weights == {"math": 2.0}
    assert Config().reward.scorer == "math"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scorer": "weighted"}, 'scorer = "weighted" needs weights'),
        ({"scorer": "math", "weights": {"f1": 1.0}}, "weights are for scorer = \"weighted\", not 'math'"),
        ({"weights": {"f1": 1.0}, "reward_key": "acc"}, "reward_key = 'acc' is for one scorer"),
        ({"weights": {"remote": 1.0}}, "weights.remote: only scorers that run here"),
        ({"weights": {"f1": float("nan")}}, "finite number"),
        ({"weights": {"pkg.mod:fn": 1.0}, "group_rm": True}, "'weighted' scores samples one by one"),
    ],
)
def test_weights_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig.model_validate(fields)
