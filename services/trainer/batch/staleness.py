"""How far behind the weights about to be trained the tokens of a batch are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.versions import Version, steps_between
from services.trainer.batch.samples import TrainSample, TrainSegment


@dataclass(frozen=True)
class Clock:
    """Measures staleness against one version.

    `forks` maps an epoch to the step it recovered from. An epoch that is missing ended before it recovered, and so
    before any token was sampled under it: it changed nothing.
    """

    trained: Version
    """The weights about to be trained: the step before the one they will make."""
    forks: Mapping[int, int]

    def staleness(self, version: Version) -> int:
        """Steps between `version` and the weights about to be trained. 0: the very same weights."""
        newer, older = max(version, self.trained), min(version, self.trained)
        known = {epoch: self.forks.get(epoch, older.step) for epoch in range(older.epoch + 1, newer.epoch + 1)}
        return steps_between(older, newer, known)


def trained_mask(
    segment: TrainSegment, clock: Clock, max_staleness: int | None, only: Version | None = None
) -> NDArray[np.uint8]:
    """The loss mask times the policy mask, uint8[completion].

    With a `max_staleness` (on_stale = "mask") tokens that are further behind are not trained; with `only`, none but
    those of that version.
    """
    mask = segment.loss_mask.copy()
    for span in segment.spans:
        too_old = max_staleness is not None and clock.staleness(span.version) > max_staleness
        if too_old or (only is not None and span.version != only):
            mask[span.start : span.end] = 0
    return mask


def last_version(sample: TrainSample) -> Version | None:
    """The version that finished the sample: tokens of any other were there when its generation was taken up again."""
    return max((span.version for segment in sample.segments for span in segment.spans), default=None)


def fresh_tokens(segment: TrainSegment, clock: Clock) -> NDArray[np.bool_]:
    """True where the very weights about to be trained computed the token and all KV under it, bool[completion]."""
    fresh = np.zeros(segment.completion_length, dtype=np.bool_)
    for span in segment.spans:
        if clock.staleness(span.version) == 0 and not span.carried:
            fresh[span.start : span.end] = True
    return fresh


def sample_staleness(sample: TrainSample, clock: Clock, max_staleness: int | None) -> int:
    """Staleness of the oldest token that is trained (tokens masked as too old are not)."""
    ages = (clock.staleness(span.version) for segment in sample.segments for span in segment.spans)
    return max((age for age in ages if max_staleness is None or age <= max_staleness), default=0)
