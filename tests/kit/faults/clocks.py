"""The clock of the day of one role jumps, ``time.time`` and ``time.time_ns`` of its processes: a file says how far."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

ROLES = ("buffer", "rollout", "reward", "trainer")
HOUR_S = 3600
JUMP_S = 6.0
_LOOK_EVERY_S = 0.2


def set_ahead(directory: Path, role: str, seconds: int) -> None:
    """`directory` is that of the fault points. 0 sets it right."""
    (directory / "clock").mkdir(exist_ok=True)
    partial = directory / "clock" / f"{role}.partial"
    partial.write_text(str(seconds))
    partial.rename(directory / "clock" / role)


def install(role: str, directory: Path) -> None:
    """In a process of the run."""
    path = directory / "clock" / role
    ahead_s, looked_at = 0, -_LOOK_EVERY_S

    def ahead() -> int:
        nonlocal ahead_s, looked_at
        if time.monotonic() - looked_at > _LOOK_EVERY_S:
            looked_at = time.monotonic()
            try:
                ahead_s = int(path.read_text())
            except (FileNotFoundError, ValueError):
                ahead_s = 0
        return ahead_s

    def shifted(clock: Callable[[], float], unit: int) -> Callable[[], float]:
        return lambda: clock() + ahead() * unit

    time.time = shifted(time.time, 1)
    time.time_ns = shifted(time.time_ns, 10**9)  # type: ignore[assignment]
