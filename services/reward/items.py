"""Items for the pool, made from what comes over the wire."""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2, sample_pb2
from services.common.wire import completion_length
from services.reward.scorers.base import Item

_STATUS = {
    sample_pb2.FINISH_REASON_STOP: "completed",
    sample_pb2.FINISH_REASON_LENGTH: "truncated",
    sample_pb2.FINISH_REASON_ABORT: "aborted",
    sample_pb2.FINISH_REASON_ERROR: "failed",
}


def item_of_sample(sample: sample_pb2.Sample, group: pb.LeasedGroup) -> Item:
    """A leased sample. Its numbers are those of slime: groups by order of issue, samples counted through all groups."""
    return _item(
        sample.sample_id,
        sample.prompt,
        sample.completion,
        status=_STATUS.get(sample.finish_reason, "completed"),
        completion_tokens=sum(completion_length(segment) for segment in sample.segments),
        group_index=group.order,
        sample_index=group.order * group.group_size + sample.index,
    )


def item_of_request(item: reward_pb2.ScoreItem, place: int) -> Item:
    """One item of a direct call, at `place` in its request."""
    return _item(
        item.sample_id,
        item.prompt,
        item.completion,
        status="completed",
        completion_tokens=0,
        group_index=0,
        sample_index=place,
    )


def _item(
    sample_id: str,
    prompt: sample_pb2.Prompt,
    completion: str,
    *,
    status: str,
    completion_tokens: int,
    group_index: int,
    sample_index: int,
) -> Item:
    return Item(
        sample_id=sample_id,
        prompt=prompt.text,
        messages_json=prompt.messages_json,
        completion=completion,
        label=prompt.label,
        metadata_json=prompt.metadata_json,
        status=status,
        completion_tokens=completion_tokens,
        group_index=group_index,
        sample_index=sample_index,
    )
