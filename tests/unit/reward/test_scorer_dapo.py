"""DAPO's whole-number answers. The verdicts are those of its published rule, where the label is a whole number."""

from __future__ import annotations

import pytest

from services.reward.scorers.base import SampleError
from services.reward.scorers.dapo import score
from tests.kit.reward_items import item

RIGHT = [
    ("Answer: 42", "42"),
    ("answer:42", "42"),
    ("ANSWER : 42", "42"),
    ("Answer:\n42", "42"),
    ("Answer: 1\nAnswer: 42\n", "42"),
    ("Answer: $42$", "42"),
    ("Answer: $42$.", "42"),
    ("Answer: \\boxed{42}", "42"),
    ("Answer: $\\boxed{42}$", "42"),
    ("Answer: \\text{42}", "42"),
    ("Answer: \\textbf{42}", "42"),
    ("Answer: x = 42", "42"),
    ("Answer: 42 dollars", "42"),
    ("Answer: \\$42", "42"),
    ("Answer: 42 cm", "42"),
    ("Answer: 42^\\circ", "42"),
    ("Answer: 42 square units", "42"),
    ("Answer: 1,234", "1234"),
    ("Answer: 42{,}000", "42000"),
    ("Answer: 4 2", "42"),
    ("Answer: -42", "-42"),
    ("Answer: 42", "42.0"),
    ("Answer: 42<|im_end|>", "42"),
    ("Answer: 1000000", "1e6"),
    ("Answer: 9007199254740993", "9007199254740993"),
]
WRONG = [
    ("Answer: 41", "42"),
    ("Answer: 42\nAnswer: 41", "42"),
    ("Answer: 42.0", "42"),
    ("Answer: 42.", "42"),
    ("Answer: 042", "42"),
    ("Answer: +42", "42"),
    ("Answer: **42**", "42"),
    ("Answer: 42%", "42"),
    ("Answer: \\frac{84}{2}", "42"),
    ("Answer: ４２", "42"),
    ("Answer: 4\x002", "42"),
    ("Answer: 42" + "." * 300, "42"),
    ("Answer: 9007199254740992", "9007199254740993"),
]
NO_ANSWER = ["", "42", "\\boxed{42}", "The answer is 42", "Answer 42", "Answer: 42" + " " * 300, "Answer:", "Answer:\n"]
NO_WHOLE_NUMBER = ["", "3.5", "1/2", "x", "\\frac{1}{2}", "inf", "nan", "1e99999", "9" * 2000, "4 and 2"]


@pytest.mark.parametrize(("completion", "label"), RIGHT)
def test_right(completion: str, label: str) -> None:
    assert score(item(completion, label)) == (1.0, {"acc": 1.0, "parsed": 1.0}, ())


@pytest.mark.parametrize(("completion", "label"), WRONG)
def test_wrong(completion: str, label: str) -> None:
    verdict = score(item(completion, label))
    assert (verdict.reward, verdict.parts["acc"]) == (-1.0, 0.0)


@pytest.mark.parametrize("completion", NO_ANSWER)
def test_without_an_answer(completion: str) -> None:
    assert score(item(completion)) == (-1.0, {"acc": 0.0, "parsed": 0.0}, ())


@pytest.mark.parametrize("label", NO_WHOLE_NUMBER)
def test_a_label_that_is_no_whole_number_is_a_failure(label: str) -> None:
    with pytest.raises(SampleError, match="is no whole number"):
        score(item("Answer: 42", label))
