"""What a field of any request may hold, whatever request it is in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import orjson

from polyhead.v1 import sample_pb2
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, LimitError
from services.common.rpc import MIB
from services.common.versions import MAX_STEP

MAX_NUMBER = 1 << 53
"""Of ids, ordinals and seeds: the store's scripts count in doubles."""
_MAX_NAME = 128
_KIB = 1024

T = TypeVar("T")


def check_name(text: str, field: str) -> str:
    """A client's own name for itself or its call: 1 to 128 printable characters."""
    if not 0 < len(text) <= _MAX_NAME or not text.isprintable():
        raise InvalidArgumentError(f"must be 1 to {_MAX_NAME} printable characters", field=field)
    return text


def check_count(items: Sequence[T], limits: LimitsConfig, field: str) -> Sequence[T]:
    if len(items) > limits.samples_per_rpc:
        raise LimitError(f"{len(items)} in one call, at most {limits.samples_per_rpc}", field=field)
    return items


def check_number(value: int, field: str, most: int = MAX_NUMBER) -> int:
    if value > most:
        raise InvalidArgumentError(f"{value} is above {most}", field=field)
    return value


def check_step(step: int, field: str) -> int:
    if step > MAX_STEP:
        raise InvalidArgumentError(f"{step} is no step", field=field)
    return step


def check_known(value: int, known: Collection[int], field: str) -> int:
    """One of an enum's values but UNSPECIFIED."""
    if not value or value not in known:
        raise InvalidArgumentError("must be given" if not value else f"{value} is not known", field=field)
    return value


def check_finite(values: Iterable[float], field: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise InvalidArgumentError(f"{value} is not finite", field=field)


def check_time(unix_us: int, field: str) -> None:
    """Microseconds since the Unix epoch, 0 for none."""
    if unix_us < 0:
        raise InvalidArgumentError(f"{unix_us} is before 1970", field=field)


def check_prompt(prompt: sample_pb2.Prompt, limits: LimitsConfig, field: str) -> None:
    """Metadata within its limit; metadata, tools and messages are the JSON that they are read as."""
    metadata_bytes = len(prompt.metadata_json.encode())
    if metadata_bytes > limits.metadata_kb * _KIB:
        raise LimitError(f"{metadata_bytes} bytes, at most {limits.metadata_kb * _KIB}", field=f"{field}.metadata_json")
    if prompt.metadata_json:
        _parsed(prompt.metadata_json, dict, f"{field}.metadata_json")
    if prompt.tools_json:
        _parsed(prompt.tools_json, list, f"{field}.tools_json")
    if prompt.HasField("messages_json"):
        messages = _parsed(prompt.messages_json, list, f"{field}.messages_json")
        if not are_messages(messages):
            raise InvalidArgumentError("is no list of messages, each with a role", field=f"{field}.messages_json")


def are_messages(value: object) -> bool:
    """A list of OpenAI-style messages, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def prompt_bytes(prompt: sample_pb2.Prompt, limits: LimitsConfig, field: str) -> bytes:
    """A serialized prompt that can be generated from, within its limits."""
    if not (prompt.text or prompt.messages_json):
        raise InvalidArgumentError("has neither text nor messages", field=f"{field}.input")
    check_prompt(prompt, limits, field)
    data = prompt.SerializeToString()
    if len(data) > limits.sample_mb * MIB:
        raise LimitError(f"{len(data)} bytes, at most {limits.sample_mb * MIB}", field=field)
    return data


def _parsed(text: str, kind: type[T], field: str) -> T:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgumentError(f"is not JSON: {error}", field=field) from None
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"is no JSON {'object' if kind is dict else 'list'}", field=field)
    return value
