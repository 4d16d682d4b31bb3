"""Advantages as the papers write them: plain loops over samples and tokens in float64, for comparison.

Nothing here calls the trainer. A batch is a list of samples, each a dict: reward, group, mask (one entry per completion
token), kl (the KL term of each completion token).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def others_of(sample: dict[str, Any], batch: Sequence[dict[str, Any]]) -> list[float]:
    return [other["reward"] for other in batch if other["group"] == sample["group"] and other is not sample]


def grpo(batch: Sequence[dict[str, Any]], *, std: bool) -> list[float]:
    """DeepSeekMath, section 4.1.2, with Bessel's correction; without `std`, Dr. GRPO."""
    result = []
    for sample in batch:
        group = [sample["reward"], *others_of(sample, batch)]
        if len(group) == 1:
            result.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        result.append((sample["reward"] - mean) / (deviation + 1e-6 if std else 1.0))
    return result


def shaped(sample: dict[str, Any], kl_coef: float) -> float:
    """RLOO's reward of a whole completion: R - beta * sum of log ratios over what is trained."""
    return sample["reward"] - kl_coef * math.fsum(k for k, m in zip(sample["kl"], sample["mask"], strict=True) if m)


def rloo(batch: Sequence[dict[str, Any]], *, kl_coef: float) -> list[float]:
    """Back to Basics: R_i - 1/(k-1) * sum over j != i of R_j."""
    result = []
    for sample in batch:
        others = [
            shaped(other, kl_coef) for other in batch if other["group"] == sample["group"] and other is not sample
        ]
        result.append(shaped(sample, kl_coef) - math.fsum(others) / len(others) if others else 0.0)
    return result


def returns(
    batch: Sequence[dict[str, Any]], *, kl_coef: float, gamma: float, baseline: bool
) -> list[list[float | None]]:
    """REINFORCE++: sum over t' >= t of gamma**(t'-t) * r_t', None where nothing is trained.

    r_t = -kl_coef * kl_t, and the reward at the last trained token; with `baseline`, minus its group's mean.
    """
    result = []
    for sample in batch:
        trained = [place for place, m in enumerate(sample["mask"]) if m]
        reward = sample["reward"]
        if baseline:
            group = [reward, *others_of(sample, batch)]
            reward -= math.fsum(group) / len(group)
        earned = [0.0] * len(sample["mask"])
        for place in trained:
            earned[place] = -kl_coef * sample["kl"][place] + (reward if place == trained[-1] else 0.0)
        of_sample: list[float | None] = [None] * len(earned)
        for place in trained:
            of_sample[place] = math.fsum(
                gamma ** (later - place) * earned[later] for later in range(place, len(earned))
            )
        result.append(of_sample)
    return result


def whitened(values: Sequence[float]) -> list[float]:
    """Over all trained tokens of the batch, with Bessel's correction."""
    if len(values) < 2:
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]
