"""What the math scorer does without math-verify is what math-verify would have done."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Rational

from services.reward.scorers.base import Item
from services.reward.scorers.math import MathScorer
from services.reward.scorers.math_reader import read
from services.reward.scorers.math_search import find
from services.reward.scorers.math_values import equal_values
from tests.bench import math_pairs

logging.getLogger("math_verify").setLevel(logging.ERROR)
SLOW = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

signs = st.sampled_from(["", "-"])
natural = st.integers(0, 2000).map(str) | st.sampled_from(["0", "007", "123456789012345"])
positive = st.integers(1, 999).map(str)
decimals = st.builds("{}.{}".format, natural, natural) | st.sampled_from(["0.5", "0.50", "1.0"])
roots = st.builds(r"{}\sqrt{{{}}}".format, natural | st.just(""), natural)
fractions = st.builds(
    r"\{}frac{{{}{}}}{{{}}}".format, st.sampled_from(["", "d", "t"]), signs, natural | roots, positive
)
terms = st.builds(
    "{}{}".format, signs, natural | decimals | roots | fractions | st.builds("{}/{}".format, natural, positive)
)
thousands = st.builds("{}{},{:03}".format, signs, st.integers(0, 999), st.integers(0, 999))
percents = st.builds("{}{}".format, natural | decimals, st.sampled_from(["%", r"\%"]))
elements = terms | st.integers(-9, 9).map(str) | st.sampled_from([r"\infty", r"-\infty"])
brackets = st.sampled_from(["()", "[]", "[)", "(]", r"\{ \}", r"\left( \right)", r"\left\{ \right\}", r"( \}", " "])


@st.composite
def collections(draw: st.DrawFn) -> str:
    inside = draw(st.sampled_from([",", ", ", " , "])).join(draw(st.lists(elements, min_size=1, max_size=4)))
    pair = draw(brackets)
    opening, closing = pair.split(" ") if " " in pair else pair
    return opening + inside + closing


answers = terms | thousands | percents | collections()


def by_math_verify(text: str) -> Any:
    config = [LatexExtractionConfig(), ExprExtractionConfig()]
    found = parse(text, config, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def same(one: Any, other: Any) -> bool:
    """Equal to the last detail: SymPy's == overlooks the order of a set as it was written."""
    order = [getattr(each, "_unsorted_args", None) for each in (one, other)]
    return type(one) is type(other) and one == other and one.args == other.args and order[0] == order[1]


@pytest.mark.timeout(120)
@SLOW
@given(answers)
def test_a_formula_is_read_as_math_verify_reads_it(formula: str) -> None:
    known = read(formula)
    if known is not None:
        assert same(by_math_verify(f"${formula}$"), known)
        assert same(by_math_verify(rf"\boxed{{{formula}}}"), known)


FREQUENT = ["-3", "1,234", "2.50", "0.5", r"-\dfrac{6}{8}", "3/4", r"25\%", r"2\sqrt{3}", r"\frac{\sqrt{3}}{2}"]
FREQUENT += [r"\{3, 1\}", "(1, 2]", "(1,2,3)", "1, 2", r"(-\infty, 3)", r"\left[ 0, \frac{1}{2} \right)"]
OTHERS = ["", "x", "1/0", r"\frac{1}{0}", "5.", ".5", "1 234", "٣", "2^3", "(1,234)", "{1,2}", r"\sqrt{-1}", "1,234,56"]
OTHERS += ["9" * 16, r"50\%\%", r"-50\%", "(1)", "(1,2", r"\{1,2)", "(1,2,3]", "1;2", r"\{\}", "(,)", "1\n2", "(1,\n2)"]


@pytest.mark.parametrize("formula", FREQUENT)
def test_the_frequent_forms_are_read(formula: str) -> None:
    assert same(by_math_verify(f"${formula}$"), read(formula))


@pytest.mark.parametrize("formula", OTHERS)
def test_anything_else_is_left_to_math_verify(formula: str) -> None:
    assert read(formula) is None


small = st.integers(0, 60).map(str)
small_roots = st.builds(r"{}\sqrt{{{}}}".format, small | st.just(""), small)
quotients = st.builds(r"\frac{{{}}}{{{}}}".format, small | small_roots, st.integers(1, 60))
exact = st.builds("{}{}".format, signs, small | small_roots | quotients | st.just(r"\frac{6}{2\sqrt{3}}"))
hundredths = st.integers(0, 9999).map(lambda each: f"{each / 100:g}")
rounded = hundredths | hundredths.map(r"{}\%".format) | st.integers(0, 9999).map(lambda each: f"{each / 1e4:g}")
numbers = exact | rounded


