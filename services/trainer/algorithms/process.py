"""Process rewards: rewards for parts of a completion, each earned at the token where its part ends.

[s] is over the process rewards of all samples of a batch, [n] over its trained tokens, in the order of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.trainer.algorithms.advantages import STD_EPS, groups_of


@dataclass(frozen=True, slots=True)
class ProcessRewards:
    """The s process rewards of a batch, those of one sample together and by position."""

    rows: NDArray[np.int64]
    """[s]: the sample"""
    positions: NDArray[np.int64]
    """[s]: the completion token, counted through all segments of the sample"""
    rewards: NDArray[np.float64]
    """[s]"""

    def sums(self, samples: int) -> NDArray[np.float64]:
        """float64[samples]"""
        return np.asarray(np.bincount(self.rows, weights=self.rewards, minlength=samples), dtype=np.float64)

    def at_tokens(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each trained token earns, float64[n]: at it, and behind it before the next trained one.

        What a sample earns before its first trained token is nobody's.
        """
        width = 1 + max(self.positions.max(initial=0), positions.max(initial=0))
        places = np.searchsorted(rows * width + positions, self.rows * width + self.positions, side="right") - 1
        of_sample = (places >= 0) & (np.append(rows, -1)[places] == self.rows)
        earned = np.zeros(len(rows))
        np.add.at(earned, places[of_sample], self.rewards[of_sample])
        return earned


def group_process_rewards(process: ProcessRewards, group_ids: Sequence[str], *, normalize_std: bool) -> ProcessRewards:
    """Against all process rewards of the group (DeepSeekMath, arXiv:2402.03300, section 4.1.3).

    ``(r - mean) / (std + 1e-6)`` over the process rewards of all samples with the same group id, with the sample
    standard deviation (n - 1); without `normalize_std` only the mean is removed. In a group of one sample, and where a
    group has one process reward, there is nothing to compare with: 0.
    """
    relative = np.zeros_like(process.rewards)
    for members in groups_of(group_ids):
        mine = np.flatnonzero(np.isin(process.rows, members))
        if len(mine) > 1:
            centred = process.rewards[mine] - process.rewards[mine].mean()
            relative[mine] = centred / (process.rewards[mine].std(ddof=1) + STD_EPS) if normalize_std else centred
    return replace(process, rewards=relative)


def following_sums(
    process: ProcessRewards, rows: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The sum of what its sample earns at a trained token or later, float64[n] (the same section)."""
    sums = np.concatenate([np.zeros(1), np.cumsum(process.rewards)])
    width = 1 + max(positions.max(initial=0), process.positions.max(initial=0))
    first = np.searchsorted(process.rows * width + process.positions, rows * width + positions)
    end = np.searchsorted(process.rows, rows, side="right")
    return np.asarray(sums[end] - sums[first], dtype=np.float64)
