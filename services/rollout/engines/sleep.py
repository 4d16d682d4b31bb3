"""An engine gives its GPU memory up, and takes it back."""

from __future__ import annotations

import asyncio
import time

from services.common.errors import UnavailableError
from services.rollout.engines.client import CACHES, WEIGHTS
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import EngineRefusedError

_POLL_S = 0.01


async def until_idle(engine: Engine, timeout_s: float) -> None:
    """Returns when it has no request left, and nothing of one in its prefix cache. It must not be sent new ones.

    Raises UnavailableError when that takes longer.
    """
    if engine.asleep >= CACHES:
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await engine.client.flush()
            return
        except EngineRefusedError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(f"still has requests after {timeout_s:g} s", field="engine") from error
        await asyncio.sleep(_POLL_S)


async def put_to_sleep(engine: Engine, timeout_s: float) -> None:
    """Once it is idle: gives up weights and caches. An engine that cannot do that keeps them, and its version.

    Raises UnavailableError or EngineRefusedError when it does not answer as it should.
    """
    if engine.info is None or not engine.info.sleeps:
        return
    held = (WEIGHTS | CACHES) - engine.asleep
    if held:
        # From here on, whatever the answer: what may have been given up is not there.
        engine.life.put_to_sleep()
        await engine.client.release_memory(held, timeout_s)
        engine.asleep |= held


async def wake(engine: Engine, kinds: frozenset[str], timeout_s: float) -> float:
    """Takes back what it has given up of `kinds`: the seconds it took. Raises as `put_to_sleep` does."""
    began = time.monotonic()
    missing = kinds & engine.asleep
    if missing:
        await engine.client.resume_memory(missing, timeout_s)
        engine.asleep -= missing
    return time.monotonic() - began
