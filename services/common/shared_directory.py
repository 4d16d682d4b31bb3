"""Where the processes of one run share memory on one machine: a directory that only their user can enter."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

IN_MEMORY = Path("/dev/shm")  # noqa: S108 (what is made there is owner-only)
VARIABLE = "POLYHEAD_SHARED_DIR"
"""Tells an engine that has none of this project's packages."""


def shared_directory(run_dir: Path) -> Path:
    """The same in every process of the run. In memory where the machine has such a file system."""
    run_dir = run_dir.absolute()
    if not IN_MEMORY.is_dir() or not os.access(IN_MEMORY, os.W_OK):
        return run_dir / "tmp" / "shared"
    return IN_MEMORY / f"polyhead-{os.geteuid()}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]}"


def clear_shared_directory(run_dir: Path) -> None:
    """Removes what is left in it, and the directory. What is mapped somewhere stays readable there."""
    shutil.rmtree(shared_directory(run_dir), ignore_errors=True)
