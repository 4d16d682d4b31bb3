"""`python -m services.trainer -c FILE --index RANK`: one trainer process. The run talks to that of rank 0."""

from __future__ import annotations

import asyncio

from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.lifecycle import STOPPED_EARLY, Process, run_service
from services.common.process import loading
from services.common.registration import keep_registered
from services.trainer import model_dir
from services.trainer.detached import leave
from services.trainer.io_thread import Io
from services.trainer.service import TrainerService, describe
from services.trainer.status import TrainerStatus

BEATS_PER_TTL = 3.0
GRACE_S = 1.0


async def serve(config: Config, process: Process) -> int:
    """Trains until the run is done or a stop is requested; returns the exit status.

    The training thread's error is raised.
    """
    model_dir.check_model_dir(config.model.hf_checkpoint)
    # One beyond the ranks is a trainer of its own: of the two, the older is fenced.
    if 0 < process.index < config.trainer.ranks:
        return await _serve_beside(config, process)
    status = TrainerStatus()
    server = await TrainerService(status, process.stop).start(config.trainer.address)
    io = Io(asyncio.get_running_loop(), process.stop)
    async with BufferClient(config.buffer.address, message_mb=config.buffer.limits.message_mb) as buffer:
        heartbeat = asyncio.create_task(
            keep_registered(
                buffer,
                lambda: describe(process.replica_id, server.address, status),
                asyncio.Event(),
                config.buffer.replica_ttl_s / BEATS_PER_TTL,
            )
        )
        heartbeat.add_done_callback(io.watch)
        try:
            complete = await asyncio.to_thread(_train, config, io, buffer, status, process.replica_id)
        finally:
            heartbeat.cancel()
            await server.stop(GRACE_S)
    return 0 if complete else STOPPED_EARLY


async def _serve_beside(config: Config, process: Process) -> int:
    """A rank that is not the first: rank 0 alone decides when it ends, and is the one to be told."""
    io = Io(asyncio.get_running_loop(), process.stop)
    async with BufferClient(config.buffer.address, message_mb=config.buffer.limits.message_mb) as buffer:
        await asyncio.to_thread(_follow, config, io, buffer, process.index)
    return 0


def _follow(config: Config, io: Io, buffer: BufferClient, rank: int) -> None:
    with loading():
        from services.trainer.ranks.follow import follow

    follow(config, io, buffer, rank)


def _train(config: Config, io: Io, buffer: BufferClient, status: TrainerStatus, replica_id: str) -> bool:
    # Importing torch takes seconds: the loop answers and registers meanwhile.
    with loading():
        from services.trainer.trainer import train

    return train(config, io, buffer, status, replica_id)


if __name__ == "__main__":
    leave(run_service("trainer", serve))
