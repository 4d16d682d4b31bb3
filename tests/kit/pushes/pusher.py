"""The trainer of a push campaign: its epoch, its commits and its publisher are real, its weights those of a test.

One JSON object a line in, one out. It says {"ready"} when it has imported what it needs and waits for its first line,
so that a second one can stand by. {"push": N}, the first too, has it push the weights of model N; it says which version
that is before anybody is offered it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config, load
from services.common.errors import FencedError
from services.common.process import die_with_parent
from services.common.telemetry import configure_logging
from services.common.versions import Version
from services.trainer.detached import leave
from services.trainer.weights.channel import Channel
from services.trainer.weights.publisher import Publisher

FENCED = FencedError.exit_code
BATCH_WAIT_S = 1.0


def say(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def timed(call: Any) -> Any:
    """Says of each RPC of a channel how long it took."""

    @functools.wraps(call)
    async def timed_call(channel: Channel, verb: str, *arguments: Any, **named: Any) -> Any:
        began, error = time.time(), ""
        try:
            return await call(channel, verb, *arguments, **named)
        except BaseException as failure:
            error = type(failure).__name__
            raise
        finally:
            say(rpc=verb, began=began, ended=time.time(), error=error)

    return timed_call


class Pusher:
    """One epoch."""

    def __init__(self, config: Config, buffer: BufferClient, weights: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        self._config, self._buffer, self._weights = config, buffer, weights
        self._epoch = self._step = 0

    async def start(self, superseded: asyncio.Event) -> None:
        acquired = await self._buffer.acquire_epoch(f"pusher-{os.getpid()}")
        self._epoch, self._step = acquired.epoch, acquired.step
        await self._buffer.recover(self._epoch, self._step)
        self._publisher = Publisher(self._buffer, self._config, self._epoch, lambda line: say(pushed=line))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                superseded.set()

        await self._publisher.start(ended)

    async def push(self, model: int) -> None:
        """The present step's weights. Returns when they are published. Raises FencedError."""
        snapshot = await self._publisher.take_snapshot(self._weights[model])
        snapshot.fill(self._weights[model].items())
        version = Version(self._epoch, self._step)
        say(version=str(version), model=model)
        await self._publisher.offer(version, snapshot)
        await self._publisher.wait_published(version)
        say(published=str(version))

    async def train(self) -> None:
        """A step: leased, and committed without looking at it. Raises FencedError."""
        step = self._step + 1
        while True:
            lease = await self._buffer.lease(
                sample_pb2.STAGE_TRAIN, "pusher", epoch=self._epoch, step=step, wait_s=BATCH_WAIT_S
            )
            if lease.groups:
                break
        await self._buffer.commit_step(self._epoch, step, lease.batch_lease_id)
        self._step = step
        say(committed=step, epoch=self._epoch)


async def serve(config: Config, weights: Mapping[int, Mapping[str, torch.Tensor]]) -> bool:
    """False when it was superseded."""
    Channel._call = timed(Channel._call)  # type: ignore[method-assign]
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    say(ready=True)
    first, superseded = json.loads(await orders.readline()), asyncio.Event()
    async with BufferClient(config.buffer.address) as buffer:
        pusher = Pusher(config, buffer, weights)
        await pusher.start(superseded)
        work = asyncio.create_task(_work(pusher, first["push"], orders))
        ended = asyncio.create_task(superseded.wait())
        await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
        return bool(work.done() and work.result())


async def _work(pusher: Pusher, model: int, orders: asyncio.StreamReader) -> bool:
    try:
        await pusher.push(model)
        while line := await orders.readline():
            await pusher.train()
            await pusher.push(json.loads(line)["push"])
    except FencedError as error:
        say(fenced=str(error))
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("parent", type=int, help="its process: this one does not outlive it")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    configure_logging("pusher")
    torch.set_num_threads(1)
    weights = {int(path.name): load_file(path / "model.safetensors") for path in arguments.models.iterdir()}
    leave(0 if asyncio.run(serve(load(arguments.config), weights)) else FENCED)


if __name__ == "__main__":
    main()
