from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_GENERATE: _ClassVar[Stage]
    STAGE_SCORE: _ClassVar[Stage]
    STAGE_TRAIN: _ClassVar[Stage]

class SampleState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAMPLE_STATE_UNSPECIFIED: _ClassVar[SampleState]
    SAMPLE_STATE_PENDING: _ClassVar[SampleState]
    SAMPLE_STATE_GENERATING: _ClassVar[SampleState]
    SAMPLE_STATE_GENERATED: _ClassVar[SampleState]
    SAMPLE_STATE_SCORING: _ClassVar[SampleState]
    SAMPLE_STATE_SCORED: _ClassVar[SampleState]
    SAMPLE_STATE_READY: _ClassVar[SampleState]
    SAMPLE_STATE_TRAINING: _ClassVar[SampleState]
    SAMPLE_STATE_CONSUMED: _ClassVar[SampleState]
    SAMPLE_STATE_RETIRED: _ClassVar[SampleState]
    SAMPLE_STATE_DROPPED: _ClassVar[SampleState]
    SAMPLE_STATE_DEAD: _ClassVar[SampleState]

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_UNSPECIFIED: _ClassVar[DropReason]
    DROP_REASON_STALE: _ClassVar[DropReason]
    DROP_REASON_ZERO_VARIANCE: _ClassVar[DropReason]
    DROP_REASON_FILTERED: _ClassVar[DropReason]
    DROP_REASON_GROUP_DEAD: _ClassVar[DropReason]
    DROP_REASON_SURPLUS: _ClassVar[DropReason]
    DROP_REASON_OVERSIZE: _ClassVar[DropReason]
    DROP_REASON_INVALID: _ClassVar[DropReason]
    DROP_REASON_CANCELLED: _ClassVar[DropReason]
    DROP_REASON_OPERATOR: _ClassVar[DropReason]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class KvOrigin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_ORIGIN_UNSPECIFIED: _ClassVar[KvOrigin]
    KV_ORIGIN_FRESH: _ClassVar[KvOrigin]
    KV_ORIGIN_CARRIED: _ClassVar[KvOrigin]
STAGE_UNSPECIFIED: Stage
STAGE_GENERATE: Stage
STAGE_SCORE: Stage
STAGE_TRAIN: Stage
SAMPLE_STATE_UNSPECIFIED: SampleState
SAMPLE_STATE_PENDING: SampleState
SAMPLE_STATE_GENERATING: SampleState
SAMPLE_STATE_GENERATED: SampleState
SAMPLE_STATE_SCORING: SampleState
SAMPLE_STATE_SCORED: SampleState
SAMPLE_STATE_READY: SampleState
SAMPLE_STATE_TRAINING: SampleState
SAMPLE_STATE_CONSUMED: SampleState
SAMPLE_STATE_RETIRED: SampleState
SAMPLE_STATE_DROPPED: SampleState
SAMPLE_STATE_DEAD: SampleState
DROP_REASON_UNSPECIFIED: DropReason
DROP_REASON_STALE: DropReason
DROP_REASON_ZERO_VARIANCE: DropReason
DROP_REASON_FILTERED: DropReason
DROP_REASON_GROUP_DEAD: DropReason
DROP_REASON_SURPLUS: DropReason
DROP_REASON_OVERSIZE: DropReason
DROP_REASON_INVALID: DropReason
DROP_REASON_CANCELLED: DropReason
DROP_REASON_OPERATOR: DropReason
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
KV_ORIGIN_UNSPECIFIED: KvOrigin
KV_ORIGIN_FRESH: KvOrigin
KV_ORIGIN_CARRIED: KvOrigin

class WeightVersion(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class WeightVersionSpan(_message.Message):
    __slots__ = ("version", "start", "end", "kv")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    version: WeightVersion
    start: int
    end: int
    kv: KvOrigin
    def __init__(self, version: _Optional[_Union[WeightVersion, _Mapping]] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., kv: _Optional[_Union[KvOrigin, str]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "messages_json", "label", "metadata_json", "tools_json")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_JSON_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages_json: str
    label: str
    metadata_json: str
    tools_json: str
    def __init__(self, text: _Optional[str] = ..., messages_json: _Optional[str] = ..., label: _Optional[str] = ..., metadata_json: _Optional[str] = ..., tools_json: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids", "sampling_seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling_seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., sampling_seed: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("token_ids", "num_tokens", "prompt_length", "loss_mask", "rollout_logprobs", "spans", "first_token_unix_us", "last_token_unix_us", "digest")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    num_tokens: int
    prompt_length: int
    loss_mask: bytes
    rollout_logprobs: bytes
    spans: _containers.RepeatedCompositeFieldContainer[WeightVersionSpan]
    first_token_unix_us: int
    last_token_unix_us: int
    digest: int
    def __init__(self, token_ids: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., prompt_length: _Optional[int] = ..., loss_mask: _Optional[bytes] = ..., rollout_logprobs: _Optional[bytes] = ..., spans: _Optional[_Iterable[_Union[WeightVersionSpan, _Mapping]]] = ..., first_token_unix_us: _Optional[int] = ..., last_token_unix_us: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class RewardSpan(_message.Message):
    __slots__ = ("start", "end", "reward")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    reward: float
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., reward: _Optional[float] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("reward", "parts", "scorer", "seconds", "spans")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    parts: _containers.ScalarMap[str, float]
    scorer: str
    seconds: float
    spans: _containers.RepeatedCompositeFieldContainer[RewardSpan]
    def __init__(self, reward: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ..., scorer: _Optional[str] = ..., seconds: _Optional[float] = ..., spans: _Optional[_Iterable[_Union[RewardSpan, _Mapping]]] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("sample_id", "group_id", "index", "prompt", "sampling", "segments", "completion", "finish_reason", "behaviour_exact", "engine", "refs")
    class RefsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: BlobRef
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[BlobRef, _Mapping]] = ...) -> None: ...
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_EXACT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    group_id: str
    index: int
    prompt: Prompt
    sampling: SamplingParams
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    completion: str
    finish_reason: FinishReason
    behaviour_exact: bool
    engine: str
    refs: _containers.MessageMap[str, BlobRef]
    def __init__(self, sample_id: _Optional[str] = ..., group_id: _Optional[str] = ..., index: _Optional[int] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., completion: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., behaviour_exact: _Optional[bool] = ..., engine: _Optional[str] = ..., refs: _Optional[_Mapping[str, BlobRef]] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("from_token", "token_ids", "rollout_logprobs", "spans", "first_token_unix_us")
    FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    from_token: int
    token_ids: bytes
    rollout_logprobs: bytes
    spans: _containers.RepeatedCompositeFieldContainer[WeightVersionSpan]
    first_token_unix_us: int
    def __init__(self, from_token: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., rollout_logprobs: _Optional[bytes] = ..., spans: _Optional[_Iterable[_Union[WeightVersionSpan, _Mapping]]] = ..., first_token_unix_us: _Optional[int] = ...) -> None: ...

class SampleIndex(_message.Message):
    __slots__ = ("num_tokens", "completion_tokens", "finish_reason", "oldest_version", "reward")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    oldest_version: WeightVersion
    reward: float
    def __init__(self, num_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., oldest_version: _Optional[_Union[WeightVersion, _Mapping]] = ..., reward: _Optional[float] = ...) -> None: ...
