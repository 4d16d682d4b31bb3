"""Server-sent events of a streamed generation, turned into chunks of new tokens."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from services.rollout.engines.messages import Chunk, EngineSpan, EngineUnavailableError, Finish, RequestRefusedError

_PREFIX = b"data: "
_DONE = b"[DONE]"
_FINISHES: dict[Any, Finish] = {finish.value: finish for finish in (Finish.STOP, Finish.LENGTH, Finish.ABORT)}


async def events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON events up to [DONE]. Raises EngineUnavailableError when the stream ends without it."""
    rest, done = b"", False
    # Read to the very end, also after [DONE]: only then is the connection used again.
    while data := await content.readany():
        *complete, rest = (rest + data).split(b"\n\n")
        for event in complete:
            body = event.removeprefix(_PREFIX)
            done = done or body == _DONE
            if not done:
                yield _parse(body)
    if not done:
        raise EngineUnavailableError("the stream ended before it was done", field="engine /generate")


class ChunkReader:
    """Remembers how far each request of a batch has come, so that cumulative and incremental streams read alike.

    `completion_tokens` counts the whole completion in both forms; what is beyond the known count is new.
    """

    def __init__(self, batch_size: int) -> None:
        self._known = [0] * batch_size

    def read(self, event: dict[str, Any]) -> tuple[int, Chunk]:
        """Index of the request within the batch, and its new tokens. Raises RequestRefusedError for an error event."""
        if (error := event.get("error")) is not None:
            raise RequestRefusedError(error_text(error), field="engine /generate")
        try:
            index = event.get("index", 0)
            meta = event["meta_info"]
            total = meta["completion_tokens"]
            new = total - self._known[index]
            token_ids = event["output_ids"][-new:] if new > 0 else []
            logprobs = [_logprob(entry[0]) for entry in meta["output_token_logprobs"][-new:]] if new > 0 else []
        except (KeyError, IndexError, TypeError) as error:
            raise EngineUnavailableError(f"cannot be read: {error!r}", field="engine /generate") from error
        if new < 0 or len(token_ids) != new or len(logprobs) != new:
            raise EngineUnavailableError(
                f"{len(token_ids)} tokens and {len(logprobs)} log-probs where {new} are new", field="engine /generate"
            )
        self._known[index] = total
        finish, message = _finish(meta.get("finish_reason"))
        spans, version = _spans(meta.get("weight_versions"), total), meta.get("weight_version")
        return index, Chunk(token_ids, logprobs, total, spans, version, finish, message)


def error_text(error: Any) -> str:
    """The reason inside an engine's error object, as one line."""
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:500]


def _parse(body: bytes) -> dict[str, Any]:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body)  # NaN and Infinity are not JSON, but are sent
    except ValueError as error:
        raise EngineUnavailableError(f"not JSON: {error}", field="engine /generate") from None


def _logprob(value: float | None) -> float:
    return math.nan if value is None else value


def _spans(spans: list[dict[str, Any]] | None, total: int) -> list[EngineSpan] | None:
    if spans is None:
        return None
    read = [EngineSpan(span["version"], span["start"], span["end"]) for span in spans if span["end"] > span["start"]]
    position = 0
    for span in read:
        if span.start != position:
            break
        position = span.end
    if position != total:
        raise EngineUnavailableError(f"weight_versions do not cover {total} tokens", field="engine /generate")
    return read


def _finish(reason: dict[str, Any] | None) -> tuple[Finish | None, str]:
    if reason is None:
        return None, ""
    message = error_text(reason.get("message") or "")
    kind = reason.get("type")
    if kind == "abort" and reason.get("status_code") == 400:
        return Finish.ERROR, message
    finish = _FINISHES.get(kind)
    if finish is None:
        raise EngineUnavailableError(f"unknown finish_reason {kind!r}", field="engine /generate")
    return finish, message
