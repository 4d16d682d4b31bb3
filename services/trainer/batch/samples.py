"""What the trainer keeps of a leased Sample: token arrays as views into the received bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError
from services.common.versions import Version


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

    @property
    def completion_length(self) -> int:
        return sum(segment.completion_length for segment in self.segments)


def decode_groups(
    groups: Iterable[pb.LeasedGroup], *, vocab_size: int, context_length: int | None = None
) -> list[TrainSample]:
    """The samples of a TRAIN lease with payloads, groups in the order of the lease.

    Raises InvalidArgumentError, naming the sample, for a payload that does not parse, is damaged, whose tokens the
    model does not have, or one with a segment longer than the model's `context_length` (None: any length). Limits and
    spans were checked by the buffer when it accepted the sample.
    """
    return [_decode(group.group_id, leased, vocab_size, context_length) for group in groups for leased in group.samples]


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
    )


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
