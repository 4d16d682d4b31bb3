"""The parent's end of one pool process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack

from services.common.errors import ConfigError, UnavailableError
from services.reward.jobs import AnyItem
from services.reward.settings import ScorerSettings

# Importing a user's module may import torch.
LOAD_TIMEOUT_S = 120.0
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_SINGLE_THREADED = dict.fromkeys(_THREAD_SETTINGS, "1")
_LAST = 19
# After the process has ended, what it had sent is read within this time.
_LAST_WORDS_S = 0.2


class Child(asyncio.Protocol):
    """A running pool process. `on_frames` gets what it sends, in order."""

    def __init__(self, on_frames: Callable[[Child, list[list[Any]]], None]) -> None:
        self._on_frames = on_frames
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)
        self._transport: Any = None
        self._process: Any = None
        self._disconnected = asyncio.Event()
        self._load_error: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, settings: ScorerSettings, on_frames: Callable[[Child, list[list[Any]]], None]) -> Child:
        """Returns when the scorer is loaded.

        Raises ConfigError with the reason when it cannot be, UnavailableError when the process ends or takes too long.
        """
        child = cls(on_frames)
        try:
            await child._spawn()
            child._transport.write(msgpack.packb(asdict(settings)))
            await child._loaded()
        except BaseException:
            await child.end()
            raise
        return child

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def send(self, items: Sequence[AnyItem]) -> None:
        """Never blocks: what the socket does not take is kept here."""
        self._transport.write(msgpack.packb([(type(item).__name__, item) for item in items]))

    def kill(self) -> None:
        """SIGKILL to the process and to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def yield_cores(self) -> None:
        """From here on it gets what the others leave."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PGRP, self.pid, _LAST)
        # Where the kernel groups processes by session, priorities hold within a group, and this is its own.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/autogroup").write_text(str(_LAST))

    async def ended(self) -> str:
        """Waits for its end, by whatever cause, and until all it sent was handled. Returns how it ended."""
        gone = asyncio.create_task(self._process.wait())
        disconnected = asyncio.create_task(self._disconnected.wait())
        try:
            await asyncio.wait({gone, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            self.kill()
            status = await gone
            # The socket stays open when a process of the user's holds a copy of it.
            await asyncio.wait({disconnected}, timeout=_LAST_WORDS_S)
            self._transport.abort()
            await disconnected
        finally:
            gone.cancel()
            disconnected.cancel()
        return f"ended with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"

    async def end(self) -> None:
        """Kills it and waits until it is gone."""
        if self._process is not None:
            self.kill()
            await self._process.wait()
        if self._transport is not None:
            self._transport.abort()

    def rest(self, seconds: float) -> None:
        """Reads nothing for a while, so that many small answers come in one piece."""
        if seconds > 0 and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(seconds, self._resume)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        frames = list(self._unpacker)
        if frames and not self._load_error.done():
            self._load_error.set_result(frames.pop(0))
        if frames:
            self._on_frames(self, frames)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected.set()

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "services.reward.pool_process", str(theirs.fileno()), str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **_SINGLE_THREADED},
                    # A terminal's Ctrl-C is not for it, and what it starts can be killed with it.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)

    async def _loaded(self) -> None:
        ended = asyncio.create_task(self.ended())
        waited: set[asyncio.Future[Any]] = {self._load_error, ended}
        try:
            await asyncio.wait(waited, timeout=LOAD_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if self._load_error.done():
                reason, field = self._load_error.result()
                if reason:
                    raise ConfigError(reason, field=field)
                return
            how = ended.result() if ended.done() else f"is not ready after {LOAD_TIMEOUT_S:g} s"
            raise UnavailableError(f"its process {how} while it loaded", field="reward.scorer")
        finally:
            ended.cancel()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
