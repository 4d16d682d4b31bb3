"""What parameters the engine's model has, read from its safetensors headers, to check a push before it starts."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from polyhead.v1 import weights_pb2
from services.common.errors import ConfigError, InvalidArgumentError

_HEADER_MAX = 100 << 20
_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# Stored or not, depending on whether the embeddings are tied and on who wrote the directory.
_OPTIONAL = frozenset({"lm_head.weight"})

Shape = tuple[int, ...]


class ModelLayout:
    """Parameter names and shapes. Empty when the directory holds no safetensors: then only the engine can tell."""

    def __init__(self, shapes: Mapping[str, Shape], dtype: str | None = None) -> None:
        """`dtype`: the one that trainer and engine hold every parameter in; None: any will do."""
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._accepted: set[str] = set()

    @classmethod
    def of_directory(cls, directory: Path, dtype: str | None = None) -> ModelLayout:
        """What is stored there may have another `dtype`. Raises ConfigError for a broken file."""
        return cls(_shapes_in(directory), dtype)

    def check(self, manifest: weights_pb2.WeightManifest) -> None:
        """Raises InvalidArgumentError, naming the tensor, unless the manifest brings every parameter exactly once."""
        if manifest.layout_digest and manifest.layout_digest in self._accepted:
            return
        if not manifest.buckets:
            raise InvalidArgumentError("a push has at least one bucket", field="manifest.buckets")
        sent: dict[str, Shape] = {}
        for number, bucket in enumerate(manifest.buckets):
            _check_bucket(bucket, f"manifest.buckets[{number}]", sent)
        self._check_names(sent)
        self._check_dtypes(manifest)
        if manifest.layout_digest:
            self._accepted.add(manifest.layout_digest)

    def _check_dtypes(self, manifest: weights_pb2.WeightManifest) -> None:
        for tensor in (tensor for bucket in manifest.buckets for tensor in bucket.tensors):
            if self._dtype not in (None, tensor.dtype):
                raise InvalidArgumentError(f"dtype {tensor.dtype}, the engine's is {self._dtype}", field=tensor.name)

    def check_directory(self, directory: Path) -> None:
        """Raises InvalidArgumentError unless the directory holds every parameter in safetensors."""
        try:
            shapes = _shapes_in(directory)
        except ConfigError as error:
            raise InvalidArgumentError(error.reason, field="directory") from None
        except (OSError, ValueError) as error:  # no path at all: too long, or with a zero in it
            raise InvalidArgumentError(f"cannot be read: {type(error).__name__}", field="directory") from None
        if not shapes:
            raise InvalidArgumentError(f"{directory} holds no safetensors", field="directory")
        self._check_names(shapes)

    def _check_names(self, sent: Mapping[str, Shape]) -> None:
        if not self._shapes:
            return
        for name, shape in sent.items():
            expected = self._shapes.get(name)
            if expected is None and name not in _OPTIONAL:
                raise InvalidArgumentError("the engine's model has no such parameter", field=name)
            if expected is not None and expected != shape:
                raise InvalidArgumentError(f"shape {list(shape)}, the engine's is {list(expected)}", field=name)
        missing = sorted(self._shapes.keys() - sent.keys() - _OPTIONAL)
        if missing:
            raise InvalidArgumentError(f"not sent, nor {len(missing) - 1} more: a push is complete", field=missing[0])


def _check_bucket(bucket: weights_pb2.WeightBucket, where: str, sent: dict[str, Shape]) -> None:
    """Adds the bucket's tensors to `sent`."""
    num_bytes = 0
    for tensor in bucket.tensors:
        if tensor.name in sent:
            raise InvalidArgumentError("sent twice", field=tensor.name)
        if tensor.dtype not in _BYTES:
            raise InvalidArgumentError(f"unknown dtype {tensor.dtype!r}", field=tensor.name)
        sent[tensor.name] = tuple(tensor.shape)
        num_bytes += math.prod(tensor.shape) * _BYTES[tensor.dtype]
    if num_bytes != bucket.num_bytes or not bucket.tensors:
        raise InvalidArgumentError(
            f"{len(bucket.tensors)} tensors of {num_bytes} bytes, not {bucket.num_bytes}", field=f"{where}.num_bytes"
        )


def _shapes_in(directory: Path) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shapes.update(_header(path))
    return shapes


def _header(path: Path) -> dict[str, Shape]:
    """Format: 8 bytes little-endian header length, then a JSON object of name to dtype, shape and offsets."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_MAX:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}", field="model.hf_checkpoint") from error
