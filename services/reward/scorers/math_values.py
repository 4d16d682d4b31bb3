"""Equality of exact values, decided without simplifying anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from sympy import Mul, Pow, Rational, S

# math-verify looks at fifteen digits. Values this far apart are different to it too.
_APART = 1e-6
_LARGEST = Fraction(10) ** 30


def equal_values(one: Any, other: Any) -> bool | None:
    """Whether two products of rational numbers and their square roots are equal; None when that is not known.

    That is so for other expressions, and for values so close or so large that math-verify may take them for equal.
    """
    first, second = _signed_square(one), _signed_square(other)
    if first is None or second is None:
        return None
    if first == second:
        return True
    if max(abs(first), abs(second)) > _LARGEST:
        return None
    return None if math.isclose(_root(first), _root(second), rel_tol=_APART, abs_tol=_APART) else False


def _root(signed_square: Fraction) -> float:
    return math.copysign(math.sqrt(abs(signed_square)), signed_square)


def _signed_square(expression: Any) -> Fraction | None:
    """x·|x|: rational where x is a root, different for different x, and of a product the product of its factors'."""
    if isinstance(expression, Rational):
        value = Fraction(expression.p, expression.q)
        return value * abs(value)
    if isinstance(expression, Mul):
        return _product(expression.args)
    if isinstance(expression, Pow):
        base, exponent = expression.args
        if exponent == S.Half and isinstance(base, Rational) and base >= 0:
            return Fraction(base.p, base.q)
        if exponent == S.NegativeOne and (square := _signed_square(base)):
            return 1 / square
    return None


def _product(factors: Sequence[Any]) -> Fraction | None:
    product = Fraction(1)
    for factor in factors:
        if (square := _signed_square(factor)) is None:
            return None
        product *= square
    return product
