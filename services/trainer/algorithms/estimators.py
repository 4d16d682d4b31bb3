"""The advantage of every trained token of a batch, by ``trainer.algorithm.name``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms.advantages import (
    discounted_returns,
    group_advantages,
    leave_one_out,
    whiten,
    with_outcomes,
)
from services.trainer.algorithms.gae import generalised_advantages
from services.trainer.algorithms.process import ProcessRewards, following_sums, group_process_rewards


@dataclass(frozen=True, slots=True)
class Episodes:
    """The samples of a batch, and their trained tokens: n in all, flat, in the order of the samples."""

    rewards: NDArray[np.float64]
    """[samples]"""
    group_ids: Sequence[str]
    """[samples]"""
    rows: NDArray[np.int64]
    """[n]: which sample each token is of. A sample may have none."""
    positions: NDArray[np.int64]
    """[n]: its place among all completion tokens of the sample."""
    kl: NDArray[np.float64] | None
    """[n]: the estimate of KL(policy || reference) at each token; None when it is not in the reward."""
    process: ProcessRewards | None = None
    """None where no sample has any."""
    values: NDArray[np.float64] | None = None
    """[n]: the critic's, of the state before each token; None without one."""


def token_advantages(episodes: Episodes, algorithm: AlgorithmConfig) -> NDArray[np.float64]:
    """The built-in estimators, float64[n]. Not whitened.

    With a KL in the reward, a token earns ``-kl_coef * kl`` where it stands, and process rewards where they are; `rloo`
    and `gspo`, whose action is the whole completion, take the sum of them.
    """
    group_ids, rows, process = episodes.group_ids, episodes.rows, episodes.process
    rewards = outcome_rewards(episodes, algorithm)
    penalties = np.zeros(len(rows)) if episodes.kl is None else -algorithm.kl_coef * episodes.kl
    if algorithm.name == "rloo":
        shaped = rewards + np.bincount(rows, weights=penalties, minlength=len(rewards))
        return leave_one_out(shaped, group_ids)[rows]
    relative = relative_rewards(rewards, group_ids, algorithm)
    if algorithm.token_level:
        if process is not None:
            penalties = penalties + process.at_tokens(rows, episodes.positions)
        if episodes.values is not None:
            return generalised_advantages(
                with_outcomes(relative, penalties, rows),
                episodes.values,
                rows,
                episodes.positions,
                gamma=algorithm.gamma,
                lambd=algorithm.lambd,
            )
        return discounted_returns(relative, penalties, rows, episodes.positions, gamma=algorithm.gamma)
    if process is None or algorithm.whole_completions:
        return relative[rows]
    steps = group_process_rewards(process, group_ids, normalize_std=algorithm.normalize_std)
    return relative[rows] + following_sums(steps, rows, episodes.positions)


def outcome_rewards(episodes: Episodes, algorithm: AlgorithmConfig) -> NDArray[np.float64]:
    """What each sample as a whole is rewarded with, float64[samples]."""
    rewards = np.zeros_like(episodes.rewards) if algorithm.process_rewards == "only" else episodes.rewards
    if episodes.process is None or not algorithm.whole_completions:
        return rewards
    return rewards + episodes.process.sums(len(rewards))


def relative_rewards(
    rewards: NDArray[np.float64], group_ids: Sequence[str], algorithm: AlgorithmConfig
) -> NDArray[np.float64]:
    """Against their groups where the estimator has it so, float64[samples]; as they are for rloo, REINFORCE++, PPO."""
    if algorithm.name in ("rloo", "reinforce_plus_plus", "ppo"):
        return rewards
    return group_advantages(rewards, group_ids, normalize_std=algorithm.normalize_std)


def normalized(advantages: NDArray[np.float64], algorithm: AlgorithmConfig) -> NDArray[np.float64]:
    """Whitened over the batch where that is wanted."""
    return whiten(advantages) if algorithm.normalize_advantages else advantages
