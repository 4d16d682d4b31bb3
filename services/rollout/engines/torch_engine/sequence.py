"""One request while it is in the engine, and what is reported about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.rollout.engines.torch_engine.sampling_params import SamplingParams

Logprob = list[Any]
"""[log-probability or None, token id, None], as SGLang writes it (the last is the token's text)."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What became of a request since its previous delta."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[Logprob]]
    completion_tokens: int
    """In all, not only in this delta."""
    weight_version: str
    """Of the last token; of the engine when there is none."""
    spans: list[dict[str, Any]]
    """Weight versions of the whole completion so far: version, start, end."""
    finish_reason: dict[str, Any] | None


@dataclass(eq=False, slots=True)
class Sequence:
    """A request. After it is submitted only the engine's thread touches it."""

    rid: str
    prompt: NDArray[np.int32]
    params: SamplingParams
    stop_ids: frozenset[int]
    """Token ids that end it: end-of-sequence ids and its own stop ids; empty under `ignore_eos`."""
    max_new_tokens: int
    """Clipped to the context length."""
    seed: int
    """`params.sampling_seed`, or one drawn from the engine's generator."""
    stream: bool
    stop_matcher: Callable[[int], str | None] | None = None
    """Takes each new token; answers the stop string that is now complete."""
    top_logprobs_num: int = 0
    logprob_start: int = -1
    """First prompt position whose log-probability is wanted; -1: none."""
    created: float = field(default_factory=time.monotonic)

    slot: int = -1
    sent: int = 0
    """Completion tokens already delivered."""
    tokens_before: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Completion tokens of a retracted sequence, to be prefilled again."""
    logprobs_before: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    top_logprobs: list[list[Logprob]] = field(default_factory=list)
    """Of the completion tokens not yet delivered."""
    input_logprobs: list[float] = field(default_factory=list)
    """Of the prompt positions after `logprob_start`."""
    version_changes: list[tuple[str, int]] = field(default_factory=list)
    """(version, completion tokens when it was replaced), oldest first."""

    def version_replaced(self, version: str, count: int) -> None:
        """Notes that the first `count` completion tokens end the reign of `version`."""
        if count > 0:
            self.version_changes.append((version, count))

    def spans(self, current_version: str, count: int) -> list[dict[str, Any]]:
        """Spans [start, end) of the completion by weight version; neighbours of one version are merged."""
        spans: list[dict[str, Any]] = []
        for version, end in [*self.version_changes, (current_version, count)]:
            start = spans[-1]["end"] if spans else 0
            if end <= start:
                continue
            if spans and spans[-1]["version"] == version:
                spans[-1]["end"] = end
            else:
                spans.append({"version": version, "start": start, "end": end})
        return spans


def stop_reason(matched: int | str) -> dict[str, Any]:
    return {"type": "stop", "matched": matched}


def length_reason(length: int) -> dict[str, Any]:
    return {"type": "length", "length": length}


def abort_reason(message: str, status_code: int | None = None) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": None}
