"""The counters a reward replica reports."""

from __future__ import annotations

import time

from services.reward.jobs import FailureKind, Result


class Stats:
    """Cumulative since the process started."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._started = time.monotonic()
        self._busy_s = 0.0
        self._scored = 0
        self._failed = dict.fromkeys(FailureKind, 0)
        self._judged = 0
        self._filter_failures = 0
        self._buffer_filter_failures = 0

    def count(self, result: Result) -> None:
        self._busy_s += result.seconds
        if result.failure is None:
            self._scored += 1
        else:
            self._failed[result.failure] += 1

    def count_judged(self, result: Result) -> None:
        self._busy_s += result.seconds
        self._judged += result.judgement is not None
        self._filter_failures += result.judgement is None and result.failure is not FailureKind.UNAVAILABLE

    def count_preferred(self, result: Result) -> None:
        self._busy_s += result.seconds
        self._buffer_filter_failures += result.preferred is None and result.failure is not FailureKind.UNAVAILABLE

    def as_dict(self) -> dict[str, float]:
        """`busy_seconds` is per item the station can be on: over `uptime_seconds` it is the share of it in use."""
        return {
            "samples_scored": self._scored,
            "failures": sum(self._failed.values()) - self._failed[FailureKind.UNAVAILABLE],
            "timeouts": self._failed[FailureKind.TIMED_OUT],
            "deaths": self._failed[FailureKind.DIED],
            "unavailable": self._failed[FailureKind.UNAVAILABLE],
            "groups_judged": self._judged,
            "filter_failures": self._filter_failures,
            "buffer_filter_failures": self._buffer_filter_failures,
            "busy_seconds": self._busy_s / self._width,
            "uptime_seconds": time.monotonic() - self._started,
        }
