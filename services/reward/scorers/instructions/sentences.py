"""Sentences and words of a text. Every pattern here takes time in proportion to the text, whatever it holds."""

from __future__ import annotations

import re
import string

# An end mark with what closes around it, before white space or the end.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|\Z)")
_LAST_WORD = re.compile(r"(?:\w|\.)*\Z")
_ABBREVIATIONS = re.compile(
    r"mr|mrs|ms|dr|prof|st|jr|sr|vs|rev|gen|col|capt|lt|e\.g|i\.e|cf|al|fig|inc|ltd|co|corp|dept|est|approx",
    re.IGNORECASE,
)
# a.m., U.S.: they end a sentence or not, which the next word tells.
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")
_LONGEST_WORD = 40
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def sentences(text: str) -> list[str]:
    """Up to their end marks: ``.``, ``!``, ``?`` before white space.

    A point behind an abbreviation, an initial or the number of an item in a list ends none.
    """
    found: list[str] = []
    start = 0
    for end in _END.finditer(text):
        if end[0] == "." and _abbreviates(text, end.start(), text[end.end() : end.end() + 2].strip()):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def words(text: str) -> list[str]:
    """Lower-cased, without ASCII punctuation, between white space."""
    return text.lower().translate(_PUNCTUATION).split()


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: "don't" is two."""
    return sum(1 for _ in re.finditer(r"\w+", text))


def _abbreviates(text: str, point: int, following: str) -> bool:
    before = _LAST_WORD.search(text[max(0, point - _LONGEST_WORD) : point])
    word = before[0] if before else ""
    line = text[max(0, point - _LONGEST_WORD) : point].rpartition("\n")[2]
    is_item = word.isdigit() and line.strip(" \t*#>-") == word and len(line) < _LONGEST_WORD
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    goes_on = following[:1].islower() and _DOTTED.fullmatch(word) is not None
    return _ABBREVIATIONS.fullmatch(word) is not None or is_initial or is_item or goes_on
