"""Several scorers, whose weighted sum is the reward."""

from __future__ import annotations

from collections.abc import Mapping

from services.reward.scorers.base import Item, RewardSpan, SampleError, Scorer, Verdict, finite


class WeightedScorer:
    """Parts: each scorer's own reward, without its weight, by its name, and its parts as ``name.part``.

    Rewards of spans come with their scorer's weight.

    Raises SampleError, or what a scorer raises, when any of them has no score: there is no sum of some.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        self._scorers = scorers
        self._weights = weights

    def __call__(self, item: Item) -> Verdict:
        reward, parts = 0.0, {}
        spans: list[RewardSpan] = []
        for name, scorer in self._scorers.items():
            try:
                verdict = scorer(item)
            except SampleError as error:
                raise SampleError(f"{name}: {error}") from None
            reward += self._weights[name] * verdict.reward
            parts[name] = verdict.reward
            parts |= {f"{name}.{part}": value for part, value in verdict.parts.items()}
            for span in verdict.spans:
                weighted = finite(self._weights[name] * span.reward, "the weighted reward of a span")
                spans.append(span._replace(reward=weighted))
        return Verdict(finite(reward, "the weighted sum"), parts, tuple(spans))
