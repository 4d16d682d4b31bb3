"""What counts as a right answer."""

from __future__ import annotations

import pytest

from services.reward.scorers.base import Item, SampleError
from services.reward.scorers.exact import score as exact
from services.reward.scorers.math import MathScorer

math_score = MathScorer()


def item(completion: str, label: str) -> Item:
    return Item("g0-000", "?", "", completion, label, "", "completed", 0, 0, 0)


RIGHT = [
    ("42", "42"),
    ("42", "The answer is 42."),
    ("42", "42.0"),
    ("42", "6 * 7 = 42"),
    ("42", r"so \boxed{42} it is"),
    ("$42$", r"\boxed{42}"),
    (r"\boxed{42}", r"\boxed{42}"),
    ("-3", "-3"),
    ("-3", r"\boxed{-3}"),
    ("1,234", "1234"),
    ("10^{5}", "100000"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    ("1/2", r"$\frac12$"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\sqrt{2}", r"$\frac{2}{\sqrt{2}}$"),
    ("50%", r"\boxed{50\%}"),
    ("50%", "50%"),
    ("50%", "0.5"),
    ("{1,2}", r"\boxed{\{2,1\}}"),
    ("{1,2}", r"\boxed{2,1}"),
    ("x=3", r"\boxed{x=3}"),
    ("x=3", r"\boxed{3}"),
    ("3", r"\boxed{x=3}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3]}"),
    ("A", r"\boxed{\text{A}}"),
    # The last complete box counts, whatever stands before or after it.
    ("4", r"first \boxed{3}, no: \boxed{4}, which is more than 2"),
    ("4", r"\boxed{4} and then it was cut: \boxed{5"),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}} } {"),
    ("[0,1)", r"\boxed{[0,1)}"),
]

WRONG = [
    ("42", "41"),
    ("42", r"\boxed{24}"),
    ("42", r"\boxed{42} or rather \boxed{43}"),
    (r"\frac{1}{2}", "0.51"),
    ("1/3", "0.33"),
    ("50%", r"\boxed{5}"),
    ("{1,2}", r"\boxed{\{1,3\}}"),
    ("x=3", r"\boxed{x=4}"),
    ("-3", "3"),
    (r"\sqrt{2}", r"\boxed{\sqrt{3}}"),
    ("A", r"\boxed{B}"),
]

UNREADABLE = ["", "   ", "I do not know", r"\boxed{}", r"\boxed{", "}{}{", "\x00\ufffd", r"\boxed{???}"]


@pytest.mark.parametrize(("label", "completion"), RIGHT)
def test_right_answers(label: str, completion: str) -> None:
    assert math_score(item(completion, label)) == (1.0, {"parsed": 1.0}, ())


@pytest.mark.parametrize(("label", "completion"), WRONG)
def test_wrong_answers(label: str, completion: str) -> None:
    assert math_score(item(completion, label)) == (0.0, {"parsed": 1.0}, ())


@pytest.mark.parametrize("completion", UNREADABLE)
def test_a_completion_without_an_answer_scores_zero(completion: str) -> None:
    assert math_score(item(completion, "42")) == (0.0, {"parsed": 0.0}, ())


@pytest.mark.parametrize("label", ["", "   ", "???", r"\boxed{}"])
def test_an_unreadable_label_is_a_failure_and_no_number(label: str) -> None:
    with pytest.raises(SampleError, match="cannot be read"):
        math_score(item("42", label))


@pytest.mark.timeout(30)  # quadratic work would take minutes
@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "\\", r"\boxed{1}", "so $y = 3x$. "])
def test_long_repetitive_completions_do_not_take_ever_longer(piece: str) -> None:
    math_score(item(piece * 20_000, "42"))


def test_exact_ignores_only_the_white_space_around() -> None:
    assert exact(item(" 42\n", "42")).reward == 1.0
    assert exact(item("4 2", "42")).reward == 0.0
    assert exact(item("42.0", "42")).reward == 0.0
