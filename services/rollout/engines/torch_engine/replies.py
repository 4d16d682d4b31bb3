"""Deltas of the engine turned into the JSON of answers and stream events."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from services.rollout.engines.torch_engine.generate_request import GenerateRequest
from services.rollout.engines.torch_engine.sequence import Delta, Logprob, Sequence
from services.rollout.engines.torch_engine.text import TextCodec


class Transcript:
    """All that is known of one sequence outside the engine's thread."""

    def __init__(self, sequence: Sequence, index: int | None, return_logprob: bool, codec: TextCodec | None) -> None:
        self.sequence = sequence
        self._index, self._return_logprob, self._codec = index, return_logprob, codec
        self._token_ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._top_logprobs: list[list[Logprob]] = []
        self._text = codec.stream(sequence.params) if codec is not None and sequence.stream else None

    def answer(self, delta: Delta) -> dict[str, Any]:
        """The whole completion."""
        self._extend(delta)
        body = self._body(self._token_ids, self._meta_info(delta, self._logprobs, self._top_logprobs))
        if self._codec is not None:
            assert delta.finish_reason is not None
            body["text"] = self._codec.completion(self._token_ids, self.sequence.params, delta.finish_reason)
        return body

    def event(self, delta: Delta, *, incremental: bool) -> dict[str, Any]:
        """One event of a stream: what is new, or everything so far."""
        new_logprobs = self._extend(delta)
        if incremental:
            body = self._body(delta.token_ids, self._meta_info(delta, new_logprobs, delta.top_logprobs))
        else:
            # Copies: this event may be written after the next delta has come.
            meta = self._meta_info(delta, self._logprobs.copy(), self._top_logprobs.copy())
            body = self._body(self._token_ids.copy(), meta)
        if self._text is not None:
            if delta.finish_reason is not None:
                new_text = self._text.finish(self._token_ids, delta.finish_reason)
            else:
                new_text = self._text.add(delta.token_ids)
            body["text"] = new_text if incremental else self._text.text
        if self._index is not None:
            body["index"] = self._index
        return body

    def _extend(self, delta: Delta) -> list[Logprob]:
        self._token_ids += delta.token_ids
        new: list[Logprob] = []
        if self._return_logprob:
            new = [[value, token, None] for value, token in zip(delta.logprobs, delta.token_ids, strict=True)]
            self._logprobs += new
            self._top_logprobs += delta.top_logprobs
        return new

    def _body(self, token_ids: list[int], meta_info: dict[str, Any]) -> dict[str, Any]:
        return {"output_ids": token_ids, "meta_info": meta_info}

    def _meta_info(self, delta: Delta, logprobs: list[Logprob], top_logprobs: list[list[Logprob]]) -> dict[str, Any]:
        sequence = self.sequence
        meta: dict[str, Any] = {
            "id": sequence.rid,
            "finish_reason": delta.finish_reason,
            "prompt_tokens": len(sequence.prompt),
            "completion_tokens": delta.completion_tokens,
            "cached_tokens": 0,
            "weight_version": delta.weight_version,
            "weight_versions": delta.spans,
        }
        if self._return_logprob:
            meta["output_token_logprobs"] = logprobs
            meta["output_token_logprobs_length"] = len(self._logprobs)
            if sequence.top_logprobs_num:
                meta["output_top_logprobs"] = top_logprobs
            if sequence.logprob_start >= 0:
                meta["input_token_logprobs"] = self._input_logprobs()
        if delta.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - sequence.created
        return meta

    def _input_logprobs(self) -> list[Logprob]:
        """The first position has no log-probability: nothing the caller asked about predicts it."""
        sequence = self.sequence
        ids = sequence.prompt[sequence.logprob_start :].tolist()
        values = [None, *sequence.input_logprobs]
        return [[value, token, None] for value, token in zip(values, ids, strict=False)]


class Reply:
    """One HTTP request on the event loop: collects what its sequences produce."""

    def __init__(self, request: GenerateRequest, codec: TextCodec | None, *, incremental: bool) -> None:
        self._request, self._incremental = request, incremental
        self._transcripts = {
            sequence.rid: Transcript(sequence, index if request.is_batch else None, logprob, codec)
            for index, (sequence, logprob) in enumerate(zip(request.sequences, request.return_logprob, strict=True))
        }
        self._answers: dict[str, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self.failure: tuple[int, str] | None = None
        """Status and reason when the engine itself failed: that is no answer."""
        self.unfinished = set(self._transcripts)

    def accept(self, delta: Delta) -> None:
        rid = delta.sequence.rid
        transcript = self._transcripts[rid]
        if self._request.stream:
            self._events.append(transcript.event(delta, incremental=self._incremental))
            self._changed.set()
        else:
            self._answers[rid] = transcript.answer(delta)
        if delta.finish_reason is not None:
            if status := delta.finish_reason.get("status_code"):
                self.failure = (status, delta.finish_reason["message"])
            self.unfinished.discard(rid)
            if not self.unfinished:
                self._changed.set()

    async def answer(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Waits until every sequence has ended."""
        await self._changed.wait()
        answers = [self._answers[sequence.rid] for sequence in self._request.sequences]
        return answers if self._request.is_batch else answers[0]

    async def events(self) -> list[dict[str, Any]]:
        """Waits for events of a stream, at least one; empty when there are no more."""
        if not self._events and not self.unfinished:
            return []
        await self._changed.wait()
        self._changed.clear()
        if not self.unfinished:
            self._changed.set()
        events, self._events = self._events, []
        return events
