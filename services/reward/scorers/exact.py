"""Equality of texts."""

from __future__ import annotations

from services.reward.scorers.base import Item, Verdict


def score(item: Item) -> Verdict:
    """1 when completion and label are equal up to white space around them, else 0."""
    return Verdict(float(item.completion.strip() == item.label.strip()), {})
