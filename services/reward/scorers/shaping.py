"""A user's function that shapes rewards: ``[async] def fn(args, sample, reward) -> float``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.reward.filters import ScoredItem, to_scored_sample
from services.reward.scorers.base import Item, Verdict, finite
from services.reward.scorers.user import UserFunction


class Shaping:
    """Puts what the function makes of a reward in its place."""

    def __init__(self, path: str, search: Sequence[Path], args: Mapping[str, Any]) -> None:
        """Raises ConfigError when it does not import or cannot be called with (args, sample, reward)."""
        self._function = UserFunction(path, search, args, "fn(args, sample, reward)", "reward.shaping")

    def __call__(self, item: Item, verdict: Verdict) -> Verdict:
        """The scorer's own reward is kept as part ``unshaped``. Raises SampleError for what is no finite number."""
        sample = to_scored_sample(ScoredItem(item, verdict.reward, verdict.parts))
        shaped = finite(self._function(sample, sample.reward), "the shaped reward")
        return verdict._replace(reward=shaped, parts={**verdict.parts, "unshaped": verdict.reward})
