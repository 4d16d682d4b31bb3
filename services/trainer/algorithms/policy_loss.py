"""Policy-gradient losses per token. All tensors are float[n], of one dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch

from services.trainer.algorithms.ratios import at_level, limited, log_ratio


class Surrogate(NamedTuple):
    """Per-token results, each [n]. All but the loss without gradient."""

    loss: torch.Tensor
    ratio: torch.Tensor
    """new / old probability: the token's, or its sequence's under GSPO. Log-ratios are limited to ±20."""
    clipped: torch.Tensor
    """1 where a clip decides: where the token has no gradient or, under CISPO, its weight is not its ratio; else 0."""
    clipped_low: torch.Tensor
    """The part of it where the ratio was below."""
    clipped_dual: torch.Tensor
    """The part of it where the dual clip decides."""


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> Surrogate:
    """PPO's clipped objective (arXiv:1707.06347, equation 7) as a loss, with separate bounds (DAPO, arXiv:2503.14476).

    ``-min(ratio * A, clip(ratio, 1 - eps_clip, 1 + eps_clip_high) * A)`` with ``ratio = exp(logprobs - old_logprobs)``.
    With an `eps_clip_c`, for negative advantages at most ``-eps_clip_c * A`` (dual clip, arXiv:1912.09729).
    """
    ratio = torch.exp(limited(log_ratio(logprobs, old_logprobs)))
    return _clip(ratio, advantages, eps_clip, eps_clip_high, eps_clip_c)


def sequence_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequences: torch.Tensor,
    count: int,
    *,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> Surrogate:
    """GSPO (arXiv:2507.18071, equations 5 and 7): the same with the geometric mean of a sequence's ratios as its ratio.

    Every token of a sequence has the sequence's loss, so that the mean over its tokens is the paper's term. All tokens
    of a sequence have the same advantage.
    """
    ratio = torch.exp(limited(at_level(log_ratio(logprobs, old_logprobs), sequences, count, "geometric")))
    return _clip(ratio, advantages, eps_clip, eps_clip_high, eps_clip_c)


def cispo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv:2506.13585, equations 4 and 5): ``-sg(clip(ratio)) * A * logprobs``.

    The clipped ratio is a weight without gradient, so no token loses its gradient. An `eps_clip` of 1 or more is the
    paper's setting, without a lower bound.
    """
    ratio = torch.exp(limited(log_ratio(logprobs, old_logprobs))).detach()
    weight = ratio.clamp(1.0 - eps_clip, 1.0 + eps_clip_high)
    low = (weight > ratio).to(ratio.dtype)
    high = (weight < ratio).to(ratio.dtype)
    return Surrogate(-weight * advantages * logprobs, ratio, low + high, low, torch.zeros_like(ratio))


def _clip(
    ratio: torch.Tensor, advantages: torch.Tensor, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None
) -> Surrogate:
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - eps_clip, 1.0 + eps_clip_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    decided, negative = clipped > unclipped, advantages < 0
    dual = torch.zeros_like(negative)
    if eps_clip_c is not None:
        bound = -eps_clip_c * advantages
        dual = negative & (loss > bound)
        loss = torch.where(dual, bound, loss)
    masks = (decided | dual, decided & negative, dual)
    return Surrogate(loss, ratio.detach(), *(mask.detach().to(ratio.dtype) for mask in masks))
