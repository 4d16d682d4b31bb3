"""Corrections for tokens that were sampled by another policy than the trainer's own at the start of the step.

All of them are functions of the log-probs ``proximal`` (the trainer's, at the start of the step) and ``behaviour``
(recorded while sampling): float[n], without gradient. `sequences` and `count` are as in `ratios`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from services.trainer.algorithms.ratios import at_level, limited, log_ratio, sequence_mean, sequence_sum

Level = Literal["token", "sequence", "geometric"]


class Weights(NamedTuple):
    """Per token, [n]."""

    weights: torch.Tensor
    """What its policy loss is multiplied by."""
    clipped: torch.Tensor
    """1 where the weight is a bound instead of the ratio; else 0."""
    masked: torch.Tensor
    """1 where the weight is 0 because the ratio is outside; else 0."""


def importance_weights(
    proximal: torch.Tensor,
    behaviour: torch.Tensor,
    sequences: torch.Tensor,
    count: int,
    *,
    kind: Literal["clip", "mask"],
    level: Level,
    low: float,
    high: float,
) -> Weights:
    """``proximal / behaviour``, of the token or of its sequence, against [low, high].

    ``clip`` brings it within: with a low of 0 truncated importance sampling (TIS; Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025), with a high of inf the weight of decoupled PPO
    (arXiv:2110.00641). ``mask`` gives 0 outside (IcePop; Ring-1T, arXiv:2510.18855).
    """
    ratio = torch.exp(limited(at_level(log_ratio(proximal, behaviour), sequences, count, level)))
    outside = (ratio < low) | (ratio > high)
    flags, none = outside.to(ratio.dtype), torch.zeros_like(ratio)
    if kind == "clip":
        return Weights(ratio.clamp(low, high), flags, none)
    return Weights(ratio.masked_fill(outside, 0.0), none, flags)


def rejected(
    proximal: torch.Tensor,
    behaviour: torch.Tensor,
    sequences: torch.Tensor,
    count: int,
    *,
    level: Literal["none", "token", "sequence", "geometric"],
    low: float,
    high: float,
    veto: float,
) -> torch.Tensor:
    """bool[n]: tokens that are not to be trained.

    Those whose ratio, or whose sequence's, is outside [low, high]; and all of a sequence with a token whose ratio is
    below `veto` (rejection as in Liu et al., "When Speed Kills Stability", 2025).
    """
    log_ratios = log_ratio(proximal, behaviour)
    outside = torch.zeros_like(log_ratios, dtype=torch.bool)
    if level != "none":
        ratio = torch.exp(limited(at_level(log_ratios, sequences, count, level)))
        outside = (ratio < low) | (ratio > high)
    if veto > 0:
        below = (torch.exp(log_ratios) < veto).to(log_ratios.dtype)
        outside = outside | (sequence_sum(below, sequences, count) > 0).index_select(0, sequences)
    return outside


def off_policy_sequences(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequences: torch.Tensor,
    count: int,
    *,
    delta: float,
) -> torch.Tensor:
    """bool[n]: tokens with a negative advantage whose sequence has a mean of ``log(old / new)`` above `delta`.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556). They are not to be trained.
    """
    divergence = sequence_mean(log_ratio(old_logprobs, logprobs).detach(), sequences, count)
    return (advantages < 0) & (divergence > delta).index_select(0, sequences)
