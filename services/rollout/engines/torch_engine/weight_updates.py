"""Weights that change while the engine serves: sessions, process groups, buckets, files."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from services.common.errors import InvalidArgumentError, PolyheadError, PreconditionError, UnavailableError
from services.common.weight_group import WeightGroup
from services.common.weight_memory import open_file
from services.rollout.engines.torch_engine.checkpoint import read_tensors
from services.rollout.engines.torch_engine.engine_thread import EngineThread
from services.rollout.engines.torch_engine.parameters import DTYPES, FP8, Parameters

FLATTENED_BUCKET = "flattened_bucket"
# That weights may come in.
_DTYPES = {**DTYPES, "float8_e4m3fn": FP8}


@dataclass(frozen=True)
class GroupAddress:
    """Where and as what the engine joins a process group."""

    name: str
    backend: str
    address: str
    port: int
    rank: int
    world_size: int
    timeout_s: float


@dataclass(frozen=True)
class Bucket:
    """What one update call brings: tensors in the order of the wire."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    group_name: str
    flattened: bool
    weight_version: str | None


@dataclass(frozen=True)
class SharedBucket:
    """A bucket that lies in a file of the shared directory."""

    file: str
    num_bytes: int
    tensors: Sequence[tuple[str, str, Sequence[int]]]
    """Name, dtype and shape, in the order of their bytes."""


