"""Where slime's `math` (text of the MATH data set, then sympy with guards) and math-verify differ, and our verdict.

slime's column was recorded from its published code, of August 2026.
"""

from __future__ import annotations

import pytest

from services.reward.scorers import build
from services.reward.scorers.base import Item, SampleError
from services.reward.scorers.bounded_math import BoundedMath
from services.reward.scorers.effort import UndecidedError, explodes, processor_time
from services.reward.scorers.math import MathScorer
from tests.kit.reward_items import item

scorer = build("math", paths=[], args={})
deepscaler = build("deepscaler", paths=[], args={})

# label, answer, slime's math and deepscaler, our math, our deepscaler
VERDICTS = [
    # Both agree.
    ("1/2", r"\frac12", 1, 1, 1),
    ("1/2", "0.5", 1, 1, 1),
    ("3", "3.0", 1, 1, 1),
    (r"50\%", "50", 1, 1, 1),
    ("50", r"50\%", 1, 1, 1),
    (r"12 \text{ cm}", "12", 1, 1, 1),
    ("12", r"12\text{ cm}", 1, 1, 1),
    ("12", "12 cm", 1, 1, 1),
    (r"12 \text{ cm}^2", "12", 1, 1, 1),
    (r"90^\circ", "90", 1, 1, 1),
    (r"\$5", "5", 1, 1, 1),
    ("x=3", "3", 1, 1, 1),
    ("(1,2)", "(2,1)", 0, 0, 0),
    ("[0,1)", "[0,1]", 0, 0, 0),
    ("(x+1)^2", "x^2+2x+1", 1, 1, 1),
    (r"2\sqrt{2}", r"\sqrt{8}", 1, 1, 1),
    ("1,234", "1234", 1, 1, 1),
    (r"1\frac{1}{2}", r"\frac{3}{2}", 1, 1, 1),
    ("1/3", "0.333", 0, 0, 0),
    ("Tuesday", "tuesday", 1, 1, 1),
    ("(A)", "A", 1, 1, 1),
    (r"5 \text{ or } 6", "5, 6", 1, 1, 1),
    # slime asks for reduced fractions, and for whole numbers to be written as such. They are equal.
    (r"\frac{1}{2}", r"\frac{2}{4}", 0, 1, 1),
    ("3", r"\frac{6}{2}", 0, 1, 1),
    # slime drops the sign.
    (r"50\%", "0.5", 0, 1, 1),
    ("0.5", r"50\%", 0, 1, 1),
    # slime compares sets in their order.
    (r"\{1,2\}", r"\{2,1\}", 0, 1, 1),
    ("1,2", "2,1", 0, 1, 1),
    # slime's guard keeps powers from sympy.
    ("10^{2}", "100", 0, 1, 1),
    ("2^{10}", "1024", 0, 1, 1),
    # slime gives three letters or more to no algebra, function names included.
    (r"\sin^2 x + \cos^2 x", "1", 0, 1, 1),
    (r"\log_2 8", "3", 0, 1, 1),
    (r"\infty", r"+\infty", 0, 1, 1),
    # math-verify rounds to six digits.
    (r"\sqrt{2}", "1.41421356", 0, 1, 1),
    ("1/3", "0.3333333333", 0, 1, 1),
    # Not read here: mixed numbers without LaTeX, exponents of ten without it, other digits than ASCII's.
    ("7 3/4", "7.75", 1, 0, 0),
    ("1.5e3", "1500", 1, 0, 0),
    ("42", "４２", 1, 0, 0),
]
NO_ANSWER = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{9^{99999999}}",
    r"\boxed{99999999!}",
    "so it is $9^{9^{9^{9}}}$",
    r"\boxed{" + "(" * 60 + "1" + ")" * 60 + "}",
    r"\boxed{" + "9" * 1001 + "}",
]
LARGE = r"9^{9^{9}}"
HARMLESS = [
    *("2^{2023}", "x^2y^2", r"e^{-x^2}", "3^{2^x}", r"\frac{1}{2}^{10}", "5!", "(2n)!", r"\binom{10}{5}", "10^{-5}"),
    *(r"\sum_{n=1}^{\infty}\frac{1}{n^2}", r"\frac{(2n)!}{2^n (n!)^2}", "(x+1)^{2}" * 20, r"\frac{2^{n}}{n!}"),
]
EXPLOSIVE = [
    *("9^9^9", "9**9**9", "9^{9^{9}x}", "(9^{9999})^{9999}", "((9^{99})^{99})^{99}", "(9!)!", "(9^9)!", "9^{9!}"),
    *("9999!^{9999}", "2**99999999", "9^{9999*9999}", r"\sum_{n=1}^{1000} n^n", r"\binom{99999}{49999}"),
]


@pytest.mark.parametrize(("label", "answer", "slimes", "ours", "deepscalers"), VERDICTS)
def test_the_verdict(label: str, answer: str, slimes: int, ours: int, deepscalers: int) -> None:
    box = f"\\boxed{{{answer}}}"
    assert scorer(item(box, label)).reward == ours
    assert deepscaler(item(f"</think>{box}", label)).reward == deepscalers


def test_a_label_in_other_digits_is_a_failure() -> None:
    with pytest.raises(SampleError, match="cannot be read as mathematics"):
        scorer(item(r"\boxed{42}", "٤٢"))


@pytest.mark.parametrize("completion", NO_ANSWER)
def test_a_bomb_is_no_answer(completion: str) -> None:
    assert scorer(item(completion)) == (0.0, {"parsed": 0.0}, ())


@pytest.mark.parametrize(
    ("end", "label"),
    [
        (r"So $\sum_{k=1}^{10} k^2 = 385$", "385"),
        (r"So $\binom{40}{20} = 137846528820$", "137846528820"),
        ("The answer is 12345!", "12345"),
        ("It is 42!!", "42"),
        (r"It is $2^{20} = 1048576$.", "1048576"),
    ],
)
def test_what_only_looks_like_a_bomb(end: str, label: str) -> None:
    assert scorer(item(end, label)).reward == 1.0


def test_what_stands_behind_a_bomb_is_read() -> None:
    assert scorer(item("It is not $9^{9^{9}}$.\nIt is 42.")).reward == 1.0


def test_a_label_too_large_to_read_is_compared_as_text() -> None:
    assert scorer(item(rf"so \boxed{{{LARGE}}}", LARGE)).reward == 1.0
    assert scorer(item(rf"so \boxed{{ {LARGE} }}", rf"\boxed{{{LARGE}}}")).reward == 1.0
    assert scorer(item(r"so \boxed{42}", LARGE)).reward == 0.0
    assert scorer(item(LARGE, LARGE)).reward == 0.0


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_read(text: str) -> None:
    assert not explodes(text)


@pytest.mark.parametrize("text", EXPLOSIVE)
def test_what_is_not_read(text: str) -> None:
    assert explodes(text)


def test_what_takes_too_long_is_not_decided() -> None:
    def hangs(_: Item) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:  # as libraries do
                continue

    with pytest.raises(UndecidedError, match="not decided within 2 s of processor time"):
        BoundedMath(hangs)(item("42"))  # type: ignore[arg-type]
    with processor_time(5.0):
        assert MathScorer()(item("42")).reward == 1.0
