"""Equality of mathematical expressions, judged by math-verify."""

from __future__ import annotations

import functools
import logging
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from services.reward.scorers.base import Item, SampleError, Verdict
from services.reward.scorers.boxed import last_box

_EXTRACTION = [LatexExtractionConfig(), ExprExtractionConfig()]
# An answer without a box stands at the end; reading all of a long completion would cost tens of milliseconds.
_TAIL = 4096


class MathScorer:
    r"""1 when the answer equals the label as mathematics, else 0.

    The answer is the content of the last complete ``\boxed{}`` of the completion, or its last expression when it has
    no box. A completion without a readable answer scores 0, with part ``parsed`` = 0; a label that cannot be read is
    the sample's failure. Has no time limit of its own: the pool ends what takes too long.
    """

    def __init__(self) -> None:
        # math-verify warns that its own time limits are off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        _parse("$1$")  # builds its regular expressions, about 50 ms

    def __call__(self, item: Item) -> Verdict:
        gold = _parse_label(item.label)
        if not gold:
            raise SampleError(f"label {item.label[:80]!r} cannot be read as mathematics")
        answer = _parse(_answer_text(item.completion))
        equal = bool(answer) and verify(gold, answer, timeout_seconds=None)
        return Verdict(float(equal), {"parsed": float(bool(answer))})


@functools.lru_cache(maxsize=4096)
def _parse_label(label: str) -> list[Any]:
    delimited = "\\boxed" in label or "\\(" in label or "\\[" in label or label.replace("\\$", "").count("$") >= 2
    return _parse(label if delimited else f"${label}$")


def _parse(text: str) -> list[Any]:
    """Expressions found in `text`, empty when there is none."""
    # Without "no_fallback", an unreadable text would be returned as a string and compared as such.
    return parse(text, _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)


def _answer_text(completion: str) -> str:
    """The last complete box, else the end of the completion."""
    box = last_box(completion) if "\\boxed" in completion else None
    return box or completion[-_TAIL:]
