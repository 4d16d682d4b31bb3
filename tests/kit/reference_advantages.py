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


def process_outcome(sample: dict[str, Any], *, only: bool, whole: bool) -> dict[str, Any]:
    """The sample with what it is rewarded with as a whole; `whole` adds up what its parts are rewarded with."""
    reward = 0.0 if only else sample["reward"]
    return {**sample, "reward": reward + (math.fsum(r for _, r in sample["process"]) if whole else 0.0)}


def process_supervision(batch: Sequence[dict[str, Any]], *, std: bool) -> list[list[float]]:
    """DeepSeekMath, section 4.1.3: per completion token, the sum over steps j with index(j) >= t of the normalised r_j.

    A sample's "process" is a list of (index(j), r_j). With Bessel's correction; 0 in a group of one sample.
    """
    result = []
    for sample in batch:
        members = [other for other in batch if other["group"] == sample["group"]]
        rewards = [reward for member in members for _, reward in member["process"]]
        if len(members) == 1 or len(rewards) < 2:
            result.append([0.0] * len(sample["mask"]))
            continue
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        scale = deviation + 1e-6 if std else 1.0
        result.append(
            [
                math.fsum((reward - mean) / scale for index, reward in sample["process"] if index >= place)
                for place in range(len(sample["mask"]))
            ]
        )
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
        for index, step_reward in sample.get("process", ()):
            before = [place for place in trained if place <= index]
            if before:
                earned[before[-1]] += step_reward
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
