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
from services.rollout.engines.messages import Chunk, EngineSpan, EngineUnavailableError, Finish

# As wire.check_logprobs: rounding may lift a log-probability this far above 0.
_LOGPROB_MAX = 1e-4


class Arrival(NamedTuple):
    """How the requests that were running when a version arrived came over to it."""

    kv: sample_pb2.KvOrigin
    """Where the KV under their further tokens is from."""
    late: bool
    """Whether the engine handed out the last token of the version before as if it were of this one: it decodes one pass
    ahead, and the pass that was running when it was paused in place is taken up after the update."""


ArrivalOf = Callable[[Version], Arrival]


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
        self._stated_kv = sample_pb2.KV_ORIGIN_FRESH
        self._base = 0

    def restore(self, partial: Iterable[sample_pb2.TokenDelta]) -> None:
        """Takes over what was saved under an earlier lease.

        Raises InvalidArgumentError when the deltas do not fit together.
        """
        for delta in partial:
            self._restore(delta)
        self.saved = self._base = self._restored = len(self.token_ids)

    @property
    def unsaved(self) -> int:
        return len(self.token_ids) - self.saved

    @property
    def in_flight(self) -> int:
        """Tokens of prompt and completion that an engine has KV for, or is about to."""
        running = self._requests > 0 and not self.closed
        return len(self.group.prompt_ids) + len(self.token_ids) if running else 0

    @property
    def fruitless(self) -> bool:
        """Whether an engine was asked to generate it under this lease, and no token has come of it."""
        return self._requests > 0 and len(self.token_ids) == self._restored

    def begin(self, served: Version) -> str:
        """A request for the rest of the completion goes out while `served` is served: its rid."""
        self._requests += 1
        self._base, self._earlier, self._sent = len(self.token_ids), list(self.spans), served
        self._stated, self._stated_kv = served, sample_pb2.KV_ORIGIN_FRESH
        self.rid = f"{self.sample_id}.{self.lease_id}.{self._requests}"
        return self.rid

    def extend(self, chunk: Chunk, served: Version, arrival_of: ArrivalOf) -> None:
        """Appends new tokens: all of them, or none when it raises.

        Until the engine says which version each was sampled by, the one it states with the event, or else `served`,
        stamps them by their position: no token is ever stamped newer than it is. Raises InvalidArgumentError for a
        value that is no log-probability, EngineUnavailableError for a version that is none of ours.
        """
        _check(chunk)
        if chunk.token_ids:
            self.last_token_us = time.time_ns() // 1000
            self.first_token_us = self.first_token_us or self.last_token_us
            self.token_ids.extend(chunk.token_ids)
            self.logprobs.extend(chunk.logprobs)
        if chunk.spans is not None:
            self._stamp(chunk.spans, arrival_of)
        elif chunk.token_ids:
            self._stamp_by_position(chunk, served, arrival_of)

    def truncate(self, length: int) -> None:
        """Forgets completion tokens from `length` on."""
        del self.token_ids[length:], self.logprobs[length:]
        self.spans = clip(self.spans, 0, length)

    def delta(self) -> sample_pb2.TokenDelta:
        """What the store does not have yet."""
        return sample_pb2.TokenDelta(
            from_token=self.saved,
            token_ids=wire.encode_tokens(self.token_ids[self.saved :]),
            rollout_logprobs=wire.encode_logprobs(self.logprobs[self.saved :]),
            spans=spans_to_proto(clip(self.spans, self.saved, len(self.token_ids))),
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

    def _stamp(self, claimed: Sequence[EngineSpan], arrival_of: ArrivalOf) -> None:
        """By what the engine says of the whole request, put right where a version arrived late."""
        end = len(self.token_ids)
        turns = []
        for number, span in enumerate(claimed):
            version, start = _version(span.version), self._base + span.start
            arrival = arrival_of(version)
            # Without a token at the pause, a request was prefilled before it, in part or whole, or after it.
            crossed = number > 0 or version > self._sent
            if number == 0 and crossed and arrival.late:
                turns.append(Span(self._sent, start, end, sample_pb2.KV_ORIGIN_FRESH))
            kv = arrival.kv if crossed else sample_pb2.KV_ORIGIN_FRESH
            turns.append(Span(version, min(start + (crossed and arrival.late), end), end, kv))
        self.spans = merge([*self._earlier, *_each_until_the_next(turns)])
        if turns:
            self._stated, self._stated_kv = turns[-1].version, turns[-1].kv

    def _stamp_by_position(self, chunk: Chunk, served: Version, arrival_of: ArrivalOf) -> None:
        """An engine keeps tokens back until they fill an event: of the first one that states a version, only the last
        token is sure to be of it, and not even that where the version arrived late, or the request was only ended.
        """
        version = served if chunk.version is None else _version(chunk.version)
        end = len(self.token_ids)
        start = turn = end - len(chunk.token_ids)
        before, kv_before = self._stated, self._stated_kv
        if version > before:
            arrival = arrival_of(version)
            turn = end if arrival.late or chunk.finish is Finish.ABORT else end - 1
            self._stated, self._stated_kv = version, arrival.kv
        elif version < before:  # sent while another engine of the replica was a version ahead
            self._stated, self._stated_kv = version, sample_pb2.KV_ORIGIN_FRESH
        spans = [Span(before, start, turn, kv_before), Span(version, turn, end, self._stated_kv)]
        self.spans = merge([*self.spans, *clip(spans, start, end)])


def _check(chunk: Chunk) -> None:
    stated = [] if chunk.version is None or not chunk.token_ids else [chunk.version]
    for text in stated if chunk.spans is None else [span.version for span in chunk.spans]:
        _version(text)
    for logprob in chunk.logprobs:
        if not -math.inf < logprob <= _LOGPROB_MAX:
            raise InvalidArgumentError(f"{logprob} is not a log-probability", field="rollout_logprobs")


def _each_until_the_next(turns: Sequence[Span]) -> list[Span]:
    """Spans that begin one after the other and all reach to the end, each cut off where the next one begins."""
    starts = [span.start for span in turns[1:]]
    cut = [span._replace(end=start) for span, start in zip(turns, starts, strict=False)]
    return [span for span in [*cut, *turns[-1:]] if span.start < span.end]


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
