"""Policy-gradient losses per token."""

from __future__ import annotations

from typing import NamedTuple

import torch

# exp() of this is finite in float32, and far outside any clip range: a larger log-ratio has no gradient either way
# for positive advantages, and would be an overflow for negative ones.
MAX_LOG_RATIO = 20.0


class Surrogate(NamedTuple):
    """Per-token results, each float32[n]."""

    loss: torch.Tensor
    ratio: torch.Tensor
    """Without gradient."""
    clipped: torch.Tensor
    """1 where the clip decides, so that the token has no gradient; else 0."""


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
) -> Surrogate:
    """PPO's clipped objective (arXiv:1707.06347, equation 7) as a loss, with separate bounds (DAPO, arXiv:2503.14476).

    ``-min(ratio * A, clip(ratio, 1 - eps_clip, 1 + eps_clip_high) * A)`` with ``ratio = exp(logprobs - old_logprobs)``.
    The old policy is the behaviour policy: `old_logprobs` are those recorded when the tokens were sampled.
    All arguments are float32[n].
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - eps_clip, 1.0 + eps_clip_high) * advantages
    return Surrogate(
        loss=torch.maximum(unclipped, clipped),
        ratio=ratio.detach(),
        clipped=(clipped > unclipped).detach().float(),
    )
