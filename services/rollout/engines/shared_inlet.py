"""The in-house engine's end of the transport `ipc`: it is told which memory to read, over its HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyhead.v1 import weights_pb2
from services.common.errors import InvalidArgumentError, PreconditionError
from services.rollout.engines.client import EngineClient
from services.rollout.engines.receiver import LoadWatch


class SharedInlet:
    """Does what a receiver inside the engine does elsewhere; nothing is on its way here, so there is little to do."""

    def __init__(self) -> None:
        self._buckets: list[dict[str, Any]] = []

    async def prepare(
        self, manifest: weights_pb2.WeightManifest, shared: Sequence[weights_pb2.SharedBucket] = ()
    ) -> int:
        """Remembers where the buckets are: all of them count as taken ahead of the pause."""
        if len(shared) != len(manifest.buckets):
            raise InvalidArgumentError(f"{len(shared)}, of {len(manifest.buckets)} buckets", field="shared")
        self._buckets = [
            {
                "file": place.file,
                "num_bytes": bucket.num_bytes,
                "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in bucket.tensors],
            }
            for bucket, place in zip(manifest.buckets, shared, strict=True)
        ]
        return len(self._buckets)

    async def receive(self, timeout_s: float) -> None:
        """They are there."""

    async def watch(self) -> LoadWatch:
        """The answer to `load` says how it went."""
        return LoadWatch()

    async def load(self, client: EngineClient, *, version: str, flush: bool, timeout_s: float) -> None:
        """Returns when the engine has copied everything. Raises EngineRefusedError."""
        if not self._buckets:
            raise PreconditionError("nothing is staged", field="version")
        buckets, self._buckets = self._buckets, []
        await client.update_from_shared(buckets, version=version, flush=flush, timeout_s=timeout_s)

    async def abort(self) -> None:
        self._buckets = []

    async def leave(self) -> None:
        self._buckets = []
