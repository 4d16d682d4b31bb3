"""DeepScaleR's rule: the box behind the thinking, equal as text of the MATH data set or as mathematics."""

from __future__ import annotations

from services.reward.scorers.base import Item, SampleError, Scorer, Verdict
from services.reward.scorers.boxed import last_boxed
from services.reward.scorers.effort import MAX_CHARACTERS, UndecidedError
from services.reward.scorers.hendrycks import normalized


class DeepScaler:
    r"""1 when the last ``\boxed{}`` after the thinking equals the label, else 0.

    The thinking ends with the last ``</think>`` or at ``###Response``; a completion with neither scores 0, as does one
    without a box behind it (part ``parsed`` = 0). Equal are texts in the MATH data set's one form (`hendrycks`), and
    what `math` calls equal. Raises SampleError for an empty label.
    """

    def __init__(self, math: Scorer) -> None:
        self._math = math

    def __call__(self, item: Item) -> Verdict:
        label = last_boxed(item.label) or item.label
        if not label.strip():
            raise SampleError("label is empty")
        answer = last_boxed(_response(item.completion))
        if answer is None or len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, {"parsed": 0.0})
        return Verdict(float(_same_text(answer, label) or self._equal(item, answer)), {"parsed": 1.0})

    def _equal(self, item: Item, answer: str) -> bool:
        try:
            return bool(self._math(item._replace(completion=f"\\boxed{{{answer}}}")).reward)
        except UndecidedError:
            raise
        except SampleError:  # a label of words, which has been compared as text
            return False


def _response(completion: str) -> str:
    """What follows the thinking, empty when nothing says where it ends."""
    if "</think>" in completion:
        return completion.rpartition("</think>")[2]
    return completion.partition("###Response")[2]


def _same_text(answer: str, label: str) -> bool:
    one, other = normalized(answer), normalized(label)
    return one == other or (one.isalpha() and one.casefold() == other.casefold())
