"""One life of an engine of our own: a child process, its admin key, its client."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path

from services.common.errors import ConfigError
from services.common.process import free_port
from services.rollout.engines.child import ChildProcess, NeverReadyError
from services.rollout.engines.client import EngineClient
from services.rollout.engines.launch import EngineCommand
from services.rollout.engines.messages import EngineUnavailableError, ServerInfo, check_version

_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 30.0
_TERM_GRACE_S = 3.0


class EngineProcess:
    """A started engine. Use it on the event loop's main thread: the engine dies with the thread that started it."""

    def __init__(self, command: EngineCommand, log_path: Path) -> None:
        port, admin_key = free_port(), secrets.token_urlsafe(24)
        launch = command(port, admin_key)
        self._scratch = launch.scratch
        self.receiver = launch.receiver
        self._child = ChildProcess(launch.command, launch.environment, log_path, [admin_key])
        self.client = EngineClient(f"http://127.0.0.1:{port}", admin_key)
        self.killed = False
        """Whether we ended it."""

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._child.status

    async def ready(self, timeout_s: float) -> ServerInfo:
        """Waits until the engine has generated a token.

        Raises, with the end of its log, EngineUnavailableError when it ends first and NeverReadyError when it takes
        longer; ConfigError when it does not take its flags, or is too old.
        """
        child, now = self._child, asyncio.get_running_loop().time
        deadline = now() + timeout_s
        while not await self.client.health(max(_POLL_S, min(_HEALTH_TIMEOUT_S, deadline - now()))):
            if not child.running:
                if (reason := child.usage_error()) is not None:
                    raise ConfigError(reason, field="rollout.engine.args")
                raise EngineUnavailableError(child.last_words(f"ended with status {child.status}"), field="engine")
            if now() > deadline:
                raise NeverReadyError(child.last_words(f"not ready after {timeout_s:g} s"), field="engine")
            await asyncio.sleep(_POLL_S)
        info = await self.client.server_info()
        check_version(info)
        if self.receiver is not None:
            await self.client.start_receiver(info.ranks)
        # What it has imported, hundreds of thousands of objects, would be searched for garbage again and again: each
        # time every stream and every call of a push stands still for up to half a second.
        await self.client.freeze_gc()
        return info

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._child.ended()

    def kill(self) -> None:
        if self._child.running:
            self.killed = True
            self._child.kill()

    async def close(self) -> None:
        """Ends the process, gently first, and forgets it."""
        await self._child.end(_TERM_GRACE_S)
        await self.client.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
