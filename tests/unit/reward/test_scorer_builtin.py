"""Which scorer a sample gets, and which entry of a verdict is the reward."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from services.common.config import Config
from services.common.errors import ConfigError
from services.reward.jobs import FailureKind
from services.reward.pool import ScorerPool
from services.reward.scorers import build
from services.reward.scorers.base import SampleError, to_verdict
from services.reward.scorers.builtin import NAMES, Options
from services.reward.settings import ScorerSettings, scorer_settings
from tests.kit.reward_items import BY_ORDER, KIT, item

exact = build("exact", paths=[], args={})


@pytest.mark.parametrize(
    ("asked", "completion", "label", "reward"),
    [
        ("f1", "x y", "y z", 0.5),
        (" f1 ", "x y", "y z", 0.5),
        ("boxed_f1", r"\boxed{b}", "b", 1.0),
        ("dapo", "Answer: 42", "42", 1.0),
        ("", "42", "42", 1.0),
        (None, "42", "41", 0.0),
    ],
)
def test_a_sample_may_name_its_scorer(asked: str | None, completion: str, label: str, reward: float) -> None:
    assert exact(item(completion, label, metadata_json=json.dumps({"rm_type": asked}))).reward == reward


@pytest.mark.parametrize(
    "asked", ["maths", "os:system", "reward_functions.by_order", "boxed_", "boxed_boxed_f1", "remote_rm", 7, ["f1"], {}]
)
def test_a_sample_cannot_name_code(asked: object) -> None:
    with pytest.raises(SampleError, match=r"rm_type .* is unknown; known are code, dapo, deepscaler"):
        exact(item("42", metadata_json=json.dumps({"rm_type": asked})))


def test_the_key_is_found_however_it_is_escaped() -> None:
    assert exact(item("x y", "y z", metadata_json='{"rm\\u005ftype": "f1"}')).reward == 0.5


def test_a_users_function_is_not_overridden() -> None:
    scorer = build(BY_ORDER, paths=[str(KIT)], args={})
    assert scorer(item("ok", metadata_json='{"rm_type": "nonsense"}')).reward == 1.0


@pytest.mark.parametrize(
    ("key", "reward", "parts"),
    [
        ("", 1.0, {"acc": 1.0, "parsed": 1.0}),
        ("score", 1.0, {"acc": 1.0, "parsed": 1.0}),
        ("acc", 1.0, {"score": 1.0, "parsed": 1.0}),
    ],
)
def test_the_key_of_a_builtin_scorers_reward(key: str, reward: float, parts: dict[str, float]) -> None:
    scorer = build("dapo", paths=[], args={}, options=Options(reward_key=key))
    assert scorer(item("Answer: 42")) == (reward, parts, ())


def test_a_wrong_answer_by_its_key() -> None:
    scorer = build("dapo", paths=[], args={}, options=Options(reward_key="acc"))
    assert scorer(item("Answer: 41")) == (0.0, {"score": -1.0, "parsed": 1.0}, ())


def test_a_key_that_is_not_there() -> None:
    scorer = build("dapo", paths=[], args={}, options=Options(reward_key="pred"))
    with pytest.raises(SampleError, match="the verdict has no part 'pred'; it has acc, parsed"):
        scorer(item("Answer: 42"))
    with pytest.raises(SampleError, match="the verdict has no part 'acc'; it has none"):
        build("exact", paths=[], args={}, options=Options(reward_key="acc"))(item("42"))


def test_the_key_of_a_users_dict() -> None:
    said = {"score": -1, "acc": True, "pred": "42"}
    assert to_verdict(said) == (-1.0, {"acc": 1.0}, ())
    assert to_verdict(said, "acc") == (1.0, {"score": -1.0}, ())
    with pytest.raises(SampleError, match="the returned dict has no 'f1'"):
        to_verdict(said, "f1")
    with pytest.raises(SampleError, match="the returned dict's 'pred' is a str, not a number"):
        to_verdict(said, "pred")
    with pytest.raises(SampleError, match="the returned reward is a float, not a dict with 'acc'"):
        to_verdict(1.0, "acc")


async def test_settings_reach_the_pool() -> None:
    settings = ScorerSettings("dapo", [], {}, reward_key="acc")
    pool = ScorerPool(settings, processes=1, timeout_s=10.0)
    try:
        await pool.start()
        good, bad = await pool.score(
            [item("Answer: 41"), item("Answer: 41", metadata_json='{"rm_type": "pkg.mod:fn"}')]
        )
    finally:
        await pool.close()
    assert good.verdict == (0.0, {"score": -1.0, "parsed": 1.0}, ())
    assert (bad.verdict, bad.failure) == (None, FailureKind.RAISED)


def test_the_tests_of_a_program_end_before_the_score_does() -> None:
    config = Config.model_validate({"reward": {"scorer": "code", "score_timeout_s": 5.0, "code": {"timeout_s": 60.0}}})
    assert scorer_settings(config).code_timeout_s == 4.0


@pytest.mark.parametrize("name", ["maths", "boxed_", "boxed_maths", ""])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError, match="known are code, dapo, deepscaler, exact, f1, gpqa, ifbench, math, random"):
        build(name, paths=[], args={})


def test_nothing_heavy_is_imported_for_what_does_not_need_it() -> None:
    light = [name for name in NAMES if name not in ("math", "deepscaler")]
    code = (
        "import sys\nfrom services.reward.scorers import build\n"
        f"for name in {light}: build(name, paths=[], args={{}})\n"
        "print([name for name in ('sympy', 'math_verify', 'numpy', 'grpc', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
