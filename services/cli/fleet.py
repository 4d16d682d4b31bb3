"""The replicas that a run has now, and those it should have: starts the missing ones, drains the ones too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import structlog

from services.cli import scale
from services.cli.supervisor import Child, Supervisor
from services.common.config import Config
from services.common.errors import ConfigError, PolyheadError

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
# What a replica may take to give its work back and leave.
GRACE_S = 30.0


class Fleet:
    """N replicas of each role that can be scaled, at the first N indices that have not failed for good. `follow` keeps
    N to the last wish.
    """

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
        self._wanted = dict(self._configured)
        self._heard: Mapping[str, int] = {}
        """The wish that `_wanted` follows."""
        self._failed: dict[str, set[int]] = {role: set() for role in scale.ROLES}
        """Indices that are left out."""
        self._complaint = ""
        self._draining: set[asyncio.Task[None]] = set()

    def settle(self) -> None:
        """Starts and drains towards what is wanted. An index whose last child is still leaving has to wait."""
        for role in scale.ROLES:
            running = {child.index: child for child in self._children(role)}
            indices = self._indices(role)
            for index in indices:
                if index not in running:
                    self._start(role, index)
            for index in sorted(running, reverse=True):
                if index not in indices and not running[index].told_to_end:
                    self._drain(running[index])

    async def follow(self) -> None:
        """Reads the wish and settles, twice a second, until cancelled. What cannot be done is told, and tried again."""
        while True:
            self._read()
            try:
                self.settle()
            except OSError as error:
                self._complain(error)
            await asyncio.sleep(LOOK_EVERY_S)

    def leave_out(self, child: Child, error: PolyheadError) -> bool:
        """Whether the run can do without `child`, which has failed for good: another one of its role does the work.

        Then fewer are wanted, until more are asked for; that tries its index again.
        """
        others = [other for other in self._children(child.role) if other is not child and not other.told_to_end]
        if child.role not in scale.ROLES or not any(other.running and other.stable for other in others):
            return False
        before = self._wanted[child.role]
        self._wanted[child.role] = before - 1
        self._failed[child.role].add(child.index)
        log.error("replica_left_out", role=child.role, index=child.index, reason=error.reason)
        self._say(f"{child.role}-{child.index} is left out, it failed: {error.reason}")
        self._say(f"{child.role}: {before} → {before - 1} replicas")
        try:
            scale.wish(self._config.run.dir, {child.role: before - 1})
            self._heard = {**self._heard, child.role: before - 1}
        except (ConfigError, OSError) as failure:
            self._complain(failure)
        return True

    def _read(self) -> None:
        try:
            wish = scale.read(self._config.run.dir)
            scale.check(self._config, wish)
        except (ConfigError, OSError) as error:
            self._complain(error)
            return
        if wish == self._heard:
            return
        self._heard = wish
        for role, count in {**self._configured, **wish}.items():
            if count > self._wanted[role]:
                self._failed[role].clear()
            if count != self._wanted[role]:
                log.info("scaling", role=role, replicas=count, before=self._wanted[role])
                self._say(f"{role}: {self._wanted[role]} → {count} replicas")
            self._wanted[role] = count

    def _complain(self, error: Exception) -> None:
        if self._complaint != str(error):
            self._complaint = str(error)
            log.error("not_scaled", reason=str(error))
            self._say(f"not scaled: {error}")

    def _indices(self, role: str) -> Sequence[int]:
        """Those that are to be filled."""
        failed = self._failed[role]
        return [index for index in range(self._wanted[role] + len(failed)) if index not in failed][: self._wanted[role]]

    def _children(self, role: str) -> Sequence[Child]:
        return [child for child in self._supervisor.children if child.role == role]

    def _drain(self, child: Child) -> None:
        self._supervisor.tell(child)
        task = asyncio.create_task(self._supervisor.end([child], GRACE_S))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
