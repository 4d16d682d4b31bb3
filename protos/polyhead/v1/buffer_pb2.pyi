import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from polyhead.v1 import sample_pb2 as _sample_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_OK: _ClassVar[Outcome]
    OUTCOME_DUPLICATE: _ClassVar[Outcome]
    OUTCOME_LEASE_LOST: _ClassVar[Outcome]
    OUTCOME_CONFLICT: _ClassVar[Outcome]
    OUTCOME_GONE: _ClassVar[Outcome]

class GroupVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_VERDICT_UNSPECIFIED: _ClassVar[GroupVerdict]
    GROUP_VERDICT_KEEP: _ClassVar[GroupVerdict]
    GROUP_VERDICT_DROP: _ClassVar[GroupVerdict]
    GROUP_VERDICT_KEEP_IF_INSUFFICIENT: _ClassVar[GroupVerdict]
    GROUP_VERDICT_FILTER_FAILED: _ClassVar[GroupVerdict]

class ReleaseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_REASON_UNSPECIFIED: _ClassVar[ReleaseReason]
    RELEASE_REASON_DRAIN: _ClassVar[ReleaseReason]
    RELEASE_REASON_UNAVAILABLE: _ClassVar[ReleaseReason]
    RELEASE_REASON_SAMPLE_ERROR: _ClassVar[ReleaseReason]
    RELEASE_REASON_FATAL: _ClassVar[ReleaseReason]
    RELEASE_REASON_DROP: _ClassVar[ReleaseReason]

class StepOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_OUTCOME_UNSPECIFIED: _ClassVar[StepOutcome]
    STEP_OUTCOME_TRAINED: _ClassVar[StepOutcome]
    STEP_OUTCOME_SKIPPED: _ClassVar[StepOutcome]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ROLLOUT: _ClassVar[Role]
    ROLE_REWARD: _ClassVar[Role]
    ROLE_TRAINER: _ClassVar[Role]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_JOINING: _ClassVar[ReplicaState]
    REPLICA_STATE_SYNCING: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_SUSPECT: _ClassVar[ReplicaState]
    REPLICA_STATE_QUARANTINED: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_DEAD: _ClassVar[ReplicaState]
    REPLICA_STATE_YIELDED: _ClassVar[ReplicaState]

class RequeueOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEUE_OUTCOME_UNSPECIFIED: _ClassVar[RequeueOutcome]
    REQUEUE_OUTCOME_REQUEUED: _ClassVar[RequeueOutcome]
    REQUEUE_OUTCOME_REISSUED: _ClassVar[RequeueOutcome]
    REQUEUE_OUTCOME_DUPLICATE: _ClassVar[RequeueOutcome]
    REQUEUE_OUTCOME_GROUP_WENT_ON: _ClassVar[RequeueOutcome]
    REQUEUE_OUTCOME_GONE: _ClassVar[RequeueOutcome]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_OK: Outcome
OUTCOME_DUPLICATE: Outcome
OUTCOME_LEASE_LOST: Outcome
OUTCOME_CONFLICT: Outcome
OUTCOME_GONE: Outcome
GROUP_VERDICT_UNSPECIFIED: GroupVerdict
GROUP_VERDICT_KEEP: GroupVerdict
GROUP_VERDICT_DROP: GroupVerdict
GROUP_VERDICT_KEEP_IF_INSUFFICIENT: GroupVerdict
GROUP_VERDICT_FILTER_FAILED: GroupVerdict
RELEASE_REASON_UNSPECIFIED: ReleaseReason
RELEASE_REASON_DRAIN: ReleaseReason
RELEASE_REASON_UNAVAILABLE: ReleaseReason
RELEASE_REASON_SAMPLE_ERROR: ReleaseReason
RELEASE_REASON_FATAL: ReleaseReason
RELEASE_REASON_DROP: ReleaseReason
STEP_OUTCOME_UNSPECIFIED: StepOutcome
STEP_OUTCOME_TRAINED: StepOutcome
STEP_OUTCOME_SKIPPED: StepOutcome
ROLE_UNSPECIFIED: Role
ROLE_ROLLOUT: Role
ROLE_REWARD: Role
ROLE_TRAINER: Role
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_JOINING: ReplicaState
REPLICA_STATE_SYNCING: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_SUSPECT: ReplicaState
REPLICA_STATE_QUARANTINED: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_DEAD: ReplicaState
REPLICA_STATE_YIELDED: ReplicaState
REQUEUE_OUTCOME_UNSPECIFIED: RequeueOutcome
REQUEUE_OUTCOME_REQUEUED: RequeueOutcome
REQUEUE_OUTCOME_REISSUED: RequeueOutcome
REQUEUE_OUTCOME_DUPLICATE: RequeueOutcome
REQUEUE_OUTCOME_GROUP_WENT_ON: RequeueOutcome
REQUEUE_OUTCOME_GONE: RequeueOutcome

