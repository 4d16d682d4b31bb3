"""Pauses out of arrival times: for each request, its longest gap between tokens around a push minus its median gap."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Arrivals = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Pauses:
    p50_s: float
    max_s: float
    requests: int
    """That were running when the push began and when it had ended."""
    median_gap_s: float


def pauses(requests: Sequence[Arrivals], begin: float, end: float) -> Pauses:
    """Of a push between two times. Requests that did not run across it do not count."""
    found, medians = [], []
    for arrivals in requests:
        times = [at for at, _ in arrivals]
        if len(times) < 3 or times[0] > begin or times[-1] < end:
            continue
        pairs = list(itertools.pairwise(times))
        median = statistics.median(after - before for before, after in pairs)
        # The token of the pass that was running comes out after the pause has ended, and the next one may wait too.
        around = [after - before for before, after in pairs if after > begin and before < end + 2 * median]
        found.append(max(around) - median)
        medians.append(median)
    if not found:
        return Pauses(float("nan"), float("nan"), 0, float("nan"))
    return Pauses(statistics.median(found), max(found), len(found), statistics.median(medians))


def went_on(requests: Sequence[Arrivals], end: float, by: float) -> bool:
    """Whether each request had a token between the end of a push and a later time."""
    return all(any(end < at <= by for at, _ in arrivals) for arrivals in requests)


def lost(requests: Sequence[dict[str, Any]], length: int) -> tuple[int, int]:
    """Requests that did not end by their length, and tokens that did not come."""
    aborted = sum(request["end"] != "length" for request in requests)
    missing = sum(length - (request["arrivals"][-1][1] if request["arrivals"] else 0) for request in requests)
    return aborted, missing