@pytest.mark.timeout(120)
@settings(SLOW, max_examples=30)
@given(numbers, numbers)
def test_numbers_are_equal_where_math_verify_says_so(one: str, other: str) -> None:
    values = by_math_verify(f"${one}$"), by_math_verify(f"${other}$")
    equal = equal_values(*values)
    assert equal is None or equal == verify(*values, timeout_seconds=None)


@pytest.mark.timeout(120)
@SLOW
@given(st.integers(0, 4000), st.sampled_from([1, 100, 10_000]), st.integers(-2, 2), st.integers(-1, 1))
def test_decimals_and_percentages_close_to_each_other(number: int, scale: int, off: int, digits: int) -> None:
    """By hundreds, by the last of five digits, and not at all."""
    one, other = number / 1000, (number + off) / scale
    forms = [f"{one:g}", rf"{one:g}\%", f"{other:g}", rf"{other * 100 + digits * 1e-5:.5f}\%", str(number)]
    values = [by_math_verify(f"${form}$") for form in forms]
    for gold in values:
        for answer in values:
            equal = equal_values(gold, answer)
            assert equal is None or equal == verify(gold, answer, timeout_seconds=None)


@SLOW
@given(st.integers(-40, 40), st.integers(1, 20), st.integers(2, 60))
def test_one_value_in_two_forms(factor: int, denominator: int, root: int) -> None:
    one = by_math_verify(rf"$\frac{{{factor}\sqrt{{{root}}}}}{{{denominator}}}$")
    sign = "-" if factor < 0 else ""
    other = by_math_verify(rf"${sign}\frac{{\sqrt{{{factor * factor * root}}}}}{{{denominator}}}$")
    assert equal_values(one, other) is True
    assert verify(one, other, timeout_seconds=None)


def test_what_is_too_close_or_not_exact_is_left_to_math_verify() -> None:
    assert equal_values(Rational(1), Rational(10**9 + 1, 10**9)) is None
    assert equal_values(Rational(10) ** 400, Rational(10) ** 400 + 1) is None
    for formula in (
        "1.00",
        "1.000001",
        r"1\%",
        r"100\%",
        "x",
        "(1,2)",
        r"1+\sqrt{2}",
        "2^{3}",
        r"\sqrt[3]{8}",
        "[1,3]",
    ):
        assert equal_values(by_math_verify(f"${formula}$"), Rational(1)) is None
    assert equal_values(by_math_verify(r"$\sqrt{-4}$"), Rational(1)) is None
    assert equal_values(by_math_verify(r"$\begin{pmatrix}1\\2\end{pmatrix}$"), Rational(1)) is None


WORDS = [
    "The answer",
    "answer:",
    "Final answer",
    "final answer is",
    "I hope",
    "anſwer",
    " is ",
    " and ",
    "percent",
    "x",
]
MARKS = [
    "$",
    "$$",
    r"\[",
    r"\]",
    r"\(",
    r"\)",
    " [",
    "] ",
    r"\boxed{",
    "}",
    "%",
    "$5",
    " 12 ",
    " = ",
    ". ",
    ", ",
    "\n\n",
]
fragments = st.sampled_from(WORDS + MARKS)
formulas = answers.map(lambda each: f"${each}$") | answers.map(lambda each: rf"\[{each}\]")
texts = st.lists(fragments | formulas | answers | answers.map(r"\boxed{{{}}}".format), max_size=8).map("".join)


@pytest.mark.timeout(120)
@SLOW
@given(texts)
def test_the_answer_of_a_text_is_the_one_that_math_verify_finds(text: str) -> None:
    theirs, ours = by_math_verify(text), find(text)
    assert same(theirs, ours) if theirs is not None else ours is None


def test_the_pairs_are_those_that_their_module_makes() -> None:
    pairs = math_pairs.load()
    assert pairs == math_pairs.pairs()
    assert len({pair["label"] for pair in pairs}) == len(pairs) == 1000
    assert sum(pair["reward"] for pair in pairs) == 500
    assert 300 < sum("boxed" not in pair["completion"] for pair in pairs) < 360


@pytest.mark.timeout(120)
def test_verdicts_on_pairs_are_those_of_the_whole_math_verify() -> None:
    """On every tenth pair; the benchmark compares all."""
    score = MathScorer()
    for pair in math_pairs.load()[::10]:
        gold, answer = parse(f"${pair['label']}$"), parse(pair["completion"])
        verdict = score(Item("", "", "", pair["completion"], pair["label"], "", "completed", 0, 0, 0))
        assert verdict.reward == pair["reward"] == float(verify(gold, answer)), pair