class SubmitRequest(_message.Message):
    __slots__ = ("request_id", "prompts")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompts: _containers.RepeatedCompositeFieldContainer[_sample_pb2.Prompt]
    def __init__(self, request_id: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_sample_pb2.Prompt, _Mapping]]] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("group_ids",)
    GROUP_IDS_FIELD_NUMBER: _ClassVar[int]
    group_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, group_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("stage", "replica_id", "max_samples", "wait", "include_payload", "weight_version", "epoch", "step", "request_id")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    stage: _sample_pb2.Stage
    replica_id: str
    max_samples: int
    wait: _duration_pb2.Duration
    include_payload: bool
    weight_version: _sample_pb2.WeightVersion
    epoch: int
    step: int
    request_id: str
    def __init__(self, stage: _Optional[_Union[_sample_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ..., max_samples: _Optional[int] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., include_payload: _Optional[bool] = ..., weight_version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("groups", "waiting_for", "lease_ttl", "batch_lease_id")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    BATCH_LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[LeasedGroup]
    waiting_for: WaitingFor
    lease_ttl: _duration_pb2.Duration
    batch_lease_id: int
    def __init__(self, groups: _Optional[_Iterable[_Union[LeasedGroup, _Mapping]]] = ..., waiting_for: _Optional[_Union[WaitingFor, _Mapping]] = ..., lease_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., batch_lease_id: _Optional[int] = ...) -> None: ...

class LeasedGroup(_message.Message):
    __slots__ = ("group_id", "group_size", "order", "prompt_ordinal", "prompt", "samples", "staleness", "judge")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ORDINAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    group_size: int
    order: int
    prompt_ordinal: int
    prompt: _sample_pb2.Prompt
    samples: _containers.RepeatedCompositeFieldContainer[LeasedSample]
    staleness: int
    judge: bool
    def __init__(self, group_id: _Optional[str] = ..., group_size: _Optional[int] = ..., order: _Optional[int] = ..., prompt_ordinal: _Optional[int] = ..., prompt: _Optional[_Union[_sample_pb2.Prompt, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[LeasedSample, _Mapping]]] = ..., staleness: _Optional[int] = ..., judge: _Optional[bool] = ...) -> None: ...

class LeasedSample(_message.Message):
    __slots__ = ("sample_id", "index", "lease_id", "attempt", "record", "partial", "sample", "score")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    index: int
    lease_id: int
    attempt: int
    record: _sample_pb2.SampleIndex
    partial: _containers.RepeatedCompositeFieldContainer[_sample_pb2.TokenDelta]
    sample: bytes
    score: _sample_pb2.Score
    def __init__(self, sample_id: _Optional[str] = ..., index: _Optional[int] = ..., lease_id: _Optional[int] = ..., attempt: _Optional[int] = ..., record: _Optional[_Union[_sample_pb2.SampleIndex, _Mapping]] = ..., partial: _Optional[_Iterable[_Union[_sample_pb2.TokenDelta, _Mapping]]] = ..., sample: _Optional[bytes] = ..., score: _Optional[_Union[_sample_pb2.Score, _Mapping]] = ...) -> None: ...

class WaitingFor(_message.Message):
    __slots__ = ("stage", "reason", "count")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    stage: _sample_pb2.Stage
    reason: str
    count: int
    def __init__(self, stage: _Optional[_Union[_sample_pb2.Stage, str]] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("sample_ids", "include_prompt")
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    include_prompt: bool
    def __init__(self, sample_ids: _Optional[_Iterable[str]] = ..., include_prompt: _Optional[bool] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("samples",)
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[FetchedSample]
    def __init__(self, samples: _Optional[_Iterable[_Union[FetchedSample, _Mapping]]] = ...) -> None: ...

class FetchedSample(_message.Message):
    __slots__ = ("sample_id", "state", "sample", "partial", "score", "prompt")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    state: _sample_pb2.SampleState
    sample: bytes
    partial: _containers.RepeatedCompositeFieldContainer[_sample_pb2.TokenDelta]
    score: _sample_pb2.Score
    prompt: _sample_pb2.Prompt
    def __init__(self, sample_id: _Optional[str] = ..., state: _Optional[_Union[_sample_pb2.SampleState, str]] = ..., sample: _Optional[bytes] = ..., partial: _Optional[_Iterable[_Union[_sample_pb2.TokenDelta, _Mapping]]] = ..., score: _Optional[_Union[_sample_pb2.Score, _Mapping]] = ..., prompt: _Optional[_Union[_sample_pb2.Prompt, _Mapping]] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("replica_id", "samples")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    samples: _containers.RepeatedCompositeFieldContainer[ExtendedSample]
    def __init__(self, replica_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[ExtendedSample, _Mapping]]] = ...) -> None: ...

class ExtendedSample(_message.Message):
    __slots__ = ("sample_id", "lease_id", "delta")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    lease_id: int
    delta: _sample_pb2.TokenDelta
    def __init__(self, sample_id: _Optional[str] = ..., lease_id: _Optional[int] = ..., delta: _Optional[_Union[_sample_pb2.TokenDelta, _Mapping]] = ...) -> None: ...

class ExtendResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SampleResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SampleResult, _Mapping]]] = ...) -> None: ...