class WeightUpdates:
    """Owns the weights' state: whole, or torn between the first and the last tensor of an update.

    Every update is checked and received before the model is touched. While the weights are not whole the engine does
    not step, and only an update that brings every tensor makes them whole again.
    """

    def __init__(self, parameters: Parameters, device: torch.device, shared_directory: Path | None = None) -> None:
        """`shared_directory`: where other processes share weights, if this engine is to read any."""
        self._parameters, self._device = parameters, device
        self._shared_directory = shared_directory
        self._groups: dict[str, WeightGroup] = {}
        self._dropped: set[str] = set()
        """Groups left because a bucket was refused or broke: the sender fails at once instead of waiting for us."""
        self._session: set[str] | None = None
        """Names loaded since begin_weight_update; None: no session is open."""
        self._whole = True
        self._turn = asyncio.Lock()

    @property
    def whole(self) -> bool:
        return self._whole

    @property
    def state(self) -> str:
        """whole, loading (an update is under way) or torn (an update ended before it was complete)."""
        return "whole" if self._whole else "loading" if self._session is not None else "torn"

    @property
    def touched(self) -> bool:
        """Whether the update under way, or one that broke, has changed the model."""
        return not self._whole or bool(self._session)

    def lose(self) -> None:
        """On the engine's thread: the weights are gone until an update brings every tensor."""
        self._whole = False
        if self._session is not None:
            self._session.clear()

    async def join(self, where: GroupAddress) -> None:
        """Joins a group; returns when all its members have. Raises PreconditionError or UnavailableError."""
        if where.name in self._groups:
            raise PreconditionError("the group exists already: destroy it first", field=where.name)
        try:
            self._groups[where.name] = await asyncio.to_thread(
                WeightGroup,
                backend=where.backend,
                address=where.address,
                port=where.port,
                rank=where.rank,
                world_size=where.world_size,
                name=where.name,
                timeout_s=where.timeout_s,
            )
        except (RuntimeError, ValueError) as error:
            raise UnavailableError(f"cannot join: {_first_line(error)}", field=where.name) from error
        self._dropped.discard(where.name)

    async def leave(self, name: str) -> None:
        """Leaves a group, after a receive that is under way. Raises PreconditionError when there is no such group."""
        async with self._turn:
            if name not in self._groups and name not in self._dropped:
                raise PreconditionError("there is no such group", field=name)
            self._drop(name)
            self._dropped.discard(name)

    async def begin(self) -> None:
        """Opens a session. Raises PreconditionError when one is open."""
        async with self._turn:
            if self._session is not None:
                raise PreconditionError("a weight-update session is open already: call end_weight_update first")
            self._session = set()

    async def end(self) -> None:
        """Closes the session. Raises PreconditionError when none is open, or when it leaves the weights torn."""
        async with self._turn:
            if self._session is None:
                raise PreconditionError("no weight-update session is open: call begin_weight_update first")
            missing = len(self._parameters.names - self._session)
            self._session = None
            if not self._whole:
                raise PreconditionError(
                    f"the session ended {missing} tensors short: nothing is generated until an update brings them all"
                )

    async def receive(self, bucket: Bucket, thread: EngineThread) -> None:
        """Receives one bucket and loads it between two steps.

        Raises InvalidArgumentError or PreconditionError before anything is received, UnavailableError when the
        transport fails; in all these cases this bucket has not touched the model.
        """
        async with self._turn:
            group = self._group(bucket)
            try:
                self._check(bucket)
                tensors = await asyncio.to_thread(self._receive, bucket, group)
            except RuntimeError as error:
                self._drop(bucket.group_name)
                raise UnavailableError(f"receiving failed: {_first_line(error)}", field=bucket.group_name) from error
            except PolyheadError:
                # The sender may have begun to broadcast what is refused; the next receive would get those bytes.
                self._drop(bucket.group_name)
                raise
            await thread.call(lambda: self._load(tensors, bucket.weight_version, thread))

    async def load_shared(self, buckets: Sequence[SharedBucket], weight_version: str, thread: EngineThread) -> None:
        """Copies a whole set of buckets out of memory that another process shares, between two steps.

        Raises InvalidArgumentError or PreconditionError before the model is touched.
        """
        async with self._turn:
            self._check_session()
            tensors = self._open_shared(buckets)
            self._parameters.check_complete(tensors)
            await thread.call(lambda: self._load(tensors, weight_version, thread))

    def _open_shared(self, buckets: Sequence[SharedBucket]) -> dict[str, torch.Tensor]:
        if self._shared_directory is None:
            raise PreconditionError("no weights are shared with this engine", field="buckets")
        tensors: dict[str, torch.Tensor] = {}
        named = [tensor for bucket in buckets for tensor in bucket.tensors]
        names = [name for name, _, _ in named]
        self._check_dtypes(names, [dtype for _, dtype, _ in named])
        self._parameters.check(names, [shape for _, _, shape in named])
        for bucket in buckets:
            sizes = [_num_bytes(dtype, shape) for _, dtype, shape in bucket.tensors]
            if sum(sizes) != bucket.num_bytes:
                raise InvalidArgumentError(f"{sum(sizes)} bytes of tensors, not {bucket.num_bytes}", field="num_bytes")
            try:
                flat = open_file(self._shared_directory, bucket.file, bucket.num_bytes)
            except (OSError, ValueError) as error:
                raise InvalidArgumentError(f"cannot be read: {error}", field="file") from error
            for (name, dtype, shape), part in zip(bucket.tensors, flat.split(sizes), strict=True):
                tensors[name] = _typed(part, _DTYPES[dtype]).view(*shape)
        return tensors

    async def load_from_disk(self, model_path: Path, weight_version: str | None, thread: EngineThread) -> None:
        """Reads a Hugging Face directory and loads it between two steps.

        Raises ConfigError or InvalidArgumentError before the model is touched.
        """
        async with self._turn:
            tensors = await asyncio.to_thread(read_tensors, model_path, self._parameters)
            await thread.call(lambda: self._load(tensors, weight_version, thread))

    def _group(self, bucket: Bucket) -> WeightGroup:
        self._check_session()
        if bucket.group_name in self._groups:
            return self._groups[bucket.group_name]
        why = ": the engine left it when a bucket was refused or broke" if bucket.group_name in self._dropped else ""
        raise PreconditionError(f"no such group{why}; call init_weights_update_group first", field=bucket.group_name)

    def _check_session(self) -> None:
        if self._session is None:
            raise PreconditionError("weights are updated between begin_weight_update() and end_weight_update()")

    def _check(self, bucket: Bucket) -> None:
        self._check_dtypes(bucket.names, bucket.dtypes)
        self._parameters.check(bucket.names, bucket.shapes)

    def _check_dtypes(self, names: Sequence[str], dtypes: Sequence[str]) -> None:
        unknown = sorted(set(dtypes).difference(_DTYPES))
        if unknown:
            raise InvalidArgumentError(f"{unknown} are not among {sorted(_DTYPES)}", field="dtypes")
        for name, dtype in zip(names, dtypes, strict=True):
            if (name in self._parameters.fp8) != (_DTYPES[dtype] == FP8):
                raise InvalidArgumentError(f"comes in {dtype}, and is not held in that", field=name)

    def _drop(self, name: str) -> None:
        if (group := self._groups.pop(name, None)) is not None:
            group.close()
            self._dropped.add(name)

    def _receive(self, bucket: Bucket, group: WeightGroup) -> dict[str, torch.Tensor]:
        sizes = [_num_bytes(dtype, shape) for dtype, shape in zip(bucket.dtypes, bucket.shapes, strict=True)]
        if bucket.flattened:
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            group.broadcast(flat)
            parts: Sequence[torch.Tensor] = flat.split(sizes)
        else:
            parts = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
            for part in parts:
                group.broadcast(part)
        return {
            name: _typed(part, _DTYPES[dtype]).view(*shape)
            for name, dtype, shape, part in zip(bucket.names, bucket.dtypes, bucket.shapes, parts, strict=True)
        }

    def _load(self, tensors: Mapping[str, torch.Tensor], weight_version: str | None, thread: EngineThread) -> None:
        """On the engine's thread."""
        self._whole = False
        self._parameters.load(tensors)
        brought: set[str] = set() if self._session is None else self._session
        if not brought.isdisjoint(tensors):
            brought.clear()  # another push within the session: it has to be complete by itself
        brought.update(tensors)
        self._whole = self._parameters.names <= brought
        if weight_version is not None:
            thread.scheduler.set_weight_version(weight_version)


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as `dtype`; a copy where a tensor of another size before it leaves it unaligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
