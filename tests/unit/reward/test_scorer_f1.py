"""Overlap of words.

The values are those of the published scripts: SQuAD's evaluate-v1.1.py (arXiv 1606.05250), and for yes, no and noanswer
HotpotQA's hotpot_evaluate_v1.py (arXiv 1809.09600), which slime's `f1` copies.
"""

from __future__ import annotations

import pytest

from services.reward.scorers.base import SampleError
from services.reward.scorers.f1 import score
from tests.kit.reward_items import item

# completion, label, F1, precision, recall
CASES = [
    ("Paris", "Paris", 1, 1, 1),
    ("the Paris", "a paris.", 1, 1, 1),
    ("Paris, France", "Paris", 2 / 3, 1 / 2, 1),
    ("Paris", "Paris, France", 2 / 3, 1, 1 / 2),
    ("France Paris", "Paris, France!", 1, 1, 1),
    ("Paris Paris", "Paris", 2 / 3, 1 / 2, 1),
    ("London", "Paris", 0, 0, 0),
    ("", "Paris", 0, 0, 0),
    ("the", "Paris", 0, 0, 0),
    ("yes", "yes", 1, 1, 1),
    ("Yes.", "yes", 1, 1, 1),
    ("yes it is", "yes", 0, 0, 0),
    ("yes", "yes it is", 0, 0, 0),
    ("no", "yes", 0, 0, 0),
    ("noanswer", "noanswer", 1, 1, 1),
    ("red-hot", "redhot", 1, 1, 1),
    ("U.S.", "us", 1, 1, 1),
    ("theater", "theater", 1, 1, 1),
    ("naïve", "Naïve", 1, 1, 1),
    ("naïve", "naive", 0, 0, 0),
    ("１２", "12", 0, 0, 0),
    ("50%", "50 %", 1, 1, 1),
    ("50 percent", "50%", 2 / 3, 1 / 2, 1),
    ("a b\x00", "b\x00", 1, 1, 1),
]


@pytest.mark.parametrize(("completion", "label", "f1", "precision", "recall"), CASES)
def test_the_overlap(completion: str, label: str, f1: float, precision: float, recall: float) -> None:
    verdict = score(item(completion, label))
    assert verdict.reward == pytest.approx(f1)
    assert verdict.parts == {"precision": precision, "recall": recall}


@pytest.mark.parametrize("label", ["", "  ", "the", "?!"])
def test_a_label_without_words_is_a_failure(label: str) -> None:
    with pytest.raises(SampleError, match="has no word to compare with"):
        score(item("", label))
