"""One engine's place in a replica: its life, and the process or server that fills the place at present."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from polyhead.v1 import buffer_pb2 as pb
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import EngineLoad, EngineUnavailableError, ServerInfo
from services.rollout.engines.receiver import EngineReceiver
from services.rollout.fleet import EngineLife


class Engine:
    """`turned` is called after every change; `lost` when the engine has ended, before its life says so."""

    def __init__(self, index: int, turned: Callable[[], None], lost: Callable[[Engine], None]) -> None:
        self.index = index
        self.life = EngineLife()
        self.info: ServerInfo | None = None
        self.load: EngineLoad | None = None
        """As of the last look."""
        self.receiver: EngineReceiver | None = None
        """Where weights arrive ahead of a pause; None when it receives them by its own means."""
        self.pid: int | None = None
        """None for one that was started elsewhere."""
        self.died = False
        """Whether the last one ended by itself, as opposed to being ended by us."""
        self.suspect = asyncio.Event()
        """Set by whoever saw it fail; its keeper looks into it and clears it."""
        self.paused = False
        """Stopped by an update, or by one that was torn."""
        self.lagging = False
        """Left behind by the others: it gets no new requests until it is pushed to."""
        self.asleep: frozenset[str] = frozenset()
        """The kinds of GPU memory that it has given up."""
        self._turned = turned
        self._lost = lost
        self._client: EngineClient | None = None
        self._kill: Callable[[], None] | None = None

    @property
    def client(self) -> EngineClient:
        """Raises EngineUnavailableError while there is no engine."""
        if self._client is None:
            raise EngineUnavailableError("not running", field="engine")
        return self._client

    @property
    def attached(self) -> bool:
        return self._client is not None

    @property
    def serving(self) -> bool:
        """Whether it holds a whole version; it may be about to get the next one."""
        return self.life.state == pb.REPLICA_STATE_SERVING

    def attach(
        self,
        client: EngineClient,
        info: ServerInfo,
        *,
        pid: int | None = None,
        kill: Callable[[], None] | None = None,
        receiver: EngineReceiver | None = None,
    ) -> None:
        """A fresh engine answers; it still has to be given a version. `kill` ends it, if it is ours to end."""
        self._client, self.info, self.pid, self._kill = client, info, pid, kill
        self.receiver = receiver
        self.life.engine_ready()
        self._turned()

    def detach(self, *, died: bool = False) -> None:
        self.died = died
        self._lost(self)
        self._client = self.pid = self._kill = self.load = self.receiver = None
        self.paused = self.lagging = False
        self.asleep = frozenset()
        self.life.engine_lost()
        self._turned()

    def kill(self) -> bool:
        """Ends its process; False when that is not ours to end. Its keeper detaches it and starts the next one."""
        if self._kill is None:
            return False
        self._kill()
        return True
