"""Directories that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

# Left behind by a process that died while it wrote.
TEMPORARY = ".tmp-"
_CHUNK = 1 << 22


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes `target` appear at once, with what `fill` writes into the directory it is given, on disk.

    An earlier `target` is replaced. A crash at any point leaves either the earlier one or none, never a part. A disk
    that refuses (OSError) keeps nothing of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a part of a checkpoint is what fills the disk
        raise
    if target.exists():
        replaced = target.parent / f"{TEMPORARY}replaced-{target.name}-{os.getpid()}"
        target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced)
    else:
        temporary.rename(target)
    _fsync(target.parent)


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
