"""`math` with bounds: an answer that is a bomb is no answer."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile

from services.reward.scorers.base import Item, Scorer, Verdict
from services.reward.scorers.boxed import last_box, last_boxed
from services.reward.scorers.effort import explodes, is_too_large, processor_time

# An answer without a box ends the completion.
_TAIL = 4096
_SECONDS = 2.0


class BoundedMath:
    """Gives `scorer` what can be decided in time.

    A boxed answer that is too large to be read scores 0 with part ``parsed`` = 0, as an unreadable one does; without a
    box, what stands behind the last such line is read. With such a label, the last box is compared with it as text.
    Raises SampleError for what is not decided within 2 s of processor time.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def __call__(self, item: Item) -> Verdict:
        box = last_box(item.completion) if "\\boxed" in item.completion else None
        if _label_is_too_large(item.label):
            return Verdict(float(box is not None and _text(box) == _text(item.label)), {"parsed": 0.0})
        if box is not None and is_too_large(box):
            return Verdict(0.0, {"parsed": 0.0})
        with processor_time(_SECONDS):
            return self._scorer(item._replace(completion=box or _readable_end(item.completion)))


@lru_cache(maxsize=4096)
def _label_is_too_large(label: str) -> bool:
    """Remembered: a group has one label."""
    return is_too_large(label)


def _readable_end(completion: str) -> str:
    lines = completion[-_TAIL:].split("\n")
    kept = list(takewhile(lambda line: not explodes(line, prose=True), reversed(lines)))
    return "\n".join(reversed(kept))


def _text(answer: str) -> str:
    """Without the box around it, and without white space."""
    return "".join((last_boxed(answer) or answer).split()).strip("$")
