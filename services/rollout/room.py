"""How many samples the replica has room for at this moment, by what its engines say about themselves."""

from __future__ import annotations

import asyncio

from services.common.config.models import RolloutConfig
from services.common.errors import PolyheadError
from services.rollout.capacity import DEFAULT_SLOTS, Lengths, capacity
from services.rollout.engines.engine import Engine
from services.rollout.replica import Replica

_LOOK_S = 1.0
# Failed looks in a row at an engine that should answer, after which its keeper has to see to it.
_MAX_FAILURES = 3


class Room:
    """Tell `lengths` of every sample that comes and goes."""

    def __init__(self, replica: Replica, settings: RolloutConfig) -> None:
        self.lengths = Lengths(settings.sampling.max_response_len)
        self._replica = replica
        self._settings = settings

    @property
    def capacity(self) -> int:
        """Samples that may be held; 0 when no engine is in rotation."""
        return capacity(
            [(engine.info, engine.load) for engine in self._replica.engines if self._replica.in_rotation(engine)],
            expected_tokens=self.lengths.expected,
            default_slots=self._settings.engine.max_running_requests or DEFAULT_SLOTS,
            limit=self._settings.max_inflight,
        )

    async def run(self) -> None:
        """Looks at the engines' loads, for ever."""
        await asyncio.gather(*(self._watch(engine) for engine in self._replica.engines))

    async def _watch(self, engine: Engine) -> None:
        failures = 0
        while True:
            failures = 0 if await self._look(engine) else failures + 1
            if failures == _MAX_FAILURES:
                engine.suspect.set()
                failures = 0
            await asyncio.sleep(_LOOK_S)

    async def _look(self, engine: Engine) -> bool:
        """False when it should have answered and has not."""
        if not _answers(engine):
            return True
        try:
            load = await engine.client.load()
        except PolyheadError:
            return not _answers(engine)
        if engine.attached:
            engine.load = load
        return True


def _answers(engine: Engine) -> bool:
    """One that loads weights does not."""
    return engine.serving and not engine.paused and engine.life.updating is None
