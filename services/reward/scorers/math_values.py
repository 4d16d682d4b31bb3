"""Equality of numbers, decided without simplifying anything where there is no doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from sympy import Float, Mul, Pow, Rational, S, UnevaluatedExpr

# math-verify rounds decimals to six places and looks at fifteen digits of the rest. Values this far apart are different
# to it too, unless one is a percentage: 50% is 0.5 and also 50.
_APART = 1e-5
_SCALES = (1.0, 100.0, 0.01)
_LARGEST = Fraction(10) ** 30


def equal_values(one: Any, other: Any) -> bool | None:
    """Whether two products of numbers and square roots are equal; None when that is not known here.

    So it is for other expressions, for decimals and percentages that are close to each other, and for numbers so close
    or so large that math-verify may take them for equal.
    """
    first, second = _signed_square(one), _signed_square(other)
    if first is None or second is None:
        return None
    if first == second and _is_exact(one) and _is_exact(other):
        return True
    if max(abs(first), abs(second)) > _LARGEST:
        return None
    value, reference = _root(first), _root(second)
    close = any(math.isclose(scale * value, reference, rel_tol=_APART, abs_tol=_APART) for scale in _SCALES)
    return None if close else False


def _is_exact(expression: Any) -> bool:
    """Neither a decimal nor a percentage, nor made with one."""
    return not expression.has(Float, UnevaluatedExpr)


def _root(signed_square: Fraction) -> float:
    return math.copysign(math.sqrt(abs(signed_square)), signed_square)


def _signed_square(expression: Any) -> Fraction | None:
    """x·|x|: rational where x is a root, different for different x, and of a product the product of its factors'."""
    if isinstance(expression, Rational | Float):
        value = _fraction(expression)
        return value * abs(value)
    if isinstance(expression, UnevaluatedExpr):
        return _signed_square(expression.args[0])
    if isinstance(expression, Mul):
        return _product(expression.args)
    if isinstance(expression, Pow):
        base, exponent = expression.args
        if exponent == S.Half and isinstance(base, Rational) and base >= 0:
            return _fraction(base)
        if exponent == S.NegativeOne and (square := _signed_square(base)):
            return 1 / square
    return None


def _fraction(number: Any) -> Fraction:
    exact = Rational(number)
    return Fraction(exact.p, exact.q)


def _product(factors: Sequence[Any]) -> Fraction | None:
    product = Fraction(1)
    for factor in factors:
        if (square := _signed_square(factor)) is None:
            return None
        product *= square
    return product
