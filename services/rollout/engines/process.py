"""One life of an engine: a child process, its log, its admin key, its client."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
from pathlib import Path

from services.common.errors import ConfigError
from services.common.process import free_port, last_lines, spawn
from services.rollout.engines.client import EngineClient
from services.rollout.engines.launch import EngineCommand
from services.rollout.engines.messages import EngineUnavailableError, ServerInfo, check_version

_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 30.0
_TERM_GRACE_S = 3.0
# Of argparse, which both engines use: the last line of the log says which flag was wrong.
_USAGE_STATUS = 2
_USAGE_MARK = ": error: "


class EngineProcess:
    """A started engine. Use it on the event loop's main thread: the engine dies with the thread that started it."""

    def __init__(self, command: EngineCommand, log_path: Path) -> None:
        port, admin_key = free_port(), secrets.token_urlsafe(24)
        self._log_path = log_path
        launch = command(port, admin_key)
        self._process: subprocess.Popen[bytes] = spawn(
            launch.command, log_path=log_path, env=launch.environment, death_signal=signal.SIGKILL
        )
        self.client = EngineClient(f"http://127.0.0.1:{port}", admin_key)
        self.killed = False
        """Whether we ended it."""
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self, timeout_s: float) -> ServerInfo:
        """Waits until the engine has generated a token.

        Raises EngineUnavailableError with the end of its log when it ends first, or takes longer; ConfigError when it
        does not take its flags, or is too old.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await self.client.health(_HEALTH_TIMEOUT_S):
            if self._ended.is_set():
                if self.status == _USAGE_STATUS and _USAGE_MARK in (line := last_lines(self._log_path, 1)):
                    raise ConfigError(line.partition(_USAGE_MARK)[2], field="rollout.engine.args")
                raise EngineUnavailableError(self._last_words(f"ended with status {self.status}"), field="engine")
            if asyncio.get_running_loop().time() > deadline:
                raise EngineUnavailableError(self._last_words(f"not ready after {timeout_s:g} s"), field="engine")
            await asyncio.sleep(_POLL_S)
        info = await self.client.server_info()
        check_version(info)
        return info

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        if not self._ended.is_set():
            self.killed = True
            self._process.kill()

    async def close(self) -> None:
        """Ends the process, gently first, and forgets it."""
        if not self._ended.is_set():
            self._process.terminate()
            try:
                await asyncio.wait_for(self._ended.wait(), _TERM_GRACE_S)
            except TimeoutError:
                self._process.kill()
                await self._ended.wait()
        await self.client.close()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()

    def _last_words(self, what: str) -> str:
        lines = last_lines(self._log_path, 5).splitlines()
        return f"{what}; {self._log_path} ends: {' | '.join(lines)}" if lines else f"{what}; see {self._log_path}"
