r"""The last ``\boxed{…}`` of a text."""

from __future__ import annotations

import re

# A box being opened; an escaped character, which is no brace; a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_PLAIN = -1


def last_box(text: str) -> str | None:
    """The last ``\\boxed{…}`` with balanced braces, in one pass over the text whatever it holds."""
    opened: list[int] = []
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else _PLAIN
            if start != _PLAIN and (last is None or start > last[0]):
                last = start, token.end()
        elif token[0] == "{":
            opened.append(_PLAIN)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.start())
    return text[slice(*last)] if last else None


def last_boxed(text: str) -> str | None:
    """What stands in the last box; None when no box is complete."""
    box = last_box(text) if "\\boxed" in text else None
    return None if box is None else box[box.index("{") + 1 : -1]
