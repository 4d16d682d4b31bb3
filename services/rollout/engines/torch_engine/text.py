"""Text in and out: encoding, decoding, stop strings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from services.common.errors import ConfigError
from services.rollout.engines.torch_engine.sampling_params import SamplingParams


class TextCodec:
    """The tokenizer of a model directory. `decode` and the streams may be used from several threads."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, model_path: Path) -> TextCodec | None:
        """None when the directory has no tokenizer.json. Raises ConfigError when it has one that cannot be read."""
        path = model_path / "tokenizer.json"
        if not path.exists():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
            settings = model_path / "tokenizer_config.json"
            eos = json.loads(settings.read_text()).get("eos_token") if settings.exists() else None
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ConfigError(f"cannot be read: {error}", field=str(path)) from error
        eos_id = tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos else None
        return cls(tokenizer, frozenset() if eos_id is None else frozenset([eos_id]))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def completion(self, token_ids: Sequence[int], params: SamplingParams, finish_reason: dict[str, Any]) -> str:
        """The text of a finished completion, cut before what stopped it unless `no_stop_trim`."""
        matched = finish_reason.get("matched")
        if isinstance(matched, int) and not params.no_stop_trim:
            token_ids = token_ids[:-1]
        text = self.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(matched, str) and (at := text.find(matched)) >= 0:
            text = text[: at + len(matched)] if params.no_stop_trim else text[:at]
        return text

    def stop_matcher(self, params: SamplingParams) -> Callable[[int], str | None] | None:
        """For a request with stop strings: takes each token, answers the string that is now complete."""
        if not params.stop:
            return None
        stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        longest = max(map(len, params.stop))
        tail = ""

        def match(token_id: int) -> str | None:
            nonlocal tail
            new = stream.step(self._tokenizer, token_id)
            if not new:
                return None
            tail = tail[-longest:] + new
            return next((stop for stop in params.stop if stop in tail), None)

        return match

    def stream(self, params: SamplingParams) -> TextStream:
        return TextStream(self, self._tokenizer, params)


class TextStream:
    """The text of a completion as it grows. Holds back what a stop string may still take away."""

    def __init__(self, codec: TextCodec, tokenizer: Any, params: SamplingParams) -> None:
        self._codec, self._tokenizer, self._params = codec, tokenizer, params
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self._decoded = ""
        self.text = ""
        """All that may be shown so far."""

    def add(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens, returns the new text that may be shown."""
        self._decoded += "".join(self._stream.step(self._tokenizer, token_id) or "" for token_id in token_ids)
        return self._show(self._decoded[: len(self._decoded) - self._held_back()])

    def finish(self, token_ids: Sequence[int], finish_reason: dict[str, Any]) -> str:
        """Takes all tokens of the completion, returns the rest of its text."""
        return self._show(self._codec.completion(token_ids, self._params, finish_reason))

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = 0
        for stop in self._params.stop:
            for length in range(min(len(stop), len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest
