"""The run's JSON-lines files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson


class JsonLines:
    """Appends to one file; each line is there when `write` returns. One thread at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: Mapping[str, object]) -> None:
        """Numbers that JSON cannot hold (NaN, infinities) become null."""
        self._file.write(orjson.dumps(line) + b"\n")
