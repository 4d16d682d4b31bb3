"""One leased batch through the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import structlog

from services.common.config import Config
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.backends.torch.backend import StepResult, TorchBackend
from services.trainer.batch.plan import split_by_groups
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock

log = structlog.get_logger()

# How many samples a log line about an unusable batch names.
NAMED = 8


def train_batch(
    backend: TorchBackend, samples: Sequence[TrainSample], clock: Clock, config: Config
) -> list[StepResult]:
    """The optimizer steps of one batch, each over whole groups.

    An optimizer step that is not finite leaves the weights as they were and is tried once more; after that it is left
    out. The result says for each whether it was applied.
    """
    results = []
    for part in split_by_groups(samples, config.batch.num_steps_per_rollout or 1):
        result = _optimizer_step(backend, part, clock, config)
        if not result.applied:
            result = _optimizer_step(backend, part, clock, config)
        results.append(result)
    return results


def mask_above(config: Config) -> int | None:
    """How far behind a token may be and still be trained; None when the buffer keeps the bound by itself."""
    return config.staleness.max_staleness if config.staleness.on_stale == "mask" else None


def _optimizer_step(backend: TorchBackend, samples: Sequence[TrainSample], clock: Clock, config: Config) -> StepResult:
    algorithm = config.trainer.algorithm
    advantages = group_advantages(
        np.array([sample.reward for sample in samples], dtype=np.float64),
        [sample.group_id for sample in samples],
        normalize_std=algorithm.normalize_std,
    )
    micro_batches = prepare_step(
        samples,
        advantages,
        clock,
        mask_above=mask_above(config),
        mask_offpolicy=config.staleness.mask_offpolicy,
        reduction=algorithm.loss_reduction,
        max_tokens=config.trainer.max_tokens_per_gpu,
    )
    result = backend.train(micro_batches)
    if not result.applied:
        offenders = [samples[row].sample_id for row in result.offenders]
        log.warning("step_not_finite", loss=result.loss, grad_norm=result.grad_norm, sample_ids=offenders[:NAMED])
    return result
