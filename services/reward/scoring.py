"""What a pool process scores with, built from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from services.reward.scorers import build, build_weighted, build_whole
from services.reward.scorers.base import Item, Scorer, Verdict, WholeItem, WholeScorer
from services.reward.scorers.builtin import BuiltinScorer, Options


def scoring(settings: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """What answers the kind of items that the scorer takes, as they come over the wire. Raises ConfigError."""
    paths, args = [Path(path) for path in settings["paths"]], settings["args"]
    if settings["group_rm"]:
        whole = build_whole(settings["name"], paths=paths, args=args, reward_key=settings["reward_key"])
        return {WholeItem.__name__: partial(_score_whole, whole)}
    options = Options(**{field.name: settings[field.name] for field in fields(Options)})
    if settings["weights"]:
        scorer = build_weighted(settings["weights"], paths=paths, args=args, options=options)
    else:
        scorer = build(settings["name"], paths=paths, args=args, options=options)
    return {Item.__name__: partial(_score, scorer)}


def _score(scorer: Scorer, item: list[Any]) -> tuple[Verdict, str]:
    """The verdict, and the name of the scorer where the sample chose it."""
    each = Item(*item)
    return scorer(each), scorer.chosen_by(each) if isinstance(scorer, BuiltinScorer) else ""


def _score_whole(scorer: WholeScorer, item: list[Any]) -> list[Verdict]:
    return scorer([Item(*each) for each in WholeItem(*item).items])
