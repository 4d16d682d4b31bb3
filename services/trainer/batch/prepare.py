"""One optimizer step's samples, as the micro-batches the backend trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.trainer.algorithms.reduction import Reduction, sample_weights
from services.trainer.batch.balance import Bins
from services.trainer.batch.packing import PackedBatch, PackItem, pack
from services.trainer.batch.plan import Batching, plan_micro_batches
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock, fresh_tokens, last_version, trained_mask


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The n trained tokens of an optimizer step, packed as well as flat: in the order of samples and segments."""

    samples: int
    """How many there are, with those of which nothing is trained."""
    weights: NDArray[np.float64]
    """[samples]: of each trained token in the loss."""
    sequences: list[tuple[int, int]]
    """Sample and segment of each sequence."""
    plan: list[Bins]
    """For each data-parallel rank its micro-batches, as indices of sequences."""
    batches: list[PackedBatch]
    """Those of rank 0. Empty when no token is trained."""
    order: NDArray[np.int64]
    """[n]: the flat place of each token of the concatenated micro-batches of all ranks, rank after rank."""
    shares: list[int]
    """How many of them each rank has."""
    rows: NDArray[np.int64]
    """[n]: the sample of each token, flat."""
    positions: NDArray[np.int64]
    """[n]: its place among the completion tokens of its sample, all segments together."""
    rollout_logprobs: NDArray[np.float32]
    """[n]: as recorded, flat."""

    def flat(self, packed: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[n]: values given per micro-batch, rank after rank, in flat order."""
        values = np.empty(len(self.order), dtype=np.float64)
        if packed:
            values[self.order] = np.concatenate(packed)
        return values

    def packed(self, flat: NDArray[np.float64]) -> list[NDArray[np.float32]]:
        """For each rank, flat values in the order of its concatenated micro-batches."""
        return np.split(flat[self.order].astype(np.float32), np.cumsum(self.shares)[:-1])

    def filled(
        self,
        advantages: NDArray[np.float64],
        old_logprobs: Sequence[NDArray[np.float32]] | None = None,
        ref_logprobs: Sequence[NDArray[np.float32]] | None = None,
    ) -> list[PackedBatch]:
        """The micro-batches of rank 0 with flat `advantages`, and with log-probs given per micro-batch."""
        return fill(self.batches, (self.packed(advantages)[0], None, None), old_logprobs, ref_logprobs)


def fill(
    batches: Sequence[PackedBatch],
    known: Sequence[NDArray[np.float32] | None],
    old_logprobs: Sequence[NDArray[np.float32]] | None,
    ref_logprobs: Sequence[NDArray[np.float32]] | None,
    teacher_logprobs: Sequence[NDArray[np.float32]] | None = None,
    old_values: Sequence[NDArray[np.float32]] | None = None,
) -> list[PackedBatch]:
    """The micro-batches of one rank with what is `known` of all their tokens, and with log-probs and values given per
    micro-batch.

    `known` are the advantages, the factors of the policy loss, None where they are 1, and the returns, None where
    nobody learns them.
    """
    advantages, factors, returns = known
    assert advantages is not None
    filled, start = [], 0
    for number, batch in enumerate(batches):
        end = start + len(batch.targets)
        filled.append(
            replace(
                batch,
                advantages=advantages[start:end],
                policy_factors=None if factors is None else factors[start:end],
                old_logprobs=None if old_logprobs is None else old_logprobs[number],
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[number],
                teacher_logprobs=None if teacher_logprobs is None else teacher_logprobs[number],
                old_values=None if old_values is None else old_values[number],
                returns=None if returns is None else returns[start:end],
            )
        )
        start = end
    return filled


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens are trained, besides what the task's loss mask says."""

    clock: Clock
    mask_above: int | None = None
    """Not those more than so many steps behind; None: all."""
    mask_offpolicy: bool = False
    """Only those of a sample's last version."""

    def masks(self, sample: TrainSample) -> list[NDArray[np.uint8]]:
        """Of each segment, uint8[completion]."""
        only = last_version(sample) if self.mask_offpolicy else None
        return [trained_mask(segment, self.clock, self.mask_above, only) for segment in sample.segments]


def prepare_step(
    samples: Sequence[TrainSample],
    clock: Clock,
    *,
    mask_above: int | None,
    mask_offpolicy: bool = False,
    reduction: Reduction,
    constant: float | None = None,
    batching: Batching,
) -> StepTokens:
    """Masks, weighs, plans for all ranks, and packs the micro-batches of rank 0.

    What is trained is as `Masking` says. The weights, which are of `reduction` with its `constant`, add up over the
    whole step, not within one micro-batch.
    """
    masking = Masking(clock, mask_above, mask_offpolicy)
    masks = [masking.masks(sample) for sample in samples]
    trained = [sum(int(mask.sum()) for mask in of_sample) for of_sample in masks]
    weights = sample_weights(trained, reduction, constant)
    sequences = [
        (row, number) for row, of_sample in enumerate(masks) for number, mask in enumerate(of_sample) if mask.any()
    ]
    items = [item(samples[row], number, masks[row][number], clock, weights[row], row) for row, number in sequences]
    lengths, predicted = [len(each) for each in items], [len(each.targets) for each in items]
    plan = plan_micro_batches(lengths, predicted, batching)
    return StepTokens(
        samples=len(samples),
        weights=weights,
        sequences=sequences,
        plan=plan,
        batches=[pack([items[index] for index in members]) for members in plan[0]],
        order=_order(items, [members for bins in plan for members in bins]),
        shares=[sum(predicted[index] for members in bins for index in members) for bins in plan],
        rows=np.repeat(np.arange(len(samples)), trained),
        positions=_joined([np.flatnonzero(_joined(of_sample)) for of_sample in masks]),
        rollout_logprobs=np.concatenate([np.empty(0, dtype=np.float32), *(each.rollout_logprobs for each in items)]),
    )


def item(sample: TrainSample, number: int, mask: NDArray[np.uint8], clock: Clock, weight: float, row: int) -> PackItem:
    """One segment of the sample in `row`, with the tokens that `mask` says are trained: at least one is."""
    segment = sample.segments[number]
    trained = np.flatnonzero(mask)
    predict = trained + (segment.prompt_length - 1)
    return PackItem(
        token_ids=segment.token_ids[: predict[-1] + 1],
        prompt_length=segment.prompt_length,
        predict=predict,
        targets=segment.token_ids[predict + 1],
        rollout_logprobs=segment.rollout_logprobs[trained],
        fresh=fresh_tokens(segment, clock)[trained],
        weight=float(weight),
        temperature=sample.temperature,
        sample_row=row,
    )


def _order(items: Sequence[PackItem], bins: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *(len(item.targets) for item in items)])
    return _joined([np.arange(starts[index], starts[index + 1]) for members in bins for index in members])


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """One after the other; none at all is an empty one."""
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])
