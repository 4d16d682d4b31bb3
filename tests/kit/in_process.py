"""The four services on one event loop: their own `serve` functions, real gRPC between them, a real store and a real
engine process. A tenth of the time that a launcher's processes take to start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.__main__ import serve as serve_buffer
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.lifecycle import Process
from services.reward.replica import serve as serve_reward
from services.rollout.__main__ import serve as serve_rollout
from services.trainer.__main__ import serve as serve_trainer

SERVE: dict[str, Callable[[Config, Process], Awaitable[Any]]] = {
    "buffer": serve_buffer,
    "reward": serve_reward,
    "rollout": serve_rollout,
    "trainer": serve_trainer,
}


class Services:
    """`config.store.url` is a store that runs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        config.buffer.address = f"127.0.0.1:{free_port()}"
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self._stops: dict[str, asyncio.Event] = {}
        self._starts = 0

    async def __aenter__(self) -> Services:
        self.client = BufferClient(self.config.buffer.address, retry_for_s=20.0)
        for role in SERVE:
            self.start(role)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for role in reversed(SERVE):
            self._stops[role].set()
            _, late = await asyncio.wait({self.tasks[role]}, timeout=20)
            for task in late:
                task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        await self.client.close()

    def start(self, role: str) -> None:
        self._starts += 1
        self._stops[role] = asyncio.Event()
        process = Process(role, 0, f"{role}-0.{self._starts}", self._stops[role])
        self.tasks[role] = asyncio.create_task(SERVE[role](self.config, process))

    async def replace(self, role: str) -> None:
        """Ends a service with all that it held, and without a word to anybody, and starts another."""
        self.tasks[role].cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self.tasks[role]
        self.start(role)

    async def engine(self) -> int:
        """The pid of the engine."""
        while True:
            for replica in await self.client.list_replicas(pb.ROLE_ROLLOUT):
                if replica.state != pb.REPLICA_STATE_DEAD and (pid := replica.child_pids.get("engine-0")):
                    return pid
            await asyncio.sleep(0.05)

    async def until(self, condition: Callable[[pb.GetLedgerResponse], bool]) -> None:
        """A trainer that ends by itself ends the wait."""
        while not self.tasks["trainer"].done() and not condition(await self.client.get_ledger()):
            await asyncio.sleep(0.02)

    async def freeze_engine(self, seconds: float) -> None:
        pid = await self.engine()
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    async def kill_engine(self) -> None:
        os.kill(await self.engine(), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
