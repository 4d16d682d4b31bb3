"""Keeps a set of child processes running: restarts what dies, with back-off, and ends them in order."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from services.common.errors import PolyheadError
from services.common.lifecycle import STOPPED_EARLY
from services.common.process import last_lines, spawn

log = structlog.get_logger()

POLL_S = 0.05
# Exit statuses after which a restart would only fail again: bad configuration, fenced, diverged.
FATAL_STATUSES = {2, 3, 4}
# Of these, what concerns the child alone and not the run.
OWN_STATUSES = {2}
# A child that dies this often without being stable between has failed for good.
MAX_RESTARTS = 8
# What the others of a group get to end by themselves and say why, when one has died.
GROUP_GRACE_S = 0.5


@dataclass
class Child:
    """One process slot. `pids` lists every process that has filled it."""

    role: str
    command: Sequence[str]
    log_path: Path
    index: int = 0
    """Which of its role it is."""
    env: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False
    """Whether it is another program, which has no use for the services' secrets."""
    registers: bool = False
    """Whether it is up only when the registry says so: it may take minutes to start. Others are up at once."""
    stable_after_s: float = 20.0
    group: str = ""
    """Children of one group live and die together: when one dies, all of them are started anew."""
    waits_for: Mapping[str, str] = field(default_factory=dict)
    """What it waits for when its log ends with this: then it is started again for as long as it takes."""
    pids: list[int] = field(default_factory=list)
    restarts: int = 0
    """In a row, without being stable between."""
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    up_since: float | None = None
    restart_at: float = 0.0
    told_to_end: bool = False

    def start(self) -> None:
        # SIGKILL: a launcher that crashed can no longer end anything in order, and every service survives it.
        self.process = spawn(
            self.command, log_path=self.log_path, env=self.env, death_signal=signal.SIGKILL, foreign=self.foreign
        )
        self.pids.append(self.process.pid)
        self.started_at = time.monotonic()
        self.up_since = None if self.registers else self.started_at

    @property
    def waiting_for(self) -> str:
        """Empty when it ended for no reason that passes by itself."""
        end = last_lines(self.log_path, 3) if self.waits_for else ""
        return next((what for line, what in self.waits_for.items() if line in end), "")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def is_due(self) -> bool:
        """Whether it is to be started again, then or later."""
        return self.restart_at > self.started_at

    @property
    def stable(self) -> bool:
        """Whether it has been up for long enough, or had been when it ended."""
        return self.up_since is not None and time.monotonic() - self.up_since > self.stable_after_s


class Supervisor:
    """Watches children until `leader` ends by itself or `stop` is set.

    Raises PolyheadError, with the child's last line, when one fails for good that cannot be spared.
    """

    def __init__(
        self,
        stop: asyncio.Event,
        on_restart: Callable[[Child, int], None],
        spare: Callable[[Child, PolyheadError], bool] = lambda *_: False,
    ) -> None:
        """`spare` says whether the run goes on without a child, given why that has failed for good."""
        self.children: list[Child] = []
        self.ended: list[Child] = []
        """Those that were ended in order."""
        self._stop = stop
        self._on_restart = on_restart
        self._spare = spare

    def add(self, child: Child) -> Child:
        child.start()
        self.children.append(child)
        return child

    async def watch(self, leader: Child) -> int | None:
        """0 when the leader finished, STOPPED_EARLY when it was told to stop before that, None when `stop` is set."""
        while not self._stop.is_set():
            for child in list(self.children):
                if child.running or child.told_to_end:
                    continue
                assert child.process is not None
                if child is leader and child.process.returncode in (0, STOPPED_EARLY):
                    return child.process.returncode
                if child.group and child.process.returncode == 0 and not child.is_due:
                    continue  # its leader let it go
                self._bring_back(child, child.process.returncode)
            await asyncio.sleep(POLL_S)
        return None

    def note_serving(self, pids: Collection[int]) -> None:
        """The registry says that the processes `pids` serve."""
        for child in self.children:
            if child.up_since is None and child.process is not None and child.process.pid in pids:
                child.up_since = time.monotonic()

    @staticmethod
    def tell(child: Child) -> None:
        """SIGTERM, once: a second one would cut the farewell short. From here on the child is not restarted."""
        if not child.told_to_end and child.process is not None and child.running:
            child.process.send_signal(signal.SIGTERM)
        child.told_to_end = True

    async def end(self, children: Sequence[Child], grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s`. Returns when all are gone."""
        deadline = time.monotonic() + grace_s
        for child in children:
            self.tell(child)
        while any(child.running for child in children) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        for child in children:
            if child.process is not None:
                if child.running:
                    log.warning("killed", role=child.role, pid=child.process.pid, grace_s=grace_s)
                    child.process.kill()
                child.process.wait()
            if child in self.children:
                self.children.remove(child)
                self.ended.append(child)

    def kill_all(self) -> None:
        for child in self.children:
            if child.process is not None and child.running:
                child.process.kill()
                child.process.wait()

    def _bring_back(self, child: Child, status: int) -> None:
        now = time.monotonic()
        if not child.is_due:
            child.restarts = 1 if child.stable else child.restarts + 1
            if status in FATAL_STATUSES or (child.restarts > MAX_RESTARTS and not child.waiting_for):
                self._give_up(child, status)
                return
            # The first restart is immediate: one crash is no pattern.
            delay = 0.0 if child.restarts == 1 else min(10.0, 0.2 * 2**child.restarts)
            child.restart_at = now + (max(delay, GROUP_GRACE_S) if child.group else delay)
            for mate in self._group(child):
                mate.restarts, mate.restart_at = child.restarts, child.restart_at
            self._on_restart(child, status)
        if now >= child.restart_at:
            self._start_again(self._group(child))

    def _group(self, child: Child) -> Sequence[Child]:
        return [mate for mate in self.children if mate is child or (child.group and mate.group == child.group)]

    def _start_again(self, group: Sequence[Child]) -> None:
        """All of a group, unless one of them says that there is no point."""
        for child in group:
            assert child.process is not None
            if child.running:
                child.process.kill()
            status = child.process.wait()
            if status in FATAL_STATUSES:
                self._give_up(child, status)
                return
        for child in group:
            child.start()

    def _give_up(self, child: Child, status: int) -> None:
        """Raises the child's error unless the run goes on without it."""
        error = _failure(child, status)
        if status in FATAL_STATUSES - OWN_STATUSES or not self._spare(child, error):
            raise error
        self.children.remove(child)
        self.ended.append(child)


def _failure(child: Child, status: int) -> PolyheadError:
    """The child's own one-line error where it wrote one, else the end of its log."""
    lines = [line for line in last_lines(child.log_path, 40).splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("polyhead ")]
    reason = own[-1].partition(": ")[2] if own else f"exit status {status}; {child.log_path}: {' | '.join(lines[-3:])}"
    error = PolyheadError(reason, field=f"{child.role} failed")
    error.exit_code = status if status in FATAL_STATUSES else 1
    return error
