"""A program that this service starts, watches, and does not outlive."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from services.common.process import last_lines, spawn
from services.rollout.engines.messages import EngineUnavailableError

# Of argparse: the last line of the log says which flag was wrong.
_USAGE_STATUS = 2
_USAGE_MARK = ": error: "
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class NeverReadyError(EngineUnavailableError):
    """It did not become ready in the time it has: the whole service starting again would only wait as long again."""

    exit_code = 2


class ChildProcess:
    """Use it on the event loop's main thread: the program dies with the thread that started it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log_path: Path, secrets: Sequence[str] = ()
    ) -> None:
        """`secrets` are never told, though the log may hold them."""
        self._log_path = log_path
        self._secrets = secrets
        self._process: subprocess.Popen[bytes] = spawn(
            command, log_path=log_path, env=environment, death_signal=signal.SIGKILL, foreign=True
        )
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    def kill(self) -> None:
        if self.running:
            self._process.kill()

    async def end(self, grace_s: float) -> None:
        """Ends the process, gently first."""
        if self.running:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._ended.wait(), grace_s)
            except TimeoutError:
                self._process.kill()
                await self._ended.wait()

    def usage_error(self) -> str | None:
        """What it said about its flags, if that is why it ended."""
        if self.running or self.status != _USAGE_STATUS:
            return None
        _, mark, reason = last_lines(self._log_path, 1, self._secrets).partition(_USAGE_MARK)
        return reason if mark else None

    def last_words(self, what: str) -> str:
        """`what`, and how its log ends, as one line."""
        lines = _COLOURS.sub("", last_lines(self._log_path, 5, self._secrets)).splitlines()
        return f"{what}; {self._log_path} ends: {' | '.join(lines)}" if lines else f"{what}; see {self._log_path}"

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Processes of its own that have just begun do not watch it yet: an engine killed while it starts would leave
        # them, with their memory. They are of its group, whose number is free only once it has been waited for.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ended.set()
