"""math-verify's `parse`, without the work that cannot change its result.

Its patterns, their priorities, and the order of their matches are its own. A pattern is run only over a text that has
the words the pattern needs, and the LaTeX of a match goes through math-verify's parser only when `read` does not know
it.
"""

from __future__ import annotations

import functools
import re
from itertools import groupby
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify.parser import extract_match, get_extraction_regexes

from services.reward.scorers.math_reader import read

_Pattern = tuple[re.Pattern[str], Any]
# What a pattern has in its source, and what a text therefore needs.
_NEEDS = [
    ("(?i:final answer", re.compile("final answer", re.IGNORECASE)),
    ("(?i:answer)", re.compile("answer", re.IGNORECASE)),
    (r"\\boxed{", re.compile(r"\\boxed{")),
]


def find(text: str) -> Any:
    """The expression of `math_verify.parse(text, fallback_mode="no_fallback", parsing_timeout=None)`, None without one.

    The first call builds the patterns, which takes 50 ms.
    """
    lacks = [source for source, words in _NEEDS if words.search(text) is None]
    try:
        for stage in _stages():
            for match, target in _matches(stage, lacks, text):
                if (found := _read_match(match, target)) is not None:
                    return found
    except Exception:  # math-verify's own parse finds nothing then
        return None
    return None


@functools.cache
def _stages() -> list[list[_Pattern]]:
    """The patterns by priority."""
    targets = get_extraction_regexes([LatexExtractionConfig(), ExprExtractionConfig()])
    listed = [(pattern, target, priority) for patterns, target in targets for pattern, priority in patterns]
    ordered = groupby(sorted(listed, key=lambda each: each[2]), key=lambda each: each[2])
    return [[(pattern, target) for pattern, target, _ in stage] for _, stage in ordered]


def _matches(stage: list[_Pattern], lacks: list[str], text: str) -> list[tuple[re.Match[str], Any]]:
    """The last one to end first, and of those that end together the longest."""
    possible = [each for each in stage if not any(source in each[0].pattern for source in lacks)]
    found = [(match, target) for pattern, target in possible for match in pattern.finditer(text)]
    return sorted(found, key=lambda each: (each[0].end(), -each[0].start()), reverse=True)


def _read_match(match: re.Match[str], target: Any) -> Any:
    """The expression in a match, None when it cannot be read."""
    if isinstance(target, LatexExtractionConfig):
        texts = [text for text in match.groupdict().values() if text]
        # One formula, and no "percent" after it.
        if len(texts) == 1 and (known := read(texts[0].strip())) is not None:
            return known
    return extract_match(match, target)[0]
