"""The loss of every trained token of a micro-batch, put together as ``trainer.algorithm`` says.

Nothing here looks beyond a token's own sequence, and how tokens are weighed in the loss is fixed before (see
`reduction`), so the sum over all micro-batches does not depend on how they were packed (I10).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms import kl
from services.trainer.algorithms.correction import importance_weights, off_policy_sequences, rejected
from services.trainer.algorithms.policy_loss import Surrogate, cispo, clipped_surrogate, sequence_surrogate
from services.trainer.algorithms.ratios import limited, log_ratio


class Tokens(NamedTuple):
    """Float tensors [n] of one dtype."""

    logprobs: torch.Tensor
    """With gradient, like the entropy where it is in the loss."""
    entropy: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    """Of each token in the loss."""
    policy_factors: torch.Tensor | None
    """What the policy loss of each is multiplied by; None: 1."""
    sequences: torch.Tensor
    """int64[n]"""
    sequence_count: int


class Objective(NamedTuple):
    """What a micro-batch gives, per token."""

    loss: torch.Tensor
    """[n]"""
    ratio: torch.Tensor
    """[n]: without gradient, as `clipped`."""
    clipped: torch.Tensor
    figures: dict[str, torch.Tensor]
    """By the name of the metric: values [n] whose mean over the step's tokens it is."""
    maxima: dict[str, torch.Tensor]
    """By the name of the metric: values [n] whose maximum it is."""


def objective(tokens: Tokens, algorithm: AlgorithmConfig) -> Objective:
    """``weight * policy loss + kl_loss_coef * KL - entropy_coef * entropy``, 0 where the token is rejected."""
    surrogate = _surrogate(tokens, algorithm)
    figures = {
        "clip_fraction_low": surrogate.clipped_low,
        "clip_fraction_high": surrogate.clipped - surrogate.clipped_low - surrogate.clipped_dual,
    }
    maxima = {"ratio_max": surrogate.ratio}
    if algorithm.eps_clip_c is not None:
        figures["clip_fraction_dual"] = surrogate.clipped_dual
    loss = surrogate.loss if tokens.policy_factors is None else surrogate.loss * tokens.policy_factors
    if tokens.teacher_logprobs is not None:
        figures["opd_reverse_kl"] = kl.k1(tokens.logprobs.detach(), tokens.teacher_logprobs)
    if algorithm.correction.weights != "none":
        loss = loss * _weights(tokens, algorithm, figures, maxima)
    if tokens.ref_logprobs is not None:
        divergence = kl.estimate(algorithm.kl_type, tokens.logprobs, tokens.ref_logprobs)
        figures["kl"] = divergence.detach()
        if algorithm.kl_unbiased:
            divergence = kl.unbiased(divergence, tokens.logprobs, tokens.rollout_logprobs)
        if algorithm.kl_loss_coef:
            loss = loss + algorithm.kl_loss_coef * divergence
    if algorithm.entropy_coef:
        loss = loss - algorithm.entropy_coef * tokens.entropy
    dropped = _rejected(tokens, algorithm)
    if dropped is not None:
        loss = loss.masked_fill(dropped, 0.0)
        figures["rejected_fraction"] = dropped.to(loss.dtype)
    return Objective(loss, surrogate.ratio, surrogate.clipped, figures, maxima)


def policy_ratio(tokens: Tokens) -> torch.Tensor:
    """new / old probability of each token, [n], without gradient."""
    return torch.exp(limited(log_ratio(tokens.logprobs.detach(), tokens.old_logprobs)))


def _surrogate(tokens: Tokens, algorithm: AlgorithmConfig) -> Surrogate:
    new, old, advantages = tokens.logprobs, tokens.old_logprobs, tokens.advantages
    if algorithm.policy_loss == "sft":
        none = torch.zeros_like(new)
        return Surrogate(-new, policy_ratio(tokens), none, none, none)
    low, high = algorithm.eps_clip, algorithm.eps_clip_high or algorithm.eps_clip
    if algorithm.policy_loss == "cispo":
        return cispo(new, old, advantages, eps_clip=low, eps_clip_high=high)
    dual = algorithm.eps_clip_c
    if algorithm.policy_loss == "gspo":
        sequences, count = tokens.sequences, tokens.sequence_count
        return sequence_surrogate(
            new, old, advantages, sequences, count, eps_clip=low, eps_clip_high=high, eps_clip_c=dual
        )
    return clipped_surrogate(new, old, advantages, eps_clip=low, eps_clip_high=high, eps_clip_c=dual)


def _weights(
    tokens: Tokens, algorithm: AlgorithmConfig, figures: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]
) -> torch.Tensor:
    settings = algorithm.correction
    assert settings.weights != "none"
    weights, clipped, masked = importance_weights(
        tokens.old_logprobs,
        tokens.rollout_logprobs,
        tokens.sequences,
        tokens.sequence_count,
        kind=settings.weights,
        level=settings.level,
        low=settings.low,
        high=settings.high,
    )
    figures |= {
        "correction_weight_mean": weights,
        "correction_clip_fraction": clipped,
        "correction_mask_fraction": masked,
    }
    maxima["correction_weight_max"] = weights
    return weights


def _rejected(tokens: Tokens, algorithm: AlgorithmConfig) -> torch.Tensor | None:
    """bool[n]; None when nothing can be."""
    settings, masks = algorithm.correction, []
    sequences, count = tokens.sequences, tokens.sequence_count
    if settings.reject != "none" or settings.veto > 0:
        masks.append(
            rejected(
                tokens.old_logprobs,
                tokens.rollout_logprobs,
                sequences,
                count,
                level=settings.reject,
                low=settings.reject_low,
                high=settings.reject_high,
                veto=settings.veto,
            )
        )
    if algorithm.opsm_delta is not None:
        new, old, advantages = tokens.logprobs, tokens.old_logprobs, tokens.advantages
        masks.append(off_policy_sequences(new, old, advantages, sequences, count, delta=algorithm.opsm_delta))
    return torch.stack(masks).any(dim=0) if masks else None
