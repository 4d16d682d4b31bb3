"""The heartbeat by which a replica of any role stays in the buffer's registry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.errors import UnavailableError

log = structlog.get_logger()

# Shorter than the client's own patience: after an outage the registry must hear the present, not what was true before.
ATTEMPT_S = 5.0


async def keep_registered(
    buffer: BufferClient, describe: Callable[[], pb.Replica], changed: asyncio.Event, interval_s: float
) -> None:
    """Registers what `describe` returns, every `interval_s` and at once when `changed` is set, until cancelled.

    Outages of the buffer are waited out: logged when one begins and when it ends. Refusals (InvalidArgumentError and
    the like) are raised: repeating them would not help.
    """
    reachable = True
    while True:
        changed.clear()
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await buffer.register_replica(describe())
        except (TimeoutError, UnavailableError) as error:
            if reachable:
                log.warning("registration_failing", reason=str(error) or "no answer")
            reachable = False
        else:
            if not reachable:
                log.info("registration_restored")
            reachable = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await changed.wait()
