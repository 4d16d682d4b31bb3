"""Monte-Carlo estimators of a Kullback-Leibler divergence (J. Schulman, "Approximating KL Divergence", 2020).

Each estimates KL(P || Q) from tokens sampled by P, given their log-probabilities under both. Shapes: any, equal.
"""

from __future__ import annotations

import torch


def k1(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``log p/q``: unbiased, may be negative, high variance."""
    return logprobs_p - logprobs_q


def k2(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``(log p/q)**2 / 2``: biased, never negative, low variance."""
    return (logprobs_p - logprobs_q).square() / 2


def k3(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``q/p - 1 - log q/p``: unbiased, never negative, low variance."""
    log_ratio = logprobs_q - logprobs_p
    return torch.expm1(log_ratio) - log_ratio
