"""What the parts of one replica share: its life, its engine, its gate, its figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import EngineUnavailableError, ServerInfo
from services.rollout.fleet import ReplicaLife
from services.rollout.stats import Stats

# Versions whose arrival is remembered; no request runs across more pushes than this.
_REMEMBERED_ARRIVALS = 4096


class Replica:
    """Call `turned` after every change of `life`: it opens or shuts the gate and tells the heartbeat."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.life = ReplicaLife()
        self.stats = Stats()
        self.info: ServerInfo | None = None
        self.engine_pid: int | None = None
        self.engine_died = False
        """Whether the last engine ended by itself, as opposed to being ended by us."""
        self.gate = asyncio.Event()
        """Set while requests may go to the engine, and when nobody should wait for that any more."""
        self.changed = asyncio.Event()
        """Set at each change of state; whoever reports it clears it."""
        self.listeners: list[Callable[[], None]] = []
        """Called at each turn."""
        self.on_lost: list[Callable[[], object]] = []
        """Called when the engine has ended, before the replica stops being what it was."""
        self.suspect = asyncio.Event()
        """Set by whoever saw the engine fail; its keeper looks into it and clears it."""
        self._client: EngineClient | None = None
        self._arrivals: dict[Version, sample_pb2.KvOrigin] = {}
        self._reported = self.life.state

    @property
    def client(self) -> EngineClient:
        """Raises EngineUnavailableError while there is no engine."""
        if self._client is None:
            raise EngineUnavailableError("not running", field="engine")
        return self._client

    def attach(self, client: EngineClient, info: ServerInfo, pid: int) -> None:
        """A fresh engine answers; it still has to be given a version."""
        self._client, self.info, self.engine_pid = client, info, pid
        self.life.engine_ready()
        self.turned()

    def detach(self, *, died: bool = False) -> None:
        self.engine_died = died
        for forget in self.on_lost:
            forget()
        self._client, self.engine_pid = None, None
        self.life.engine_lost()
        self.turned()

    def turned(self) -> None:
        if self.life.may_generate or self.life.leaving:
            self.gate.set()
        else:
            self.gate.clear()
        if self.life.state != self._reported:
            self._reported = self.life.state
            self.changed.set()
        for listener in self.listeners:
            listener()

    def remember_arrival(self, version: Version, kv: sample_pb2.KvOrigin) -> None:
        """How requests that were running when `version` arrived came over: with their KV cache, or prefilled again."""
        self._arrivals[version] = kv
        if len(self._arrivals) > _REMEMBERED_ARRIVALS:
            del self._arrivals[next(iter(self._arrivals))]

    def kv_under(self, version: Version, sent: Version) -> sample_pb2.KvOrigin:
        """The origin of the KV cache under tokens of `version`, for a request sent while `sent` was served."""
        if version == sent:
            return sample_pb2.KV_ORIGIN_FRESH
        return self._arrivals.get(version, sample_pb2.KV_ORIGIN_FRESH)
