"""One optimizer step's samples, as the micro-batches the backend trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.trainer.algorithms.reduction import Reduction, sample_weights
from services.trainer.batch.packing import PackedBatch, PackItem, pack
from services.trainer.batch.plan import Batching, plan_micro_batches
from services.trainer.batch.samples import TrainSample, TrainSegment
from services.trainer.batch.staleness import Clock, fresh_tokens, last_version, trained_mask


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The n trained tokens of an optimizer step, packed as well as flat: in the order of samples and segments."""

    samples: int
    """How many there are, with those of which nothing is trained."""
    batches: list[PackedBatch]
    """Empty when no token is trained."""
    order: NDArray[np.int64]
    """[n]: the flat place of each token of the concatenated batches."""
    rows: NDArray[np.int64]
    """[n]: the sample of each token, flat."""
    positions: NDArray[np.int64]
    """[n]: its place among the completion tokens of its sample, all segments together."""

    def flat(self, packed: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[n]: values given per micro-batch, in flat order."""
        values = np.empty(len(self.order), dtype=np.float64)
        if packed:
            values[self.order] = np.concatenate(packed)
        return values

    def filled(
        self,
        advantages: NDArray[np.float64],
        old_logprobs: Sequence[NDArray[np.float32]] | None = None,
        ref_logprobs: Sequence[NDArray[np.float32]] | None = None,
    ) -> list[PackedBatch]:
        """The micro-batches with flat `advantages`, and with log-probs given per micro-batch."""
        filled, start = [], 0
        for number, batch in enumerate(self.batches):
            end = start + len(batch.targets)
            filled.append(
                replace(
                    batch,
                    advantages=advantages[self.order[start:end]].astype(np.float32),
                    old_logprobs=None if old_logprobs is None else old_logprobs[number],
                    ref_logprobs=None if ref_logprobs is None else ref_logprobs[number],
                )
            )
            start = end
        return filled


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
    """Masks, weighs and packs: the micro-batches of the only data-parallel rank.

    Tokens more than `mask_above` steps behind are not trained; None trains all. With `mask_offpolicy` only the tokens
    of a sample's last version are. The weights in the result, which are of `reduction` with its `constant`, add up over
    the whole step, not within one micro-batch.
    """
    masks = [_masks(sample, clock, mask_above, mask_offpolicy=mask_offpolicy) for sample in samples]
    trained = [sum(int(mask.sum()) for mask in of_sample) for of_sample in masks]
    weights = sample_weights(trained, reduction, constant)
    items = [
        _item(segment, mask, clock, weights[row], sample.temperature, row)
        for row, (sample, of_sample) in enumerate(zip(samples, masks, strict=True))
        for segment, mask in zip(sample.segments, of_sample, strict=True)
        if mask.any()
    ]
    lengths, predicted = [len(item) for item in items], [len(item.targets) for item in items]
    (bins,) = plan_micro_batches(lengths, predicted, batching)
    return StepTokens(
        samples=len(samples),
        batches=[pack([items[index] for index in members]) for members in bins],
        order=_order(items, bins),
        rows=np.repeat(np.arange(len(samples)), trained),
        positions=_joined([np.flatnonzero(_joined(of_sample)) for of_sample in masks]),
    )


def _order(items: Sequence[PackItem], bins: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *(len(item.targets) for item in items)])
    return _joined([np.arange(starts[index], starts[index + 1]) for members in bins for index in members])


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """One after the other; none at all is an empty one."""
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _masks(
    sample: TrainSample, clock: Clock, mask_above: int | None, *, mask_offpolicy: bool
) -> list[NDArray[np.uint8]]:
    only = last_version(sample) if mask_offpolicy else None
    return [trained_mask(segment, clock, mask_above, only) for segment in sample.segments]


def _item(
    segment: TrainSegment, mask: NDArray[np.uint8], clock: Clock, weight: float, temperature: float, row: int
) -> PackItem:
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
        temperature=temperature,
        sample_row=row,
    )
