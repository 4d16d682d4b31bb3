"""One leased batch through the model."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from services.common.config import Config
from services.trainer.advantages import with_advantages
from services.trainer.backends.torch.backend import StepResult, TorchBackend
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.plan import Batching, split_by_groups
from services.trainer.batch.prepare import StepTokens, prepare_step
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
    out. The result says for each whether it was applied. Raises ConfigError when a user's function fails.
    """
    parts = split_by_groups(samples, config.batch.num_steps_per_rollout or 1)
    if not parts:
        return []
    batching = Batching(
        config.trainer.max_tokens_per_gpu, micro_batch_size=config.trainer.fixed_micro_batch_size, flops=backend.flops
    )
    steps = [_prepare(part, clock, config, batching) for part in parts]
    ordered = [sample for part in parts for sample in part]
    filled = with_advantages(backend, ordered, steps, config)
    results = []
    for part, micro_batches in zip(parts, filled, strict=True):
        result = _optimizer_step(backend, part, micro_batches)
        if not result.applied:
            result = _optimizer_step(backend, part, micro_batches)
        results.append(result)
    return results


def mask_above(config: Config) -> int | None:
    """How far behind a token may be and still be trained; None when the buffer keeps the bound by itself."""
    return config.staleness.max_staleness if config.staleness.on_stale == "mask" else None


def _prepare(samples: Sequence[TrainSample], clock: Clock, config: Config, batching: Batching) -> StepTokens:
    algorithm = config.trainer.algorithm
    return prepare_step(
        samples,
        clock,
        mask_above=mask_above(config),
        mask_offpolicy=config.staleness.mask_offpolicy,
        reduction=algorithm.loss_reduction,
        constant=algorithm.loss_constant or config.rollout.sampling.max_response_len,
        batching=batching,
    )


def _optimizer_step(
    backend: TorchBackend, samples: Sequence[TrainSample], micro_batches: Sequence[PackedBatch]
) -> StepResult:
    result = backend.train(micro_batches)
    if not result.applied:
        offenders = [samples[row].sample_id for row in result.offenders]
        log.warning("step_not_finite", loss=result.loss, grad_norm=result.grad_norm, sample_ids=offenders[:NAMED])
    return result
