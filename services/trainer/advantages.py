"""From the prepared optimizer steps of a batch to micro-batches with advantages and the log-probs that these need.

All optimizer steps of a batch are scored before the first of them moves the weights: old log-probs are those at the
start of the batch, and whitening is over all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms import kl
from services.trainer.algorithms.estimators import Episodes, normalized, token_advantages
from services.trainer.algorithms.process import ProcessRewards
from services.trainer.algorithms.user_function import TokenLogprobs, user_advantages
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.prepare import StepTokens, fill
from services.trainer.batch.samples import TrainSample

Packed = list[NDArray[np.float32]]
Batches = list[list[PackedBatch]]


@dataclass(frozen=True)
class Scores:
    """What one rank's model says of its micro-batches before the first optimizer step; None where nobody asks."""

    old: list[Packed | None]
    """Log-probs of the weights as they are, by optimizer step."""
    ref: list[Packed | None]
    """Of the reference model."""

    def filled(self, batches: Sequence[Sequence[PackedBatch]], advantages: Sequence[NDArray[np.float32]]) -> Batches:
        """The micro-batches of each optimizer step, with the advantages of their tokens."""
        return [fill(*of_step) for of_step in zip(batches, advantages, self.old, self.ref, strict=True)]


def score_steps(backend: TorchBackend, batches: Sequence[Sequence[PackedBatch]], algorithm: AlgorithmConfig) -> Scores:
    """On every rank, of its own micro-batches of each optimizer step."""
    old = [_old_logprobs(backend, of_step, algorithm, len(batches)) for of_step in batches]
    return Scores(old, [backend.ref_logprobs(of_step) for of_step in batches])


def with_advantages(
    backend: TorchBackend, samples: Sequence[TrainSample], steps: Sequence[StepTokens], config: Config
) -> Batches:
    """Rank 0's micro-batches of each optimizer step. `samples` are those of all steps, in order.

    The other ranks take part by `take_advantages`: rank 0 hears their log-probs, and tells them their advantages.
    Raises ConfigError when the user's advantage function fails.
    """
    algorithm = config.trainer.algorithm
    batches = [step.batches for step in steps]
    own = score_steps(backend, batches, algorithm)
    group = backend.group
    everybodys = Scores(*(_of_all_parts(group.of_parts(group.gather(each))) for each in (own.old, own.ref)))
    advantages = normalized(_advantages(samples, steps, everybodys.old, everybodys.ref, config), algorithm)
    parts = np.split(advantages, np.cumsum([len(step.rows) for step in steps])[:-1])
    packed = [step.packed(part) for step, part in zip(steps, parts, strict=True)]
    return own.filled(batches, group.scatter(group.for_ranks(list(zip(*packed, strict=True)))))


def take_advantages(backend: TorchBackend, batches: Sequence[Sequence[PackedBatch]], config: Config) -> Batches:
    """What `with_advantages` is on rank 0, on the others."""
    own = score_steps(backend, batches, config.trainer.algorithm)
    backend.group.gather(own.old)
    backend.group.gather(own.ref)
    return own.filled(batches, backend.group.scatter())


def _of_all_parts(scores: Sequence[Sequence[Packed | None]]) -> list[Packed | None]:
    """By optimizer step, micro-batches part after part, of what each of them has by optimizer step."""
    joined: list[Packed | None] = []
    for of_step in zip(*scores, strict=True):
        some = [packed for packed in of_step if packed is not None]
        joined.append([each for packed in some for each in packed] if some else None)
    return joined


def _old_logprobs(
    backend: TorchBackend, batches: Sequence[PackedBatch], algorithm: AlgorithmConfig, steps: int
) -> Packed | None:
    """None where the loss finds them by itself: as recorded, or those of the only forward pass there is."""
    ahead = steps > 1 or algorithm.kl_coef > 0 or algorithm.advantage_function
    if algorithm.old_logprobs == "rollout" or not ahead:
        return None
    return backend.logprobs(batches)


def _advantages(
    samples: Sequence[TrainSample],
    steps: Sequence[StepTokens],
    old: Sequence[Packed | None],
    ref: Sequence[Packed | None],
    config: Config,
) -> NDArray[np.float64]:
    algorithm = config.trainer.algorithm
    recorded = np.concatenate([step.rollout_logprobs for step in steps]).astype(np.float64)
    logprobs = recorded if None in old else _flat(steps, old)
    ref_logprobs = None if None in ref else _flat(steps, ref)
    divergence = None if ref_logprobs is None else _kl(algorithm, logprobs, ref_logprobs)
    episodes = Episodes(
        rewards=np.array([sample.reward for sample in samples], dtype=np.float64),
        group_ids=[sample.group_id for sample in samples],
        rows=_rows(steps),
        positions=np.concatenate([step.positions for step in steps]),
        kl=divergence if algorithm.kl_coef else None,
        process=_process(samples),
    )
    if algorithm.advantage_function:
        return user_advantages(samples, episodes, TokenLogprobs(recorded, logprobs, ref_logprobs, divergence), config)
    return token_advantages(episodes, algorithm)


def _process(samples: Sequence[TrainSample]) -> ProcessRewards | None:
    earned = [(row, *each) for row, sample in enumerate(samples) for each in sample.process]
    if not earned:
        return None
    rows, positions, rewards = zip(*earned, strict=True)
    return ProcessRewards(np.array(rows), np.array(positions), np.array(rewards, dtype=np.float64))


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
