"""Token arrays on the wire, and the checks a Sample has to pass before anything stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike, NDArray

from polyhead.v1 import sample_pb2
from services.common.errors import InvalidArgumentError, LimitError
from services.common.parts import check_parts
from services.common.versions import MAX_STEP

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")
MASK_DTYPE = np.dtype("u1")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_REFS = 64
_ABOVE_ZERO = 1e-4
_MAX_REF_NAME = 128
_MAX_SEGMENTS = 1024
_MAX_SPANS = 4096
_KV_ORIGINS = frozenset(sample_pb2.KvOrigin.values())


def encode_tokens(token_ids: ArrayLike) -> bytes:
    """int32 little-endian bytes of a one-dimensional array of token ids."""
    return np.asarray(token_ids, dtype=TOKEN_DTYPE).tobytes()


def encode_logprobs(logprobs: ArrayLike) -> bytes:
    """float32 little-endian bytes of a one-dimensional array of log-probabilities (nats)."""
    return np.asarray(logprobs, dtype=LOGPROB_DTYPE).tobytes()


def encode_mask(mask: ArrayLike) -> bytes:
    """One byte per token: 1 where it is trained."""
    return np.asarray(mask, dtype=MASK_DTYPE).tobytes()


def decode_tokens(data: bytes) -> NDArray[np.int32]:
    """Read-only view, no copy."""
    return np.frombuffer(data, dtype=TOKEN_DTYPE)


def decode_logprobs(data: bytes) -> NDArray[np.float32]:
    """Read-only view, no copy."""
    return np.frombuffer(data, dtype=LOGPROB_DTYPE)


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """Read-only view, no copy."""
    return np.frombuffer(data, dtype=MASK_DTYPE)


def segment_digest(segment: sample_pb2.Segment) -> int:
    """XXH3-64 of what is trained: against damage in the store, not against an adversary."""
    digest = xxhash.xxh3_64(segment.token_ids)
    digest.update(segment.loss_mask)
    digest.update(segment.rollout_logprobs)
    return digest.intdigest()


def is_damaged(segment: sample_pb2.Segment) -> bool:
    """Whether it carries a digest and is not what that was made of."""
    return bool(segment.digest) and segment.digest != segment_digest(segment)


def completion_length(segment: sample_pb2.Segment) -> int:
    return segment.num_tokens - segment.prompt_length


def parse_sample(data: bytes, *, max_bytes: int, max_tokens: int, max_metadata_bytes: int) -> sample_pb2.Sample:
    """Parses and checks a serialized Sample.

    Raises InvalidArgumentError naming the field, or LimitError when it is over a limit.
    """
    if len(data) > max_bytes:
        raise LimitError(f"{len(data)} bytes, at most {max_bytes}", field="sample")
    check_parts(data, sample_pb2.Sample.DESCRIPTOR, "sample")
    try:
        sample = sample_pb2.Sample.FromString(data)
    except DecodeError as error:
        raise InvalidArgumentError(f"not a Sample: {error}", field="sample") from None
    metadata_bytes = len(sample.prompt.metadata_json.encode())
    if metadata_bytes > max_metadata_bytes:
        raise LimitError(f"{metadata_bytes} bytes, at most {max_metadata_bytes}", field="sample.prompt.metadata_json")
    if not sample.segments:
        raise InvalidArgumentError("at least one segment is needed", field="sample.segments")
    if len(sample.segments) > _MAX_SEGMENTS:
        raise LimitError(f"{len(sample.segments)}, at most {_MAX_SEGMENTS}", field="sample.segments")
    total = sum(segment.num_tokens for segment in sample.segments)
    if total > max_tokens:
        raise LimitError(f"{total} tokens, at most {max_tokens}", field="sample.segments")
    for number, segment in enumerate(sample.segments):
        _check_segment(segment, f"sample.segments[{number}]")
    check_refs(sample.refs, "sample.refs")
    return sample


def check_refs(refs: Mapping[str, sample_pb2.BlobRef], field: str) -> None:
    """References to blobs are few and well-formed. Raises InvalidArgumentError, or LimitError for too many."""
    if len(refs) > _MAX_REFS:
        raise LimitError(f"{len(refs)} references, at most {_MAX_REFS}", field=field)
    for name, ref in refs.items():
        if not 0 < len(name) <= _MAX_REF_NAME or not name.isprintable():
            raise InvalidArgumentError(f"names have 1 to {_MAX_REF_NAME} printable characters", field=field)
        if not _SHA256.fullmatch(ref.sha256):
            raise InvalidArgumentError("is not 64 lower-case hexadecimal digits", field=f"{field}[{name}].sha256")


def check_version(version: sample_pb2.WeightVersion, field: str) -> None:
    """A step that a run can reach. Raises InvalidArgumentError."""
    if version.step > MAX_STEP:
        raise InvalidArgumentError(f"{version.step} is no step", field=f"{field}.step")


def check_spans(spans: Sequence[sample_pb2.WeightVersionSpan], start: int, end: int, field: str) -> None:
    """Spans must cover [start, end) without gaps, in order. Raises InvalidArgumentError, or LimitError for too many."""
    if len(spans) > _MAX_SPANS:
        raise LimitError(f"{len(spans)}, at most {_MAX_SPANS}", field=field)
    position = start
    for number, span in enumerate(spans):
        where = f"{field}[{number}]"
        if not span.HasField("version"):
            raise InvalidArgumentError("every span names its weight version", field=f"{where}.version")
        check_version(span.version, f"{where}.version")
        if span.kv not in _KV_ORIGINS:
            raise InvalidArgumentError(f"{span.kv} is not known", field=f"{where}.kv")
        if span.start != position or span.end <= span.start:
            raise InvalidArgumentError(f"[{span.start}, {span.end}) does not follow {position}", field=where)
        position = span.end
    if position != end:
        raise InvalidArgumentError(f"spans end at {position}, tokens at {end}", field=field)


def check_logprobs(logprobs: NDArray[np.float32], field: str) -> None:
    """Log-probabilities are finite and at most 0 (a rounding error of 1e-4 is let pass)."""
    # Two passes without a temporary array; a NaN makes either comparison false.
    if logprobs.size and not (logprobs.max() <= _ABOVE_ZERO and logprobs.min() > -np.inf):
        bad = ~np.isfinite(logprobs) | (logprobs > _ABOVE_ZERO)
        at = int(bad.argmax())
        raise InvalidArgumentError(f"{logprobs[at]} is not a log-probability", field=f"{field}[{at}]")


def check_array(data: bytes, itemsize: int, count: int, field: str) -> None:
    if len(data) != itemsize * count:
        raise InvalidArgumentError(f"{len(data)} bytes, expected {itemsize} × {count}", field=field)


def check_token_ids(data: bytes, field: str) -> None:
    token_ids = decode_tokens(data)
    if token_ids.size and token_ids.min() < 0:
        at = int(token_ids.argmin())
        raise InvalidArgumentError(f"negative token id {token_ids[at]}", field=f"{field}[{at}]")


def _check_segment(segment: sample_pb2.Segment, where: str) -> None:
    if segment.prompt_length > segment.num_tokens:
        raise InvalidArgumentError(
            f"{segment.prompt_length} is above num_tokens = {segment.num_tokens}", field=f"{where}.prompt_length"
        )
    length = completion_length(segment)
    check_array(segment.token_ids, TOKEN_DTYPE.itemsize, segment.num_tokens, f"{where}.token_ids")
    check_array(segment.loss_mask, MASK_DTYPE.itemsize, length, f"{where}.loss_mask")
    check_array(segment.rollout_logprobs, LOGPROB_DTYPE.itemsize, length, f"{where}.rollout_logprobs")
    check_token_ids(segment.token_ids, f"{where}.token_ids")
    mask = decode_mask(segment.loss_mask)
    if mask.size and mask.max() > 1:
        raise InvalidArgumentError("values are 0 or 1", field=f"{where}.loss_mask[{int(mask.argmax())}]")
    check_logprobs(decode_logprobs(segment.rollout_logprobs), f"{where}.rollout_logprobs")
    check_spans(segment.spans, 0, length, f"{where}.spans")
    if is_damaged(segment):
        raise InvalidArgumentError("is not that of these arrays", field=f"{where}.digest")
