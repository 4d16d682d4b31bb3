"""Overlap of words, as SQuAD and HotpotQA measure it."""

from __future__ import annotations

import re
import string
from collections import Counter

from services.reward.scorers.base import Item, SampleError, Verdict

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Not shared in part: with one of these, answer and label are equal or have nothing in common.
_WHOLE = frozenset({"yes", "no", "noanswer"})


def score(item: Item) -> Verdict:
    """The harmonic mean of precision and recall over words, 0 to 1, with those two as parts.

    Case, punctuation (ASCII), articles and the order of words do not count. "yes", "no" and "noanswer" are equal to
    the whole of the other text or share nothing with it. Raises SampleError when the label has no word.
    """
    label, answer = normalized(item.label), normalized(item.completion)
    if not label:
        raise SampleError(f"label {item.label[:80]!r} has no word to compare with")
    if answer != label and (label in _WHOLE or answer in _WHOLE):
        return _verdict(0, 1, 1)
    expected, said = label.split(), answer.split()
    return _verdict((Counter(expected) & Counter(said)).total(), len(said), len(expected))


def normalized(text: str) -> str:
    """Lower-cased words with single spaces between them, without ASCII punctuation and English articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _verdict(shared: int, said: int, expected: int) -> Verdict:
    precision, recall = (shared / said, shared / expected) if shared else (0.0, 0.0)
    mean = 2 * precision * recall / (precision + recall) if shared else 0.0
    return Verdict(mean, {"precision": precision, "recall": recall})
