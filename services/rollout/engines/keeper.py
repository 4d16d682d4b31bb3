"""Keeps an engine of our own running: starts it, looks after it, starts it again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import structlog

from services.common.errors import PolyheadError
from services.rollout.engines.engine import Engine
from services.rollout.engines.launch import EngineCommand
from services.rollout.engines.lives import keep_alive
from services.rollout.engines.messages import warn_of_inexact_versions
from services.rollout.engines.process import EngineProcess

log = structlog.get_logger()

# An engine that does not answer within this time is stuck, for instance in a collective, and is killed.
_PROBE_TIMEOUT_S = 15.0
# The kernel reports the end of a process a moment after its connections break.
_END_S = 0.5


class EngineKeeper:
    """Fills an engine's place: attaches each process that became ready, and detaches it when it ends."""

    def __init__(
        self,
        engine: Engine,
        command: EngineCommand,
        log_path: Path,
        *,
        start_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._command = command
        self._log_path = log_path
        self._start_timeout_s = start_timeout_s

    async def run(self) -> None:
        """Until cancelled. Raises NeverReadyError when it cannot be started, ConfigError when it shows that no start
        can succeed.
        """
        await keep_alive(f"engine {self._engine.index}", self._one_life)

    async def _one_life(self) -> None:
        process = EngineProcess(self._command, self._log_path)
        try:
            info = await process.ready(self._start_timeout_s)
            warn_of_inexact_versions(info)
            log.info("engine_ready", engine=self._engine.index, name=info.name, pid=process.pid)
            self._engine.attach(process.client, info, pid=process.pid, kill=process.kill, receiver=process.receiver)
            died = False
            try:
                await self._watch(process)
                died = not process.killed
                log.error("engine_ended", engine=self._engine.index, status=process.status, log=str(self._log_path))
            finally:
                self._engine.detach(died=died)
        finally:
            await process.close()

    async def _watch(self, process: EngineProcess) -> None:
        """Returns when the engine has ended. A suspect one is probed, and killed if it does not answer."""
        suspect = self._engine.suspect
        ended = asyncio.create_task(process.ended())
        try:
            while not ended.done():
                suspected = asyncio.create_task(suspect.wait())
                await asyncio.wait([ended, suspected], return_when=asyncio.FIRST_COMPLETED)
                suspected.cancel()
                if not ended.done() and suspect.is_set():
                    suspect.clear()
                    await self._probe(process)
        finally:
            ended.cancel()
            suspect.clear()

    async def _probe(self, process: EngineProcess) -> None:
        """One that is being updated is left alone: it may load weights, and the update has deadlines of its own."""
        if self._engine.life.updating is not None:
            return
        try:
            await asyncio.wait_for(process.client.server_info(), _PROBE_TIMEOUT_S)
            return
        except (PolyheadError, TimeoutError) as error:
            reason = str(error)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.ended(), _END_S)
            return
        if self._engine.life.updating is not None:
            return
        log.error("engine_stuck", pid=process.pid, reason=reason)
        process.kill()
        await process.ended()
