"""The scorers, by name. Nothing heavy is imported before a scorer that needs it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.reward.scorers.base import Scorer, WholeScorer
from services.reward.scorers.builtin import BuiltinScorer, Options, is_builtin, load_builtin


def build(
    name: str,
    *,
    paths: Sequence[str | Path],
    args: Mapping[str, Any],
    options: Options | None = None,
) -> Scorer:
    """The scorer called `name`: a built-in one (`builtin.NAMES`), or the dotted path of a user's function.

    `paths` are put on sys.path for user functions, `args` is the first argument they get.
    Raises ConfigError for an unknown name and for a function that does not import.
    """
    options = options or Options()
    if is_builtin(name):
        return BuiltinScorer(name, options)
    from services.reward.scorers.user import UserScorer

    return UserScorer(name, _directories(paths), args, reward_key=options.reward_key)


def build_weighted(
    weights: Mapping[str, float], *, paths: Sequence[str | Path], args: Mapping[str, Any], options: Options
) -> Scorer:
    """The weighted sum of scorers, each as for `build`, but no sample chooses another one. Raises ConfigError."""
    from services.reward.scorers.user import UserScorer
    from services.reward.scorers.weighted import WeightedScorer

    scorers: dict[str, Scorer] = {
        name: load_builtin(name, options)
        if is_builtin(name)
        else UserScorer(name, _directories(paths), args, field="reward.weights")
        for name in weights
    }
    return WeightedScorer(scorers, weights)


def build_whole(
    name: str, *, paths: Sequence[str | Path], args: Mapping[str, Any], reward_key: str = ""
) -> WholeScorer:
    """A user's function that scores groups. Raises ConfigError when it does not import."""
    from services.reward.scorers.user import UserWholeScorer

    return UserWholeScorer(name, _directories(paths), args, reward_key=reward_key)


def _directories(paths: Sequence[str | Path]) -> list[Path]:
    return [Path(path) for path in paths]
