"""Remembers outside the store how far it had come, so that a store that comes back with less is found out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

import structlog

log = structlog.get_logger()

_INTERVAL_S = 1.0


class Witnessed(Protocol):
    acknowledged: int
    """The highest position that the store has answered with."""


class Witness:
    """Keeps the position in a file, for when the buffer and the store go down together. Buffers may share the file."""

    def __init__(self, path: Path, store: Witnessed) -> None:
        self._path = path
        self._store = store
        self._saved = 0

    def recall(self) -> None:
        """Before the store is opened: makes it answer for what was acknowledged to earlier processes."""
        self._saved = self._read()
        self._store.acknowledged = max(self._store.acknowledged, self._saved)

    def save(self) -> None:
        """Returns when the position is on disk. Raises OSError."""
        position = max(self._store.acknowledged, self._read())
        if position == self._saved:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with part.open("w") as file:
            file.write(f"{position}\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self._saved = position

    async def run(self) -> None:
        """Saves about once a second, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await asyncio.to_thread(self.save)
            except OSError as error:
                log.warning("position_not_saved", path=str(self._path), reason=error.strerror)

    def _read(self) -> int:
        try:
            return int(self._path.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            log.warning("position_not_read", path=str(self._path), why="it holds no number")
            return 0
