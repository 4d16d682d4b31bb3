"""The body of POST /generate, turned into sequences."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.errors import InvalidArgumentError
from services.rollout.engines.torch_engine.sampling_params import SamplingParams, parse_sampling_params
from services.rollout.engines.torch_engine.sequence import Sequence
from services.rollout.engines.torch_engine.text import TextCodec

# Accepted for SGLang's sake; there is no prefix cache, no adapter and no router that could use them.
_WITHOUT_EFFECT = {
    "extra_key", "priority", "data_parallel_rank", "log_metrics", "background", "custom_labels",
    "return_text_in_logprobs",
}  # fmt: skip
_KNOWN = {
    "input_ids", "text", "sampling_params", "rid", "stream", "return_logprob", "logprob_start_len", "top_logprobs_num",
}  # fmt: skip


@dataclass(frozen=True)
class GenerateRequest:
    """One HTTP request: one sequence, or a batch of them answered as a list."""

    sequences: list[Sequence]
    is_batch: bool
    stream: bool
    return_logprob: list[bool]


class RequestParser:
    """Knows the model's limits. Stateless otherwise, except for the generator behind seeds that were not given."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        eos_ids: frozenset[int],
        codec: TextCodec | None,
        random_seed: int,
    ) -> None:
        self._vocab_size, self._context_length = vocab_size, context_length
        self._eos_ids, self._codec = eos_ids, codec
        self._generator = np.random.default_rng(random_seed)

    def parse(self, body: object) -> GenerateRequest:
        """Raises InvalidArgumentError naming the field; nothing was submitted then."""
        if not isinstance(body, Mapping):
            raise InvalidArgumentError("must be a JSON object", field="body")
        for key, value in body.items():
            if key not in _KNOWN and key not in _WITHOUT_EFFECT and value:
                raise InvalidArgumentError("is not supported by this engine", field=key)
        prompts, is_batch = self._prompts(body)
        size = len(prompts)
        rids = _rids(body.get("rid"), size, is_batch)
        params = _all_params(body.get("sampling_params"), size, is_batch)
        return_logprob = _each(body, "return_logprob", size, False, _is_bool)
        starts = _each(body, "logprob_start_len", size, -1, _is_int)
        top = _each(body, "top_logprobs_num", size, 0, _is_int)
        stream = body.get("stream") or False
        if not _is_bool(stream):
            raise InvalidArgumentError("must be true or false", field="stream")
        sequences = [
            self._sequence(prompts[i], rids[i], params[i], stream, return_logprob[i], starts[i], top[i])
            for i in range(size)
        ]
        return GenerateRequest(sequences, is_batch, stream, return_logprob)

    def _prompts(self, body: Mapping[str, Any]) -> tuple[list[NDArray[np.int32]], bool]:
        ids, text = body.get("input_ids"), body.get("text")
        if (ids is None) == (text is None):
            raise InvalidArgumentError("exactly one of input_ids and text is needed", field="input_ids")
        if text is not None:
            return self._encode(text), isinstance(text, list)
        if not isinstance(ids, list) or not ids:
            raise InvalidArgumentError(
                "must be a list of token ids, or a list of such lists; not empty", field="input_ids"
            )
        if isinstance(ids[0], list):
            return [self._token_ids(each, f"input_ids[{index}]") for index, each in enumerate(ids)], True
        return [self._token_ids(ids, "input_ids")], False

    def _encode(self, text: object) -> list[NDArray[np.int32]]:
        if self._codec is None:
            raise InvalidArgumentError("needs a tokenizer, and the engine runs without one", field="text")
        texts: list[Any] = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(each, str) for each in texts):
            raise InvalidArgumentError("must be a string or a list of strings", field="text")
        return [self._token_ids(self._codec.encode(each), "text") for each in texts]

    def _token_ids(self, ids: object, where: str) -> NDArray[np.int32]:
        try:
            array = np.asarray(ids)
        except ValueError:
            array = np.empty(0)
        if not isinstance(ids, list) or array.ndim != 1 or array.dtype.kind != "i" or not array.size:
            raise InvalidArgumentError("must be a list of token ids, not empty", field=where)
        if array.min() < 0 or array.max() >= self._vocab_size:
            bad = int(np.flatnonzero((array < 0) | (array >= self._vocab_size))[0])
            raise InvalidArgumentError(
                f"{array[bad]} is not in the vocabulary of {self._vocab_size}", field=f"{where}[{bad}]"
            )
        if array.size >= self._context_length:
            raise InvalidArgumentError(
                f"The input ({array.size} tokens) is longer than the model's context length "
                f"({self._context_length} tokens): at least one token must be left to generate.",
                field=where,
            )
        return array.astype(np.int32)

    def _sequence(
        self,
        prompt: NDArray[np.int32],
        rid: str,
        params: SamplingParams,
        stream: bool,
        return_logprob: bool,
        logprob_start: int,
        top_logprobs_num: int,
    ) -> Sequence:
        self._check_params(params, top_logprobs_num, logprob_start, len(prompt))
        seed = params.sampling_seed
        return Sequence(
            rid=rid,
            prompt=prompt,
            params=params,
            stop_ids=frozenset() if params.ignore_eos else self._eos_ids.union(params.stop_token_ids),
            max_new_tokens=min(params.max_new_tokens, self._context_length - len(prompt)),
            seed=int(self._generator.integers(2**63)) if seed is None else seed,
            stream=stream,
            stop_matcher=self._codec.stop_matcher(params) if self._codec is not None else None,
            top_logprobs_num=top_logprobs_num if return_logprob else 0,
            logprob_start=logprob_start if return_logprob else -1,
        )

    def _check_params(self, params: SamplingParams, top: int, start: int, prompt_length: int) -> None:
        if params.stop and self._codec is None:
            raise InvalidArgumentError(
                "needs a tokenizer, and the engine runs without one", field="sampling_params.stop"
            )
        if any(not 0 <= token < self._vocab_size for token in params.stop_token_ids):
            raise InvalidArgumentError(
                f"must be in the vocabulary of {self._vocab_size}", field="sampling_params.stop_token_ids"
            )
        if not 0 <= top <= self._vocab_size:
            raise InvalidArgumentError(f"{top} is not in [0, {self._vocab_size}]", field="top_logprobs_num")
        if not -1 <= start < prompt_length:
            raise InvalidArgumentError(f"{start} is not a position of the prompt, nor -1", field="logprob_start_len")


