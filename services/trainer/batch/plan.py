"""Which samples train together: optimizer steps by whole groups, micro-batches by tokens."""

from __future__ import annotations

from collections.abc import Sequence

from services.trainer.batch.samples import TrainSample


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


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `max_tokens`; a longer item gets a bin of its own.

    First-fit decreasing: at most 11/9 of the optimal number of bins, plus one (Johnson, 1973). Equal lengths keep
    their order, so that samples of one prompt, whose prompt is computed once, tend to stay together.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        for number, free in enumerate(room):
            if length <= free:
                bins[number].append(index)
                room[number] -= length
                break
        else:
            bins.append([index])
            room.append(max_tokens - length)
    return bins
