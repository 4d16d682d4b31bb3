"""Sampling for all slots at once, with random numbers that depend on nothing but (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_KEEP_52_BITS = np.uint64(12)


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of B rows; what no row needs is None."""

    uniforms: NDArray[np.float64]
    """[B] in [0, 1), see `uniforms`."""
    inverse_temperatures: NDArray[np.float32] | None
    """[B]; None when all are 1. 1 for greedy rows."""
    greedy: NDArray[np.bool_] | None
    """[B]; None when no row is greedy."""
    top_p: NDArray[np.float64] | None
    top_k: NDArray[np.int64] | None
    """[B], both or none of them; a row that does not truncate has 1.0 and the size of the vocabulary."""
    forbidden: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    """Pairs (row, token id) that must not be drawn: stop tokens before `min_new_tokens`."""


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., 2014): a bijection of 64 bits whose outputs look independent."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        values = (values ^ (values >> shift)) * multiplier
    return values ^ (values >> _SHIFTS[2])


def uniforms(mixed_seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """[B] numbers in [0, 1), a pure function of (`mix`\\ ed seed, absolute position of the token to be drawn).

    So a completion that is resumed as a longer prompt with the same seed goes on with the same stream.
    52 bits, so that the largest times any sum stays below that sum.
    """
    counters = positions.astype(np.uint64) + np.uint64(1)
    return (mix(mixed_seeds + counters * _GOLDEN) >> _KEEP_52_BITS).astype(np.float64) * 2.0**-52


def sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row of float32 `logits` [B, vocab].

    Returns token ids, int64 [B], and the log-probabilities, float32 [B, vocab]: log-softmax of logits / temperature
    before any truncation (temperature 1 for greedy rows). Rows do not influence each other.
    """
    if batch.inverse_temperatures is not None:
        logits = logits * torch.from_numpy(batch.inverse_temperatures).to(logits.device)[:, None]
    logprobs = logits.log_softmax(-1)
    allowed = logprobs
    if batch.forbidden is not None:
        allowed = logprobs.clone()
        allowed[tuple(torch.from_numpy(index).to(logits.device) for index in batch.forbidden)] = float("-inf")
    if batch.greedy is not None and batch.greedy.all():
        return allowed.argmax(-1), logprobs
    probabilities = allowed.exp()
    if batch.top_p is not None and batch.top_k is not None:
        probabilities = _truncate(probabilities, torch.from_numpy(batch.top_p), torch.from_numpy(batch.top_k))
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    thresholds = torch.from_numpy(batch.uniforms).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative sum is above the threshold: never one of probability 0.
    tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    if batch.greedy is not None:
        tokens = torch.where(torch.from_numpy(batch.greedy).to(logits.device), allowed.argmax(-1), tokens)
    return tokens, logprobs


def _truncate(probabilities: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Zeroes all but the `top_k` most probable tokens, then all after the cumulative sum of those reaches `top_p`."""
    device = probabilities.device
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probabilities.shape[-1], device=device)
    ordered = ordered.double().masked_fill_(ranks >= top_k.to(device)[:, None], 0.0)
    before = ordered.cumsum(-1) - ordered
    keep = (before < top_p.to(device)[:, None] * ordered.sum(-1, keepdim=True)) & (ordered > 0)
    # A row that does not truncate keeps its bits: its neighbours' parameters must not matter.
    keep |= ((top_p >= 1.0) & (top_k >= probabilities.shape[-1])).to(device)[:, None]
    return probabilities * torch.empty_like(keep).scatter_(-1, order, keep)
