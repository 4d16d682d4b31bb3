"""Monte-Carlo estimators of a Kullback-Leibler divergence (J. Schulman, "Approximating KL Divergence", 2020).

Each estimates KL(P || Q) from tokens sampled by P, given their log-probabilities under both. Shapes: any, equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from services.trainer.algorithms.ratios import MAX_LOG_RATIO, limited, log_ratio

KlType = Literal["k1", "k2", "k3", "low_var_kl"]
LOW_VAR_LIMIT = 10.0


def k1(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``log p/q``: unbiased, may be negative, high variance."""
    return log_ratio(logprobs_p, logprobs_q)


def k2(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``(log p/q)**2 / 2``: biased, never negative, low variance."""
    return log_ratio(logprobs_p, logprobs_q).square() / 2


def k3(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """``q/p - 1 - log q/p``: unbiased, never negative, low variance. ``log q/p`` is limited to 20: it stays finite."""
    log_q_over_p = log_ratio(logprobs_q, logprobs_p).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_q_over_p) - log_q_over_p


def low_var_kl(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """`k3`, at most 10. No gradient beyond."""
    return k3(logprobs_p, logprobs_q).clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT)


_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "low_var_kl": low_var_kl,
}


def estimate(kind: KlType, logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """By the name of the estimator."""
    return _ESTIMATORS[kind](logprobs_p, logprobs_q)


def unbiased(kl: torch.Tensor, logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor) -> torch.Tensor:
    """The estimate of each token times ``p / behaviour``, with gradient (DeepSeek-V3.2, arXiv:2512.02556).

    The tokens were sampled by the behaviour policy. Weighed so, the mean of a `k1` or `k3` over them is that under the
    present policy, and its gradient the gradient of the divergence.
    """
    return torch.exp(limited(log_ratio(logprobs, behaviour_logprobs))) * kl
