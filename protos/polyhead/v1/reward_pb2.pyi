from polyhead.v1 import sample_pb2 as _sample_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_ERROR_KIND_UNSPECIFIED: _ClassVar[ScoreErrorKind]
    SCORE_ERROR_KIND_UNAVAILABLE: _ClassVar[ScoreErrorKind]
    SCORE_ERROR_KIND_FAILED: _ClassVar[ScoreErrorKind]
SCORE_ERROR_KIND_UNSPECIFIED: ScoreErrorKind
SCORE_ERROR_KIND_UNAVAILABLE: ScoreErrorKind
SCORE_ERROR_KIND_FAILED: ScoreErrorKind

class ScoreRequest(_message.Message):
    __slots__ = ("scorer", "items")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    def __init__(self, scorer: _Optional[str] = ..., items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("sample_id", "prompt", "completion", "token_ids", "prompt_length")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    prompt: _sample_pb2.Prompt
    completion: str
    token_ids: bytes
    prompt_length: int
    def __init__(self, sample_id: _Optional[str] = ..., prompt: _Optional[_Union[_sample_pb2.Prompt, _Mapping]] = ..., completion: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., prompt_length: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("sample_id", "score", "error")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    score: _sample_pb2.Score
    error: ScoreError
    def __init__(self, sample_id: _Optional[str] = ..., score: _Optional[_Union[_sample_pb2.Score, _Mapping]] = ..., error: _Optional[_Union[ScoreError, _Mapping]] = ...) -> None: ...

class ScoreError(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: ScoreErrorKind
    message: str
    def __init__(self, kind: _Optional[_Union[ScoreErrorKind, str]] = ..., message: _Optional[str] = ...) -> None: ...
