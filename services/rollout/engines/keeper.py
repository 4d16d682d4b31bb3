"""Keeps an engine running: starts it, looks after it, starts it again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from services.common.errors import PolyheadError
from services.rollout.engines.launch import EngineCommand
from services.rollout.engines.messages import EngineUnavailableError
from services.rollout.engines.process import EngineProcess
from services.rollout.replica import Replica

log = structlog.get_logger()

_BACKOFF_FIRST_S = 0.5
_BACKOFF_MAX_S = 30.0
# An engine that lived this long is started again without delay to speak of.
_HEALTHY_LIFE_S = 60.0
# An engine that does not answer within this time is stuck, for instance in a collective, and is killed.
_PROBE_TIMEOUT_S = 15.0


class EngineKeeper:
    """The replica is attached to each engine that became ready, and detached when it ends."""

    def __init__(
        self,
        replica: Replica,
        command: EngineCommand,
        log_path: Path,
        *,
        start_timeout_s: float,
    ) -> None:
        self._replica = replica
        self._command = command
        self._log_path = log_path
        self._start_timeout_s = start_timeout_s

    async def run(self) -> None:
        """Until cancelled. Raises EngineUnavailableError when the very first start fails, ConfigError when it
        shows that no start can succeed.
        """
        backoff_s = _BACKOFF_FIRST_S
        first = True
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._one_life()
            except EngineUnavailableError as error:
                if first:
                    raise
                log.error("engine_start_failed", reason=str(error))
            first = False
            if asyncio.get_running_loop().time() - began > _HEALTHY_LIFE_S:
                backoff_s = _BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)

    async def _one_life(self) -> None:
        engine = EngineProcess(self._command, self._log_path)
        try:
            info = await engine.ready(self._start_timeout_s)
            log.info("engine_ready", engine=info.name, pid=engine.pid)
            self._replica.attach(engine.client, info, engine.pid)
            died = False
            try:
                await self._watch(engine)
                died = not engine.killed
                log.error("engine_ended", status=engine.status, log=str(self._log_path))
            finally:
                self._replica.detach(died=died)
        finally:
            await engine.close()

    async def _watch(self, engine: EngineProcess) -> None:
        """Returns when the engine has ended. A suspect one is probed, and killed if it does not answer."""
        suspect = self._replica.suspect
        ended = asyncio.create_task(engine.ended())
        try:
            while not ended.done():
                suspected = asyncio.create_task(suspect.wait())
                await asyncio.wait([ended, suspected], return_when=asyncio.FIRST_COMPLETED)
                suspected.cancel()
                if not ended.done() and suspect.is_set():
                    suspect.clear()
                    await self._probe(engine)
        finally:
            ended.cancel()
            suspect.clear()

    async def _probe(self, engine: EngineProcess) -> None:
        try:
            await asyncio.wait_for(engine.client.server_info(), _PROBE_TIMEOUT_S)
        except (PolyheadError, TimeoutError) as error:
            log.error("engine_stuck", pid=engine.pid, reason=str(error))
            engine.kill()
            await engine.ended()