class SampleResult(_message.Message):
    __slots__ = ("sample_id", "outcome", "saved_tokens")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    outcome: Outcome
    saved_tokens: int
    def __init__(self, sample_id: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., saved_tokens: _Optional[int] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("stage", "replica_id", "samples")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    stage: _sample_pb2.Stage
    replica_id: str
    samples: _containers.RepeatedCompositeFieldContainer[CompletedSample]
    def __init__(self, stage: _Optional[_Union[_sample_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[CompletedSample, _Mapping]]] = ...) -> None: ...

class CompletedSample(_message.Message):
    __slots__ = ("sample_id", "lease_id", "sample", "score", "verdict", "verdict_reason")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_REASON_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    lease_id: int
    sample: bytes
    score: _sample_pb2.Score
    verdict: GroupVerdict
    verdict_reason: str
    def __init__(self, sample_id: _Optional[str] = ..., lease_id: _Optional[int] = ..., sample: _Optional[bytes] = ..., score: _Optional[_Union[_sample_pb2.Score, _Mapping]] = ..., verdict: _Optional[_Union[GroupVerdict, str]] = ..., verdict_reason: _Optional[str] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SampleResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SampleResult, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("stage", "replica_id", "samples")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    stage: _sample_pb2.Stage
    replica_id: str
    samples: _containers.RepeatedCompositeFieldContainer[ReleasedSample]
    def __init__(self, stage: _Optional[_Union[_sample_pb2.Stage, str]] = ..., replica_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[ReleasedSample, _Mapping]]] = ...) -> None: ...

class ReleasedSample(_message.Message):
    __slots__ = ("sample_id", "lease_id", "reason", "drop_reason", "error", "tokens_discarded")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DROP_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DISCARDED_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    lease_id: int
    reason: ReleaseReason
    drop_reason: _sample_pb2.DropReason
    error: str
    tokens_discarded: int
    def __init__(self, sample_id: _Optional[str] = ..., lease_id: _Optional[int] = ..., reason: _Optional[_Union[ReleaseReason, str]] = ..., drop_reason: _Optional[_Union[_sample_pb2.DropReason, str]] = ..., error: _Optional[str] = ..., tokens_discarded: _Optional[int] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SampleResult]
    def __init__(self, results: _Optional[_Iterable[_Union[SampleResult, _Mapping]]] = ...) -> None: ...

class ListPartialsRequest(_message.Message):
    __slots__ = ("max_groups",)
    MAX_GROUPS_FIELD_NUMBER: _ClassVar[int]
    max_groups: int
    def __init__(self, max_groups: _Optional[int] = ...) -> None: ...

class ListPartialsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[LeasedGroup]
    def __init__(self, groups: _Optional[_Iterable[_Union[LeasedGroup, _Mapping]]] = ...) -> None: ...

class PreferGroupsRequest(_message.Message):
    __slots__ = ("group_ids",)
    GROUP_IDS_FIELD_NUMBER: _ClassVar[int]
    group_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, group_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PreferGroupsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitStepRequest(_message.Message):
    __slots__ = ("epoch", "step", "batch_lease_id", "outcome")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BATCH_LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    batch_lease_id: int
    outcome: StepOutcome
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., batch_lease_id: _Optional[int] = ..., outcome: _Optional[_Union[StepOutcome, str]] = ...) -> None: ...

