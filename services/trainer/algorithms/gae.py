"""Generalised advantage estimation (arXiv:1506.02438), over the trained tokens of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def generalised_advantages(
    earned: NDArray[np.float64],
    values: NDArray[np.float64],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    gamma: float,
    lambd: float,
) -> NDArray[np.float64]:
    """``A_t = delta_t + gamma * lambd * A_t'`` with ``delta_t = earned_t + gamma * V_t' - V_t``, float64[n]
    (equations 11 and 16).

    `values` are of the state before each token; t' is the next trained token of the sample, and after the last one
    there is nothing: its A and V are 0. Over tokens in between that are not trained gamma counts as many times as time
    passes, as in `discounted_returns`, and lambd once: it is a matter of the policy's own decisions. `rows` and
    `positions` are as there.
    """
    ends = np.flatnonzero(np.diff(rows, append=-1))
    lengths = np.diff(ends, prepend=-1)
    factors = np.zeros(len(rows))
    factors[:-1] = np.where(rows[1:] == rows[:-1], float(gamma) ** np.maximum(np.diff(positions), 0), 0.0)
    advantages = earned + factors * np.append(values[1:], 0.0) - values
    decay = factors * lambd
    longest_first = np.argsort(-lengths, kind="stable")
    ends, lengths = ends[longest_first], lengths[longest_first]
    # All samples at once, from their ends on: those with more than `back` tokens come first.
    for back in range(1, int(lengths.max(initial=1))):
        tokens = ends[: np.searchsorted(-lengths, -back)] - back
        advantages[tokens] += decay[tokens] * advantages[tokens + 1]
    return advantages
