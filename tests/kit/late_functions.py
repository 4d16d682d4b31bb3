"""A reward and a filter, functions of the texts alone, that take their time as chance has it."""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Sequence
from typing import Any

LATE_S = "LATE_SECONDS"
"""The environment variable with the longest time that a call takes."""


def reward_of(text: str) -> float:
    return float(zlib.crc32(text.encode()) % 2)


def keeps(texts: Sequence[str]) -> bool:
    return zlib.crc32("\n".join(texts).encode()) % 3 > 0


def reward(args: Any, sample: Any) -> float:
    _dawdle()
    return reward_of(sample.response)


def keep(args: Any, samples: list[Any]) -> bool:
    _dawdle()
    return keeps([sample.response for sample in samples])


def _dawdle() -> None:
    time.sleep(random.SystemRandom().random() ** 4 * float(os.environ.get(LATE_S, "0")))
