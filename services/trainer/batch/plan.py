"""Which samples train together: optimizer steps by whole groups, micro-batches by tokens, ranks by work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.common.errors import InvalidArgumentError
from services.trainer.batch.balance import Bins, aligned, karmarkar_karp
from services.trainer.batch.flops import SequenceFlops
from services.trainer.batch.samples import TrainSample


@dataclass(frozen=True, slots=True)
class Batching:
    """How the sequences of an optimizer step become micro-batches of data-parallel ranks."""

    max_tokens: int
    """Of a micro-batch on one GPU."""
    micro_batch_size: int | None = None
    """Sequences in each, whatever their lengths; None packs them up to `max_tokens`."""
    flops: SequenceFlops | None = None
    """What balances the ranks; None deals micro-batches out in turn."""
    dp: int = 1
    """Data-parallel ranks."""
    cp: int = 1
    """GPUs that share each sequence of a rank."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "micro_batch_size", "dp", "cp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{value} is less than 1", field=name)


def plan_micro_batches(lengths: Sequence[int], predicted: Sequence[int], batching: Batching) -> list[Bins]:
    """For each data-parallel rank its micro-batches, each a list of indices of sequences.

    A sequence has a length in tokens, of which some predict a trained one. Every rank gets as many micro-batches; where
    there are fewer sequences than ranks, some are empty. The same input gives the same plan, on every rank.
    """
    if batching.micro_batch_size is None:
        bins = first_fit_decreasing(lengths, batching.max_tokens * batching.cp)
    else:
        bins = _chunks(len(lengths), batching.micro_batch_size)
    if batching.flops is None:
        bins = aligned(bins, lengths, batching.dp)
        return [bins[rank :: batching.dp] for rank in range(batching.dp)]
    costs = list(map(batching.flops, lengths, predicted))
    bins = aligned(bins, costs, batching.dp)
    totals = [sum(costs[index] for index in members) for members in bins]
    return [[bins[number] for number in share] for share in karmarkar_karp(totals, batching.dp)]


def _chunks(count: int, size: int) -> Bins:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def split_by_groups(samples: Sequence[TrainSample], parts: int) -> list[list[TrainSample]]:
    """`parts` optimizer steps of as many groups each, in order; the first ones get one more when it does not divide.

    A group is never split. Steps that would be empty are left out.
    """
    groups: dict[str, list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    ordered = list(groups.values())
    size, larger = divmod(len(ordered), parts)
    steps: list[list[TrainSample]] = []
    start = 0
    for part in range(parts):
        end = start + size + (part < larger)
        if end > start:
            steps.append([sample for group in ordered[start:end] for sample in group])
        start = end
    return steps


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> Bins:
    """Bins of indices whose lengths add up to at most `max_tokens`; a longer item gets a bin of its own.

    First-fit decreasing: at most 11/9 of the optimal number of bins, plus one (Johnson, 1973). Equal lengths keep
    their order, so that samples of one prompt, whose prompt is computed once, tend to stay together.
    """
    bins: Bins = []
    room = np.empty(len(lengths), dtype=np.int64)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fits = room[: len(bins)] >= length
        # The first True; 0 when there is none.
        number = int(fits.argmax()) if bins else 0
        if bins and fits[number]:
            bins[number].append(index)
            room[number] -= length
        else:
            room[len(bins)] = max_tokens - length
            bins.append([index])
    return bins
