"""Where each epoch of the run forked off: kept beside the checkpoints, for measuring staleness through recoveries."""

from __future__ import annotations

import os
from pathlib import Path

import orjson


def load_forks(run_dir: Path) -> dict[int, int]:
    """Epoch to the step it recovered from. Epochs that ended before they wrote anything are missing."""
    try:
        stored = orjson.loads(_path(run_dir).read_bytes())
    except FileNotFoundError:
        return {}
    return {int(epoch): int(step) for epoch, step in stored.items()}


def record_fork(run_dir: Path, epoch: int, step: int) -> dict[int, int]:
    """Adds that `epoch` begins at `step`, on disk before it returns. Returns the whole history."""
    forks = {**load_forks(run_dir), epoch: step}
    path = _path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(orjson.dumps({str(key): value for key, value in sorted(forks.items())}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return forks


def _path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "forks.json"
