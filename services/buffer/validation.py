"""Requests as records: every field is checked before the store sees it, and named when it is wrong."""

from __future__ import annotations

from typing import Protocol

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials, policy
from services.buffer.field_checks import (
    check_count,
    check_finite,
    check_known,
    check_name,
    check_number,
    check_prompt,
    check_step,
    check_time,
    prompt_bytes,
)
from services.buffer.ids import SampleRef, group_id, parse_sample_id
from services.buffer.records import Extension, Generated, Released, Scored
from services.common import wire
from services.common.blobs import Blobs
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, LimitError
from services.common.rpc import MIB
from services.common.versions import Version

_MAX_ERROR = 500
_MAX_REASON = 64
_MAX_EPOCH = 1_000_000
_KIB = 1024
_FINISHED = frozenset(sample_pb2.FinishReason.values())
_VERDICTS = frozenset(pb.GroupVerdict.values())
_RELEASED = frozenset(pb.ReleaseReason.values())
_DROPPED = frozenset(sample_pb2.DropReason.values())
_OUTCOMES = frozenset(pb.StepOutcome.values())
_ROLES = frozenset(pb.Role.values())
_STATES = frozenset(pb.ReplicaState.values())
# Where a checkpoint may claim to be: the run goes on from there.
_MAX_RECOVERED, _MAX_ORDINAL, _MAX_CLOSED = 1 << 32, 1 << 48, 1_000_000


class _Leased(Protocol):
    sample_id: str
    lease_id: int


def check_lease(request: pb.LeaseRequest) -> None:
    """What `Lease` needs for its stage is there."""
    check_name(request.replica_id, "replica_id")
    if request.request_id:
        check_name(request.request_id, "request_id")
    if request.wait.ToNanoseconds() < 0:
        raise InvalidArgumentError("must not be negative", field="wait")
    if request.stage == sample_pb2.STAGE_TRAIN:
        if not request.epoch or not request.step:
            raise InvalidArgumentError("a TRAIN lease names both, from 1", field="step" if request.epoch else "epoch")
        check_step(request.step, "step")
        return
    if request.stage not in (sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE):
        raise InvalidArgumentError("must be GENERATE, SCORE or TRAIN", field="stage")
    if not request.max_samples:
        raise InvalidArgumentError("must be at least 1", field="max_samples")
    if request.stage == sample_pb2.STAGE_GENERATE and not request.HasField("weight_version"):
        raise InvalidArgumentError("a GENERATE lease names the version that is served", field="weight_version")
    wire.check_version(request.weight_version, "weight_version")


def check_known_epoch(request: pb.AcquireEpochRequest) -> int:
    """Epochs count starts of a trainer: a number that no run reaches is a mistake, and would not be undone."""
    if request.known_epoch > _MAX_EPOCH:
        raise InvalidArgumentError(f"{request.known_epoch} is no epoch", field="known_epoch")
    return request.known_epoch


def check_commit(request: pb.CommitStepRequest) -> None:
    check_step(request.step, "step")
    check_number(request.batch_lease_id, "batch_lease_id")
    check_known(request.outcome, _OUTCOMES, "outcome")


def check_recover(request: pb.RecoverRequest) -> None:
    """The watermark is one of the step that is recovered, and its ordinals are places of a data set."""
    if request.step > _MAX_RECOVERED:
        raise InvalidArgumentError(f"{request.step} is no step", field="step")
    if not request.HasField("watermark"):
        return
    mark = request.watermark
    if mark.step != request.step:
        raise InvalidArgumentError(f"is {mark.step}, the checkpoint is {request.step}", field="watermark.step")
    check_number(mark.low_water, "watermark.low_water", _MAX_ORDINAL)
    check_number(mark.seed, "watermark.seed")
    if len(mark.closed_ordinals) > _MAX_CLOSED:
        raise LimitError(f"{len(mark.closed_ordinals)}, at most {_MAX_CLOSED}", field="watermark.closed_ordinals")
    check_number(max(mark.closed_ordinals, default=0), "watermark.closed_ordinals", _MAX_ORDINAL)


def prompts(request: pb.SubmitRequest, limits: LimitsConfig) -> list[bytes]:
    """The serialized prompts of a Submit."""
    check_name(request.request_id, "request_id")
    found = []
    for number, prompt in enumerate(check_count(request.prompts, limits, "prompts")):
        found.append(prompt_bytes(prompt, limits, f"prompts[{number}]"))
    return found


