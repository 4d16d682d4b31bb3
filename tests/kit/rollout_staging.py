"""An engine that takes weights ahead of its pause: what runs of ours inside SGLang, real, around a small model.

The trainer's end of the collective is another process, since a group's name may exist once in each.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polyhead.v1 import rollout_pb2, weights_pb2
from services.common.process import free_port
from services.common.versions import Version
from services.rollout.engines.receiver import PLUGIN_DIRECTORY, EngineReceiver
from tests.kit.rollout_rig import Rig
from tests.kit.trainer_replica import Receiver as GroupMember

_spec = importlib.util.spec_from_file_location("polyhead_receiver_in_kit", PLUGIN_DIRECTORY / "polyhead_receiver.py")
assert _spec is not None
assert _spec.loader is not None
plugin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plugin)

BUCKETS, SIZE = 4, 256
SHAPES = {f"w{number}": (SIZE // 4,) for number in range(BUCKETS)}


def staged_manifest(**changes: Any) -> weights_pb2.WeightManifest:
    """One tensor a bucket. `changes`: `shapes` or `dtype`."""
    shapes, dtype = changes.get("shapes", SHAPES), changes.get("dtype", "float32")
    width = 2 if dtype == "float16" else 4
    buckets = [
        weights_pb2.WeightBucket(
            tensors=[weights_pb2.TensorSpec(name=name, dtype=dtype, shape=shape)], num_bytes=width * shape[0]
        )
        for name, shape in shapes.items()
    ]
    return weights_pb2.WeightManifest(buckets=buckets, layout_digest=f"{sorted(shapes.items())} {dtype}")


class Model(torch.nn.Module):
    """Its weights are what was received."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        self.fails_at: str | None = None

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == self.fails_at:
                raise KeyError(f"no parameter {name}")
            self.get_parameter(name).data.copy_(weight)

    def bytes_of(self) -> bytes:
        return b"".join(self.get_parameter(name).detach().numpy().tobytes() for name in SHAPES)


class Staging:
    """Makes the first engine of a rig take `slots` buckets ahead of its pause."""

    def __init__(self, rig: Rig, directory: Path, slots: int = 2) -> None:
        self.rig = rig
        self.model = Model()
        self.inside = plugin.Receiver(self.model)
        self.sent: list[bytes] = []
        self._group = ""
        self._directory = directory
        self._trainer = GroupMember.take()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "weights-0.sock"))
        listener.listen()
        threading.Thread(target=plugin._serve, args=(listener, self.inside), daemon=True).start()
        rig.first.receiver = EngineReceiver(directory, 1, slots * SIZE)
        rig.engine.on_load = self._load
        rig.receiver._timeout_s = 30.0

    def _load(self) -> None:
        with torch.no_grad():
            self.inside.load()

    async def join(self, epoch: int = 1, **changes: Any) -> bool:
        """Both ends. `changes`: fields of the request, for one that is refused."""
        port, self._group = free_port(), uuid.uuid4().hex
        request = rollout_pb2.JoinWeightGroupRequest(
            epoch=epoch,
            group_name=self._group,
            backend="gloo",
            master_address="127.0.0.1",
            master_port=port,
            world_size=2,
            rank_offset=1,
        )
        if changes:
            request.MergeFrom(rollout_pb2.JoinWeightGroupRequest(**changes))
            return await self.rig.receiver.join(request)
        group = {"address": "127.0.0.1", "port": port, "name": self._group, "world_size": 2, "timeout_s": 10.0}
        joined, _ = await asyncio.gather(
            self.rig.receiver.join(request),
            asyncio.to_thread(self._trainer.run, {"join": group | {"backend": "gloo", "rank": 0}}),
        )
        return joined

    async def stage(self, version: Version, manifest: weights_pb2.WeightManifest | None = None) -> int:
        return await self.rig.receiver.stage(
            rollout_pb2.StageUpdateRequest(
                epoch=version.epoch,
                version=version.to_proto(),
                manifest=staged_manifest() if manifest is None else manifest,
                group_name=self._group,
            )
        )

    async def send(self, buckets: int) -> None:
        """Bytes of the trainer's choice."""
        for _ in range(buckets):
            path = self._directory / "sent"
            await asyncio.to_thread(self._trainer.run, {"receive": SIZE, "to": str(path)})
            self.sent.append(path.read_bytes())

    async def begin(self, version: Version) -> int:
        return await self.rig.receiver.begin(
            rollout_pb2.BeginUpdateRequest(
                epoch=version.epoch,
                version=version.to_proto(),
                manifest=staged_manifest(),
                group_name=self._group,
                pause_mode=rollout_pb2.PAUSE_MODE_IN_PLACE,
            )
        )

    async def load(self, version: Version) -> None:
        await self.rig.receiver.load_staged(
            rollout_pb2.LoadStagedRequest(epoch=version.epoch, version=version.to_proto())
        )

    async def push(self, version: Version) -> None:
        """All of it, over a new group."""
        self.sent.clear()
        await self.join(version.epoch)
        ahead = await self.stage(version)
        await self.send(ahead)
        await self.begin(version)
        await asyncio.gather(self.load(version), self.send(BUCKETS - ahead))
        await self.rig.commit(version)

    async def lose_trainer(self) -> None:
        """Its connections break, as when it is killed or gives up."""
        await asyncio.to_thread(self._trainer.run, {"leave": True})

    def close(self) -> None:
        self._trainer.run({"leave": True})
        self.inside.handle({"verb": "leave"})
        self._trainer.give_back()
