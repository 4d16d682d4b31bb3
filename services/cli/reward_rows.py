"""The rows that `polyhead reward test` scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from polyhead.v1 import reward_pb2, sample_pb2
from services.cli.reward_arguments import EXPECTED
from services.common.errors import ConfigError


class Row(NamedTuple):
    line: int
    item: reward_pb2.ScoreItem
    expected: float | None
    """What the row says its reward is, if it does."""
    group: str
    """What the row says its group is; else its prompt."""


def read_rows(path: Path, expect: str | None = None) -> list[Row]:
    """Every row of the file; empty lines are skipped.

    With `expect`, every row must have that column. Raises ConfigError naming the line and the column.
    """
    rows = [_row(path, number, line, expect) for number, line in _lines(path)]
    if not rows:
        raise ConfigError("has no rows", field=str(path))
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error


def _row(path: Path, number: int, line: bytes, expect: str | None) -> Row:
    try:
        return _parse(number, line, expect)
    except ValueError as error:
        raise ConfigError(str(error), field=f"{path}:{number}") from None


def _parse(number: int, line: bytes, expect: str | None) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    name = "response" if "response" in row and "completion" not in row else "completion"
    if not isinstance(row.get(name), str):
        raise ValueError(f'"{name}" must be a text, {_what(row, name)}')
    prompt = sample_pb2.Prompt(label=_label(row), metadata_json=_metadata(row))
    _set_prompt(prompt, row)
    item = reward_pb2.ScoreItem(sample_id=f"line {number}", prompt=prompt, completion=row[name])
    group = orjson.dumps([row.get("group"), None if "group" in row else row.get("prompt")]).decode()
    return Row(number, item, _expected(row, expect), group)


def _label(row: dict[str, Any]) -> str:
    label = row.get("label")
    if label is None:
        return ""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f'"label" must be a text or a number, {_what(row, "label")}')
    return str(label)


def _metadata(row: dict[str, Any]) -> str:
    metadata = row.get("metadata")
    if metadata is None:
        return ""
    if not isinstance(metadata, dict):
        raise ValueError(f'"metadata" must be an object, {_what(row, "metadata")}')
    return orjson.dumps(metadata).decode()


def _set_prompt(prompt: sample_pb2.Prompt, row: dict[str, Any]) -> None:
    given = row.get("prompt", "")
    if isinstance(given, str):
        prompt.text = given
    elif isinstance(given, list) and all(isinstance(message, dict) for message in given):
        prompt.messages_json = orjson.dumps(given).decode()
    else:
        raise ValueError(f'"prompt" must be a text or a list of messages, {_what(row, "prompt")}')


def _expected(row: dict[str, Any], expect: str | None) -> float | None:
    name = expect or EXPECTED
    value = row.get(name)
    if value is None and expect is None:
        return None
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ValueError(f'"{name}" must be a number, {_what(row, name)}')
    return float(value)


def _what(row: dict[str, Any], name: str) -> str:
    return f"is {type(row[name]).__name__}" if name in row else "is missing"
