"""Engines that the pushes pass by: new requests do not go to weights that the others have left behind."""

from __future__ import annotations

import asyncio

import structlog

from services.common.versions import Version
from services.rollout.engines.engine import Engine
from services.rollout.replica import Replica

log = structlog.get_logger()

# Pushes go from engine to engine: for this long, it is their turn that has not come.
PATIENCE_S = 5.0
_LOOK_S = 0.5


class Laggards:
    """Takes an engine out of rotation that is behind for too long, until it is pushed to or the others are gone."""

    def __init__(self, replica: Replica, patience_s: float = PATIENCE_S) -> None:
        self._replica = replica
        self._patience_s = patience_s
        self._since: dict[int, float] = {}

    async def run(self) -> None:
        while True:
            self.look(asyncio.get_running_loop().time())
            await asyncio.sleep(min(_LOOK_S, self._patience_s))

    def look(self, now: float) -> None:
        """One look, at `now` seconds."""
        if self._replica.router is not None and not self._replica.router.up:
            return  # the newest ones are out of rotation for as long as it is away
        newest = self._replica.newest
        for engine in self._replica.engines:
            if engine.life.updating is not None:
                continue
            since = self._since.setdefault(engine.index, now) if _behind(engine, newest) else None
            if since is None:
                self._since.pop(engine.index, None)
            self._leave(engine, lagging=since is not None and now - since >= self._patience_s)

    def _leave(self, engine: Engine, *, lagging: bool) -> None:
        if lagging != engine.lagging:
            log.warning("engine_lags", engine=engine.index, lagging=lagging, version=str(engine.life.version))
            engine.lagging = lagging
            self._replica.turned()


def _behind(engine: Engine, newest: Version | None) -> bool:
    version = engine.life.version
    return version is not None and newest is not None and version < newest
