"""One leased batch through the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import structlog

from services.common.config import Config
from services.trainer.advantages import take_advantages, with_advantages
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.critic import CriticResult
from services.trainer.backends.torch.results import StepResult
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.plan import Batching, split_by_groups
from services.trainer.batch.prepare import Masking, StepTokens, prepare_step
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock
from services.trainer.ranks import commands
from services.trainer.ranks.shares import batch_message

log = structlog.get_logger()

Result = TypeVar("Result", StepResult, CriticResult)

# How many samples a log line about an unusable batch names.
NAMED = 8


def train_batch(
    backend: TorchBackend, samples: Sequence[TrainSample], clock: Clock, config: Config
) -> list[StepResult]:
    """The optimizer steps of one batch, each over whole groups. Rank 0 calls it, and leads the others (`follow_batch`).

    A critic trains before the policy on the micro-batches of each; in the first `trainer.critic.only_steps` steps it
    trains alone.

    An optimizer step that is not finite leaves the weights as they were and is tried once more; after that it is left
    out. The result says for each whether it was applied. Raises ConfigError when a user's function fails.
    """
    parts = split_by_groups(samples, config.batch.num_steps_per_rollout or 1)
    if not parts:
        return []
    batching = Batching(
        config.trainer.max_tokens_per_gpu,
        micro_batch_size=config.trainer.fixed_micro_batch_size,
        flops=backend.flops,
        dp=backend.group.parts,
        cp=backend.group.context_size,
    )
    steps = [_prepare(part, clock, config, batching) for part in parts]
    ordered = [sample for part in parts for sample in part]
    critic_only = critic_alone(config, clock)
    message = batch_message(clock, parts, steps) if backend.group.size > 1 else None
    with backend.group.command(commands.TRAIN, message):
        filled = with_advantages(backend, ordered, steps, config)
        return [
            _optimizer_step(backend, micro_batches, critic_only, [sample.sample_id for sample in part])
            for part, micro_batches in zip(parts, filled, strict=True)
        ]


def follow_batch(backend: TorchBackend, batches: Sequence[Sequence[PackedBatch]], config: Config, clock: Clock) -> None:
    """What `train_batch` is on rank 0, on the others: `batches` are their own micro-batches of each optimizer step."""
    with backend.group.command(commands.TRAIN):
        for micro_batches in take_advantages(backend, batches, config):
            _optimizer_step(backend, micro_batches, critic_alone(config, clock))


def critic_alone(config: Config, clock: Clock) -> bool:
    """Whether the step that follows the version of `clock` leaves the policy as it is."""
    return clock.trained.step < config.trainer.critic.only_steps


def mask_above(config: Config) -> int | None:
    """How far behind a token may be and still be trained; None when the buffer keeps the bound by itself."""
    return config.staleness.max_staleness if config.staleness.on_stale == "mask" else None


def masking_of(config: Config, clock: Clock) -> Masking:
    return Masking(clock, mask_above(config), config.staleness.mask_offpolicy)


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
    backend: TorchBackend, micro_batches: Sequence[PackedBatch], critic_only: bool, sample_ids: Sequence[str] = ()
) -> StepResult:
    """On every rank, which all come to the same result. Rank 0 names the samples."""
    critic = None
    if backend.critic is not None:
        critic = _twice(backend.critic.train, micro_batches, "critic_step_not_finite", sample_ids)
    if critic is not None and critic_only:
        result = StepResult(applied=critic.applied, tokens=critic.tokens, micro_batches=len(micro_batches))
    else:
        result = _twice(backend.train, micro_batches, "step_not_finite", sample_ids)
    return replace(result, critic=critic, critic_only=critic_only)


def _twice(
    train: Callable[[Sequence[PackedBatch]], Result],
    micro_batches: Sequence[PackedBatch],
    complaint: str,
    sample_ids: Sequence[str],
) -> Result:
    """Tries once more what was not finite."""
    result = train(micro_batches)
    if not result.applied:
        _complain(complaint, result, sample_ids)
        result = train(micro_batches)
        if not result.applied:
            _complain(complaint, result, sample_ids)
    return result


def _complain(complaint: str, result: StepResult | CriticResult, sample_ids: Sequence[str]) -> None:
    if sample_ids:
        offenders = [sample_ids[row] for row in result.offenders]
        log.warning(complaint, loss=result.loss, grad_norm=result.grad_norm, sample_ids=offenders[:NAMED])
