"""Items for the pool, made from what comes over the wire."""

from __future__ import annotations

from collections.abc import Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import reward_pb2, sample_pb2
from services.common.wire import TOKEN_DTYPE, completion_length
from services.reward.filters import GroupItem, ScoredItem, WaitingItem
from services.reward.jobs import Result
from services.reward.scorers.base import Item, Verdict

_STATUS = {
    sample_pb2.FINISH_REASON_STOP: "completed",
    sample_pb2.FINISH_REASON_LENGTH: "truncated",
    sample_pb2.FINISH_REASON_ABORT: "aborted",
    sample_pb2.FINISH_REASON_ERROR: "failed",
}


def item_of_sample(sample: sample_pb2.Sample, group: pb.LeasedGroup, *, tokens: bool = False) -> Item:
    """A leased sample, with its token ids if `tokens`.

    Its numbers are those of slime: groups by order of issue, samples counted through all groups.
    """
    return _item(
        sample.sample_id,
        sample.prompt,
        sample.completion,
        status=_STATUS.get(sample.finish_reason, "completed"),
        completion_tokens=sum(completion_length(segment) for segment in sample.segments),
        group_index=group.order,
        sample_index=group.order * group.group_size + sample.index,
        start_rollout_id=_start_rollout_id(sample),
        token_ids=sample.segments[0].token_ids if tokens and len(sample.segments) == 1 else b"",
    )


def _start_rollout_id(sample: sample_pb2.Sample) -> int:
    versions = {(span.version.epoch, span.version.step) for segment in sample.segments for span in segment.spans}
    return min(versions)[1] if len(versions) > 1 else -1


def item_of_group(group: pb.LeasedGroup) -> GroupItem:
    """A group leased to be judged, payloads included. Raises DecodeError."""
    scored = [
        ScoredItem(
            item_of_sample(sample_pb2.Sample.FromString(leased.sample), group),
            leased.score.reward,
            dict(leased.score.parts),
        )
        for leased in group.samples
    ]
    return GroupItem(group.group_id, scored)


def item_of_waiting(groups: Sequence[pb.LeasedGroup], num_samples: int) -> WaitingItem:
    """Unfinished groups by their records: lengths and rewards, without texts and tokens."""
    return WaitingItem(
        "waiting groups", [[_waiting(leased, group) for leased in group.samples] for group in groups], num_samples
    )


def _waiting(leased: pb.LeasedSample, group: pb.LeasedGroup) -> ScoredItem:
    record = leased.record
    unfinished = "aborted" if record.completion_tokens else "pending"
    item = _item(
        leased.sample_id,
        group.prompt,
        "",
        status=_STATUS.get(record.finish_reason, unfinished),
        completion_tokens=record.completion_tokens,
        group_index=group.order,
        sample_index=group.order * group.group_size + leased.index,
        start_rollout_id=record.oldest_version.step if record.HasField("oldest_version") else -1,
    )
    scored = leased.HasField("score")
    return ScoredItem(item, leased.score.reward if scored else None, dict(leased.score.parts))


def score_of(verdict: Verdict, result: Result, scorer: str) -> sample_pb2.Score:
    """`scorer` is the run's own; a sample may have chosen another one."""
    return sample_pb2.Score(
        reward=verdict.reward,
        parts=verdict.parts,
        scorer=result.scorer or scorer,
        seconds=result.seconds,
        spans=[sample_pb2.RewardSpan(start=start, end=end, reward=reward) for start, end, reward in verdict.spans],
    )


def item_of_request(item: reward_pb2.ScoreItem, place: int) -> Item:
    """One item of a direct call, at `place` in its request."""
    return _item(
        item.sample_id,
        item.prompt,
        item.completion,
        status="completed",
        completion_tokens=max(len(item.token_ids) // TOKEN_DTYPE.itemsize - item.prompt_length, 0),
        group_index=0,
        sample_index=place,
        token_ids=item.token_ids,
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
    start_rollout_id: int = -1,
    token_ids: bytes = b"",
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
        start_rollout_id=start_rollout_id,
        token_ids=token_ids,
    )
