"""Which letter a completion settles on.

The phrases are those that prompts for GPQA (arXiv 2311.12022) ask for, "The answer is (C)" of the paper's and
"Answer: C" of simple-evals, and the patterns of slime's `gpqa`; where the verdict is not slime's, docs/rewards.md says
so.
"""

from __future__ import annotations

import json

import pytest

from services.reward.scorers.base import SampleError
from services.reward.scorers.gpqa import score
from tests.kit.reward_items import item

STATED = [
    ("The answer is C", "C"),
    ("The answer is C.", "C"),
    ("the answer is c.", "C"),
    ("Answer: B", "B"),
    ("Answer B", "B"),
    ("**Answer: A**", "A"),
    ("The answer is **C**.", "C"),
    ("Answer: (D)", "D"),
    ("Answer: $\\boxed{\\text{A}}$", "A"),
    ("final answer: \\text{B}", "B"),
    ("The correct answer is\n\nD", "D"),
    ("The answer to the question above is (B).", "B"),
    ("The answer is option C", "C"),
    ("I choose option B", "B"),
    ("Choice (C) seems right", "C"),
    ("A is correct. B is not", "A"),
    ("D is the correct choice", "D"),
    ("So \\boxed{C}", "C"),
    ("\\boxed{(\\text{B})}", "B"),
    ("C", "C"),
    ("(C)", "C"),
    ("either A or maybe B", "B"),
    # The plainer statement, and of two the later one.
    ("Option A is wrong. The answer is C", "C"),
    ("The answer is A. No, the answer is B", "B"),
    ("<think>The answer is A</think> The answer is B", "B"),
    # Words are no letters.
    ("The answer involves much. Final answer: D", "D"),
    ("The answer is a matter of taste: C", "C"),
    ("answer because B", "B"),
    ("A cat sat on I do not know what: D", "D"),
    ("ABCD", ""),
    ("The answer is Z", ""),
    ("", ""),
    ("\x00", ""),
    ("Ⅽ", ""),
    ("С", ""),  # Cyrillic
]
CHOICES = ["Paris", "London", "New York", "Rome"]
# completion, label, metadata, reward, parsed
CASES = [
    ("The answer is C", "New York", {"choices": CHOICES}, 1, 1),
    ("The answer is C", "2", {"choices": CHOICES}, 1, 1),
    ("The answer is C", "", {"choices": CHOICES, "correct_letter": "c"}, 1, 1),
    ("The answer is C", "A", {"correct_letter": "C"}, 1, 1),
    ("The answer is Q", "Q", {"valid_letters": ["P", "Q"]}, 1, 1),
    ("The answer is B", "London", {"choices": {"A": "Paris", "B": "London"}}, 1, 1),
    ("The answer is E", "D", {"choices": CHOICES}, 0, 0),
    ("It is New York.", "C", {"choices": CHOICES}, 1, 0),
    ("It is new-york!", "New York", {"choices": CHOICES}, 1, 0),
    ("It is York.", "C", {"choices": CHOICES}, 0, 0),
    ("Paris, London, New York or Rome", "C", {"choices": CHOICES}, 0, 0),
    ("Mitochondria, of course", "mitochondria", {}, 1, 0),
    ("It is 42.", "C", {"correct_answer": "42"}, 1, 0),
    ("The answer is A: New York", "C", {"choices": CHOICES}, 0, 1),
]


@pytest.mark.parametrize(("completion", "letter"), STATED)
def test_the_letter(completion: str, letter: str) -> None:
    for correct in "ABCD":
        verdict = score(item(completion, correct))
        assert verdict == (float(correct == letter), {"parsed": float(bool(letter))}, ()), correct


@pytest.mark.parametrize(("completion", "label", "metadata", "reward", "parsed"), CASES)
def test_by_metadata(completion: str, label: str, metadata: dict[str, object], reward: int, parsed: int) -> None:
    verdict = score(item(completion, label, metadata_json=json.dumps(metadata)))
    assert verdict == (float(reward), {"parsed": float(parsed)}, ())


@pytest.mark.parametrize(
    ("label", "metadata", "message"),
    [
        ("", {}, "names no choice"),
        ("Z", {}, "names no choice"),
        ("9", {"choices": CHOICES}, "names no choice"),
        ("A", {"correct_letter": "Z"}, "correct letter 'Z' is none of A, B"),
        ("A", {"choices": 7}, "choices are no list"),
        ("A", {"choices": ["x"] * 27}, "choices are no list of at most 26"),
    ],
)
def test_a_sample_that_does_not_say_what_is_right(label: str, metadata: dict[str, object], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        score(item("The answer is A", label, metadata_json=json.dumps(metadata)))
