"""What a replica counts about itself, for its heartbeat."""

from __future__ import annotations

import time
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
    tokens_discarded: int = 0
    """Streamed in and then neither saved nor completed."""
    requests_aborted: int = 0
    """Ended by the engine before they were finished; they were resumed."""
    samples_completed: int = 0
    multi_span_samples: int = 0
    """Completed with tokens of two or more weight versions."""
    pushes: int = 0
    pause_seconds: float = 0.0
    busy: BusyClock = field(default_factory=BusyClock)
    started: float = field(default_factory=time.monotonic)

    def snapshot(self) -> dict[str, float]:
        return {
            "tokens_generated": self.tokens_generated,
            "tokens_discarded": self.tokens_discarded,
            "requests_aborted": self.requests_aborted,
            "samples_completed": self.samples_completed,
            "multi_span_samples": self.multi_span_samples,
            "pushes": self.pushes,
            "pause_seconds": self.pause_seconds,
            "busy_seconds": self.busy.seconds(),
            "uptime_seconds": time.monotonic() - self.started,
        }
