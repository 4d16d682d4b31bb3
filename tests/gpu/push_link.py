"""The trainer's end: the project's own channel to one replica, and what is asked beside it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import orjson

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from services.common.config.models import WeightsConfig
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.trainer.weights.channel import Channel, Pushed
from services.trainer.weights.snapshot import MIB, Snapshot
from tests.gpu.push_process import JsonProcess

_MODES = {"in_place": rpb.PAUSE_MODE_IN_PLACE, "retract": rpb.PAUSE_MODE_RETRACT}


class Link:
    def __init__(
        self, replica: JsonProcess, address: str, client: EngineClient, backend: str, timeout_s: float
    ) -> None:
        self.client = client
        """To the engine itself: for what is no part of a push."""
        self._replica = replica
        self._peer = pb.Replica(replica_id="rollout-0", address=address)
        self._config = WeightsConfig(backend=backend, timeout_s=timeout_s)
        self._channel: Channel | None = None
        self.version = Version(1, 0)
        """The last one pushed."""

    async def stage_memory(self, staging_mb: float) -> None:
        await self._replica.ask({"staging_bytes": int(staging_mb * MIB)})

    async def timings(self) -> dict[str, float]:
        return await self._replica.ask({"timings": True})

    async def join(self, mode: str) -> None:
        self._channel = Channel(self._peer, 0, 1, self._config, _MODES[mode])
        await self._channel.join(1)

    async def push(self, snapshot: Snapshot) -> Pushed:
        assert self._channel is not None
        self.version = Version(1, self.version.step + 1)
        return await self._channel.push(self.version, snapshot)

    async def leave(self) -> None:
        if self._channel is not None:
            await self._channel.leave()

    async def checksum(self) -> str:
        """Of the engine's weights, by SGLang's own checker: equal for equal parameters."""
        answer = await self._ask("/weights_checker", {"action": "checksum"})
        ranks = answer.get("payload") or answer.get("ranks") or answer
        sums = [rank["checksums"] for rank in (ranks if isinstance(ranks, list) else [ranks])]
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        session = self.client._session
        async with session.post(self.client.url + path, json=body) as response:
            content = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{path}: HTTP {response.status} {content[:300]!r}")
            answer: dict[str, Any] = orjson.loads(content)
            return answer
