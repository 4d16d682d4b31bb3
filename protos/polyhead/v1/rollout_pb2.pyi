import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from polyhead.v1 import buffer_pb2 as _buffer_pb2
from polyhead.v1 import sample_pb2 as _sample_pb2
from polyhead.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PauseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAUSE_MODE_UNSPECIFIED: _ClassVar[PauseMode]
    PAUSE_MODE_IN_PLACE: _ClassVar[PauseMode]
    PAUSE_MODE_RETRACT: _ClassVar[PauseMode]
    PAUSE_MODE_ABORT: _ClassVar[PauseMode]
PAUSE_MODE_UNSPECIFIED: PauseMode
PAUSE_MODE_IN_PLACE: PauseMode
PAUSE_MODE_RETRACT: PauseMode
PAUSE_MODE_ABORT: PauseMode

class JoinWeightGroupRequest(_message.Message):
    __slots__ = ("epoch", "group_name", "backend", "master_address", "master_port", "world_size", "rank_offset", "engine", "nccl_version", "nccl_cumem")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANK_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    NCCL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NCCL_CUMEM_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    group_name: str
    backend: str
    master_address: str
    master_port: int
    world_size: int
    rank_offset: int
    engine: int
    nccl_version: str
    nccl_cumem: str
    def __init__(self, epoch: _Optional[int] = ..., group_name: _Optional[str] = ..., backend: _Optional[str] = ..., master_address: _Optional[str] = ..., master_port: _Optional[int] = ..., world_size: _Optional[int] = ..., rank_offset: _Optional[int] = ..., engine: _Optional[int] = ..., nccl_version: _Optional[str] = ..., nccl_cumem: _Optional[str] = ...) -> None: ...

class JoinWeightGroupResponse(_message.Message):
    __slots__ = ("stages",)
    STAGES_FIELD_NUMBER: _ClassVar[int]
    stages: bool
    def __init__(self, stages: _Optional[bool] = ...) -> None: ...

class LeaveWeightGroupRequest(_message.Message):
    __slots__ = ("epoch", "group_name", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    group_name: str
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., group_name: _Optional[str] = ..., engine: _Optional[int] = ...) -> None: ...

class LeaveWeightGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageUpdateRequest(_message.Message):
    __slots__ = ("epoch", "version", "manifest", "group_name", "engine", "shared")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    manifest: _weights_pb2.WeightManifest
    group_name: str
    engine: int
    shared: _containers.RepeatedCompositeFieldContainer[_weights_pb2.SharedBucket]
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., manifest: _Optional[_Union[_weights_pb2.WeightManifest, _Mapping]] = ..., group_name: _Optional[str] = ..., engine: _Optional[int] = ..., shared: _Optional[_Iterable[_Union[_weights_pb2.SharedBucket, _Mapping]]] = ...) -> None: ...

class StageUpdateResponse(_message.Message):
    __slots__ = ("buckets",)
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    buckets: int
    def __init__(self, buckets: _Optional[int] = ...) -> None: ...

class BeginUpdateRequest(_message.Message):
    __slots__ = ("epoch", "version", "manifest", "group_name", "pause_mode", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    PAUSE_MODE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    manifest: _weights_pb2.WeightManifest
    group_name: str
    pause_mode: PauseMode
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., manifest: _Optional[_Union[_weights_pb2.WeightManifest, _Mapping]] = ..., group_name: _Optional[str] = ..., pause_mode: _Optional[_Union[PauseMode, str]] = ..., engine: _Optional[int] = ...) -> None: ...

class BeginUpdateResponse(_message.Message):
    __slots__ = ("running_requests",)
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    def __init__(self, running_requests: _Optional[int] = ...) -> None: ...

class LoadBucketRequest(_message.Message):
    __slots__ = ("epoch", "version", "bucket", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    bucket: int
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., bucket: _Optional[int] = ..., engine: _Optional[int] = ...) -> None: ...

class LoadBucketResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadStagedRequest(_message.Message):
    __slots__ = ("epoch", "version", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., engine: _Optional[int] = ...) -> None: ...

class LoadStagedResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitUpdateRequest(_message.Message):
    __slots__ = ("epoch", "version", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., engine: _Optional[int] = ...) -> None: ...

