"""Multiple choice, as GPQA is asked: which letter does the completion settle on?"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from services.reward.scorers.base import Item, SampleError, Verdict
from services.reward.scorers.metadata import after_thinking, metadata_of

_DEFAULT_LETTERS = string.ascii_uppercase[:10]
# What may stand around a letter: (B), **B**, $B$, \text{B}, \boxed{\text{(B)}}. Bounded: it is tried at many places.
_MARKS = r"[\s(*_`$\[{\"'“:]{0,8}(?:\\(?:text|boxed|mathrm|mathbf|textbf)\s{0,4}\{[\s(*]{0,4}){0,2}"
_LETTER = r"(?-i:([A-Z])(?![\w'’])|([a-z])(?![\w'’])(?!\s{1,8}\w))"
_CLAIMED = r"\s{0,8}(?:is|would\s{1,8}be|should\s{1,8}be|must\s{1,8}be|:|=)"
# From the plainest statement to the weakest. Of one kind, the last counts: it was said after the others.
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\banswer\b[^.\n:]{{0,60}}?{_CLAIMED}\s{{0,8}}(?:option|choice)?{_MARKS}{_LETTER}",
        rf"\banswer\s{{1,8}}(?:option|choice)?{_MARKS}{_LETTER}",
        rf"\b{_LETTER}[\s)*_.\]]{{0,8}}is\s{{1,8}}(?:the\s{{1,8}})?(?:correct|right)\b",
        rf"\\boxed\s{{0,4}}\{{{_MARKS}{_LETTER}",
        rf"\b(?:option|choice){_CLAIMED}?{_MARKS}{_LETTER}",
    )
)
# A and I are words, too.
_STANDING_ALONE = re.compile(r"\b(?:[B-HJ-Z]|[AI](?!\s+[a-z]))\b")
_NOT_WORDS = re.compile(r"[^a-z0-9]+")


class _Question(NamedTuple):
    letters: Sequence[str]
    texts: Sequence[str]
    """Of the choices, in the order of their letters; empty when they are not known."""
    correct: str
    """The letter, or empty when only the text is known."""
    correct_texts: Sequence[str]


def score(item: Item) -> Verdict:
    """1 when the letter that the completion settles on is the correct one, else 0.

    Read behind the last ``</think>``: the last plain statement ("the answer is (C)"), else the last valid capital that
    stands alone. Without any letter, the text of the correct choice counts, if no other choice is named beside it.
    The correct choice is metadata's "correct_letter", else the label: a letter, a choice's text, or its number from 0.
    Metadata may give "choices" (a list, or an object by letter), "valid_letters", "correct_answer". Part ``parsed``:
    whether there was a letter. Raises SampleError when nothing says which choice is correct.
    """
    question = _question(item.label.strip(), metadata_of(item))
    text = after_thinking(item.completion)
    letter = _letter(text, question.letters)
    if letter and question.correct:
        return Verdict(float(letter == question.correct), {"parsed": 1.0})
    return Verdict(float(_names_only_correct(text, question)), {"parsed": float(bool(letter))})


def _question(label: str, metadata: dict[str, Any]) -> _Question:
    letters, texts = _choices(metadata)
    correct = str(metadata.get("correct_letter") or "").strip().upper()
    if not correct:
        correct = _letter_of_label(label, letters, texts)
    stated = [str(metadata[key]) for key in ("correct_answer", "answer_text") if metadata.get(key)]
    if correct in letters and letters.index(correct) < len(texts):
        stated.append(texts[letters.index(correct)])
    if len(label) > 1 and label.upper() not in letters:
        stated.append(label)
    correct_texts = [words for words in map(_words, stated) if words]
    if correct and correct not in letters:
        raise SampleError(f"correct letter {correct[:20]!r} is none of {', '.join(letters)}")
    if not correct and not correct_texts:
        raise SampleError(f"label {label[:80]!r} names no choice, and metadata has no correct_letter")
    return _Question(letters, [_words(text) for text in texts], correct, correct_texts)


def _choices(metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The letters, and the texts of the choices as far as they are known."""
    choices = metadata.get("choices") or []
    letters = [str(letter).strip().upper() for letter in metadata.get("valid_letters") or ()]
    if isinstance(choices, dict):
        keys = [str(key).strip().upper() for key in choices]
        letters = letters or (keys if all(len(key) == 1 for key in keys) else [])
        choices = list(choices.values())
    if not isinstance(choices, list) or len(choices) > len(string.ascii_uppercase):
        raise SampleError("metadata's choices are no list of at most 26")
    default = string.ascii_uppercase[: len(choices)] if choices else _DEFAULT_LETTERS
    return letters or list(default), [str(choice) for choice in choices]


def _letter_of_label(label: str, letters: Sequence[str], texts: Sequence[str]) -> str:
    words = _words(label)
    for letter, text in zip(letters, texts, strict=False):
        if words and words == _words(text):
            return letter
    if label.upper() in letters:
        return label.upper()
    is_number = label.isascii() and label.isdigit() and len(label) < 3
    return letters[int(label)] if is_number and int(label) < len(letters) else ""


def _letter(text: str, letters: Sequence[str]) -> str:
    """The letter it settles on, empty when there is none."""
    for statement in _STATEMENTS:
        stated = [(upper or lower).upper() for upper, lower in statement.findall(text)]
        if valid := [letter for letter in stated if letter in letters]:
            return valid[-1]
    alone = [letter for letter in _STANDING_ALONE.findall(text) if letter in letters]
    return alone[-1] if alone else ""


def _names_only_correct(text: str, question: _Question) -> bool:
    """A completion that repeats all choices has chosen none."""
    said = f" {_words(text)} "
    if not any(f" {words} " in said for words in question.correct_texts):
        return False
    for words in question.correct_texts:
        said = said.replace(f" {words} ", " | ")
    return not any(f" {words} " in said for words in question.texts if words and words not in question.correct_texts)


def _words(text: str) -> str:
    return _NOT_WORDS.sub(" ", text.lower()).strip()
