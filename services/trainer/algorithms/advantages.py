"""Advantages from rewards: per sample, relative to its group, and per token, as discounted returns.

Groups are told apart by `group_id`, whatever their sizes and order. Arrays are float64: [samples], or [n] over the
trained tokens of a batch in the order of its samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Keeps a group of nearly equal rewards finite. The value of the reference implementations.
STD_EPS = 1e-6
# The same for the variance of a whole batch.
VARIANCE_EPS = 1e-8


def group_advantages(
    rewards: NDArray[np.float64], group_ids: Sequence[str], *, normalize_std: bool
) -> NDArray[np.float64]:
    """Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1.2), float64[n].

    ``(r - mean) / (std + 1e-6)`` over the samples of the same group, whatever the sizes of the groups, with the
    sample standard deviation (n - 1). Without `normalize_std` only the mean is removed (Dr. GRPO, arXiv:2503.20783).
    A group of one has nothing to be compared with: 0.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    for rows in groups_of(group_ids):
        group = rewards[rows]
        centred = group - group.mean()
        advantages[rows] = centred / (group.std(ddof=1) + STD_EPS) if normalize_std else centred
    return advantages


def leave_one_out(rewards: NDArray[np.float64], group_ids: Sequence[str]) -> NDArray[np.float64]:
    """RLOO (arXiv:2402.14740): each reward minus the mean of the *others* of its group, float64[samples].

    A group of one has no others: 0.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    for rows in groups_of(group_ids):
        group = rewards[rows]
        advantages[rows] = (group - group.mean()) * (len(rows) / (len(rows) - 1))
    return advantages


def discounted_returns(
    rewards: NDArray[np.float64],
    token_rewards: NDArray[np.float64],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    gamma: float,
) -> NDArray[np.float64]:
    """What each trained token is still followed by, itself included, float64[n] (REINFORCE++, arXiv:2501.03262).

    A token earns its `token_rewards`, the last trained one of a sample its entry of `rewards` as well. `rows` is the
    sample of each token, `positions` its place among all completion tokens of that sample: time passes on tokens that
    are not trained, too. Tokens of one sample stand together, in order.
    """
    earned = with_outcomes(rewards, token_rewards, rows)
    returns = np.empty_like(earned)
    start = 0
    for end in (_ends(rows) + 1).tolist():
        returns[start:end] = _returns(earned[start:end], positions[start:end], gamma)
        start = end
    return returns


def with_outcomes(
    rewards: NDArray[np.float64], token_rewards: NDArray[np.float64], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`token_rewards` plus, at the last trained token of each sample, its entry of `rewards`: float64[n]."""
    ends, earned = _ends(rows), token_rewards.copy()
    earned[ends] += rewards[rows[ends]]
    return earned


def _ends(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The last token of each sample that has any."""
    return np.flatnonzero(np.diff(rows, append=-1))


def _returns(earned: NDArray[np.float64], positions: NDArray[np.int64], gamma: float) -> NDArray[np.float64]:
    """Of one sample."""
    if gamma == 1.0:
        return np.cumsum(earned[::-1])[::-1]
    factors = gamma ** np.diff(positions).astype(np.float64)
    returns, following = earned.copy(), 0.0
    for token in range(len(earned) - 1, -1, -1):
        following = earned[token] + (following * factors[token] if token < len(factors) else 0.0)
        returns[token] = following
    return returns


def whiten(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(x - mean) / sqrt(var + 1e-8)`` over all trained tokens of the batch, with the sample variance (n - 1).

    Equal values, and a single one, become 0.
    """
    if len(values) < 2:
        return np.zeros_like(values)
    return (values - values.mean()) / np.sqrt(values.var(ddof=1) + VARIANCE_EPS)


def groups_of(group_ids: Sequence[str]) -> Iterator[list[int]]:
    """The rows of each group of two or more."""
    members: dict[str, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(row)
    return (rows for rows in members.values() if len(rows) > 1)
