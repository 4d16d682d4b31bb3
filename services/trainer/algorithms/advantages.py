"""Advantages from rewards, per group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Keeps a group of nearly equal rewards finite. The value of the reference implementations.
STD_EPS = 1e-6


def group_advantages(
    rewards: NDArray[np.float64], group_ids: Sequence[str], *, normalize_std: bool
) -> NDArray[np.float64]:
    """Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1.2), float64[n].

    ``(r - mean) / (std + 1e-6)`` over the samples of the same group, whatever the sizes of the groups, with the
    sample standard deviation (n - 1). Without `normalize_std` only the mean is removed (Dr. GRPO, arXiv:2503.20783).
    A group of one has nothing to be compared with: 0.
    """
    members: dict[str, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(row)
    advantages = np.zeros(len(rewards), dtype=np.float64)
    for rows in members.values():
        if len(rows) == 1:
            continue
        group = rewards[rows]
        centred = group - group.mean()
        advantages[rows] = centred / (group.std(ddof=1) + STD_EPS) if normalize_std else centred
    return advantages
