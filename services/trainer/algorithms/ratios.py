"""Importance ratios of tokens and of whole sequences, over flat arrays with a sequence index.

A *sequence* is one segment's trained tokens; it lies within one micro-batch. `sequences` is int64[n], the sequence of
each token; `count` is how many there are.
"""

from __future__ import annotations

from typing import Literal

import torch

# exp() of this is finite in float32, and far outside any clip range: a larger log-ratio has no gradient either way
# for positive advantages, and would be an overflow for negative ones.
MAX_LOG_RATIO = 20.0


def log_ratio(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new - old``, unlimited; 0 without gradient where both say that the token is impossible (-inf)."""
    return (new - old).masked_fill(torch.isneginf(new) & torch.isneginf(old), 0.0)


def limited(log_ratios: torch.Tensor) -> torch.Tensor:
    """Within ±20, so that the ratio is finite. No gradient outside."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_sum(values: torch.Tensor, sequences: torch.Tensor, count: int) -> torch.Tensor:
    """[count]: over the tokens of each sequence; 0 for one without tokens."""
    return values.new_zeros(count).index_add(0, sequences, values)


def sequence_mean(values: torch.Tensor, sequences: torch.Tensor, count: int) -> torch.Tensor:
    """[count]: over the tokens of each sequence; 0 for one without tokens."""
    lengths = sequence_sum(torch.ones_like(values), sequences, count)
    return sequence_sum(values, sequences, count) / lengths.clamp(min=1.0)


def at_level(
    log_ratios: torch.Tensor, sequences: torch.Tensor, count: int, level: Literal["token", "sequence", "geometric"]
) -> torch.Tensor:
    """[n]: the token's own log-ratio, or the sum (the ratio is a product) or the mean over its sequence."""
    if level == "token":
        return log_ratios
    reduce = sequence_sum if level == "sequence" else sequence_mean
    return reduce(log_ratios, sequences, count).index_select(0, sequences)
