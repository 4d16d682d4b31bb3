"""What one training step was like, as a line of ``run.dir/metrics.jsonl``."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.trainer.backends.torch.critic import CriticResult
from services.trainer.backends.torch.results import StepResult
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock, sample_staleness

# What is left of the variance of equal returns, as a share of their mean square.
ROUNDING = 1e-12
# In the metadata of a prompt: the data set that it is of, for `reward_by_source`.
SOURCE = "data_source"


@dataclass
class Times:
    """Where the seconds of a step went."""

    wait_s: float = 0.0
    """For a batch to be leased."""
    yield_s: float = 0.0
    """Colocated: for the engines to give up the GPUs, and for the trainer to be back on them."""
    train_s: float = 0.0
    """Decoding, packing, forward, backward, optimizer."""
    commit_s: float = 0.0
    publish_wait_s: float = 0.0
    """For the pushes of the last version, and for the copy of the weights."""
    step_s: float = 0.0
    """All of it."""


def batch_metrics(
    groups: Sequence[pb.LeasedGroup], samples: Sequence[TrainSample], clock: Clock, mask_above: int | None
) -> dict[str, Any]:
    """Facts of a batch that need no model: its groups, rewards, lengths, staleness (samples by steps behind)."""
    rewards = [sample.reward for sample in samples]
    completions = [sample.completion_length for sample in samples]
    prompts = sum(segment.prompt_length for sample in samples for segment in sample.segments)
    staleness = Counter(sample_staleness(sample, clock, mask_above) for sample in samples)
    truncated = sum(sample.message.finish_reason == sample_pb2.FINISH_REASON_LENGTH for sample in samples)
    count = max(len(samples), 1)
    by_source = _rewards_by_source(samples)
    return {
        "reward_mean": sum(rewards) / count,
        "reward_std": statistics.pstdev(rewards) if rewards else 0.0,
        **({"reward_by_source": by_source} if by_source else {}),
        "staleness": {str(steps): staleness[steps] for steps in sorted(staleness)},
        "staleness_max": max(staleness, default=0),
        "samples": len(samples),
        "groups": len(groups),
        "groups_of_one": sum(len(group.samples) == 1 for group in groups),
        "group_ids": [group.group_id for group in groups],
        "prompt_ordinals": [group.prompt_ordinal for group in groups],
        "completion_tokens": sum(completions),
        "prompt_tokens": prompts,
        "mean_completion_length": sum(completions) / count,
        "completion_lengths": _by_power_of_two(completions),
        "truncated_fraction": truncated / count,
        "multi_span_samples": sum(any(len(segment.spans) > 1 for segment in sample.segments) for sample in samples),
    }


def _rewards_by_source(samples: Sequence[TrainSample]) -> dict[str, float]:
    """The mean reward of each `data_source` that is named in the metadata of prompts."""
    rewards: dict[str, list[float]] = {}
    for sample in samples:
        metadata = sample.message.prompt.metadata_json
        source = orjson.loads(metadata).get(SOURCE) if metadata else None
        if source is not None:
            rewards.setdefault(str(source), []).append(sample.reward)
    return {source: statistics.fmean(rewards[source]) for source in sorted(rewards)}


def _by_power_of_two(lengths: Sequence[int]) -> dict[str, int]:
    """How many lengths are at most a power of two and above the one before it, by that power."""
    counts = Counter(1 << max(length - 1, 0).bit_length() for length in lengths)
    return {str(bound): counts[bound] for bound in sorted(counts)}


def training_metrics(results: Sequence[StepResult]) -> dict[str, Any]:
    """What the optimizer steps of one batch report. Losses and gradient norms are means over the optimizer steps.

    Per-token figures are over the optimizer steps that were applied; 0 when none was.
    `mismatch_kl` is the mean over trained tokens of the k3 estimate of KL(rollout policy || trainer policy), each
    token seen by the weights before its own optimizer step. `mismatch_kl_fresh` is the same over tokens that the
    very version being trained has sampled, on KV of its own, where only numerics differ; None when the batch has none.
    What an algorithm reports besides is in docs/algorithms.md.
    """
    applied = [result for result in results if result.applied]
    tokens = max(sum(result.tokens for result in applied), 1)
    fresh = sum(result.fresh_tokens for result in applied)
    steps = max(len(results), 1)
    names = sorted({name for result in applied for name in result.figures})
    largest = sorted({name for result in applied for name in result.maxima})
    loads = [result.expert_load_max for result in applied if result.expert_load_max is not None]
    critic = [result.critic for result in results if result.critic is not None]
    return {
        "loss": sum(result.loss for result in results) / steps,
        "grad_norm": sum(result.grad_norm for result in results) / steps,
        "entropy": sum(result.entropy for result in applied) / tokens,
        "lr": results[-1].lr if results else 0.0,
        "ratio_mean": sum(result.ratio for result in applied) / tokens,
        "clip_fraction": sum(result.clipped for result in applied) / tokens,
        "mismatch_kl": sum(result.mismatch_kl for result in applied) / tokens,
        "mismatch_kl_fresh": sum(result.mismatch_kl_fresh for result in applied) / fresh if fresh else None,
        **{name: sum(result.figures.get(name, 0.0) for result in applied) / tokens for name in names},
        **{name: max(result.maxima[name] for result in applied if name in result.maxima) for name in largest},
        **({"expert_load_max": sum(loads) / len(loads)} if loads else {}),
        "trained_tokens": sum(result.tokens for result in applied),
        "micro_batches": sum(result.micro_batches for result in results),
        "optimizer_steps_skipped": sum(not result.applied for result in results),
        **(_critic_metrics(critic) | {"critic_only": any(result.critic_only for result in results)} if critic else {}),
    }


def _critic_metrics(results: Sequence[CriticResult]) -> dict[str, Any]:
    """Loss and gradient norm are means over the optimizer steps, the others are over the trained tokens of all.

    `explained_variance` is 1 - Var(return - value) / Var(return), None where all returns are equal.
    """
    tokens = max(sum(result.tokens for result in results), 1)

    def mean(name: str) -> float:
        return float(sum(getattr(result, name) for result in results)) / tokens

    variance = mean("squared_returns") - mean("returns") ** 2
    unexplained = mean("squared_errors") - mean("errors") ** 2
    return {
        "value_loss": sum(result.loss for result in results) / len(results),
        "value_clip_fraction": mean("clipped"),
        "value_mean": mean("values"),
        "return_mean": mean("returns"),
        "explained_variance": 1.0 - unexplained / variance if variance > ROUNDING * mean("squared_returns") else None,
        "critic_grad_norm": sum(result.grad_norm for result in results) / len(results),
        "critic_lr": results[-1].lr,
        "critic_steps_skipped": sum(not result.applied for result in results),
    }


def step_line(
    step: int, version: Version, batch: dict[str, Any], training: dict[str, Any], overlap_tokens: int, times: Times
) -> dict[str, Any]:
    """One line of metrics.jsonl. `version` is the one that the step made. After a recovery a step appears again."""
    return {
        "step": step,
        "time": time.time(),
        "epoch": version.epoch,
        "version": str(version),
        **batch,
        **training,
        "overlap_tokens": overlap_tokens,
        **vars(times),
    }


def sample_line(step: int, sample: TrainSample, clock: Clock) -> dict[str, Any]:
    """One line of samples.jsonl."""
    spans = [span for segment in sample.segments for span in segment.spans]
    return {
        "step": step,
        "prompt": sample.message.prompt.text or sample.message.prompt.messages_json,
        "completion": sample.message.completion,
        "label": sample.message.prompt.label,
        "reward": sample.reward,
        "spans": [[str(span.version), span.start, span.end] for span in spans],
        "staleness": sample_staleness(sample, clock, None),
        "finish_reason": sample_pb2.FinishReason.Name(sample.message.finish_reason)
        .removeprefix("FINISH_REASON_")
        .lower(),
    }
