"""The scorers, by name. Nothing heavy is imported before a scorer that needs it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.reward.scorers.base import Scorer


def build(name: str, *, paths: Sequence[str], args: Mapping[str, Any]) -> Scorer:
    """The scorer called `name`: "math", "exact", or the dotted path of a user's function.

    `paths` are put on sys.path for user functions, `args` is the first argument they get.
    Raises ConfigError for an unknown name and for a function that does not import.
    """
    if name == "math":
        from services.reward.scorers.math import MathScorer

        return MathScorer()
    if name == "exact":
        from services.reward.scorers.exact import score

        return score
    from services.reward.scorers.user import UserScorer

    return UserScorer(name, [Path(path) for path in paths], args)
