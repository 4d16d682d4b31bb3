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
from services.trainer.algorithms.user_loss import load_reducer, reducer_weights
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.prepare import StepTokens, fill
from services.trainer.batch.samples import TrainSample

Packed = list[NDArray[np.float32]]
Batches = list[list[PackedBatch]]
Known = list[NDArray[np.float32] | None]
"""Of one rank's tokens of an optimizer step: advantages, factors of the policy loss, and returns."""


@dataclass(frozen=True)
class Scores:
    """What one rank's models say of its micro-batches before the first optimizer step; None where nobody asks."""

    old: list[Packed | None]
    """Log-probs of the weights as they are, by optimizer step."""
    ref: list[Packed | None]
    """Of the reference model."""
    teacher: list[Packed | None]
    values: list[Packed | None]
    """The critic's."""

    def filled(self, batches: Sequence[Sequence[PackedBatch]], known: Sequence[Known]) -> Batches:
        """The micro-batches of each optimizer step, with what is known of their tokens."""
        return [fill(*of_step) for of_step in zip(batches, known, *self.parts, strict=True)]

    @property
    def parts(self) -> tuple[list[Packed | None], ...]:
        return self.old, self.ref, self.teacher, self.values


def score_steps(backend: TorchBackend, batches: Sequence[Sequence[PackedBatch]], algorithm: AlgorithmConfig) -> Scores:
    """On every rank, of its own micro-batches of each optimizer step."""
    old = [_old_logprobs(backend, of_step, algorithm, len(batches)) for of_step in batches]
    ref = [backend.ref_logprobs(of_step) for of_step in batches]
    teacher = [backend.teacher_logprobs(of_step) for of_step in batches]
    return Scores(old, ref, teacher, [backend.values(of_step) for of_step in batches])


def with_advantages(
    backend: TorchBackend, samples: Sequence[TrainSample], steps: Sequence[StepTokens], config: Config
) -> Batches:
    """Rank 0's micro-batches of each optimizer step. `samples` are those of all steps, in order.

    The other ranks take part by `take_advantages`: rank 0 hears their log-probs, and tells them their advantages.
    Raises ConfigError when a user's function fails.
    """
    algorithm = config.trainer.algorithm
    batches = [step.batches for step in steps]
    own = score_steps(backend, batches, algorithm)
    group = backend.group
    gathered = (group.of_parts(group.gather(each)) for each in own.parts)
    raw, returns = _advantages(samples, steps, Scores(*map(_of_all_parts, gathered)), config)
    factors = _policy_factors(samples, steps, config)
    of_steps = zip(steps, _split(normalized(raw, algorithm), steps), factors, _split(returns, steps), strict=True)
    known = [_known(step, *flat) for step, *flat in of_steps]
    return own.filled(batches, group.scatter(group.for_ranks(list(zip(*known, strict=True)))))


def take_advantages(backend: TorchBackend, batches: Sequence[Sequence[PackedBatch]], config: Config) -> Batches:
    """What `with_advantages` is on rank 0, on the others."""
    own = score_steps(backend, batches, config.trainer.algorithm)
    for scores in own.parts:
        backend.group.gather(scores)
    return own.filled(batches, backend.group.scatter())


def _known(step: StepTokens, *flat: NDArray[np.float64] | None) -> list[Known]:
    """For each part of the batch."""
    packed = ([None] * len(step.shares) if each is None else step.packed(each) for each in flat)
    return [[*of_part] for of_part in zip(*packed, strict=True)]


def _split(flat: NDArray[np.float64] | None, steps: Sequence[StepTokens]) -> list[NDArray[np.float64] | None]:
    """By optimizer step."""
    if flat is None:
        return [None] * len(steps)
    return [*np.split(flat, np.cumsum([len(step.rows) for step in steps])[:-1])]


def _policy_factors(
    samples: Sequence[TrainSample], steps: Sequence[StepTokens], config: Config
) -> list[NDArray[np.float64] | None]:
    """By optimizer step, flat: a user's weights of the policy losses over those of ``loss_reduction``."""
    reducer = load_reducer(config)
    if reducer is None:
        return [None] * len(steps)
    factors: list[NDArray[np.float64] | None] = []
    first, per_token = 0, config.trainer.algorithm.loss_reduction == "per_token"
    for step in steps:
        members = samples[first : first + step.samples]
        weights = reducer_weights(reducer, members, step.rows, step.positions, per_token=per_token)
        factors.append(weights / step.weights[step.rows])
        first += step.samples
    return factors


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
    ahead = steps > 1 or algorithm.kl_coef > 0 or algorithm.use_opd or algorithm.advantage_function
    if algorithm.old_logprobs == "rollout" or not ahead:
        return None
    return backend.logprobs(batches)


def _advantages(
    samples: Sequence[TrainSample],
    steps: Sequence[StepTokens],
    scores: Scores,
    config: Config,
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Flat, of all steps, not whitened; and the returns that a critic learns, None without one. `scores` are of all
    parts.
    """
    algorithm, old, ref = config.trainer.algorithm, scores.old, scores.ref
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
        values=None if None in scores.values else _flat(steps, scores.values),
    )
    if algorithm.advantage_function:
        by_token = TokenLogprobs(recorded, logprobs, ref_logprobs, divergence)
        advantages = user_advantages(samples, episodes, by_token, config)
    else:
        advantages = token_advantages(episodes, algorithm)
    returns = None if episodes.values is None else advantages + episodes.values
    if algorithm.use_opd:
        advantages = advantages - algorithm.opd_kl_coef * (logprobs - _flat(steps, scores.teacher))
    return advantages, returns


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
