"""DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass

from services.reward.scorers.base import Item, Verdict


@dataclass(frozen=True)
class Overlong:
    """Lengths in tokens. The penalty falls from 0 to -`factor` over the last `buffer_len` of `max_len`."""

    max_len: int
    buffer_len: int
    factor: float

    def __call__(self, item: Item, verdict: Verdict) -> Verdict:
        """The verdict with the penalty, which is at most 0, added to its reward and kept as part ``overlong``."""
        over = item.completion_tokens - (self.max_len - self.buffer_len)
        penalty = -self.factor * min(1.0, over / self.buffer_len) if over > 0 else 0.0
        return verdict._replace(reward=verdict.reward + penalty, parts={**verdict.parts, "overlong": penalty})