def _rids(raw: object, size: int, is_batch: bool) -> list[str]:
    if raw is None:
        return [uuid.uuid4().hex for _ in range(size)]
    if isinstance(raw, str) and raw:
        return [f"{raw}_{index}" for index in range(size)] if is_batch else [raw]
    if isinstance(raw, list) and is_batch and all(isinstance(rid, str) and rid for rid in raw) and len(raw) == size:
        if len(set(raw)) != size:
            raise InvalidArgumentError("must not repeat", field="rid")
        return list(raw)
    raise InvalidArgumentError("must be a string, or for a batch a list of as many strings", field="rid")


def _all_params(raw: object, size: int, is_batch: bool) -> list[SamplingParams]:
    if not isinstance(raw, list):
        return [parse_sampling_params({} if raw is None else raw)] * size
    if not is_batch or len(raw) != size:
        raise InvalidArgumentError("a list needs a batch of the same size", field="sampling_params")
    return [parse_sampling_params(each) for each in raw]


def _each(body: Mapping[str, Any], key: str, size: int, default: Any, valid: Callable[[object], bool]) -> list[Any]:
    """One value for all, or a list with one for each."""
    raw = body.get(key)
    values = list(raw) if isinstance(raw, list) else [raw] * size
    values = [default if value is None else value for value in values]
    if len(values) != size or not all(map(valid, values)):
        raise InvalidArgumentError(f"must be like {default!r}, or a list of one for each of {size}", field=key)
    return values


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
