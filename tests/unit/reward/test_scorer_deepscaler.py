"""DeepScaleR's rule.

What is one text: the equivalences of the MATH data set's own grader (Hendrycks et al., arXiv 2103.03874), which
DeepScaleR's `mathd` and slime's `deepscaler` use. What counts as an answer: the box behind the thinking, as in
DeepScaleR.
"""

from __future__ import annotations

import pytest

from services.reward.scorers import build
from services.reward.scorers.base import SampleError
from services.reward.scorers.hendrycks import normalized
from tests.kit.reward_items import item

scorer = build("deepscaler", paths=[], args={})

# From the MATH data set's own equivalences: one text.
SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
    ("1/2", r"\frac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.5"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
    ("x = 3", "3"),
    (r"12\text{ cm}", "12"),
    (r"50\%", "50"),
    (r"\$5", "5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"\text{Tuesday}", "Tuesday"),
    ("1 0", "10"),
    (r"2\!000", "2000"),
]
DIFFERENT = [("ab = 3", "a = 3"), ("f(x)=3", "3"), ("a=b=c", "c"), ("x/y", r"\frac{x}{y}"), ("", "0"), ("1,2", "2,1")]
RIGHT = [
    ("<think>\\boxed{1}</think> so \\boxed{42}", "42"),
    ("###Response\\boxed{42}", "42"),
    ("</think>\\boxed{42}", "\\boxed{42}"),
    ("</think>\\boxed{1} or \\boxed{42}", "42"),
    ("</think>\\boxed{tuesday}", "\\text{Tuesday}"),
    ("</think>\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
    ("</think>\\boxed{(x+1)^2}", "x^2+2x+1"),
    ("</think>\\boxed{50\\%}", "50"),
    ("</think>\\boxed{9^{9^{9}}}", "9^{9^{9}}"),
]
WRONG = [
    ("</think>\\boxed{41}", "42"),
    ("</think>\\boxed{42} no, \\boxed{41}", "42"),
    ("</think>\\boxed{Monday}", "Tuesday"),
    ("</think>\\boxed{(2,1)}", "(1,2)"),
    ("</think>\\boxed{٤١}", "42"),
]
NO_ANSWER = [
    "\\boxed{42}",
    "<think>\\boxed{42}",
    "<think>\\boxed{42}</think>",
    "</think>42",
    "</think>\\boxed{42",
    "",
    "</think>",
    "</think>\\boxed{" + "4" * 5000 + "}",
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_form(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_two_forms(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


@pytest.mark.parametrize(("completion", "label"), RIGHT)
def test_right(completion: str, label: str) -> None:
    assert scorer(item(completion, label)) == (1.0, {"parsed": 1.0}, ())


@pytest.mark.parametrize(("completion", "label"), WRONG)
def test_wrong(completion: str, label: str) -> None:
    assert scorer(item(completion, label)) == (0.0, {"parsed": 1.0}, ())


@pytest.mark.parametrize("completion", NO_ANSWER)
def test_without_an_answer(completion: str) -> None:
    assert scorer(item(completion, "42")) == (0.0, {"parsed": 0.0}, ())


@pytest.mark.parametrize("label", ["", "  "])
def test_an_empty_label_is_a_failure(label: str) -> None:
    with pytest.raises(SampleError, match="label is empty"):
        scorer(item("</think>\\boxed{42}", label))
