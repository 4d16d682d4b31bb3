"""Random access to the rows of a data file."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from services.common.errors import ConfigError


class Rows(Protocol):
    """Rows of a file, by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Mapping[str, Any], bytes]:
        """The row, and bytes that identify its content. Raises ConfigError naming the place when it is malformed."""

    def where(self, index: int) -> str:
        """The row's place in the file, for error messages."""


class JsonlRows:
    """One JSON object a line; blank lines are skipped. Keeps places and lengths, not rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")
        offset = 0
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._lengths.append(len(line))
                        self._lines.append(number)
                    offset += len(line)
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error

    def __len__(self) -> int:
        return len(self._offsets)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, index: int) -> tuple[Mapping[str, Any], bytes]:
        raw = os.pread(self._file, self._lengths[index], self._offsets[index])
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"is not valid JSON: {error}", field=self.where(index)) from None
        if not isinstance(row, dict):
            raise ConfigError("is not a JSON object", field=self.where(index))
        return row, raw

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"


class ParquetRows:
    """The rows of a Parquet file, kept as Arrow columns in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"cannot be read as Parquet: {error}", field=str(path)) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, index: int) -> tuple[Mapping[str, Any], bytes]:
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        try:
            return row, orjson.dumps(row, default=str, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            raise ConfigError(f"holds what JSON cannot: {error}", field=self.where(index)) from None

    def where(self, index: int) -> str:
        return f"{self._path} row {index}"
