"""What the trainer keeps of a leased Sample: token arrays as views into the received bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import structlog
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError
from services.common.versions import Version

log = structlog.get_logger()


class Span(NamedTuple):
    """Completion tokens [start, end) were sampled by `version`."""

    version: Version
    start: int
    end: int
    carried: bool = False
    """On KV that older weights had computed."""


@dataclass(frozen=True, slots=True)
class TrainSegment:
    """One trainable token sequence."""

    token_ids: NDArray[np.int32]
    """[prompt_length + completion]: read-only view."""
    prompt_length: int
    loss_mask: NDArray[np.uint8]
    """[completion]: 1 where the task wants the token trained."""
    rollout_logprobs: NDArray[np.float32]
    """[completion]: under the behaviour policy."""
    spans: tuple[Span, ...]
    first_token_unix_us: int
    last_token_unix_us: int

    @property
    def completion_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


class ProcessReward(NamedTuple):
    """Earned at a completion token."""

    position: int
    """Of the last token of what it is for, counted through the completions of all segments."""
    reward: float


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One trajectory with its reward."""

    sample_id: str
    group_id: str
    reward: float
    temperature: float
    segments: tuple[TrainSegment, ...]
    message: sample_pb2.Sample
    """The rest of it, for the records: prompt, completion text, finish reason."""
    process: tuple[ProcessReward, ...] = ()
    """Beside `reward`, by position."""

    @property
    def completion_length(self) -> int:
        return sum(segment.completion_length for segment in self.segments)


def decode_groups(
    groups: Iterable[pb.LeasedGroup], *, vocab_size: int, context_length: int | None = None, strict: bool = False
) -> list[TrainSample]:
    """The samples of a TRAIN lease with payloads, groups in the order of the lease.

    A sample is unusable whose payload does not parse, is damaged, has tokens that the model does not, or a segment
    longer than the model's `context_length` (None: any length). It is named in the log, and nothing of it is trained:
    it has no segments, but its reward, which its group is compared with. Limits and spans were checked by the buffer
    when it accepted the sample. Raises InvalidArgumentError, naming the first, when there are only unusable ones, and
    with `strict` when there is one.
    """
    samples: list[TrainSample] = []
    unusable: list[InvalidArgumentError] = []
    for group_id, leased in [(group.group_id, leased) for group in groups for leased in group.samples]:
        try:
            samples.append(_decode(group_id, leased, vocab_size, context_length))
        except InvalidArgumentError as error:
            if strict:
                raise
            log.warning("sample_unusable", sample_id=leased.sample_id, reason=error.reason)
            unusable.append(error)
            samples.append(_untrained(group_id, leased))
    if unusable and len(unusable) == len(samples):
        raise unusable[0]
    return samples


def _untrained(group_id: str, leased: pb.LeasedSample) -> TrainSample:
    return TrainSample(leased.sample_id, group_id, leased.score.reward, 1.0, (), sample_pb2.Sample())


def _decode(group_id: str, leased: pb.LeasedSample, vocab_size: int, context_length: int | None) -> TrainSample:
    try:
        message = sample_pb2.Sample.FromString(leased.sample)
    except DecodeError as error:
        raise InvalidArgumentError(f"not a Sample: {error}", field=leased.sample_id) from None
    if any(map(wire.is_damaged, message.segments)):
        raise InvalidArgumentError("its tokens are not those that were generated: damaged", field=leased.sample_id)
    segments = tuple(map(_decode_segment, message.segments))
    for segment in segments:
        if segment.token_ids.size and segment.token_ids.max() >= vocab_size:
            raise InvalidArgumentError(
                f"token id {segment.token_ids.max()} is outside the model's vocabulary of {vocab_size}",
                field=leased.sample_id,
            )
        if context_length is not None and segment.token_ids.size > context_length:
            raise InvalidArgumentError(
                f"{segment.token_ids.size} tokens are more than the model's context of {context_length}",
                field=leased.sample_id,
            )
    return TrainSample(
        sample_id=leased.sample_id,
        group_id=group_id,
        reward=leased.score.reward,
        # 0 on the wire means that the producer left it out.
        temperature=message.sampling.temperature or 1.0,
        segments=segments,
        message=message,
        process=_process(leased, message, segments),
    )


def _process(
    leased: pb.LeasedSample, message: sample_pb2.Sample, segments: Sequence[TrainSegment]
) -> tuple[ProcessReward, ...]:
    """Raises InvalidArgumentError for a reward of tokens that the sample does not have."""
    if not leased.score.spans:
        return ()
    # By the place of a token as it was generated: its place among the tokens here, or the last one before it.
    places: list[int] = []
    following = 0
    for sent, kept in zip(message.segments, segments, strict=True):
        skipped = wire.completion_length(sent) - kept.completion_length
        places += [following - 1] * skipped + list(range(following, following + kept.completion_length))
        following += kept.completion_length
    if any(span.end > len(places) for span in leased.score.spans):
        raise InvalidArgumentError(f"a reward of tokens behind its {len(places)}", field=leased.sample_id)
    earned = [ProcessReward(places[span.end - 1], span.reward) for span in leased.score.spans]
    return tuple(sorted(each for each in earned if each.position >= 0))


def _decode_segment(segment: sample_pb2.Segment) -> TrainSegment:
    # Nothing predicts the very first token of a sequence: without a prompt it counts as the prompt.
    skipped = 1 if segment.prompt_length == 0 and segment.num_tokens else 0
    return TrainSegment(
        token_ids=wire.decode_tokens(segment.token_ids),
        prompt_length=segment.prompt_length + skipped,
        loss_mask=wire.decode_mask(segment.loss_mask)[skipped:],
        rollout_logprobs=wire.decode_logprobs(segment.rollout_logprobs)[skipped:],
        spans=tuple(
            Span(
                Version.from_proto(span.version),
                max(span.start - skipped, 0),
                span.end - skipped,
                span.kv == sample_pb2.KV_ORIGIN_CARRIED,
            )
            for span in segment.spans
        ),
        first_token_unix_us=segment.first_token_unix_us,
        last_token_unix_us=segment.last_token_unix_us,
    )