def extensions(request: pb.ExtendRequest, limits: LimitsConfig) -> list[Extension]:
    check_name(request.replica_id, "replica_id")
    found = []
    for number, each in enumerate(check_count(request.samples, limits, "samples")):
        field = f"samples[{number}]"
        ref, lease_id = _leased(each, field)
        count = _check_delta(each.delta, limits, f"{field}.delta")
        if count:
            data = partials.frame(each.delta.SerializeToString())
            found.append(Extension(ref, lease_id, each.delta.from_token, count, data))
        else:
            found.append(Extension(ref, lease_id))
    return found


def generated(request: pb.CompleteRequest, limits: LimitsConfig, blobs: Blobs | None) -> list[Generated]:
    """Checks each serialized Sample against its id and the limits, and that its blobs are there."""
    check_name(request.replica_id, "replica_id")
    found = []
    for number, each in enumerate(check_count(request.samples, limits, "samples")):
        field = f"samples[{number}]"
        ref, lease_id = _leased(each, field)
        data = each.sample  # a copy each time
        sample = parsed(data, limits, field)
        if sample.sample_id != each.sample_id or sample.index != ref.index or sample.group_id != group_id(ref.order):
            raise InvalidArgumentError(
                f"is {sample.sample_id!r}, number {sample.index} of {sample.group_id!r}", field=f"{field}.sample"
            )
        digests = check_blobs(sample, blobs, field)
        found.append(Generated(ref, lease_id, *sample_facts(sample), data, digests))
    return found


def parsed(data: bytes, limits: LimitsConfig, field: str) -> sample_pb2.Sample:
    """A serialized Sample that is whole and within its limits."""
    try:
        sample = wire.parse_sample(
            data,
            max_bytes=limits.sample_mb * MIB,
            max_tokens=limits.sample_tokens,
            max_metadata_bytes=limits.metadata_kb * _KIB,
        )
        check_prompt(sample.prompt, limits, "sample.prompt")
    except (InvalidArgumentError, LimitError) as error:
        raise type(error)(error.reason, field=f"{field}.{error.field}") from None
    check_known(sample.finish_reason, _FINISHED, f"{field}.sample.finish_reason")
    sampling = sample.sampling
    check_finite((sampling.temperature, sampling.top_p), f"{field}.sample.sampling")
    for number, segment in enumerate(sample.segments):
        check_time(segment.first_token_unix_us, f"{field}.sample.segments[{number}].first_token_unix_us")
        check_time(segment.last_token_unix_us, f"{field}.sample.segments[{number}].last_token_unix_us")
    return sample


def check_blobs(sample: sample_pb2.Sample, blobs: Blobs | None, field: str) -> tuple[str, ...]:
    """The digests of the blobs it refers to, each once. Raises DataLossError when one is not there."""
    if not sample.refs:
        return ()
    if blobs is None:
        raise InvalidArgumentError("this buffer knows no directory of blobs", field=f"{field}.sample.refs")
    for name, ref in sample.refs.items():
        blobs.check(ref, f"{field}.sample.refs[{name}]")
    return tuple(sorted({ref.sha256 for ref in sample.refs.values()}))


def sample_facts(sample: sample_pb2.Sample) -> tuple[int, int, int, tuple[tuple[int, int, int], ...]]:
    """Tokens, completion tokens, finish reason, and versions as `policy.merge_versions` has them."""
    spans = (span for segment in sample.segments for span in segment.spans)
    return (
        sum(segment.num_tokens for segment in sample.segments),
        sum(wire.completion_length(segment) for segment in sample.segments),
        sample.finish_reason,
        policy.merge_versions(Version.from_proto(span.version) for span in spans),
    )


def scored(request: pb.CompleteRequest, limits: LimitsConfig) -> list[Scored]:
    check_name(request.replica_id, "replica_id")
    found = []
    for number, each in enumerate(check_count(request.samples, limits, "samples")):
        field = f"samples[{number}]"
        ref, lease_id = _leased(each, field)
        if each.verdict:
            if each.verdict not in _VERDICTS or each.HasField("score"):
                raise InvalidArgumentError("must be a known one, without a score", field=f"{field}.verdict")
            found.append(Scored(ref, lease_id, 0.0, b"", each.verdict, _counter_name(each.verdict_reason)))
            continue
        if not each.HasField("score"):
            raise InvalidArgumentError("a SCORE completion carries a score or a verdict", field=f"{field}.score")
        found.append(Scored(ref, lease_id, each.score.reward, score_bytes(each.score, limits, f"{field}.score")))
    return found


