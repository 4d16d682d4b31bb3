"""How many samples a replica may hold: as many as its engines have slots and KV memory for."""

from __future__ import annotations

from collections.abc import Sequence

from services.rollout.engines.messages import EngineLoad, ServerInfo

# Of the in-house engine, and of SGLang on a CPU, unless configured.
DEFAULT_SLOTS = 64
# Lengths are averaged over about so many samples: enough to be steady, few enough to follow completions that grow.
_WINDOW = 512


class Lengths:
    """How long samples become, in tokens of prompt and completion."""

    def __init__(self, max_response_len: int) -> None:
        self._max_response_len = max_response_len
        self._prompt = _Mean()
        self._whole = _Mean()

    def leased(self, prompt_tokens: int) -> None:
        self._prompt.add(prompt_tokens)

    def completed(self, tokens: int) -> None:
        self._whole.add(tokens)

    @property
    def expected(self) -> float:
        """Before anything has been completed, the longest that a completion may become."""
        return self._whole.value if self._whole.count else self._prompt.value + self._max_response_len


class _Mean:
    """Of everything at first, then of about the last `_WINDOW` values."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, _WINDOW)
        self.value += (value - self.value) / self.count


def capacity(
    engines: Sequence[tuple[ServerInfo | None, EngineLoad | None]],
    *,
    expected_tokens: float,
    default_slots: int,
    limit: int | None,
) -> int:
    """Samples that engines in rotation have room for, at most `limit`: at least one each.

    `expected_tokens` of a sample, prompt and completion; `default_slots` for an engine that does not say.
    """
    room = sum(_room(info, load, expected_tokens, default_slots) for info, load in engines)
    return room if limit is None else min(room, limit)


def _room(info: ServerInfo | None, load: EngineLoad | None, expected_tokens: float, default_slots: int) -> int:
    slots = (load.slots if load else 0) or (info.max_running_requests if info else None) or default_slots
    tokens = (load.max_tokens if load else 0) or (info.kv_tokens if info else None)
    if info is not None and info.context_length is not None:
        expected_tokens = min(expected_tokens, info.context_length)
    if tokens is None or slots * expected_tokens <= tokens:
        return slots
    fits = int(tokens / max(expected_tokens, 1.0))
    if load is not None and load.waiting and load.running < slots:
        # It keeps a queue although it has free slots: these samples need more memory than expected. Half of what was
        # expected to fit does, or it was only asked before it had taken them up.
        fits = min(fits, max(load.running, fits // 2))
    return max(1, min(slots, fits))
