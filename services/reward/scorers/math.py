"""Equality of mathematical expressions, judged by math-verify."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import verify

from services.reward.scorers.base import Item, SampleError, Verdict
from services.reward.scorers.boxed import last_boxed
from services.reward.scorers.math_reader import read
from services.reward.scorers.math_search import find
from services.reward.scorers.math_values import equal_values

# A label that is one formula.
_DELIMITED = re.compile(r"\$([^$\n]+)\$|\\boxed\{(.+)\}")
# An answer without a box stands at the end; reading all of a long completion would cost tens of milliseconds.
_TAIL = 4096


class MathScorer:
    r"""1 when the answer equals the label as mathematics, else 0.

    The answer is the content of the last complete ``\boxed{}`` of the completion, or its last expression when it has
    no box. A completion without a readable answer scores 0, with part ``parsed`` = 0; a label that cannot be read is
    the sample's failure. The verdict is math-verify's; the answers that are most frequent are read and compared without
    it. Has no time limit of its own: the pool ends what takes too long.
    """

    def __init__(self) -> None:
        # math-verify warns that its own time limits are off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # Regular expressions, the tables of a parser and SymPy's own imports: a quarter of a second, once.
        verify(find(r"$1+\sqrt{2}$"), find("$x+2$"), timeout_seconds=None)

    def __call__(self, item: Item) -> Verdict:
        gold = _read_label(item.label)
        if gold is None:
            raise SampleError(f"label {item.label[:80]!r} cannot be read as mathematics")
        answer = _read_answer(item.completion)
        return Verdict(float(_equal(gold, answer)), {"parsed": float(answer is not None)})


@functools.lru_cache(maxsize=4096)
def _read_label(label: str) -> Any:
    """The expression of a label, with or without delimiters; None when there is none."""
    delimited = "\\boxed" in label or "\\(" in label or "\\[" in label or label.replace("\\$", "").count("$") >= 2
    if not delimited:
        return _read(label.strip(" "), f"${label}$")
    formula = _DELIMITED.fullmatch(label)
    return _read(formula[1] or formula[2], label) if formula else find(label)


def _read_answer(completion: str) -> Any:
    """The expression in the last complete box, else at the end of the completion; None when there is none."""
    box = last_boxed(completion)
    if box is None:
        return find(completion[-_TAIL:])
    return _read(box.strip(), rf"\boxed{{{box}}}")


def _read(formula: str, delimited: str) -> Any:
    known = read(formula)
    return find(delimited) if known is None else known


def _equal(gold: Any, answer: Any) -> bool:
    if answer is None:
        return False
    equal = equal_values(gold, answer)
    return bool(verify(gold, answer, timeout_seconds=None)) if equal is None else equal
