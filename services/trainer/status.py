"""What the trainer is doing, for whoever asks while it does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from services.common.versions import Version


class TrainerStatus:
    """Written by the training thread, read on the loop. Each attribute is replaced as a whole, never changed."""

    def __init__(self) -> None:
        self.version = Version(0, 0)
        self.phase = "starting"
        self.waiting_for: pb.WaitingFor | None = None
        self.metrics: Mapping[str, float] = {}
        self.steps = 0
        """Steps trained by this process."""
        self.wait_seconds = 0.0
        """Time in which there was nothing to do: no batch, or weights on their way."""
        self._busy_seconds = 0.0
        self._busy_since: float | None = None
        self._started = time.monotonic()

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def busy_seconds(self) -> float:
        """Time spent training, copying weights and saving, up to now."""
        since = self._busy_since
        return self._busy_seconds + (time.monotonic() - since if since is not None else 0.0)

    @contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        """The work inside counts as busy."""
        self.phase = phase
        self._busy_since = started = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None
            self._busy_seconds += time.monotonic() - started

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """The time inside counts as waiting."""
        self.phase = phase
        started = time.monotonic()
        try:
            yield
        finally:
            self.waiting_for = None
            self.wait_seconds += time.monotonic() - started

    def report(self, version: Version, line: Mapping[str, Any]) -> None:
        """A step has ended: keeps its numbers."""
        self.version = version
        self.steps += 1
        self.metrics = {
            name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and name != "time"
        }
