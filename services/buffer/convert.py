"""Records of the store as messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials, policy
from services.buffer.ids import group_id, sample_id
from services.buffer.records import (
    NO_ORDINAL,
    Extension,
    Fetched,
    Generated,
    LeasedGroup,
    LeasedSample,
    LedgerRecord,
    Page,
    Released,
    Report,
    Requeued,
    SampleFacts,
    Scored,
    Waiting,
    WatermarkRecord,
)
from services.common.splice import Spliced

_SUBMITTED = 1 << 63
"""Submitted groups have no place in the data set; theirs is made of their order, and no data set reaches so far."""


def leased_group(group: LeasedGroup, group_size: int) -> Spliced:
    """A LeasedGroup. What the store holds serialized goes into it as it is."""
    head = pb.LeasedGroup(
        group_id=group_id(group.order),
        group_size=group_size,
        order=group.order,
        prompt_ordinal=_SUBMITTED | group.order if group.ordinal == NO_ORDINAL else group.ordinal,
        staleness=max(0, group.staleness),
        judge=group.judge,
    )
    message = Spliced(head)
    if group.prompt:
        message.append(pb.LeasedGroup.PROMPT_FIELD_NUMBER, group.prompt)
    for sample in group.samples:
        message.append(pb.LeasedGroup.SAMPLES_FIELD_NUMBER, _leased_sample(group.order, sample))
    return message


def _leased_sample(order: int, sample: LeasedSample) -> Spliced:
    head = pb.LeasedSample(
        sample_id=sample_id(order, sample.index),
        index=sample.index,
        lease_id=sample.lease_id,
        attempt=sample.attempt,
    )
    _fill_record(head.record, sample.facts)
    message = Spliced(head)
    for delta in partials.split(sample.partial):
        message.append(pb.LeasedSample.PARTIAL_FIELD_NUMBER, delta)
    if sample.payload:
        message.append(pb.LeasedSample.SAMPLE_FIELD_NUMBER, sample.payload)
    if sample.score:
        message.append(pb.LeasedSample.SCORE_FIELD_NUMBER, sample.score)
    return message


def _fill_record(record: sample_pb2.SampleIndex, facts: SampleFacts) -> None:
    record.num_tokens = facts.num_tokens
    record.completion_tokens = facts.completion_tokens
    record.finish_reason = _enum(facts.finish_reason)
    record.reward = facts.reward
    if facts.oldest.epoch:
        record.oldest_version.epoch, record.oldest_version.step = facts.oldest


def waiting_for(stage: int, waiting: Waiting) -> pb.WaitingFor:
    reason, count = policy.describe(waiting)
    return pb.WaitingFor(stage=_enum(stage), reason=reason, count=count)


def results(samples: Iterable[Extension | Generated | Scored | Released], report: Report) -> Iterable[pb.SampleResult]:
    for each, result in zip(samples, report.results, strict=True):
        yield pb.SampleResult(
            sample_id=sample_id(*each.ref),
            outcome=_enum(result.outcome),
            saved_tokens=result.saved_tokens,
        )


def fetched(sample_ids: Sequence[str], records: Sequence[Fetched]) -> Spliced:
    """A FetchResponse."""
    response = Spliced(pb.FetchResponse())
    for each, record in zip(sample_ids, records, strict=True):
        message = Spliced(pb.FetchedSample(sample_id=each, state=_enum(record.state)))
        if record.payload:
            message.append(pb.FetchedSample.SAMPLE_FIELD_NUMBER, record.payload)
        for delta in partials.split(record.partial):
            message.append(pb.FetchedSample.PARTIAL_FIELD_NUMBER, delta)
        if record.score:
            message.append(pb.FetchedSample.SCORE_FIELD_NUMBER, record.score)
        if record.prompt:
            message.append(pb.FetchedSample.PROMPT_FIELD_NUMBER, record.prompt)
        response.append(pb.FetchResponse.SAMPLES_FIELD_NUMBER, message)
    return response


def page(found: Page) -> pb.ListSamplesResponse:
    response = pb.ListSamplesResponse(next_page_token=str(found.following) if found.following else "")
    for each in found.samples:
        message = response.samples.add(
            sample_id=sample_id(*each.ref),
            group_id=group_id(each.ref.order),
            index=each.ref.index,
            attempt=each.attempt,
        )
        _fill_record(message.record, each.facts)
        if (letter := each.letter) is not None:
            dead = pb.DeadLetter(error=letter.error, died_unix_ms=letter.died_ms, requeue=_enum(letter.requeue))
            message.dead.CopyFrom(dead)
    return response


def requeued(sample_ids: Sequence[str], records: Sequence[Requeued]) -> Iterable[pb.RequeueResult]:
    for each, record in zip(sample_ids, records, strict=True):
        goes_on = group_id(record.order) if record.order >= 0 else ""
        yield pb.RequeueResult(sample_id=each, outcome=_enum(record.outcome), group_id=goes_on)


def watermark(record: WatermarkRecord) -> pb.Watermark:
    return pb.Watermark(
        step=record.step,
        low_water=record.low_water,
        closed_ordinals=record.closed,
        dataset_digest=record.dataset_digest,
        seed=record.seed,
    )


def watermark_record(message: pb.Watermark) -> WatermarkRecord:
    return WatermarkRecord(
        message.step, message.low_water, tuple(message.closed_ordinals), message.dataset_digest, message.seed
    )


def ledger(record: LedgerRecord) -> pb.GetLedgerResponse:
    """`imbalance` is computed here: what was accepted minus what was counted."""
    return pb.GetLedgerResponse(
        accepted=record.accepted,
        counts=[
            pb.LedgerCount(
                state=_enum(each.state),
                drop_reason=_enum(each.drop_reason),
                samples=each.samples,
                completion_tokens=each.completion_tokens,
            )
            for each in record.counts
        ],
        imbalance=record.accepted - sum(each.samples for each in record.counts),
        epoch=record.epoch,
        step=record.step,
        published=record.published.to_proto() if record.published else None,
        prompt_cursor=record.cursor,
        live_groups=record.live_groups,
        live_groups_limit=record.live_groups_limit,
        waiting_for=[waiting_for(stage, record.waiting[stage]) for stage in sorted(record.waiting)],
        counters=record.counters,
        length_bias=policy.length_bias(record.counts),
    )


def _enum(value: int) -> Any:
    """Records hold enums as numbers, which is what messages store."""
    return value
