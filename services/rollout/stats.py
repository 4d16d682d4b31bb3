"""What a replica counts about itself, for its heartbeat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


class BusyClock:
    """Seconds during which at least one request was running and the engine was not paused."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running = 0
        self._paused = False
        self._since: float | None = None

    def started(self, requests: int) -> None:
        self._running += requests
        self._turn()

    def ended(self, requests: int) -> None:
        self._running -= requests
        self._turn()

    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._turn()

    @property
    def running(self) -> int:
        return self._running

    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

    def _turn(self) -> None:
        busy = self._running > 0 and not self._paused
        if busy and self._since is None:
            self._since = time.monotonic()
        elif not busy and self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None


@dataclass
class Stats:
    """Cumulative since the process started."""

    tokens_generated: int = 0
    discarded: Counter[str] = field(default_factory=Counter)
    """Tokens that streamed in and were then neither saved nor completed, by the reason."""
    unsaved: Callable[[], int] = lambda: 0
    """Tokens of the samples held at this moment that the store does not have."""
    in_flight: Callable[[], int] = lambda: 0
    """Tokens of the requests that run at this moment, prompts included."""
    tokens_recomputed: int = 0
    """Completion tokens that were sent again with their prompt, so that an engine could resume them."""
    requests_aborted: int = 0
    """Ended by the engine before they were finished; they were resumed."""
    samples_completed: int = 0
    multi_span_samples: int = 0
    """Completed with tokens of two or more weight versions."""
    pushes: int = 0
    pause_seconds: float = 0.0
    busy: BusyClock = field(default_factory=BusyClock)
    started: float = field(default_factory=time.monotonic)

    @property
    def tokens_discarded(self) -> int:
        return self.discarded.total()

    def snapshot(self) -> dict[str, float]:
        return {
            "tokens_generated": self.tokens_generated,
            "tokens_discarded": self.tokens_discarded,
            **{f"tokens_discarded.{reason}": count for reason, count in self.discarded.items() if count},
            "tokens_unsaved": self.unsaved(),
            "tokens_recomputed": self.tokens_recomputed,
            "requests_aborted": self.requests_aborted,
            "samples_completed": self.samples_completed,
            "multi_span_samples": self.multi_span_samples,
            "pushes": self.pushes,
            "pause_seconds": self.pause_seconds,
            "busy_seconds": self.busy.seconds(),
            "uptime_seconds": time.monotonic() - self.started,
        }
