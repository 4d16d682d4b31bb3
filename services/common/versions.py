"""Weight versions: identity, order along the training history, and distance through a recovery.

A version is the pair (epoch, step). Epoch *e* began by recovering a checkpoint of step `forks[e]` of the history
before it, so the histories form a chain of branches: versions (e', s) with s <= forks[e] are shared, later ones of an
older epoch are on a branch that was abandoned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from polyhead.v1 import sample_pb2

MAX_STEP = 1 << 40
"""No run reaches this step. The store's scripts count in doubles, and do sums with steps."""

_WIRE = re.compile(r"e(\d+)\.s(\d+)")


class Version(NamedTuple):
    """One set of weights. Tuple order is the order of creation."""

    epoch: int
    step: int

    def __str__(self) -> str:
        """As SGLang's `weight_version` carries it: ``e2.s57``."""
        return f"e{self.epoch}.s{self.step}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Inverse of `str`. Raises ValueError for anything else (SGLang's own default is "default")."""
        match = _WIRE.fullmatch(text)
        if match is None:
            raise ValueError(f"not a weight version: {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_proto(cls, message: sample_pb2.WeightVersion) -> Version:
        return cls(message.epoch, message.step)

    def to_proto(self) -> sample_pb2.WeightVersion:
        return sample_pb2.WeightVersion(epoch=self.epoch, step=self.step)


def steps_between(older: Version, newer: Version, forks: Mapping[int, int]) -> int:
    """Distance in steps from `older` to `newer` along the history, through fork points (I6).

    `forks[e]` is the step that epoch e recovered from. Steps of `older` above the fork were undone, so they count
    once backwards and the new steps count forwards. Example: with ``forks={2: 10}``,
    ``steps_between(Version(1, 13), Version(2, 12), forks) == 3 + 2``.
    """
    fork = min((forks[e] for e in range(older.epoch + 1, newer.epoch + 1)), default=older.step)
    shared = min(older.step, fork)
    return (older.step - shared) + (newer.step - shared)
