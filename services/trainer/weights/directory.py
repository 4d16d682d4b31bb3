"""Versions of the weights as directories of safetensors, which engines load."""

from __future__ import annotations

import asyncio
import math
import shutil
import struct
from collections import Counter
from functools import partial
from pathlib import Path

import orjson
import torch

from polyhead.v1 import weights_pb2
from services.common.versions import Version
from services.trainer.detached import in_thread
from services.trainer.files import remove_temporary, write_directory
from services.trainer.model_dir import copy_beside_weights
from services.trainer.weights.snapshot import Snapshot

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_version(target: Path, snapshot: Snapshot, model: Path) -> None:
    """Writes what `snapshot` holds as a Hugging Face directory in the form of `model`, atomically: a file for each
    bucket, and what `model` has beside its weights. Raises OSError.
    """

    def fill(directory: Path) -> None:
        copy_beside_weights(model, directory)
        places: dict[str, str] = {}
        for number, (bucket, flat) in enumerate(zip(snapshot.manifest.buckets, snapshot.buckets, strict=True), start=1):
            name = f"model-{number:05}-of-{len(snapshot.buckets):05}.safetensors"
            places |= dict.fromkeys((tensor.name for tensor in bucket.tensors), name)
            with (directory / name).open("wb") as file:
                file.write(_header(bucket))
                file.write(memoryview(flat.cpu().numpy()))
        index = {"metadata": {"total_size": snapshot.manifest.num_bytes}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_bytes(orjson.dumps(index))

    write_directory(target, fill)


def _header(bucket: weights_pb2.WeightBucket) -> bytes:
    """What stands in a safetensors file ahead of the bytes, which are those of the bucket."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in bucket.tensors:
        end = start + math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize
        stored, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        entries[tensor.name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class VersionDirectories:
    """Below one root: each version is written once, whoever asks first, and goes when no engine loads it any more and
    newer ones are kept.
    """

    def __init__(self, root: Path, model: Path, keep_last: int) -> None:
        """`model`: the directory that the engines have loaded. `keep_last`: versions that stay."""
        self._root = root.absolute()
        self._model = model
        self._keep_last = keep_last
        self._users: Counter[Version] = Counter()
        self._writing: dict[Version, asyncio.Future[None]] = {}
        remove_temporary(self._root)

    def start(self, version: Version, snapshot: Snapshot) -> asyncio.Future[None]:
        """Writes the version unless that has begun. Done when it is there; `release` has to follow."""
        self._users[version] += 1
        writing = self._writing.get(version)
        if writing is None or (writing.done() and writing.exception() is not None):
            work = partial(write_version, self.path(version), snapshot, self._model)
            self._writing[version] = writing = in_thread(work)
        return writing

    def path(self, version: Version) -> Path:
        return self._root / str(version)

    async def release(self, version: Version) -> None:
        """One engine has loaded the version, or will not."""
        self._users[version] -= 1
        await asyncio.to_thread(self._prune)

    def _prune(self) -> None:
        there = sorted(filter(None, map(_version, self._root.glob("e*.s*"))))
        for version in there[: -self._keep_last]:
            if not self._users[version]:
                shutil.rmtree(self.path(version), ignore_errors=True)
                self._writing.pop(version, None)


def _version(path: Path) -> Version | None:
    try:
        return Version.parse(path.name)
    except ValueError:
        return None
