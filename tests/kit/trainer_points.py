"""Points at which a trainer is struck, more of them than in running systems."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.faults import points

_MORE = {
    "state_loaded": "services.trainer.backends.torch.backend:TorchBackend.load_state",
    "fork_recorded": "services.trainer.trainer:record_fork",
    "state_copied": "services.trainer.backends.torch.backend:TorchBackend.state",
    "checkpoint_pruned": "services.trainer.checkpoint:CheckpointStore._prune",
    "line_written": "services.trainer.records:JsonLines.write",
}


def names() -> list[str]:
    return [*points.names("trainer"), *(f"trainer.{name}.{when}" for name in _MORE for when in ("before", "after"))]


def install() -> None:
    """In the trainer's process, before anything else."""
    points.install(["-m", "services.trainer"])
    for name, place in _MORE.items():
        points._wrap(place, f"trainer.{name}", Path(os.environ["FAULT_POINTS"]))
