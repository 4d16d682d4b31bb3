"""One life of a program after the other, with back-off between them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from services.rollout.engines.child import NeverReadyError
from services.rollout.engines.messages import EngineUnavailableError

log = structlog.get_logger()

_BACKOFF_FIRST_S = 0.5
_BACKOFF_MAX_S = 30.0
# A program that lived this long is started again without delay to speak of.
_HEALTHY_LIFE_S = 60.0
# Starts that may fail before one has succeeded: memory of a process that was killed may take a while to be free.
_FIRST_STARTS = 3


async def keep_alive(name: str, one_life: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled. `one_life` returns when the program has ended, and raises EngineUnavailableError when it did
    not become ready, or OSError when it could not be started.

    Raises NeverReadyError when the first start takes too long or the first three fail, ConfigError when one shows that
    none can succeed. Once it has been ready, every failure is followed by another start.
    """
    loop = asyncio.get_running_loop()
    backoff_s, failed, lived = _BACKOFF_FIRST_S, 0, False
    while True:
        began = loop.time()
        try:
            await one_life()
            lived = True
        except (EngineUnavailableError, OSError) as failure:
            error = failure if isinstance(failure, EngineUnavailableError) else _not_started(name, failure)
            failed += 1
            if not lived and (failed == _FIRST_STARTS or isinstance(error, NeverReadyError)):
                raise NeverReadyError(error.reason, field=error.field) from failure
            log.error("start_failed", program=name, reason=str(error))
        if loop.time() - began > _HEALTHY_LIFE_S:
            backoff_s = _BACKOFF_FIRST_S
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)


def _not_started(name: str, error: OSError) -> EngineUnavailableError:
    return EngineUnavailableError(f"could not be started: {error}", field=name)