class CommitStepResponse(_message.Message):
    __slots__ = ("applied", "checkpoint_wanted")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WANTED_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    checkpoint_wanted: bool
    def __init__(self, applied: _Optional[bool] = ..., checkpoint_wanted: _Optional[bool] = ...) -> None: ...

class PublishVersionRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: _sample_pb2.WeightVersion
    def __init__(self, version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ...) -> None: ...

class PublishVersionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Watermark(_message.Message):
    __slots__ = ("step", "low_water", "closed_ordinals", "dataset_digest", "seed")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOW_WATER_FIELD_NUMBER: _ClassVar[int]
    CLOSED_ORDINALS_FIELD_NUMBER: _ClassVar[int]
    DATASET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    step: int
    low_water: int
    closed_ordinals: _containers.RepeatedScalarFieldContainer[int]
    dataset_digest: str
    seed: int
    def __init__(self, step: _Optional[int] = ..., low_water: _Optional[int] = ..., closed_ordinals: _Optional[_Iterable[int]] = ..., dataset_digest: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class GetWatermarkRequest(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class GetWatermarkResponse(_message.Message):
    __slots__ = ("watermark",)
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    watermark: Watermark
    def __init__(self, watermark: _Optional[_Union[Watermark, _Mapping]] = ...) -> None: ...

class ConfirmCheckpointRequest(_message.Message):
    __slots__ = ("epoch", "oldest_kept_step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OLDEST_KEPT_STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    oldest_kept_step: int
    def __init__(self, epoch: _Optional[int] = ..., oldest_kept_step: _Optional[int] = ...) -> None: ...

class ConfirmCheckpointResponse(_message.Message):
    __slots__ = ("retired_samples",)
    RETIRED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    retired_samples: int
    def __init__(self, retired_samples: _Optional[int] = ...) -> None: ...

class AcquireEpochRequest(_message.Message):
    __slots__ = ("holder", "known_epoch")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    KNOWN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    holder: str
    known_epoch: int
    def __init__(self, holder: _Optional[str] = ..., known_epoch: _Optional[int] = ...) -> None: ...

class AcquireEpochResponse(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class RecoverRequest(_message.Message):
    __slots__ = ("epoch", "step", "watermark")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    watermark: Watermark
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., watermark: _Optional[_Union[Watermark, _Mapping]] = ...) -> None: ...

class RecoverResponse(_message.Message):
    __slots__ = ("returned_groups", "replayed_steps")
    RETURNED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_STEPS_FIELD_NUMBER: _ClassVar[int]
    returned_groups: int
    replayed_steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, returned_groups: _Optional[int] = ..., replayed_steps: _Optional[_Iterable[int]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "role", "address", "state", "weight_version", "pid", "stats", "child_pids", "engines", "trouble")
    class StatsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ChildPidsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    CHILD_PIDS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    role: Role
    address: str
    state: ReplicaState
    weight_version: _sample_pb2.WeightVersion
    pid: int
    stats: _containers.ScalarMap[str, float]
    child_pids: _containers.ScalarMap[str, int]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    trouble: str
    def __init__(self, replica_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., weight_version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., pid: _Optional[int] = ..., stats: _Optional[_Mapping[str, float]] = ..., child_pids: _Optional[_Mapping[str, int]] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., trouble: _Optional[str] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("index", "state", "weight_version", "name", "ranks")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    index: int
    state: ReplicaState
    weight_version: _sample_pb2.WeightVersion
    name: str
    ranks: int
    def __init__(self, index: _Optional[int] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., weight_version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., name: _Optional[str] = ..., ranks: _Optional[int] = ...) -> None: ...

class RegisterReplicaRequest(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class RegisterReplicaResponse(_message.Message):
    __slots__ = ("ttl", "floor_version")
    TTL_FIELD_NUMBER: _ClassVar[int]
    FLOOR_VERSION_FIELD_NUMBER: _ClassVar[int]
    ttl: _duration_pb2.Duration
    floor_version: _sample_pb2.WeightVersion
    def __init__(self, ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., floor_version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class GetLedgerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LedgerCount(_message.Message):
    __slots__ = ("state", "drop_reason", "samples", "completion_tokens")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DROP_REASON_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    state: _sample_pb2.SampleState
    drop_reason: _sample_pb2.DropReason
    samples: int
    completion_tokens: int
    def __init__(self, state: _Optional[_Union[_sample_pb2.SampleState, str]] = ..., drop_reason: _Optional[_Union[_sample_pb2.DropReason, str]] = ..., samples: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class GetLedgerResponse(_message.Message):
    __slots__ = ("accepted", "counts", "imbalance", "epoch", "step", "published", "prompt_cursor", "live_groups", "live_groups_limit", "waiting_for", "counters", "length_bias")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LengthBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIVE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    LIVE_GROUPS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BIAS_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    counts: _containers.RepeatedCompositeFieldContainer[LedgerCount]
    imbalance: int
    epoch: int
    step: int
    published: _sample_pb2.WeightVersion
    prompt_cursor: int
    live_groups: int
    live_groups_limit: int
    waiting_for: _containers.RepeatedCompositeFieldContainer[WaitingFor]
    counters: _containers.ScalarMap[str, int]
    length_bias: _containers.ScalarMap[str, float]
    def __init__(self, accepted: _Optional[int] = ..., counts: _Optional[_Iterable[_Union[LedgerCount, _Mapping]]] = ..., imbalance: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., published: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., prompt_cursor: _Optional[int] = ..., live_groups: _Optional[int] = ..., live_groups_limit: _Optional[int] = ..., waiting_for: _Optional[_Iterable[_Union[WaitingFor, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., length_bias: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListSamplesRequest(_message.Message):
    __slots__ = ("state", "limit", "page_token")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    state: _sample_pb2.SampleState
    limit: int
    page_token: str
    def __init__(self, state: _Optional[_Union[_sample_pb2.SampleState, str]] = ..., limit: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSamplesResponse(_message.Message):
    __slots__ = ("samples", "next_page_token")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[ListedSample]
    next_page_token: str
    def __init__(self, samples: _Optional[_Iterable[_Union[ListedSample, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListedSample(_message.Message):
    __slots__ = ("sample_id", "group_id", "index", "attempt", "record", "dead")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DEAD_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    group_id: str
    index: int
    attempt: int
    record: _sample_pb2.SampleIndex
    dead: DeadLetter
    def __init__(self, sample_id: _Optional[str] = ..., group_id: _Optional[str] = ..., index: _Optional[int] = ..., attempt: _Optional[int] = ..., record: _Optional[_Union[_sample_pb2.SampleIndex, _Mapping]] = ..., dead: _Optional[_Union[DeadLetter, _Mapping]] = ...) -> None: ...

class DeadLetter(_message.Message):
    __slots__ = ("error", "died_unix_ms", "requeue")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DIED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEUE_FIELD_NUMBER: _ClassVar[int]
    error: str
    died_unix_ms: int
    requeue: RequeueOutcome
    def __init__(self, error: _Optional[str] = ..., died_unix_ms: _Optional[int] = ..., requeue: _Optional[_Union[RequeueOutcome, str]] = ...) -> None: ...

class RequeueRequest(_message.Message):
    __slots__ = ("sample_ids",)
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sample_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RequeueResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[RequeueResult]
    def __init__(self, results: _Optional[_Iterable[_Union[RequeueResult, _Mapping]]] = ...) -> None: ...

class RequeueResult(_message.Message):
    __slots__ = ("sample_id", "outcome", "group_id")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    outcome: RequeueOutcome
    group_id: str
    def __init__(self, sample_id: _Optional[str] = ..., outcome: _Optional[_Union[RequeueOutcome, str]] = ..., group_id: _Optional[str] = ...) -> None: ...

class SampleGroup(_message.Message):
    __slots__ = ("group_id", "prompt", "samples")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    prompt: _sample_pb2.Prompt
    samples: _containers.RepeatedCompositeFieldContainer[GroupSample]
    def __init__(self, group_id: _Optional[str] = ..., prompt: _Optional[_Union[_sample_pb2.Prompt, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[GroupSample, _Mapping]]] = ...) -> None: ...

class GroupSample(_message.Message):
    __slots__ = ("sample", "score")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    sample: _sample_pb2.Sample
    score: _sample_pb2.Score
    def __init__(self, sample: _Optional[_Union[_sample_pb2.Sample, _Mapping]] = ..., score: _Optional[_Union[_sample_pb2.Score, _Mapping]] = ...) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("request_id", "groups")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    groups: _containers.RepeatedCompositeFieldContainer[SampleGroup]
    def __init__(self, request_id: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[SampleGroup, _Mapping]]] = ...) -> None: ...

class ImportResponse(_message.Message):
    __slots__ = ("group_ids",)
    GROUP_IDS_FIELD_NUMBER: _ClassVar[int]
    group_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, group_ids: _Optional[_Iterable[str]] = ...) -> None: ...
