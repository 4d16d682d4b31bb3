"""What an optimizer step did: the figures of its micro-batches, added up over them and over the ranks."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from services.trainer.algorithms.kl import k3
from services.trainer.algorithms.objective import Objective
from services.trainer.backends.torch.critic import CriticResult
from services.trainer.backends.torch.logprobs import DeviceBatch, TokenLogprobs
from services.trainer.batch.packing import PackedBatch


@dataclass
class StepResult:
    """What one optimizer step did. Sums are over trained tokens, at the weights before the step."""

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    applied: bool = False
    """False when the loss or the gradient was not finite: the weights are as before."""
    micro_batches: int = 0
    tokens: int = 0
    fresh_tokens: int = 0
    entropy: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    mismatch_kl: float = 0.0
    """k3 estimate of KL(rollout policy || trainer policy)."""
    mismatch_kl_fresh: float = 0.0
    """The same over tokens sampled by the very weights being trained."""
    figures: dict[str, float] = field(default_factory=dict)
    """Sums of what the algorithm reports besides, by the name of the metric that their mean is."""
    maxima: dict[str, float] = field(default_factory=dict)
    """Over trained tokens, by the name of the metric."""
    expert_load_max: float | None = None
    """Of the expert with most tokens, its share times the experts, mean over layers; None where that is not known."""
    offenders: list[int] = field(default_factory=list)
    """Rows of samples whose tokens gave a loss that is not finite."""
    critic: CriticResult | None = None
    """Of the critic's optimizer step on the same tokens; None where there is no critic."""
    critic_only: bool = False
    """The policy was not trained: what is not of the critic is 0, and `applied` is the critic's."""


# Of StepResult, in the order of `figures_of`.
_SUMS = ("loss", "entropy", "ratio", "clipped", "mismatch_kl", "mismatch_kl_fresh")


class MicroBatchFigures(NamedTuple):
    """Of one micro-batch, where it was computed."""

    names: Sequence[str]
    maxima: int
    """How many of them are maxima, the last ones; the others are sums."""
    values: torch.Tensor
    losses: torch.Tensor
    """Of each trained token."""


def total_of(parts: Sequence[Mapping[str, Any]]) -> StepResult:
    """Of the results of all ranks: sums, and the greatest of the maxima."""
    total = StepResult()
    for part in parts:
        for name, value in part.items():
            before = getattr(total, name)
            if isinstance(value, Mapping):
                combine = max if name == "maxima" else operator.add
                before.update(
                    {key: combine(before[key], each) if key in before else each for key, each in value.items()}
                )
            elif name not in ("applied", "critic", "critic_only", "expert_load_max"):
                setattr(total, name, before + value)
    return total


def figures_of(batch: DeviceBatch, loss: torch.Tensor, tokens: TokenLogprobs, losses: Objective) -> MicroBatchFigures:
    """Of what `batch` gave, `loss` in all. Waits for nothing."""
    mismatch = k3(batch.rollout_logprobs, tokens.logprobs.detach())
    sums = [
        *(loss, tokens.entropy.detach().sum(), losses.ratio.sum(), losses.clipped.sum()),
        *(mismatch.sum(), (mismatch * batch.fresh).sum()),
        *(values.sum() for values in losses.figures.values()),
    ]
    maxima = [values.max() for values in losses.maxima.values()]
    names = [*_SUMS, *losses.figures, *losses.maxima]
    return MicroBatchFigures(names, len(maxima), torch.stack([*sums, *maxima]), losses.loss.detach())


def add(result: StepResult, micro_batch: PackedBatch, figures: MicroBatchFigures) -> None:
    """Reads the figures from their device, and adds them to `result`."""
    values = figures.values.tolist()
    first_maximum = len(values) - figures.maxima
    for place, (name, value) in enumerate(zip(figures.names, values, strict=True)):
        if place < len(_SUMS):
            setattr(result, name, getattr(result, name) + value)
        elif place < first_maximum:
            result.figures[name] = result.figures.get(name, 0.0) + value
        else:
            result.maxima[name] = max(result.maxima.get(name, value), value)
    result.tokens += len(micro_batch.targets)
    result.fresh_tokens += int(micro_batch.fresh.sum())
    if not math.isfinite(values[0]):
        bad = (~torch.isfinite(figures.losses)).cpu().numpy()
        result.offenders += np.unique(micro_batch.sample_rows[bad]).tolist()
