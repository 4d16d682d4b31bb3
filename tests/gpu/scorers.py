"""A reward that a random model can learn: no task, but a signal in every sample."""

from __future__ import annotations

from typing import Any


def even_characters(args: Any, sample: Any, **kwargs: Any) -> float:
    """Share of characters with an even code point."""
    text = sample.response
    return sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))
