"""DAPO's rule for whole-number answers: the completion ends with ``Answer: 42``."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from services.reward.scorers.base import Item, SampleError, Verdict

# Further up, nothing is read.
_TAIL = 300
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_MAX_LABEL = 1000

# What Minerva's normalisation takes away, in its order: articles and spacing first, then units and LaTeX.
_SPACING = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{}^2", "\\text{}^3", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots", "<|im_end|>", "<|endoftext|>"),
)
_DOLLARS = re.compile(r".*?\$(.*?)\$.*")
_WRAPPED = re.compile(r"\\(?:text|textbf|overline)\{(.*?)\}")
_BOXED = re.compile(r"\\boxed\{(.*)\}")


def score(item: Item) -> Verdict:
    """1 when the last ``Answer:`` line within the last 300 characters is the label, else -1; part ``acc`` is 1 or 0.

    They are compared as text after Minerva's normalisation, so "42.0" is not 42. Without such a line the score is -1,
    with part ``parsed`` = 0. Raises SampleError when the label is no whole number.
    """
    label = _whole(item.label)
    lines = _ANSWER.findall(item.completion[-_TAIL:])
    right = bool(lines) and normalized(lines[-1]) == label
    return Verdict(1.0 if right else -1.0, {"acc": float(right), "parsed": float(bool(lines))})


def normalized(answer: str) -> str:
    """What is left of an answer without its left side, units, spaces and LaTeX around a number.

    Minerva also completes ``\\frac12`` and ``\\sqrt2``; no whole number is written with these.
    """
    text = answer.split("=")[-1]
    for old, new in _SPACING:
        text = text.replace(old, new)
    for unit in _UNITS:
        text = text.replace(unit, "")
    text = _BOXED.sub(r"\1", _WRAPPED.sub(r"\1", _DOLLARS.sub(r"\1", text))).replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()


def _whole(label: str) -> str:
    """The label's number in digits. Exact for any size, where a float would round above 2^53."""
    text = normalized(label) if len(label) <= _MAX_LABEL else ""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number.adjusted() > _MAX_LABEL or number != number.to_integral_value():
        raise SampleError(f"label {label[:80]!r} is no whole number")
    return str(int(number))
