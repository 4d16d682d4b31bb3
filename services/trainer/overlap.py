"""Which tokens were generated while the trainer trained: the proof that a run is asynchronous."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from services.trainer.batch.samples import TrainSample

# Older intervals are forgotten: a sample was generated within the last few steps.
REMEMBERED = 512


class TrainIntervals:
    """When this trainer was training, in microseconds since the Unix epoch."""

    def __init__(self) -> None:
        self._intervals: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)

    def add(self, start_us: int, end_us: int) -> None:
        """Intervals come in order and do not overlap."""
        self._intervals.append((start_us, end_us))

    def overlap_tokens(self, samples: Iterable[TrainSample]) -> int:
        """Completion tokens that arrived within an interval.

        Only the arrival of a segment's first and last token is recorded; the others are taken to be spread evenly.
        """
        if not self._intervals:
            return 0
        arrivals = [
            _arrivals(segment.first_token_unix_us, segment.last_token_unix_us, segment.completion_length)
            for sample in samples
            for segment in sample.segments
        ]
        if not arrivals:
            return 0
        times = np.concatenate(arrivals)
        starts, ends = np.array(self._intervals, dtype=np.float64).T
        latest = np.searchsorted(starts, times, side="right") - 1
        return int(((latest >= 0) & (times <= ends[latest])).sum())


def _arrivals(first_us: int, last_us: int, count: int) -> NDArray[np.float64]:
    return np.linspace(first_us, last_us, count) if count > 1 else np.full(count, last_us, dtype=np.float64)
