"""What parameters the engine's model has, read from its safetensors headers, to check a push before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from polyhead.v1 import weights_pb2
from services.common.errors import ConfigError, InvalidArgumentError
from services.common.model_files import SCALE_SUFFIX, fp8_weights, stored_tensors

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

    def __init__(
        self, shapes: Mapping[str, Shape], dtype: str | None = None, fp8: frozenset[str] = frozenset()
    ) -> None:
        """`dtype`: the one that trainer and engine hold every parameter in; None: any will do. `fp8`: those that the
        engine has in fp8 instead, each with its scales.
        """
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._fp8 = fp8
        self._accepted: set[str] = set()

    @classmethod
    def of_directory(cls, directory: Path, dtype: str | None = None) -> ModelLayout:
        """What is stored there may have another `dtype`, but for fp8. Raises ConfigError for a broken file, or a
        quantisation other than block-wise fp8.
        """
        return cls(_shapes_in(directory), dtype, fp8_weights(directory))

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
            wanted = self._dtype_of(tensor.name)
            if wanted not in (None, tensor.dtype):
                raise InvalidArgumentError(f"dtype {tensor.dtype}, the engine's is {wanted}", field=tensor.name)

    def _dtype_of(self, name: str) -> str | None:
        if name in self._fp8:
            return "float8_e4m3fn"
        return "float32" if name.removesuffix(SCALE_SUFFIX) in self._fp8 else self._dtype

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
    return {name: tensor.shape for name, tensor in stored_tensors(directory).items()}