def score_bytes(score: sample_pb2.Score, limits: LimitsConfig, field: str) -> bytes:
    """A serialized Score of finite numbers, within the limit of metadata."""
    check_finite((score.reward,), f"{field}.reward")
    check_finite((score.seconds,), f"{field}.seconds")
    for name, part in score.parts.items():
        check_finite((part,), f"{field}.parts[{name[:_MAX_REASON]}]")
    for number, span in enumerate(score.spans):
        check_finite((span.reward,), f"{field}.spans[{number}].reward")
        if span.start >= span.end:
            raise InvalidArgumentError(
                f"{span.end} is not above start = {span.start}", field=f"{field}.spans[{number}].end"
            )
    data = score.SerializeToString()
    if len(data) > limits.metadata_kb * _KIB:
        raise LimitError(f"{len(data)} bytes, at most {limits.metadata_kb * _KIB}", field=field)
    return data


def _counter_name(reason: str) -> str:
    """A filter's reason as part of a counter's name."""
    plain = (char if char.isascii() and (char.isalnum() or char in "._+-") else "_" for char in reason[:_MAX_REASON])
    return "".join(plain) or "unnamed"


def preferred(request: pb.PreferGroupsRequest) -> list[int]:
    """The orders of the groups."""
    if len(request.group_ids) > policy.MAX_PARTIALS:
        raise LimitError(f"{len(request.group_ids)} in one call, at most {policy.MAX_PARTIALS}", field="group_ids")
    return [
        parse_sample_id(f"{each}-000", f"group_ids[{number}]").order for number, each in enumerate(request.group_ids)
    ]


def released(request: pb.ReleaseRequest, limits: LimitsConfig) -> list[Released]:
    check_name(request.replica_id, "replica_id")
    if request.stage not in (sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE):
        raise InvalidArgumentError("must be GENERATE or SCORE: batches end by CommitStep or Recover", field="stage")
    found = []
    for number, each in enumerate(check_count(request.samples, limits, "samples")):
        field = f"samples[{number}]"
        ref, lease_id = _leased(each, field)
        check_known(each.reason, _RELEASED, f"{field}.reason")
        names_drop = each.drop_reason in _DROPPED and bool(each.drop_reason)
        if names_drop != (each.reason == pb.RELEASE_REASON_DROP):
            raise InvalidArgumentError("goes with reason DROP, and only with it", field=f"{field}.drop_reason")
        if each.tokens_discarded > limits.sample_tokens:
            raise LimitError(
                f"{each.tokens_discarded}, at most {limits.sample_tokens}", field=f"{field}.tokens_discarded"
            )
        error = each.error[:_MAX_ERROR]
        found.append(Released(ref, lease_id, each.reason, each.drop_reason, error, each.tokens_discarded))
    return found


def check_replica(replica: pb.Replica, limits: LimitsConfig) -> None:
    check_name(replica.replica_id, "replica.replica_id")
    check_known(replica.role, _ROLES, "replica.role")
    _check_place(replica, "replica")
    for number, engine in enumerate(replica.engines):
        _check_place(engine, f"replica.engines[{number}]")
    check_finite(replica.stats.values(), "replica.stats")
    if replica.ByteSize() > limits.metadata_kb * _KIB:
        raise LimitError(f"{replica.ByteSize()} bytes, at most {limits.metadata_kb * _KIB}", field="replica")


def _check_place(each: pb.Replica | pb.Engine, field: str) -> None:
    if each.state not in _STATES:
        raise InvalidArgumentError(f"{each.state} is not known", field=f"{field}.state")
    wire.check_version(each.weight_version, f"{field}.weight_version")


def _leased(each: _Leased, field: str) -> tuple[SampleRef, int]:
    if not each.lease_id:
        raise InvalidArgumentError("must be given", field=f"{field}.lease_id")
    return parse_sample_id(each.sample_id, f"{field}.sample_id"), check_number(each.lease_id, f"{field}.lease_id")


def _check_delta(delta: sample_pb2.TokenDelta, limits: LimitsConfig, field: str) -> int:
    """The number of tokens in a delta whose parts fit together."""
    itemsize = wire.TOKEN_DTYPE.itemsize
    if len(delta.token_ids) % itemsize:
        raise InvalidArgumentError(f"{len(delta.token_ids)} bytes of int32", field=f"{field}.token_ids")
    count = len(delta.token_ids) // itemsize
    if delta.from_token + count > limits.sample_tokens:
        raise LimitError(f"{delta.from_token + count} tokens, at most {limits.sample_tokens}", field=field)
    check_time(delta.first_token_unix_us, f"{field}.first_token_unix_us")
    wire.check_array(delta.rollout_logprobs, wire.LOGPROB_DTYPE.itemsize, count, f"{field}.rollout_logprobs")
    wire.check_token_ids(delta.token_ids, f"{field}.token_ids")
    wire.check_logprobs(wire.decode_logprobs(delta.rollout_logprobs), f"{field}.rollout_logprobs")
    wire.check_spans(delta.spans, delta.from_token, delta.from_token + count, f"{field}.spans")
    return count
