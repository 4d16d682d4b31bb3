"""The scorers that come with Polyhead, by name; ``boxed_`` before it; and which one a sample asks for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from services.reward.scorers.base import Item, SampleError, Scorer, Verdict, keyed
from services.reward.scorers.boxed import last_boxed
from services.reward.scorers.metadata import rm_type_of

_PREFIX = "boxed_"
# How what stood in a box is put to scorers that look for an answer's mark of their own.
_AS_ANSWER = {"math": "\\boxed{{{}}}", "deepscaler": "</think>\\boxed{{{}}}", "dapo": "Answer: {}"}


@dataclass(frozen=True)
class Options:
    """What some of the scorers are told."""

    reward_key: str = ""
    """The part of a verdict that is the reward; empty or "score" for the scorer's own."""
    code_timeout_s: float = 6.0
    code_memory_mb: int = 512


def _function(module: str) -> Callable[[Options], Scorer]:
    """Loads a scorer that is told nothing: its module's `score`."""

    def load(_: Options) -> Scorer:
        scorer: Scorer = importlib.import_module(f"services.reward.scorers.{module}").score
        return scorer

    return load


def _math(_: Options) -> Scorer:
    from services.reward.scorers.bounded_math import BoundedMath
    from services.reward.scorers.math import MathScorer

    return BoundedMath(MathScorer())


def _deepscaler(options: Options) -> Scorer:
    from services.reward.scorers.deepscaler import DeepScaler

    return DeepScaler(_math(options))


def _code(options: Options) -> Scorer:
    from services.reward.scorers.code import CodeScorer

    return CodeScorer(timeout_s=options.code_timeout_s, memory_mb=options.code_memory_mb)


_LOADERS: dict[str, Callable[[Options], Scorer]] = {
    "code": _code,
    "dapo": _function("dapo"),
    "deepscaler": _deepscaler,
    "exact": _function("exact"),
    "f1": _function("f1"),
    "gpqa": _function("gpqa"),
    "ifbench": _function("ifbench"),
    "math": _math,
    "random": _function("chance"),
}
NAMES = tuple(_LOADERS)
"""Each may have ``boxed_`` before it."""


def is_builtin(name: str) -> bool:
    return name.removeprefix(_PREFIX) in _LOADERS


class BuiltinScorer:
    """The scorer called `name`, or the one that a sample's metadata names in "rm_type".

    A sample can only name what is built in: a data file does not choose code. Others are loaded when a sample first
    asks for them.
    """

    def __init__(self, name: str, options: Options) -> None:
        self._options = options
        self._name = name
        self._scorers = {name: load_builtin(name, options)}

    def __call__(self, item: Item) -> Verdict:
        name = self._name_for(item)
        if name not in self._scorers:
            self._scorers[name] = load_builtin(name, self._options)
        return keyed(self._scorers[name](item), self._options.reward_key)

    def chosen_by(self, item: Item) -> str:
        """The name of what scores the item where its metadata chose that, else empty. Raises SampleError."""
        name = self._name_for(item)
        return "" if name == self._name else name

    def _name_for(self, item: Item) -> str:
        asked = rm_type_of(item)
        name = asked.strip() if isinstance(asked, str) else asked
        if name is None or name == "":
            return self._name
        if not isinstance(name, str) or not is_builtin(name):
            raise SampleError(f"metadata's rm_type {str(asked)[:80]!r} is unknown; known are {', '.join(NAMES)}")
        return name


def load_builtin(name: str, options: Options) -> Scorer:
    """The scorer called `name`, and no other whatever a sample asks for."""
    scorer = _LOADERS[name.removeprefix(_PREFIX)](options)
    if not name.startswith(_PREFIX):
        return scorer
    return partial(_score_boxed, scorer, _AS_ANSWER.get(name.removeprefix(_PREFIX), "{}"))


def _score_boxed(scorer: Scorer, answer: str, item: Item) -> Verdict:
    """Scores what stands in the last box; an empty completion when there is none."""
    inside = last_boxed(item.completion)
    return scorer(item._replace(completion="" if inside is None else answer.format(inside)))
