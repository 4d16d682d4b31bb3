"""``python -m services.buffer -c run.toml``: one buffer process. Any number of them may serve one store."""

from __future__ import annotations

import asyncio
import sys

import stamina
import structlog

from polyhead.v1 import buffer_pb2, buffer_pb2_grpc
from services.buffer.blob_sweep import BlobSweep
from services.buffer.memory_watch import MemoryWatch
from services.buffer.prompts import PromptSource
from services.buffer.redis_store import RedisStore
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.buffer.store import Store
from services.buffer.witness import Witness
from services.common import rpc
from services.common.blobs import Blobs
from services.common.config import Config
from services.common.errors import ConfigError, UnavailableError
from services.common.lifecycle import Process, run_service

log = structlog.get_logger()

CONNECT_LIMIT_S = 30.0
STOP_GRACE_S = 2.0


async def serve(config: Config, process: Process) -> None:
    """Opens the run in the store, serves until told to stop."""
    source = PromptSource(config.data, config.buffer.limits) if config.data.prompt_data else None
    store = _connect(config)
    witness = Witness(config.run.dir / f"{config.run.name}.position", store)
    try:
        witness.recall()
        await _open(store, config, source)
        watch = MemoryWatch(store, config.store.max_memory_mb)
        await watch.look()
        blobs = Blobs(config.run.dir / "blobs")
        service = BufferService(store, source, watch, config.buffer, config.batch.n_samples_per_prompt, blobs)
        server = await rpc.serve(
            _address(config, process.index),
            lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(service, server),
            [buffer_pb2.DESCRIPTOR.services_by_name["BufferService"].full_name],
            message_mb=config.buffer.limits.message_mb,
        )
        log.info("serving", address=server.address, prompts=len(source) if source else 0)
        sweep = BlobSweep(store, blobs, service.retired)
        async with asyncio.TaskGroup() as tasks:
            duties = (watch.run(server.set_serving), sweep.run(), witness.run())
            watching = [tasks.create_task(duty) for duty in duties]
            await process.stop.wait()
            for task in watching:
                task.cancel()
        await server.stop(STOP_GRACE_S)
        witness.save()
    finally:
        await store.close()


def _address(config: Config, index: int) -> str:
    """Of the replica `index`. Raises ConfigError when there is none."""
    if index >= len(config.buffer.addresses):
        raise ConfigError(f"{config.buffer.address} names none for --index {index}", field="buffer.address")
    return config.buffer.addresses[index]


def _connect(config: Config) -> RedisStore:
    if config.store.url == "embedded":
        raise ConfigError(
            '"embedded" is started by "polyhead up"; a buffer of its own needs redis://, rediss:// or unix://',
            field="store.url",
        )
    password = config.store.password.get_secret_value() if config.store.password else None
    return RedisStore(config.store.url, password=password, run_name=config.run.name)


async def _open(store: Store, config: Config, source: PromptSource | None) -> None:
    """Waits for a store that is still starting. Raises UnavailableError when it stays away."""
    async for attempt in stamina.retry_context(
        on=UnavailableError, attempts=None, timeout=CONNECT_LIMIT_S, wait_initial=0.05, wait_max=1.0
    ):
        with attempt:
            await store.open(run_params(config, source))


if __name__ == "__main__":
    sys.exit(run_service("buffer", serve))
