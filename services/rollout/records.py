"""The replica's own record of each sample it holds: from it partials are saved, resumed and completed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError
from services.common.versions import Version
from services.rollout.engines.messages import Chunk, EngineSpan, EngineUnavailableError

# As wire.check_logprobs: rounding may lift a log-probability this far above 0.
_LOGPROB_MAX = 1e-4

# (version of the tokens, version served when the request was sent) -> where the KV under them came from
KvUnder = Callable[[Version, Version], sample_pb2.KvOrigin]


class Span(NamedTuple):
    """Completion tokens [start, end) were sampled by `version`."""

    version: Version
    start: int
    end: int
    kv: sample_pb2.KvOrigin


@dataclass(frozen=True)
class Group:
    """What the samples of one prompt share."""

    group_id: str
    prompt: sample_pb2.Prompt
    prompt_ids: Sequence[int]


class SampleRecord:
    """One leased sample. Closed once its fate is decided: what an engine still sends for it is ignored."""

    def __init__(
        self, group: Group, leased: pb.LeasedSample, sampling: sample_pb2.SamplingParams, token_limit: int
    ) -> None:
        """`token_limit` bounds the completion, in tokens."""
        self.group = group
        self.sample_id = leased.sample_id
        self.index = leased.index
        self.lease_id = leased.lease_id
        self.attempt = leased.attempt
        """Failures attributed to it under earlier leases."""
        self.sampling = sampling
        self.token_limit = token_limit
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.spans: list[Span] = []
        self.settled = 0
        """Tokens whose version is certain: only they are saved, because a stored span is never replaced."""
        self.saved = 0
        """Completion tokens the store has."""
        self.first_token_us = 0
        self.last_token_us = 0
        self.finish: sample_pb2.FinishReason = sample_pb2.FINISH_REASON_UNSPECIFIED
        self.closed = False
        self.to_be_saved = False
        """Closed, but its tokens go to the store before it is released."""
        self.lost = False
        """The lease has ended under us: the sample is somebody else's."""
        self.rid = ""
        self._requests = 0
        self._restored = 0
        self._earlier: list[Span] = []
        self._sent = self._stated = Version(0, 0)
        self._certain = True
        self._base = 0

    def restore(self, partial: Iterable[sample_pb2.TokenDelta]) -> None:
        """Takes over what was saved under an earlier lease.

        Raises InvalidArgumentError when the deltas do not fit together.
        """
        for delta in partial:
            self._restore(delta)
        self.saved = self.settled = self._base = self._restored = len(self.token_ids)

    @property
    def unsaved(self) -> int:
        return len(self.token_ids) - self.saved

    @property
    def fruitless(self) -> bool:
        """Whether an engine was asked to generate it under this lease, and no token has come of it."""
        return self._requests > 0 and len(self.token_ids) == self._restored

    @property
    def savable(self) -> int:
        """How many of the unsaved tokens may be saved now."""
        return self.settled - self.saved

    @property
    def resumed(self) -> bool:
        """Whether the request that runs now continues tokens that the engine was given with the prompt."""
        return self._base > 0

    def begin(self, served: Version) -> str:
        """A request for the rest of the completion goes out while `served` is served: its rid."""
        self._requests += 1
        self._base, self._earlier, self._sent = len(self.token_ids), list(self.spans), served
        self._stated, self._certain = served, True
        self.rid = f"{self.sample_id}.{self.lease_id}.{self._requests}"
        return self.rid

    def extend(self, chunk: Chunk, served: Version, kv_under: KvUnder) -> None:
        """Appends new tokens.

        Where the engine does not say which version each was sampled by, the one it states with the event stamps them,
        or else `served`, until it does say. Raises InvalidArgumentError for a value that
        is no log-probability, EngineUnavailableError for a version that is none of ours.
        """
        if chunk.token_ids:
            for logprob in chunk.logprobs:
                if not -math.inf < logprob <= _LOGPROB_MAX:
                    raise InvalidArgumentError(f"{logprob} is not a log-probability", field="rollout_logprobs")
            self.last_token_us = time.time_ns() // 1000
            self.first_token_us = self.first_token_us or self.last_token_us
            self.token_ids.extend(chunk.token_ids)
            self.logprobs.extend(chunk.logprobs)
        if chunk.spans is not None:
            self._stamp(chunk.spans, kv_under)
        elif chunk.token_ids:
            self._stamp_by_position(chunk, served, kv_under)
        if chunk.spans is not None or chunk.finish is not None or self._certain:
            self.settled = len(self.token_ids)

    def truncate(self, length: int) -> None:
        """Forgets completion tokens from `length` on."""
        del self.token_ids[length:], self.logprobs[length:]
        self.spans = clip(self.spans, 0, length)
        self.settled = min(self.settled, length)

    def delta(self) -> sample_pb2.TokenDelta:
        """What the store does not have yet, as far as it may be saved."""
        return sample_pb2.TokenDelta(
            from_token=self.saved,
            token_ids=wire.encode_tokens(self.token_ids[self.saved : self.settled]),
            rollout_logprobs=wire.encode_logprobs(self.logprobs[self.saved : self.settled]),
            spans=spans_to_proto(clip(self.spans, self.saved, self.settled)),
            first_token_unix_us=self.first_token_us,
        )

    def _restore(self, delta: sample_pb2.TokenDelta) -> None:
        start = len(self.token_ids)
        if delta.from_token != start:
            raise InvalidArgumentError(f"{delta.from_token} does not follow {start} tokens", field="partial.from_token")
        token_ids, logprobs = wire.decode_tokens(delta.token_ids), wire.decode_logprobs(delta.rollout_logprobs)
        wire.check_array(
            delta.rollout_logprobs, wire.LOGPROB_DTYPE.itemsize, len(token_ids), "partial.rollout_logprobs"
        )
        wire.check_spans(delta.spans, start, start + len(token_ids), "partial.spans")
        self.token_ids.extend(token_ids.tolist())
        self.logprobs.extend(logprobs.tolist())
        restored = [Span(Version.from_proto(span.version), span.start, span.end, span.kv) for span in delta.spans]
        self.spans = merge([*self.spans, *restored])
        self.first_token_us = self.first_token_us or delta.first_token_unix_us
        self.last_token_us = max(self.last_token_us, delta.first_token_unix_us)

    def _stamp(self, spans: Iterable[EngineSpan], kv_under: KvUnder) -> None:
        stamped = []
        for span in spans:
            version = _version(span.version)
            stamped.append(Span(version, self._base + span.start, self._base + span.end, kv_under(version, self._sent)))
        self.spans = merge([*self._earlier, *stamped])
        self._stated, self._certain = stamped[-1].version if stamped else self._stated, True

    def _stamp_by_position(self, chunk: Chunk, served: Version, kv_under: KvUnder) -> None:
        """An engine keeps tokens back until they fill an event, so the first event that states a version may begin
        with tokens of the version before, unless it holds a single one and generation had gone on by then.
        """
        version = served if chunk.version is None else _version(chunk.version)
        if version != self._stated and (len(chunk.token_ids) > 1 or version != served):
            self._certain = False
        self._stated = version
        end = len(self.token_ids)
        span = Span(version, end - len(chunk.token_ids), end, kv_under(version, self._sent))
        self.spans = merge([*self.spans, span])


def merge(spans: Sequence[Span]) -> list[Span]:
    """Joins neighbours that differ in nothing but their place."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and last.version == span.version and last.kv == span.kv:
            merged[-1] = Span(last.version, last.start, span.end, last.kv)
        else:
            merged.append(span)
    return merged


def clip(spans: Iterable[Span], start: int, end: int) -> list[Span]:
    """The parts of `spans` within [start, end)."""
    clipped = [Span(span.version, max(span.start, start), min(span.end, end), span.kv) for span in spans]
    return [span for span in clipped if span.start < span.end]


def spans_to_proto(spans: Iterable[Span]) -> list[sample_pb2.WeightVersionSpan]:
    return [
        sample_pb2.WeightVersionSpan(version=span.version.to_proto(), start=span.start, end=span.end, kv=span.kv)
        for span in spans
    ]


@lru_cache(maxsize=256)
def _version(text: str) -> Version:
    try:
        return Version.parse(text)
    except ValueError as error:
        raise EngineUnavailableError(str(error), field="engine weight_version") from None
