"""The data set as an endless stream of prompts, addressed by ordinal: epoch × rows + position in the epoch."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import xxhash

from polyhead.v1 import sample_pb2
from services.buffer.field_checks import are_messages, prompt_bytes
from services.buffer.rows import JsonlRows, ParquetRows, Rows
from services.common.config.models import DataConfig, LimitsConfig
from services.common.errors import ConfigError, InvalidArgumentError, LimitError

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
_ORDERS_KEPT = 2  # permutations: prompts are issued across the border of two epochs


class PromptSource:
    """Rows of one .jsonl or .parquet file, permuted anew in each epoch when `data.shuffle` is set.

    Every row is checked at the start. Raises ConfigError naming file and row when one is malformed.
    """

    def __init__(self, config: DataConfig, limits: LimitsConfig | None = None) -> None:
        """`limits` are the buffer's for prompts that come over the wire; None for their defaults."""
        path, start, stop = split_slice(config.prompt_data)
        self._keys = config
        self._limits = limits or LimitsConfig()
        self._rows = _open(path)
        self._chosen = range(len(self._rows))[start:stop]
        if not self._chosen:
            raise ConfigError(
                f"no prompts: {len(self._rows)} rows, slice [{start}:{stop}] leaves none", field=config.prompt_data
            )
        self._orders: dict[int, list[int]] = {}
        digest = xxhash.xxh3_128(orjson.dumps(self._identity(start, stop)))
        for index in self._chosen:
            row, raw = self._rows.read(index)
            self._check(self._prompt(row, self._rows.where(index)), self._rows.where(index))
            digest.update(raw)
        self.digest = digest.hexdigest()

    @property
    def seed(self) -> int:
        """What the order of the stream depends on besides the digest."""
        return self._keys.seed if self._keys.shuffle else 0

    def __len__(self) -> int:
        return len(self._chosen)

    def prompt(self, ordinal: int) -> sample_pb2.Prompt:
        """The prompt at a place of the stream; any ordinal >= 0 has one."""
        epoch, position = divmod(ordinal, len(self._chosen))
        index = self._chosen[self._order(epoch)[position] if self._keys.shuffle else position]
        row, _ = self._rows.read(index)
        return self._prompt(row, self._rows.where(index))

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._chosen)))
            random.Random(self._keys.seed + epoch).shuffle(order)
            self._orders[epoch] = order
            while len(self._orders) > _ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
        return self._orders[epoch]

    def _identity(self, start: int | None, stop: int | None) -> list[object]:
        keys = self._keys
        return [keys.input_key, keys.label_key, keys.metadata_key, keys.tool_key, start, stop, keys.shuffle]

    def _check(self, prompt: sample_pb2.Prompt, where: str) -> None:
        try:
            prompt_bytes(prompt, self._limits, "prompt")
        except (InvalidArgumentError, LimitError) as error:
            raise ConfigError(f"{error.field}: {error.reason}", field=where) from None

    def _prompt(self, row: Mapping[str, Any], where: str) -> sample_pb2.Prompt:
        keys = self._keys
        prompt = sample_pb2.Prompt(
            metadata_json=_json_field(row, keys.metadata_key, dict, where),
            tools_json=_json_field(row, keys.tool_key, list, where),
        )
        value = _required(row, keys.input_key, where)
        if isinstance(value, str) and value:
            prompt.text = value
        elif are_messages(value):
            prompt.messages_json = orjson.dumps(value).decode()
        else:
            raise ConfigError(f"{keys.input_key!r} is neither text nor a list of messages", field=where)
        if keys.label_key is not None:
            label = _required(row, keys.label_key, where)
            prompt.label = label if isinstance(label, str) else orjson.dumps(label).decode()
        return prompt


def split_slice(text: str) -> tuple[Path, int | None, int | None]:
    """``path@[a:b]`` as path, a and b; negative places count from the end, absent ones are None."""
    match = _SLICE.fullmatch(text)
    if match is None:
        if "@[" in text:
            raise ConfigError(f"{text!r} is not of the form path@[start:end]", field="data.prompt_data")
        return Path(text), None, None
    start, stop = match["start"], match["stop"]
    return Path(match["path"]), int(start) if start else None, int(stop) if stop else None


def _open(path: Path) -> Rows:
    if not path.is_file():
        raise ConfigError(f"no such file: {path}", field="data.prompt_data")
    if path.suffix == ".jsonl":
        return JsonlRows(path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    raise ConfigError(f"{path.name} ends neither in .jsonl nor in .parquet", field="data.prompt_data")


def _required(row: Mapping[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        raise ConfigError(f"no {key!r}; the row has {', '.join(map(repr, row))}", field=where)
    return row[key]


def _json_field(row: Mapping[str, Any], key: str, kind: type, where: str) -> str:
    """An optional part of a row as JSON text; it may come as a value or as JSON in a string."""
    value = row.get(key)
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{key!r} is not JSON: {error}", field=where) from None
    if not isinstance(value, kind):
        raise ConfigError(f"{key!r} is no JSON {'object' if kind is dict else 'list'}", field=where)
    return orjson.dumps(value).decode() if value else ""
