"""From the prepared optimizer steps of a batch to micro-batches with advantages and the log-probs that these need.

All optimizer steps of a batch are scored before the first of them moves the weights: old log-probs are those at the
start of the batch, and whitening is over all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms import kl
from services.trainer.algorithms.estimators import Episodes, normalized, token_advantages
from services.trainer.algorithms.user_function import TokenLogprobs, user_advantages
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.prepare import StepTokens
from services.trainer.batch.samples import TrainSample

Packed = list[NDArray[np.float32]]


def with_advantages(
    backend: TorchBackend, samples: Sequence[TrainSample], steps: Sequence[StepTokens], config: Config
) -> list[list[PackedBatch]]:
    """The micro-batches of each optimizer step. `samples` are those of all steps, in order.

    Raises ConfigError when the user's advantage function fails.
    """
    algorithm = config.trainer.algorithm
    old: list[Packed | None] = [_old_logprobs(backend, step, algorithm, len(steps)) for step in steps]
    ref = [backend.ref_logprobs(step.batches) for step in steps]
    advantages = normalized(_advantages(samples, steps, old, ref, config), algorithm)
    parts = np.split(advantages, np.cumsum([len(step.rows) for step in steps])[:-1])
    return [
        step.filled(part, of_step, of_ref) for step, part, of_step, of_ref in zip(steps, parts, old, ref, strict=True)
    ]


def _old_logprobs(backend: TorchBackend, step: StepTokens, algorithm: AlgorithmConfig, steps: int) -> Packed | None:
    """None where the loss finds them by itself: as recorded, or those of the only forward pass there is."""
    ahead = steps > 1 or algorithm.kl_coef > 0 or algorithm.advantage_function
    if algorithm.old_logprobs == "rollout" or not ahead:
        return None
    return backend.logprobs(step.batches)


def _advantages(
    samples: Sequence[TrainSample],
    steps: Sequence[StepTokens],
    old: Sequence[Packed | None],
    ref: Sequence[Packed | None],
    config: Config,
) -> NDArray[np.float64]:
    algorithm = config.trainer.algorithm
    rollout: Sequence[Packed] = [[batch.rollout_logprobs for batch in step.batches] for step in steps]
    recorded = _flat(steps, rollout)
    logprobs = recorded if None in old else _flat(steps, old)
    ref_logprobs = None if None in ref else _flat(steps, ref)
    divergence = None if ref_logprobs is None else _kl(algorithm, logprobs, ref_logprobs)
    episodes = Episodes(
        rewards=np.array([sample.reward for sample in samples], dtype=np.float64),
        group_ids=[sample.group_id for sample in samples],
        rows=_rows(steps),
        positions=np.concatenate([step.positions for step in steps]),
        kl=divergence if algorithm.kl_coef else None,
    )
    if algorithm.advantage_function:
        return user_advantages(samples, episodes, TokenLogprobs(recorded, logprobs, ref_logprobs, divergence), config)
    return token_advantages(episodes, algorithm)


def _flat(steps: Sequence[StepTokens], packed: Sequence[Packed | None]) -> NDArray[np.float64]:
    return np.concatenate([step.flat(of_step or []) for step, of_step in zip(steps, packed, strict=True)])


def _rows(steps: Sequence[StepTokens]) -> NDArray[np.int64]:
    """Of the samples of all steps."""
    first, rows = 0, []
    for step in steps:
        rows.append(step.rows + first)
        first += step.samples
    return np.concatenate(rows)


def _kl(
    algorithm: AlgorithmConfig, logprobs: NDArray[np.float64], ref_logprobs: NDArray[np.float64]
) -> NDArray[np.float64]:
    estimate = kl.estimate(algorithm.kl_type, torch.from_numpy(logprobs), torch.from_numpy(ref_logprobs))
    return np.asarray(estimate.numpy(), dtype=np.float64)