class CommitUpdateResponse(_message.Message):
    __slots__ = ("pause", "requests_continued", "requests_aborted", "trace", "effect")
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_CONTINUED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_ABORTED_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    pause: _duration_pb2.Duration
    requests_continued: int
    requests_aborted: int
    trace: UpdateTrace
    effect: UpdateEffect
    def __init__(self, pause: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., requests_continued: _Optional[int] = ..., requests_aborted: _Optional[int] = ..., trace: _Optional[_Union[UpdateTrace, _Mapping]] = ..., effect: _Optional[_Union[UpdateEffect, _Mapping]] = ...) -> None: ...

class UpdateEffect(_message.Message):
    __slots__ = ("tokens_kept", "tokens_recomputed", "salt_race")
    TOKENS_KEPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    SALT_RACE_FIELD_NUMBER: _ClassVar[int]
    tokens_kept: int
    tokens_recomputed: int
    salt_race: int
    def __init__(self, tokens_kept: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., salt_race: _Optional[int] = ...) -> None: ...

class UpdateTrace(_message.Message):
    __slots__ = ("settle_s", "quiet_s", "load_s", "continue_s", "wake_s")
    SETTLE_S_FIELD_NUMBER: _ClassVar[int]
    QUIET_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_S_FIELD_NUMBER: _ClassVar[int]
    WAKE_S_FIELD_NUMBER: _ClassVar[int]
    settle_s: float
    quiet_s: float
    load_s: float
    continue_s: float
    wake_s: float
    def __init__(self, settle_s: _Optional[float] = ..., quiet_s: _Optional[float] = ..., load_s: _Optional[float] = ..., continue_s: _Optional[float] = ..., wake_s: _Optional[float] = ...) -> None: ...

class AbortUpdateRequest(_message.Message):
    __slots__ = ("epoch", "version", "reason", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    reason: str
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., reason: _Optional[str] = ..., engine: _Optional[int] = ...) -> None: ...

class AbortUpdateResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _buffer_pb2.ReplicaState
    def __init__(self, state: _Optional[_Union[_buffer_pb2.ReplicaState, str]] = ...) -> None: ...

class LoadVersionRequest(_message.Message):
    __slots__ = ("epoch", "version", "directory", "engine")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: _sample_pb2.WeightVersion
    directory: str
    engine: int
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[_Union[_sample_pb2.WeightVersion, _Mapping]] = ..., directory: _Optional[str] = ..., engine: _Optional[int] = ...) -> None: ...

class LoadVersionResponse(_message.Message):
    __slots__ = ("pause", "requests_continued", "requests_aborted", "trace", "effect")
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_CONTINUED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_ABORTED_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    pause: _duration_pb2.Duration
    requests_continued: int
    requests_aborted: int
    trace: UpdateTrace
    effect: UpdateEffect
    def __init__(self, pause: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., requests_continued: _Optional[int] = ..., requests_aborted: _Optional[int] = ..., trace: _Optional[_Union[UpdateTrace, _Mapping]] = ..., effect: _Optional[_Union[UpdateEffect, _Mapping]] = ...) -> None: ...

class YieldRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class YieldResponse(_message.Message):
    __slots__ = ("samples_returned", "drain_s", "sleep_s")
    SAMPLES_RETURNED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    SLEEP_S_FIELD_NUMBER: _ClassVar[int]
    samples_returned: int
    drain_s: float
    sleep_s: float
    def __init__(self, samples_returned: _Optional[int] = ..., drain_s: _Optional[float] = ..., sleep_s: _Optional[float] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("wake_s",)
    WAKE_S_FIELD_NUMBER: _ClassVar[int]
    wake_s: float
    def __init__(self, wake_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("samples_returned",)
    SAMPLES_RETURNED_FIELD_NUMBER: _ClassVar[int]
    samples_returned: int
    def __init__(self, samples_returned: _Optional[int] = ...) -> None: ...

class RolloutServiceGetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RolloutServiceGetStatusResponse(_message.Message):
    __slots__ = ("replica", "running_requests")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    replica: _buffer_pb2.Replica
    running_requests: int
    def __init__(self, replica: _Optional[_Union[_buffer_pb2.Replica, _Mapping]] = ..., running_requests: _Optional[int] = ...) -> None: ...
