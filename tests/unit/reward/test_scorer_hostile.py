"""Whatever a completion or a label holds: a verdict or a SampleError, in bounded time and memory."""

from __future__ import annotations

import math
import resource
import time
from contextlib import suppress

import pytest

from services.reward.scorers import build
from services.reward.scorers.base import Item, SampleError, Scorer
from services.reward.scorers.builtin import NAMES, Options
from tests.kit.hostile_answers import HOSTILE
from tests.kit.reward_items import item

LABELS = {"gpqa": "C", "code": '[{"input": "", "output": "1"}]', "ifbench": ""}
METADATA = '{"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"]}'
OPTIONS = Options(code_timeout_s=3.0, code_memory_mb=256)
SECONDS = 8.0
"""Of this process's own time. The pool's limit is 10."""
GROWTH_MB = 400


# A program runs for each text that the scorer of code gets.
SLOW = "code"


@pytest.fixture(
    scope="module",
    params=[
        *(name for name in NAMES if name != SLOW),
        "boxed_math",
        pytest.param(SLOW, marks=pytest.mark.long),
    ],
)
def named(request: pytest.FixtureRequest) -> tuple[str, Scorer]:
    return request.param, build(request.param, paths=[], args={}, options=OPTIONS)


def survives(scorer: Scorer, scored: Item, what: str) -> None:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(SampleError):
        verdict = scorer(scored)
        assert all(map(math.isfinite, (verdict.reward, *verdict.parts.values()))), what
    assert time.process_time() - begun < SECONDS, what
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < GROWTH_MB, what


def test_hostile_completions(named: tuple[str, Scorer]) -> None:
    name, scorer = named
    label = LABELS.get(name, "42")
    for what, text in HOSTILE.items():
        completion = "</think>" + text if name == "deepscaler" else text
        survives(scorer, item(completion, label, metadata_json=METADATA), what)


def test_hostile_labels(named: tuple[str, Scorer]) -> None:
    name, scorer = named
    answer = "</think>\\boxed{42}" if name == "deepscaler" else "Answer: 42"
    for what, text in HOSTILE.items():
        survives(scorer, item(answer, text, metadata_json=METADATA), what)


@pytest.mark.parametrize(
    "metadata", ["[]", "null", "{", "7", '"x"', "\x00", "{" * 5000, '{"rm_type": 7}', '{"kwargs": 1}']
)
def test_hostile_metadata(named: tuple[str, Scorer], metadata: str) -> None:
    name, scorer = named
    survives(scorer, item("</think>\\boxed{42}", LABELS.get(name, "42"), metadata_json=metadata), metadata)
