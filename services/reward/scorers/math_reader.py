"""Reads the simplest answers as math-verify does, a hundred times as fast.

Its LaTeX parser takes a millisecond for an integer and twenty for a set. Most answers are numbers, roots, intervals and
sets of them: for these, `read` makes the same SymPy object from a regular expression. What it does not know it leaves
to math-verify.
"""

from __future__ import annotations

import re
from typing import Any

from latex2sympy2_extended.sets import FiniteSet
from sympy import Float, Integer, Interval, Mul, Pow, Rational, S, Tuple, UnevaluatedExpr

# A number, a/b, a root with a factor, or a fraction of one of them over an integer; each with a sign.
# Not of zero: SymPy contradicts itself about a root of it that it has not evaluated.
_ROOT = r"(?:[1-9]\d{0,14})?\\sqrt\{[1-9]\d{0,14}\}"
_TERM = re.compile(
    rf"""(?P<minus>-)?(?:
        (?P<number>\d{{1,15}}(?:\.\d{{1,15}})?)
        | (?P<over>\d{{1,15}})/(?P<under>0*[1-9]\d{{0,14}})
        | (?P<factor>[1-9]\d{{0,14}})?\\sqrt\{{(?P<root>[1-9]\d{{0,14}})\}}
        | \\[dtc]?frac\{{(?P<top>-?\d{{1,15}}|-?{_ROOT})\}}\{{(?P<bottom>0*[1-9]\d{{0,14}})\}}
    )""",
    re.VERBOSE | re.ASCII,
)
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+", re.ASCII)
_PERCENT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\\?%", re.ASCII)
_INFINITY = {r"\infty": S.Infinity, r"-\infty": S.NegativeInfinity}

_BRACKETS = re.compile(r"(?:\\left)?(\(|\[|\\\{)(.*?)(?:\\right)?(\)|\]|\\\})")
# One number with a separator, or two elements.
_AMBIGUOUS = re.compile(r",\d{3}(?!\d)")


def read(text: str) -> Any:
    r"""What math-verify makes of ``$text$`` and of ``\boxed{text}``, or None when that is not known here."""
    if text == "0.5":  # math-verify takes this one for a fraction, and other decimals for what they are
        return S.Half
    if (term := _term(text)) is not None:
        return term
    if _THOUSANDS.fullmatch(text):
        return Integer(int(text.replace(",", "")))
    if percent := _PERCENT.fullmatch(text):
        return Mul(_decimal(percent[1]), UnevaluatedExpr(Rational(1, 100)), evaluate=False)
    return _collection(text)


def _term(text: str) -> Any:
    match = _TERM.fullmatch(text)
    if match is None:
        return None
    if match["number"]:
        value = _decimal(match["number"])
    elif match["over"]:
        value = Rational(int(match["over"]), int(match["under"]))
    elif match["root"]:
        root = Pow(Integer(int(match["root"])), S.Half, evaluate=False)
        value = Mul(Integer(int(match["factor"])), root, evaluate=False) if match["factor"] else root
    else:
        value = _quotient(_term(match["top"]), Integer(int(match["bottom"])))
    return _negated(value) if match["minus"] else value


def _decimal(text: str) -> Any:
    return Float(text) if "." in text else Integer(int(text))


def _quotient(top: Any, bottom: Any) -> Any:
    if top.is_Integer:
        return Rational(top, bottom)
    return Mul(top, Pow(bottom, -1, evaluate=False), evaluate=False)


def _negated(value: Any) -> Any:
    if value.is_Number:
        return -value
    return Mul(-1, *(value.args if value.is_Mul else (value,)), evaluate=False)


def _collection(text: str) -> Any:
    r"""``(a, b]``, ``(a, b, c)``, ``\{a, b\}`` or ``a, b``."""
    brackets = _BRACKETS.fullmatch(text)
    opening, inside, closing = brackets.groups() if brackets else ("", text, "")
    if "," not in inside or _AMBIGUOUS.search(inside):
        return None
    elements = [_element(element.strip(" "), opening) for element in inside.split(",")]
    if any(element is None for element in elements):
        return None
    if opening + closing in ("", r"\{\}"):
        return FiniteSet(*elements)
    if opening == r"\{" or closing == r"\}":
        return None
    if len(elements) == 2:
        left, right = elements
        return _interval(left, right, opening == "(", closing == ")")
    return Tuple(*elements) if opening + closing in ("()", "[]") else None


def _element(text: str, opening: str) -> Any:
    infinity = _INFINITY.get(text) if opening in ("(", "[") else None
    return infinity if infinity is not None else _term(text)


def _interval(left: Any, right: Any, left_open: bool, right_open: bool) -> Any:
    """An interval that would hold nothing is a pair."""
    if (left_open and right_open and right <= left) or (not left_open and not right_open and right < left):
        return Tuple(left, right)
    return Interval(left, right, left_open=left_open, right_open=right_open)
