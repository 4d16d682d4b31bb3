"""One launcher per run directory. The lock is the kernel's: it ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from services.common.errors import ConfigError

_NAME = "launcher.lock"


@contextmanager
def sole_launcher(run_dir: Path) -> Iterator[None]:
    """Holds `run_dir`, which is created if needed. Raises ConfigError when another launcher has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _NAME).open("a+") as lock:
        if not _lock(lock):
            raise ConfigError(f"is already running (process {_pid(lock)})", field=str(run_dir))
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def holder(run_dir: Path) -> int | None:
    """The process that holds `run_dir`, or None."""
    try:
        with (run_dir / _NAME).open("a+") as lock:
            return None if _lock(lock) else _pid(lock)
    except FileNotFoundError:
        return None


def _lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid(lock: IO[str]) -> int:
    lock.seek(0)
    return int(lock.read().strip() or 0)
