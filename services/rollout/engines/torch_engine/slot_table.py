"""The running requests as arrays over slots, so that the work per step does not grow with Python's speed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.rollout.engines.torch_engine.sampling import SamplingBatch, mix, uniforms
from services.rollout.engines.torch_engine.sequence import Sequence

_NO_TOKEN = -1


class SlotTable:
    """State of every slot. Row `n` (the last) is scratch: it pads batches and never holds a request."""

    def __init__(self, slots: int, length: int, vocab_size: int, stream_interval: int) -> None:
        rows = slots + 1
        self.slots, self.vocab_size = slots, vocab_size
        self._stream_interval = stream_interval
        self.sequences: list[Sequence | None] = [None] * slots
        self.tokens = np.zeros((rows, length), np.int32)
        """Prompt and completion, by absolute position."""
        self.logprobs = np.zeros((rows, length), np.float32)
        """Of the completion's tokens, by absolute position."""
        self.decoding = np.zeros(rows, np.bool_)
        """Prefilled: takes part in decode steps."""
        self.position = np.zeros(rows, np.int64)
        """Decoding: where the token to be fed next stands. Prefilling: first position not yet in the cache."""
        self.prompt_length = np.zeros(rows, np.int64)
        self.count = np.zeros(rows, np.int64)
        """Completion tokens so far."""
        self.sent = np.zeros(rows, np.int64)
        self.max_new = np.zeros(rows, np.int64)
        self.streaming = np.zeros(rows, np.bool_)
        self.interval = np.ones(rows, np.int64)
        """Tokens between two events of its stream."""
        self.stop_ids = np.full((rows, 4), _NO_TOKEN, np.int64)
        self.matching = np.zeros(rows, np.bool_)
        """Has stop strings."""
        self.min_new = np.zeros(rows, np.int64)
        self.top_logprobs = np.zeros(rows, np.int64)
        self._mixed_seeds = np.zeros(rows, np.uint64)
        self._inverse_temperature = np.ones(rows, np.float32)
        self._greedy = np.zeros(rows, np.bool_)
        self._top_p = np.ones(rows, np.float64)
        self._top_k = np.full(rows, vocab_size, np.int64)

    def occupy(self, slot: int, sequence: Sequence) -> None:
        """Puts a waiting sequence into a free slot, with the completion it already has."""
        assert self.sequences[slot] is None
        params, prompt, before = sequence.params, sequence.prompt, sequence.tokens_before
        start, end = len(prompt), len(prompt) + len(before)
        self.sequences[slot], sequence.slot = sequence, slot
        self.tokens[slot, :start], self.tokens[slot, start:end] = prompt, before
        self.logprobs[slot, start:end] = sequence.logprobs_before
        self.decoding[slot], self.position[slot] = False, 0
        self.prompt_length[slot], self.count[slot], self.sent[slot] = start, len(before), sequence.sent
        self.max_new[slot], self.min_new[slot] = sequence.max_new_tokens, params.min_new_tokens
        self.interval[slot] = params.stream_interval or self._stream_interval
        self.streaming[slot], self.matching[slot] = sequence.stream, sequence.stop_matcher is not None
        self.top_logprobs[slot] = sequence.top_logprobs_num
        self._set_stop_ids(slot, sequence.stop_ids)
        self._mixed_seeds[slot] = mix(np.array([sequence.seed], np.int64).view(np.uint64))[0]
        self._greedy[slot] = params.temperature == 0 or params.top_k == 1
        # Greedy by top_k = 1 keeps its temperature for the log-probs; temperature 0 has them at 1.
        self._inverse_temperature[slot] = 1.0 / (params.temperature or 1.0)
        if not self._greedy[slot]:
            self._top_p[slot] = params.top_p
            self._top_k[slot] = self.vocab_size if params.top_k == -1 else min(params.top_k, self.vocab_size)

    def free(self, slot: int) -> None:
        """Empties a slot; the neutral values keep it from switching on work for its neighbours."""
        self.sequences[slot] = None
        self.decoding[slot] = self.streaming[slot] = self.matching[slot] = self._greedy[slot] = False
        self.position[slot] = self.min_new[slot] = self.count[slot] = self.top_logprobs[slot] = 0
        self._inverse_temperature[slot], self._top_p[slot] = 1.0, 1.0
        self._top_k[slot] = self.vocab_size

    def retire(self, slot: int) -> Sequence:
        """Frees a slot and saves the completion in its sequence, which can wait for another slot."""
        sequence = self.sequences[slot]
        assert sequence is not None
        start = int(self.prompt_length[slot])
        end = start + int(self.count[slot])
        sequence.tokens_before = self.tokens[slot, start:end].copy()
        sequence.logprobs_before = self.logprobs[slot, start:end].copy()
        sequence.sent, sequence.slot = int(self.sent[slot]), -1
        self.free(slot)
        return sequence

    def completion(self, slot: int, start: int) -> tuple[list[int], list[float]]:
        """Token ids and log-probs of the completion from its token number `start` on."""
        first = int(self.prompt_length[slot]) + start
        end = int(self.prompt_length[slot] + self.count[slot])
        return self.tokens[slot, first:end].tolist(), self.logprobs[slot, first:end].tolist()

    def append(self, slots: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        """One more token for each of `slots`."""
        self.position[slots] += 1
        self.count[slots] += 1
        where = (slots, self.position[slots])
        self.tokens[where], self.logprobs[where] = tokens, logprobs

    def sampling_batch(self, batch: int) -> SamplingBatch:
        """Parameters of the first `batch` slots for the token after `position`."""
        rows = slice(batch)
        greedy, temperatures = self._greedy[rows], self._inverse_temperature[rows]
        truncates = (self._top_p[rows] < 1).any() or (self._top_k[rows] < self.vocab_size).any()
        return SamplingBatch(
            uniforms=uniforms(self._mixed_seeds[rows], self.position[rows] + 1),
            inverse_temperatures=temperatures if (temperatures != 1).any() else None,
            greedy=greedy if greedy.any() else None,
            top_p=self._top_p[rows] if truncates else None,
            top_k=self._top_k[rows] if truncates else None,
            forbidden=self._forbidden(rows),
        )

    def _forbidden(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        held = self.count[rows] < self.min_new[rows]
        if not held.any():
            return None
        where, column = np.nonzero(held[:, None] & (self.stop_ids[rows] != _NO_TOKEN))
        return where, self.stop_ids[rows][where, column]

    def _set_stop_ids(self, slot: int, ids: frozenset[int]) -> None:
        if len(ids) > self.stop_ids.shape[1]:
            more = np.full((self.stop_ids.shape[0], len(ids) - self.stop_ids.shape[1]), _NO_TOKEN, np.int64)
            self.stop_ids = np.concatenate((self.stop_ids, more), axis=1)
        self.stop_ids[slot] = _NO_TOKEN
        self.stop_ids[slot, : len(ids)] = sorted(ids)
