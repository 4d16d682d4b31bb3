"""What a pool process scores with, built from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from services.reward.scorers import build, build_weighted, build_whole
from services.reward.scorers.base import Item, Scorer, Verdict, WholeItem, WholeScorer
from services.reward.scorers.builtin import BuiltinScorer, Options
from services.reward.scorers.overlong import Overlong

Finish = Callable[[Item, Verdict], Verdict]


def scoring(settings: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """What answers the kind of items that the scorer takes, as they come over the wire. Raises ConfigError."""
    paths, args, finish = [Path(path) for path in settings["paths"]], settings["args"], _finishing(settings)
    if settings["group_rm"]:
        whole = build_whole(settings["name"], paths=paths, args=args, reward_key=settings["reward_key"])
        return {WholeItem.__name__: partial(_score_whole, whole, finish)}
    options = Options(**{field.name: settings[field.name] for field in fields(Options)})
    if settings["weights"]:
        scorer = build_weighted(settings["weights"], paths=paths, args=args, options=options)
    else:
        scorer = build(settings["name"], paths=paths, args=args, options=options)
    return {Item.__name__: partial(_score, scorer, finish)}


def _finishing(settings: dict[str, Any]) -> list[Finish]:
    """What is done to each verdict, in order."""
    finish: list[Finish] = []
    if settings["shaping"]:
        from services.reward.scorers.shaping import Shaping

        finish.append(Shaping(settings["shaping"], [Path(path) for path in settings["paths"]], settings["args"]))
    if settings["overlong"]:
        finish.append(Overlong(**settings["overlong"]))
    return finish


def _score(scorer: Scorer, finish: Sequence[Finish], item: list[Any]) -> tuple[Verdict, str]:
    """The verdict, and the name of the scorer where the sample chose it."""
    each = Item(*item)
    chosen = scorer.chosen_by(each) if isinstance(scorer, BuiltinScorer) else ""
    return _finished(finish, each, scorer(each)), chosen


def _score_whole(scorer: WholeScorer, finish: Sequence[Finish], item: list[Any]) -> list[Verdict]:
    items = [Item(*each) for each in WholeItem(*item).items]
    return [_finished(finish, each, verdict) for each, verdict in zip(items, scorer(items), strict=True)]


def _finished(finish: Sequence[Finish], item: Item, verdict: Verdict) -> Verdict:
    for step in finish:
        verdict = step(item, verdict)
    return verdict
