"""GAE and the value loss as the papers write them: plain loops over samples and tokens in float64, for comparison.

Nothing here calls the trainer. A batch is as in `reference_advantages`, and a sample has "values" too: of the state
before each completion token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def rewards_of_tokens(sample: dict[str, Any], *, kl_coef: float) -> dict[int, float]:
    """By trained completion token: its KL, the rewards of spans that end at it or before the next, the outcome."""
    trained = [place for place, m in enumerate(sample["mask"]) if m]
    earned = {place: -kl_coef * sample["kl"][place] for place in trained}
    if trained:
        earned[trained[-1]] += sample["reward"]
    for index, reward in sample.get("process", ()):
        before = [place for place in trained if place <= index]
        if before:
            earned[before[-1]] += reward
    return earned


def gae(batch: Sequence[dict[str, Any]], *, kl_coef: float, gamma: float, lambd: float) -> list[list[float | None]]:
    """Schulman et al. 2015, equation 16, as the sum over all later deltas; None where nothing is trained."""
    result = []
    for sample in batch:
        earned = rewards_of_tokens(sample, kl_coef=kl_coef)
        trained = list(earned)
        deltas, decays = [], []
        for number, place in enumerate(trained):
            following, discount = 0.0, 0.0
            if number + 1 < len(trained):
                discount = gamma ** (trained[number + 1] - place)
                following = sample["values"][trained[number + 1]]
            deltas.append(earned[place] + discount * following - sample["values"][place])
            decays.append(discount * lambd)
        of_sample: list[float | None] = [None] * len(sample["mask"])
        for number, place in enumerate(trained):
            terms = (math.prod(decays[number:later]) * deltas[later] for later in range(number, len(trained)))
            of_sample[place] = math.fsum(terms)
        result.append(of_sample)
    return result


def value_loss(value: torch.Tensor, old: float, target: float, *, clip: float) -> torch.Tensor:
    """Of one token, with its gradient by cases."""
    near = min(max(value.item(), old - clip), old + clip)
    moved = near != value.item()
    if moved and (near - target) ** 2 > (value.item() - target) ** 2:
        return 0.5 * (value.detach() * 0.0 + near - target) ** 2 + 0.0 * value
    return 0.5 * (value - target) ** 2
