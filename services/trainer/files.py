"""Directories that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

# Left behind by a process that died while it wrote.
TEMPORARY = ".tmp-"
_CHUNK = 1 << 22


def temporary_for(target: Path) -> Path:
    """A place beside `target`, another one each time, that `remove_temporary` knows."""
    return target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}-{time.time_ns()}"


def write_directory(target: Path, fill: Callable[[Path], None], temporary: Path | None = None) -> None:
    """Makes `target` appear at once, with what `fill` writes into the directory it is given, on disk.

    That directory is `temporary`, a `temporary_for` the target, which may exist and hold files already.

    An earlier `target` is replaced. A crash at any point leaves either the earlier one or none, never a part. A disk
    that refuses (OSError) keeps nothing of it.
    """
    temporary = temporary or temporary_for(target)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        for path in temporary.iterdir():
            fsync(path)
        fsync(temporary)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a part of a checkpoint is what fills the disk
        raise
    if target.exists():
        replaced = temporary_for(target)
        target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced)
    else:
        temporary.rename(target)
    fsync(target.parent)


def remove_temporary(parent: Path) -> None:
    """Removes what dead writers left in `parent`."""
    for path in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def digest(path: Path) -> str:
    """XXH3-128 of a file's content: against damage, not against an adversary."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return str(state.hexdigest())


def fsync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
