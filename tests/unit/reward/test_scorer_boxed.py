"""``boxed_`` before a scorer's name, and the last balanced box."""

from __future__ import annotations

import pytest

from services.reward.scorers import build
from services.reward.scorers.boxed import last_boxed
from tests.kit.reward_items import item

BOXES = [
    (r"\boxed{42}", "42"),
    (r"\boxed {42}", "42"),
    (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{1} and then cut: \boxed{2", "1"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\}}", r"\}"),
    (r"\boxed{a \boxed{b} c}", "b"),
    (r"\boxed{}", ""),
    (r"\boxed{ 4 }", " 4 "),
    ("\\boxed{4\n2}", "4\n2"),
    (r"}}} \boxed{x} {{{", "x"),
    (r"\fbox{42}", None),
    (r"\boxed 42", None),
    ("42", None),
    ("", None),
    (r"\boxed{\{}", r"\{"),
]

# scorer, completion, label, reward
BOXED = [
    ("boxed_math", r"\boxed{\frac{2}{4}}", "1/2", 1.0),
    ("boxed_math", "it is 42", "42", 0.0),
    ("boxed_deepscaler", r"no thinking \boxed{0.5}", r"\frac{1}{2}", 1.0),
    ("boxed_deepscaler", "</think>42", "42", 0.0),
    ("boxed_dapo", r"\boxed{42}", "42", 1.0),
    ("boxed_dapo", "Answer: 42", "42", -1.0),
    ("boxed_f1", r"The answer: \boxed{the Eiffel Tower}", "Eiffel tower", 1.0),
    ("boxed_gpqa", r"A, B or D? \boxed{\text{C}}", "C", 1.0),
    ("boxed_gpqa", "The answer is C", "C", 0.0),
    ("boxed_exact", r"so \boxed{ yes }", "yes", 1.0),
    ("boxed_exact", r"\boxed{{0}{x!r}}", "{0}{x!r}", 1.0),
    ("boxed_code", r"\boxed{print(6 * 7)}", '[{"input": "", "output": "42"}]', 1.0),
]


@pytest.mark.parametrize(("text", "inside"), BOXES)
def test_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(("name", "completion", "label", "reward"), BOXED)
def test_what_stands_in_the_box_is_scored(name: str, completion: str, label: str, reward: float) -> None:
    assert build(name, paths=[], args={})(item(completion, label)).reward == reward


def test_instructions_are_checked_inside_the_box() -> None:
    scorer = build("boxed_ifbench", paths=[], args={})
    metadata = '{"instruction_id_list": ["punctuation:no_comma"]}'
    assert scorer(item(r"well, \boxed{no comma here}", metadata_json=metadata)).reward == 1.0
