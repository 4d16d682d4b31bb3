"""The replicas that a run has now, and those it should have: starts the missing ones, drains the ones too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from services.cli import scale
from services.cli.supervisor import Child, Supervisor
from services.common.config import Config
from services.common.errors import ConfigError

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
# What a replica may take to give its work back and leave.
GRACE_S = 30.0


class Fleet:
    """Replicas 0 to N - 1 of each role that can be scaled. `follow` keeps N to the last wish."""

    def __init__(
        self,
        config: Config,
        supervisor: Supervisor,
        start: Callable[[str, int], Child],
        say: Callable[[str], None],
    ) -> None:
        """`start` makes the child of a role and an index."""
        self._config = config
        self._supervisor = supervisor
        self._start = start
        self._say = say
        self._configured = scale.configured(config)
        self._wanted = self._configured
        self._refused = ""
        self._draining: set[asyncio.Task[None]] = set()

    def settle(self) -> None:
        """Starts and drains towards what is wanted. An index whose last child is still leaving has to wait."""
        for role, count in self._wanted.items():
            running = {child.index: child for child in self._supervisor.children if child.role == role}
            for index in range(count):
                if index not in running:
                    self._start(role, index)
            for index in sorted(running, reverse=True):
                if index >= count and not running[index].told_to_end:
                    self._drain(running[index])

    async def follow(self) -> None:
        """Reads the wish and settles, twice a second, until cancelled."""
        while True:
            self._read()
            self.settle()
            await asyncio.sleep(LOOK_EVERY_S)

    def _read(self) -> None:
        try:
            wish = scale.read(self._config.run.dir)
            scale.check(self._config, wish)
        except ConfigError as error:
            if self._refused != str(error):
                self._refused = str(error)
                self._say(f"not scaled: {error}")
            return
        wanted = {**self._configured, **wish}
        for role, count in wanted.items():
            if count != self._wanted[role]:
                log.info("scaling", role=role, replicas=count, before=self._wanted[role])
                self._say(f"{role}: {self._wanted[role]} → {count} replicas")
        self._wanted = wanted

    def _drain(self, child: Child) -> None:
        self._supervisor.tell(child)
        task = asyncio.create_task(self._supervisor.end([child], GRACE_S))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
