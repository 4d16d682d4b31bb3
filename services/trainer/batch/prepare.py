"""One optimizer step's samples, as the micro-batches the backend trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.trainer.algorithms.reduction import sample_weights
from services.trainer.batch.packing import PackedBatch, PackItem, pack
from services.trainer.batch.plan import first_fit_decreasing
from services.trainer.batch.samples import TrainSample, TrainSegment
from services.trainer.batch.staleness import Clock, fresh_tokens, last_version, trained_mask


def prepare_step(
    samples: Sequence[TrainSample],
    advantages: NDArray[np.float64],
    clock: Clock,
    *,
    mask_above: int | None,
    mask_offpolicy: bool = False,
    reduction: Literal["per_sample", "per_token"],
    max_tokens: int,
) -> list[PackedBatch]:
    """Masks, weighs and packs. Empty when no token of `samples` is to be trained.

    `advantages` is one number per sample, float64[samples]. Tokens more than `mask_above` steps behind are not
    trained; None trains all. With `mask_offpolicy` only the tokens of a
    sample's last version are. The weights in the result add up over the whole list, not within one micro-batch.
    """
    masks = [_masks(sample, clock, mask_above, mask_offpolicy=mask_offpolicy) for sample in samples]
    weights = sample_weights([sum(int(mask.sum()) for mask in of_sample) for of_sample in masks], reduction)
    items = [
        _item(segment, mask, clock, advantages[row], weights[row], sample.temperature, row)
        for row, (sample, of_sample) in enumerate(zip(samples, masks, strict=True))
        for segment, mask in zip(sample.segments, of_sample, strict=True)
        if mask.any()
    ]
    bins = first_fit_decreasing([len(item) for item in items], max_tokens)
    return [pack([items[index] for index in members]) for members in bins]


def _masks(
    sample: TrainSample, clock: Clock, mask_above: int | None, *, mask_offpolicy: bool
) -> list[NDArray[np.uint8]]:
    only = last_version(sample) if mask_offpolicy else None
    return [trained_mask(segment, clock, mask_above, only) for segment in sample.segments]


def _item(
    segment: TrainSegment,
    mask: NDArray[np.uint8],
    clock: Clock,
    advantage: float,
    weight: float,
    temperature: float,
    row: int,
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
        advantage=float(advantage),
        weight=float(weight),
        temperature=temperature,
        sample_row=row,
    )
