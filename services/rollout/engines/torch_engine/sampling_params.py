"""The `sampling_params` of a request, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import InvalidArgumentError

_MAX_STOPS = 32
# Fields of SGLang that must have these values, or be absent: the engine does not do what others would ask for.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "stop_regex": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "logit_bias": (),
    "custom_params": (),
    "beam_width": (1,),
    "spaces_between_special_tokens": (True, False),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it stops. Defaults are SGLang's."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: the whole vocabulary."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """No token id ends the completion; stop strings and the length do."""
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    """Tokens between two events of its stream; the engine's own when None."""


def parse_sampling_params(raw: object) -> SamplingParams:
    """Null counts as absent. Raises InvalidArgumentError for unknown keys and values out of range."""
    if not isinstance(raw, Mapping):
        raise InvalidArgumentError("must be an object", field="sampling_params")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        where = f"sampling_params.{key}"
        if key in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[key]:
                raise InvalidArgumentError(f"{value!r} is not supported by this engine", field=where)
        elif key not in _READERS:
            raise InvalidArgumentError("is not known", field=where)
        elif value is not None:
            values[key] = _READERS[key](value, where)
    params = SamplingParams(**values)
    if params.min_new_tokens > params.max_new_tokens:
        raise InvalidArgumentError(
            f"{params.min_new_tokens} is above max_new_tokens = {params.max_new_tokens}",
            field="sampling_params.min_new_tokens",
        )
    return params


def _temperature(value: Any, where: str) -> float:
    number = _number(value, where)
    _require(math.isfinite(number) and number >= 0, value, "must be finite and at least 0", where)
    # Below this SGLang samples greedily too.
    return number if number >= 1e-6 else 0.0


def _top_p(value: Any, where: str) -> float:
    number = _number(value, where)
    _require(0 < number <= 1, value, "must be in (0, 1]", where)
    return number


def _top_k(value: Any, where: str) -> int:
    number = _integer(value, where)
    _require(number == -1 or number >= 1, value, "must be -1 or at least 1", where)
    return number


def _count(value: Any, where: str) -> int:
    number = _integer(value, where)
    _require(number >= 0, value, "must be at least 0", where)
    return number


def _seed(value: Any, where: str) -> int:
    number = _integer(value, where)
    _require(-(2**63) <= number < 2**63, value, "must fit into 64 bits", where)
    return number


def _strings(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    valid = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    _require(valid and len(texts) <= _MAX_STOPS, value, f"must be at most {_MAX_STOPS} non-empty strings", where)
    return tuple(texts)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    _require(isinstance(value, list), value, "must be a list of token ids", where)
    return tuple(_integer(item, where) for item in value)


def _number(value: Any, where: str) -> float:
    _require(isinstance(value, int | float) and not isinstance(value, bool), value, "must be a number", where)
    return float(value)


def _integer(value: Any, where: str) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool), value, "must be an integer", where)
    return int(value)


def _boolean(value: Any, where: str) -> bool:
    _require(isinstance(value, bool), value, "must be true or false", where)
    return bool(value)


def _require(condition: bool, value: Any, rule: str, where: str) -> None:
    if not condition:
        raise InvalidArgumentError(f"{rule}, not {value!r}", field=where)


_READERS: dict[str, Any] = {
    "temperature": _temperature,
    "top_p": _top_p,
    "top_k": _top_k,
    "max_new_tokens": _count,
    "min_new_tokens": _count,
    "stop": _strings,
    "stop_token_ids": _ids,
    "ignore_eos": _boolean,
    "sampling_seed": _seed,
    "skip_special_tokens": _boolean,
    "no_stop_trim": _boolean,
    "stream_interval": _count,
}
