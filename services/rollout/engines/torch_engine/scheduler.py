"""Continuous batching: who is in which slot, what one step computes, when a request ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from services.rollout.engines.torch_engine.decoder import Decoder
from services.rollout.engines.torch_engine.request_log import RequestLog
from services.rollout.engines.torch_engine.sampling import sample
from services.rollout.engines.torch_engine.sequence import Delta, Sequence, abort_reason, length_reason, stop_reason
from services.rollout.engines.torch_engine.slot_table import SlotTable

_ROW_STEP = 4
_KV_STEP = 16
_FIXED_PREFILL_ROWS = 8
_FIXED_ROW_STEP = 8


def slots_needed(max_running: int, deterministic: bool) -> int:
    """Rows of the batch.

    Matrix products compute a row with other kernels when the rows that a thread gets are fewer than four, or do not
    come in fours: its last bits then depend on its place. Eights leave fours to each of two threads.
    """
    return round_up(max_running, _FIXED_ROW_STEP) if deterministic else max_running


def cache_length(context_length: int, prefill_chunk: int) -> int:
    """Positions per slot: a prefill chunk may reach past the end of the longest prompt."""
    return round_up(context_length + round_up(prefill_chunk, _ROW_STEP), _KV_STEP)


class Scheduler:
    """Runs on the engine's thread only. `deliver` gets the deltas of each step at once."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_running: int,
        prefill_chunk: int,
        stream_interval: int,
        deterministic: bool,
        weight_version: str,
        deliver: Callable[[list[Delta]], None],
        decode_rate: float | None = None,
        log: RequestLog | None = None,
    ) -> None:
        """`decode_rate`: decode steps per second at most."""
        self._decoder = decoder
        self._slots = slots_needed(max_running, deterministic)
        self._max_running = max_running
        self._chunk = round_up(prefill_chunk, _ROW_STEP)
        self._deterministic = deterministic
        self.weight_version = weight_version
        self._deliver = deliver
        self._decode_interval_s = 1 / decode_rate if decode_rate is not None else 0.0
        self._decode_from = 0.0
        """When the next decode step may begin, by the monotonic clock."""
        self._log = log
        self._table = SlotTable(self._slots, decoder.length, decoder.config.vocab_size, stream_interval)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[int] = []
        self._deltas: list[Delta] = []
        self._rows = np.arange(self._slots)
        self.generated_tokens = 0

    @property
    def num_running(self) -> int:
        return sum(sequence is not None for sequence in self._table.sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._table.decoding.any())

    @property
    def used_tokens(self) -> int:
        """KV cache that running requests have come to need."""
        return int((self._table.prompt_length + self._table.count)[: self._slots][self._occupied()].sum())

    def idle_seconds(self) -> float:
        """How long a step would find nothing to do yet, while there is work: decoding is held to its rate."""
        if self._prefilling or (self._waiting and not self._occupied()[: self._max_running].all()):
            return 0.0
        return max(0.0, self._decode_from - time.monotonic())

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    def set_weight_version(self, version: str) -> None:
        """Tokens sampled from now on belong to `version`."""
        if version == self.weight_version:
            return
        for slot, sequence in enumerate(self._table.sequences):
            if sequence is not None:
                sequence.version_replaced(self.weight_version, int(self._table.count[slot]))
        for sequence in self._waiting:
            sequence.version_replaced(self.weight_version, len(sequence.tokens_before))
        self.weight_version = version

    def retract(self) -> None:
        """All running requests wait again, in front; their KV is computed anew from what they have."""
        running = [slot for slot, sequence in enumerate(self._table.sequences) if sequence is not None]
        retired = sorted((self._table.retire(slot) for slot in running), key=lambda sequence: sequence.created)
        self._prefilling.clear()
        for sequence in retired:
            if len(sequence.input_logprobs) < len(sequence.prompt) - 1 - sequence.logprob_start:
                sequence.input_logprobs.clear()
        self._waiting.extendleft(reversed(retired))

    def abort(self, rid: str | None, message: str, status_code: int | None = None) -> None:
        """Ends one request, or all when `rid` is None, with what they have. An unknown rid does nothing."""
        for slot, sequence in enumerate(self._table.sequences):
            if sequence is not None and rid in (None, sequence.rid):
                if slot in self._prefilling:
                    self._prefilling.remove(slot)
                self._finish(slot, abort_reason(message, status_code))
        for sequence in [s for s in self._waiting if rid in (None, s.rid)]:
            self._waiting.remove(sequence)
            self._abort_waiting(sequence, abort_reason(message, status_code))
        self._flush()

    def step(self) -> None:
        """Admits, prefills one chunk, decodes one token for every prefilled request if it is time, and delivers."""
        self._admit()
        at_once = _FIXED_PREFILL_ROWS if self._deterministic else max(1, len(self._prefilling))
        slots = list(self._prefilling)
        for start in range(0, len(slots), at_once):
            self._prefill(slots[start : start + at_once])
        now = time.monotonic()
        if self._table.decoding.any() and now >= self._decode_from:
            self._decode_from = now + self._decode_interval_s
            self._decode()
        self._flush()

    def _occupied(self) -> NDArray[np.bool_]:
        return np.array([sequence is not None for sequence in self._table.sequences], np.bool_)

    def _admit(self) -> None:
        for slot in range(self._max_running):
            if not self._waiting:
                return
            if self._table.sequences[slot] is None:
                sequence = self._waiting.popleft()
                self._table.occupy(slot, sequence)
                if self._log is not None:
                    self._log.started(sequence, self.weight_version)
                self._prefilling.append(slot)
                self._end_prefill_if_done(slot)

    def _prefill(self, slots: list[int]) -> None:
        """One chunk of each prompt; padded to fixed shapes in deterministic mode."""
        starts = self._table.position[slots]
        ends = (self._table.prompt_length + self._table.count)[slots] - 1
        longest = round_up(int((ends - starts).max()), _ROW_STEP)
        columns = self._chunk if self._deterministic else min(self._chunk, longest)
        rows = np.full(_FIXED_PREFILL_ROWS if self._deterministic else len(slots), self._decoder.scratch_slot)
        first = np.zeros(len(rows), np.int64)
        rows[: len(slots)], first[: len(slots)] = slots, starts
        tokens = self._table.tokens[rows[:, None], first[:, None] + np.arange(columns)]
        wanting = [row for row, slot in enumerate(slots) if self._wants_input_logprobs(slot)]
        logits = self._decoder.prefill(
            tokens, first, rows, self._kv_length(int(first.max()) + columns), want_logits=bool(wanting)
        )
        for row in wanting if logits is not None else ():
            assert logits is not None
            self._collect_input_logprobs(slots[row], int(starts[row]), logits[row])
        self._table.position[slots] = np.minimum(starts + columns, ends)
        for slot in slots:
            self._end_prefill_if_done(slot)

    def _end_prefill_if_done(self, slot: int) -> None:
        """The last token is not prefilled: it is what the first decode step feeds."""
        table = self._table
        if table.position[slot] == table.prompt_length[slot] + table.count[slot] - 1:
            self._prefilling.remove(slot)
            if table.max_new[slot] == 0:
                self._finish(slot, length_reason(0))
            else:
                table.decoding[slot] = True

    def _decode(self) -> None:
        table = self._table
        highest = int(np.flatnonzero(table.decoding)[-1]) + 1
        batch = self._slots if self._deterministic else min(self._slots, round_up(highest, _ROW_STEP))
        decoding, positions = table.decoding[:batch], table.position[:batch]
        active = np.flatnonzero(decoding)
        rows = self._rows[:batch]
        logits = self._decoder.decode(
            table.tokens[rows, positions],
            positions,
            np.where(decoding, rows, self._decoder.scratch_slot),
            self._kv_length(int(positions[active].max()) + 1),
        )
        drawn, all_logprobs = sample(logits, table.sampling_batch(batch))
        chosen = all_logprobs.gather(1, drawn[:, None]).squeeze(1)
        tokens, logprobs = drawn.cpu().numpy()[active], chosen.cpu().numpy()[active]
        table.append(active, tokens, logprobs)
        self.generated_tokens += len(active)
        if table.top_logprobs[active].any():
            self._collect_top_logprobs(active, all_logprobs)
        self._end_or_stream(active, tokens, logprobs)

    def _end_or_stream(
        self, active: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float32]
    ) -> None:
        table = self._table
        stopped = (table.stop_ids[active] == tokens[:, None]).any(1)
        full = table.count[active] >= table.max_new[active]
        broken = ~np.isfinite(logprobs)
        matched: dict[int, str] = {}
        for index in np.flatnonzero(table.matching[active]).tolist():
            if (text := self._match(int(active[index]), int(tokens[index]))) is not None:
                matched[index] = text
        ended = stopped | full | broken
        ended[list(matched)] = True
        for index in np.flatnonzero(ended).tolist():
            slot = int(active[index])
            if broken[index]:
                reason = abort_reason("the model's output is not finite", 500)
            elif index in matched:
                reason = stop_reason(matched[index])
            elif stopped[index]:
                reason = stop_reason(int(tokens[index]))
            else:
                reason = length_reason(int(table.max_new[slot]))
            self._finish(slot, reason)
        if table.streaming.any():
            due = table.streaming[active] & (table.count[active] - table.sent[active] >= table.interval[active])
            for slot in active[due].tolist():
                self._report(slot, None)

    def _match(self, slot: int, token: int) -> str | None:
        sequence = self._table.sequences[slot]
        assert sequence is not None
        assert sequence.stop_matcher is not None
        return sequence.stop_matcher(token)

    def _finish(self, slot: int, reason: dict[str, object]) -> None:
        self._report(slot, reason)
        self._table.free(slot)

    def _report(self, slot: int, reason: dict[str, object] | None) -> None:
        sequence = self._table.sequences[slot]
        assert sequence is not None
        count = int(self._table.count[slot])
        token_ids, logprobs = self._table.completion(slot, int(self._table.sent[slot]))
        self._emit(sequence, token_ids, logprobs, count, reason)
        self._table.sent[slot] = count

    def _abort_waiting(self, sequence: Sequence, reason: dict[str, object]) -> None:
        token_ids = sequence.tokens_before[sequence.sent :].tolist()
        logprobs = sequence.logprobs_before[sequence.sent :].tolist()
        self._emit(sequence, token_ids, logprobs, len(sequence.tokens_before), reason)

    def _emit(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[float],
        count: int,
        reason: dict[str, object] | None,
    ) -> None:
        top, sequence.top_logprobs = sequence.top_logprobs, []
        spans = sequence.spans(self.weight_version, count)
        version = spans[-1]["version"] if spans else self.weight_version
        if reason is not None and self._log is not None:
            self._log.ended(sequence, version, count, spans, reason)
        self._deltas.append(Delta(sequence, token_ids, logprobs, top, count, version, spans, finish_reason=reason))

    def _wants_input_logprobs(self, slot: int) -> bool:
        sequence = self._table.sequences[slot]
        assert sequence is not None
        wanted = len(sequence.prompt) - 1 - sequence.logprob_start
        return sequence.logprob_start >= 0 and len(sequence.input_logprobs) < wanted

    def _collect_input_logprobs(self, slot: int, start: int, logits: torch.Tensor) -> None:
        """`logits` [C, vocab] of the positions from `start`: each predicts the token after it. Temperature 1."""
        sequence = self._table.sequences[slot]
        assert sequence is not None
        first = max(start, sequence.logprob_start)
        end = min(start + logits.shape[0], len(sequence.prompt) - 1)
        if first < end:
            targets = torch.from_numpy(sequence.prompt[first + 1 : end + 1].astype(np.int64)).to(logits.device)
            logprobs = logits[first - start : end - start].log_softmax(-1).gather(1, targets[:, None])
            sequence.input_logprobs.extend(logprobs.squeeze(1).tolist())

    def _collect_top_logprobs(self, active: NDArray[np.int64], logprobs: torch.Tensor) -> None:
        best, ids = (part.tolist() for part in logprobs.topk(int(self._table.top_logprobs[active].max()), dim=-1))
        for slot in active[self._table.top_logprobs[active] > 0].tolist():
            sequence = self._table.sequences[slot]
            assert sequence is not None
            pairs = zip(best[slot], ids[slot], strict=True)
            sequence.top_logprobs.append([[value, token, None] for value, token in pairs][: sequence.top_logprobs_num])

    def _kv_length(self, needed: int) -> int:
        length = self._decoder.length
        return length if self._deterministic else min(length, round_up(needed, _KV_STEP))

    def _flush(self) -> None:
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self._deliver(deltas)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
