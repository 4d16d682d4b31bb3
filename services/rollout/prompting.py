"""Between text and token ids: chat templates, prompts, completions, and where a completion ends."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from polyhead.v1 import sample_pb2
from services.common.config import Config
from services.common.errors import ConfigError, InvalidArgumentError, LimitError

_SEED_BITS = 63
_NEW_TOKENS_AT_LEAST = 1


class Prompter:
    """The tokenizer of the run's model directory, used the same way for every sample."""

    def __init__(self, config: Config) -> None:
        """Loads the tokenizer: slow. Raises ConfigError when it is missing or does not belong to the model."""
        from transformers import AutoTokenizer  # heavy

        directory = config.model.hf_checkpoint
        self._data = config.data
        self._sampling = config.rollout.sampling
        self._seed = config.run.seed
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:  # whatever a broken directory makes it raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{directory} has no usable tokenizer: {reason}", field="model.hf_checkpoint") from error
        model = _read_json(directory / "config.json")
        _check_vocabulary(self._tokenizer, model, directory)
        if config.data.apply_chat_template and not self._tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {directory} has no chat template", field="data.apply_chat_template")
        generation = _read_json(directory / "generation_config.json")
        self._stop_ids = frozenset(self._sampling.stop_token_ids) | _eos_ids(
            self._tokenizer.eos_token_id, model.get("eos_token_id"), generation.get("eos_token_id")
        )

    def encode(self, prompt: sample_pb2.Prompt, context_length: int | None) -> list[int]:
        """Token ids of a prompt, without special tokens of the tokenizer's own: the template or the text has them.

        Raises LimitError when it leaves no room for a completion or is over max_prompt_len, InvalidArgumentError when
        it cannot be rendered.
        """
        text = self._render(prompt)
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not token_ids:
            raise InvalidArgumentError("has no tokens", field="prompt")
        limit = self._sampling.max_prompt_len
        if limit is not None and len(token_ids) > limit:
            raise LimitError(f"{len(token_ids)} tokens, at most {limit}", field="rollout.sampling.max_prompt_len")
        if context_length is not None and len(token_ids) + _NEW_TOKENS_AT_LEAST > context_length:
            raise LimitError(
                f"{len(token_ids)} tokens leave no room in a context of {context_length}",
                field="rollout.engine.context_length",
            )
        return token_ids

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Completions as text, special tokens removed."""
        texts: list[str] = self._tokenizer.batch_decode(
            completions, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # A tokenizer may leave lone surrogates where bytes do not make a character: a message cannot carry those.
        return [text.encode(errors="replace").decode() for text in texts]

    def sampling_params(self, prompt_ordinal: int, index: int) -> sample_pb2.SamplingParams:
        """How sample `index` of the prompt is sampled, in this replica or any other."""
        settings = self._sampling
        return sample_pb2.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_response_len,
            stop=settings.stop,
            stop_token_ids=settings.stop_token_ids,
            sampling_seed=sampling_seed(self._seed, prompt_ordinal, index),
        )

    def token_limit(self, prompt_tokens: int, context_length: int | None) -> int:
        """How long the completion of a prompt may become."""
        limit = self._sampling.max_response_len
        return limit if context_length is None else min(limit, context_length - prompt_tokens)

    def ended(self, token_ids: Sequence[int], limit: int) -> sample_pb2.FinishReason:
        """Why a restored completion needs no more tokens; UNSPECIFIED when it does."""
        if token_ids and (token_ids[-1] in self._stop_ids or self.stop_end(token_ids, 0) is not None):
            return sample_pb2.FINISH_REASON_STOP
        if len(token_ids) >= limit:
            return sample_pb2.FINISH_REASON_LENGTH
        return sample_pb2.FINISH_REASON_UNSPECIFIED

    def stop_end(self, token_ids: Sequence[int], start: int) -> int | None:
        """The length at which a stop string is complete, if one is completed by a token at or after `start`.

        An engine sees only the tokens of its own request; a stop string may begin in the part restored before it.
        """
        stops = self._sampling.stop
        if not stops or start >= len(token_ids):
            return None
        # A token holds at least one byte, so no stop string reaches back further than it has bytes; one token more,
        # because some decoders strip the space that a text begins with.
        reach = max(len(stop.encode()) for stop in stops) + 1
        if not self._stops_within(token_ids[max(0, start + 1 - reach) :]):
            return None
        for end in range(start + 1, len(token_ids) + 1):
            if self._stops_within(token_ids[max(0, end - reach) : end]):
                return end
        return None

    def _stops_within(self, token_ids: Sequence[int]) -> bool:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._sampling.stop)

    def _render(self, prompt: sample_pb2.Prompt) -> str:
        if not self._data.apply_chat_template:
            if prompt.WhichOneof("input") == "messages_json":
                raise InvalidArgumentError("messages need data.apply_chat_template", field="prompt.messages_json")
            return prompt.text
        if prompt.WhichOneof("input") == "messages_json":
            messages = _parse_list(prompt.messages_json, "prompt.messages_json")
        else:
            messages = [{"role": "user", "content": prompt.text}]
        tools = _parse_list(prompt.tools_json, "prompt.tools_json") if prompt.tools_json else None
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                **self._data.chat_template_kwargs,
            )
        except Exception as error:  # a template may raise anything for messages that it does not like
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise InvalidArgumentError(f"the chat template refuses it: {reason}", field="prompt") from error
        return rendered


def sampling_seed(run_seed: int, prompt_ordinal: int, index: int) -> int:
    """63 bits of xxHash64 over the three numbers as little-endian 64-bit integers."""
    key = struct.pack("<qQQ", run_seed, prompt_ordinal, index)
    return int(xxhash.xxh64_intdigest(key)) >> (64 - _SEED_BITS)


def _check_vocabulary(tokenizer: Any, model: dict[str, Any], directory: Path) -> None:
    size = model.get("vocab_size")
    if size is None:
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ConfigError(
            f"the tokenizer of {directory} has token ids up to {largest}, but the model's vocab_size is {size}",
            field="model.hf_checkpoint",
        )


def _eos_ids(*values: int | Iterable[int] | None) -> frozenset[int]:
    ids: set[int] = set()
    for value in values:
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    """An empty object when there is no such file. Raises ConfigError when it cannot be parsed."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="model.hf_checkpoint") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object", field="model.hf_checkpoint")
    return value


def _parse_list(text: str, field: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"not JSON: {error}", field=field) from None
    if not isinstance(value, list):
        raise InvalidArgumentError("not a JSON list", field=field)
    return value
