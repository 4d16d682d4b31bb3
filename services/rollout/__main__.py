"""One rollout replica: ``python -m services.rollout -c run.toml --index 0``."""

from __future__ import annotations

import asyncio
import logging
import sys

from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.lifecycle import Process, run_service
from services.common.process import loading
from services.common.registration import keep_registered
from services.rollout.building import build_replica
from services.rollout.laggards import Laggards
from services.rollout.layout import ModelLayout
from services.rollout.prompting import Prompter
from services.rollout.registration import describe, say_farewell
from services.rollout.replica import Replica
from services.rollout.service import RolloutService
from services.rollout.turns import Turns
from services.rollout.weights import WeightReceiver
from services.rollout.worker import Worker

# A buffer that stays away longer is reported, and then tried again.
BUFFER_RETRY_S = 10.0
# Counters are this fresh in the registry, and never further apart than a third of its time-to-live.
BEAT_S = 1.0


async def serve(config: Config, process: Process) -> None:
    """Generates until told to stop, then gives everything back and leaves."""
    limits = config.buffer.limits
    replica, keepers = build_replica(config, process)
    try:
        async with (
            BufferClient(config.buffer.address, retry_for_s=BUFFER_RETRY_S, message_mb=limits.message_mb) as buffer,
            asyncio.TaskGroup() as tasks,
        ):
            running = [tasks.create_task(keeper.run()) for keeper in keepers]
            with loading():
                prompter = await asyncio.to_thread(Prompter, config)
            worker = Worker(config, replica, prompter, buffer)
            receivers = _receivers(config, replica, worker)
            turns = Turns(
                replica,
                receivers,
                worker.let_go,
                timeout_s=config.trainer.weights.timeout_s,
                stall_limit_s=config.run.stall_limit_s,
            )
            service = RolloutService(replica, receivers, worker, turns, process.stop)
            async with service.listening(config.rollout.address, message_mb=limits.message_mb) as address:
                beat_s = min(BEAT_S, config.buffer.replica_ttl_s / 3)
                beating = keep_registered(buffer, lambda: describe(replica, address), replica.changed, beat_s)
                running += [tasks.create_task(part) for part in (worker.run(), Laggards(replica).run(), beating)]
                await process.stop.wait()
                await worker.drain()
            for task in running:
                task.cancel()
            await say_farewell(buffer, replica, address)
    except ExceptionGroup as failures:
        raise _first(failures) from failures


async def _serve_alone(config: Config, process: Process) -> None:
    """`serve` in a process of its own."""
    if not config.plugins.paths:  # code of the run's own may need it
        _leave_torch_out()
    await serve(config, process)


def _leave_torch_out() -> None:
    """transformers imports torch wherever it finds it, which is most of the time of a start, and 180 MB. A replica
    itself only tokenizes.
    """
    # None is how Python marks what is not to be imported; its stubs know of modules only.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # It warns that there are no models then.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def _receivers(config: Config, replica: Replica, worker: Worker) -> list[WeightReceiver]:
    layout = ModelLayout.of_directory(config.model.hf_checkpoint, config.model.dtype)
    return [
        WeightReceiver(
            replica,
            engine,
            layout,
            worker.give_back,
            timeout_s=config.trainer.weights.timeout_s,
            load_pause_mode=config.rollout.pause_mode,
        )
        for engine in replica.engines
    ]


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """The error that ended a part, out of the groups around it."""
    error: Exception = failures
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(run_service("rollout", _serve_alone))
