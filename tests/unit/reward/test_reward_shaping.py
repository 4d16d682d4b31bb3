"""Rewards shaped by a function, and the penalty for completions that come near their limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.config import Config, load
from services.common.config.models import RewardConfig
from services.common.errors import ConfigError
from services.reward.scorers.base import Verdict
from services.reward.scorers.overlong import Overlong
from services.reward.settings import scorer_settings
from tests.kit.reward_items import BY_ORDER, item, running_pool

SHAPES = "reward_functions:shapes"
OVERLONG = {"max_len": 100, "buffer_len": 40, "factor": 2.0}


def equation_13(length: int, longest: int, cache: int) -> float:
    """As the paper writes it."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_the_penalty_is_equation_13(length: int, longest: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, longest))
    verdict = Overlong(longest, cache, 0.5)(item("", completion_tokens=length), Verdict(1.0, {"acc": 1.0}))
    penalty = 0.5 * equation_13(length, longest, cache)
    assert verdict == (pytest.approx(1.0 + penalty), {"acc": 1.0, "overlong": pytest.approx(penalty)}, ())


async def test_the_penalty_is_a_part() -> None:
    async with running_pool("exact", overlong=OVERLONG) as pool:
        results = await pool.score([item("42", completion_tokens=tokens) for tokens in (0, 60, 70, 100, 120)])
    assert [result.verdict for result in results] == [
        (1.0 + penalty, {"overlong": penalty}, ()) for penalty in (0.0, 0.0, -0.5, -2.0, -2.0)
    ]


async def test_a_function_shapes_and_the_penalty_comes_after_it() -> None:
    async with running_pool(BY_ORDER, shaping=SHAPES, overlong=OVERLONG) as pool:
        plain, parts, refused = await pool.score([item("ok", completion_tokens=70), item("dict"), item("refuse")])
    assert plain.verdict == (0.0, {"unshaped": 1.0, "overlong": -0.5}, ())
    assert parts.verdict == (0.0, {"acc": 1.0, "length": 3.0, "unshaped": 0.5, "overlong": 0.0}, ())
    assert (refused.verdict, refused.reason) == (None, "the shaped reward is None, not a number")


async def test_rewards_of_whole_groups_are_shaped_one_by_one() -> None:
    async with running_pool(
        "reward_functions:ranks_as_array", group_rm=True, shaping=SHAPES, overlong=OVERLONG
    ) as pool:
        first, second = await pool.score([item("a"), item("b", completion_tokens=70)])
    assert first.verdict == (0.0, {"unshaped": 0.0, "overlong": 0.0}, ())
    assert second.verdict == (0.125 - 0.5, {"unshaped": 0.25, "overlong": -0.5}, ())


async def test_a_function_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward.shaping: .* cannot be called as fn\(args, sample, reward\)"):
        async with running_pool("exact", shaping="reward_functions:plain"):
            pass


def test_settings_of_the_penalty() -> None:
    overrides: dict[str, Any] = {"rollout.sampling.max_response_len": 100, "reward.overlong_buffer_len": 40}
    config = load(None, {**overrides, "reward.overlong_penalty_factor": 2})
    assert scorer_settings(config).overlong == OVERLONG
    assert scorer_settings(Config()).overlong == {}
    with pytest.raises(ConfigError, match="overlong_buffer_len = 101 is more than"):
        load(None, {**overrides, "reward.overlong_buffer_len": 101})


def test_rewards_of_remote_scorers_are_not_shaped() -> None:
    with pytest.raises(ValueError, match="shaping is for scorers that run here"):
        RewardConfig.model_validate({"scorer": "remote", "shaping": SHAPES, "remote": {"urls": "http://127.0.0.1:9"}})
