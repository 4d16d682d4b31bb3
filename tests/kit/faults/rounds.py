"""One run and the strikes on it: each victim, the network and the clocks are struck independently of one another."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from tests.kit.faults import clocks, points
from tests.kit.faults.judge import Verdict, judge_run
from tests.kit.faults.links import FAULTS, Links
from tests.kit.faults.shares import OTHERS, VICTIMS, Shares
from tests.kit.runs import Run
from tests.kit.systems import small_train

TICK_S = 0.05
LOOK_EVERY_S = 0.5
# Between two strikes of one victim.
APART_S = 8.0
# Strikes between two steps: then a run is left to recover, however long that takes.
AT_ONCE = 4
# An armed point that nobody reaches in this time is left for another.
REACH_S = 60.0
UP_S = 120.0
# A run that makes no step for this long stands still.
STALL_S = 300.0
# Some are longer than a lease (3 s) and than a replica's registration (4 s).
FREEZES_S = (0.5, 1.5, 5.0)
# Once in a while nothing is scored for so long.
REWARD_AWAY_S = 30.0
STOP_S = 60.0
# Room that is left on a disk that is about to be full.
ROOM_BYTES = 4096
# Points that only a trainer which starts comes to; it is struck anyway, and killed for them if it takes long.
AT_START = ("acquire_epoch", "recover", "AcquireEpoch", "Recover")
AWAITED_S = 30.0

Life = Generator[None, None, bool]
"""What goes on beside the rest of a round: it is gone on with at each tick. Its value: whether it was carried out."""


class Stop(Protocol):
    def is_set(self) -> bool: ...


@dataclass
class Tally:
    """What was struck."""

    kills: Counter[str] = field(default_factory=Counter)
    freezes: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    """By SIGTERM."""
    full_disks: Counter[str] = field(default_factory=Counter)
    links: Counter[str] = field(default_factory=Counter)
    clocks: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    """Kills by armed point, those of the store as ``store@<point of the buffer>``; and all else by its place in the
    crash matrix."""

    def strikes(self, victim: str) -> int:
        """Kills and freezes."""
        return self.kills[victim] + self.freezes[victim]

    def add(self, other: Tally) -> None:
        for name, counts in vars(other).items():
            getattr(self, name).update(counts)


class Round:
    """One run and its strikes. `say` gets a line per strike."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        shares: Shares,
        say: Callable[[str], None] = print,
        buffers: int = 1,
    ) -> None:
        self.seed = seed
        self.tally = Tally()
        self._shares = shares
        self._unreached: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._say = say
        self._failed: list[str] = []
        self._points = points.Points(directory / "faults")
        self._links = Links(self._points.directory, directory / "run", buffers)
        command = [*small_train(directory), "--run.seed", str(seed), "--buffer.replicas", str(buffers)]
        self.run = Run(directory / "run", *command, environment=self._points.environment())
        self._left = 0
        self._since_step = 0
        """Strikes."""
        self._began = time.monotonic()

    def strike(self, deadline: float, stop: Stop, most: int = 1000) -> None:
        """At most `most` strikes; ends earlier at `deadline` (monotonic), when `stop` is set or the shares are used up.

        Raises AssertionError when the run ends or stands still.
        """
        self.run.wait_for(lambda: self.run.step() >= 2, within_s=2 * UP_S)
        self._left = most
        lives = [self._life(victim) for victim in (*VICTIMS, *OTHERS)]
        watching = self._watch()
        try:
            while lives and not stop.is_set() and time.monotonic() < deadline:
                next(watching)
                lives = [life for life in lives if next(life, "over") is None]
                time.sleep(TICK_S)
        finally:
            for life in lives:
                life.close()

    def settle(self, steps: int = 5) -> Verdict:
        """The run makes `steps` more steps, ends in order, and is judged."""
        try:
            verdict = settle(self.run, self._points, steps)
        finally:
            self._links.close()
        verdict.failed += self._failed
        return verdict

    def salvage(self) -> Verdict:
        """Of a run that did not come through: what it kept."""
        self.run.process.kill()
        self.run.process.wait()
        self.run.left_behind()
        self._links.close()
        return judge_run(self.run, self._points.directory)

    def _watch(self) -> Iterator[None]:
        looked_at, moved_at, step = 0.0, time.monotonic(), self.run.step()
        while True:
            now = time.monotonic()
            if self.run.step() > step:
                moved_at, step, self._since_step = now, self.run.step(), 0
            if now - looked_at > LOOK_EVERY_S:
                looked_at = now
                self.run.look()
            if self.run.process.poll() is not None:
                raise AssertionError(f"the run ended with {self.run.process.returncode}:\n{self.run.tail()}")
            if now - moved_at > STALL_S:
                raise AssertionError(f"no step in {STALL_S} s (step {step}):\n{self.run.tail()}")
            yield

    def _life(self, victim: str) -> Generator[None, None, None]:
        yield from self._pause(self._rng.uniform(0, APART_S))
        while self._left > 0:
            while self._since_step >= AT_ONCE and victim != "clock":
                yield
            if (strike := self._shares.take(victim, self._unreached)) is None:
                return
            if victim != "clock":
                self._left -= 1
                self._since_step += 1
            done = False
            try:
                done = yield from self._carry_out(victim, strike.kind, strike.point)
            finally:
                if not done:
                    self._shares.undo(victim, strike)
            yield from self._pause(APART_S)

    def _carry_out(self, victim: str, kind: str, point: str) -> Life:
        if victim == "link":
            return self._link(point)
        if victim == "clock":
            return self._clock(point)
        if point:
            return self._kill_at_point(victim, point)
        acts = {"kill": self._kill, "freeze": self._freeze, "stop": self._stop, "full": self._full}
        return acts[kind](victim)

    def _pause(self, seconds: float) -> Iterator[None]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield

    def _kill(self, victim: str) -> Life:
        process = yield from self._process(victim)
        with suppress(psutil.NoSuchProcess):
            process.kill()
            self.tally.kills[victim] += 1
            self._note(f"kill {victim} at a random time")
            return True
        return False

    def _kill_at_point(self, victim: str, name: str) -> Life:
        if not (yield from self._carried_out(victim, name, "kill")):
            return False
        self.tally.kills[victim] += 1
        self.tally.points[name] += 1
        self._note(f"kill {name}")
        return True

    def _carried_out(self, victim: str, name: str, action: str) -> Life:
        """Arms a point; whether somebody came to it."""
        point = name.partition("@")[2] or name
        process = yield from self._process(victim)
        if self._points.is_armed(point):  # for the store or for the buffer
            return False
        self._points.arm(point, f"{action} {process.pid}" if victim == "store" else action)
        began, starts = time.monotonic(), point.split(".")[1] in AT_START
        try:
            while self._points.is_armed(point) and time.monotonic() < began + REACH_S:
                if starts and (victim == "trainer" or time.monotonic() > began + AWAITED_S):
                    starts = False
                    if (yield from self._kill("trainer")):
                        self._shares.spend("trainer")
                yield
        finally:
            unreached = self._points.disarm(point)
        if unreached:
            self._unreached[name] += 1
            self._note(f"nobody came to {name}")
        return not unreached

    def _freeze(self, victim: str) -> Life:
        """At a point or at a random time, whichever the seed says."""
        seconds = self._rng.choice((*FREEZES_S, REWARD_AWAY_S) if victim == "reward" else FREEZES_S)
        name = self._rng.choice(points.names(victim)) if victim != "store" and self._rng.random() < 0.5 else ""
        process = yield from self._process(victim)
        frozen = bool(name) and (yield from self._carried_out(victim, name, "freeze"))
        try:
            process = psutil.Process(self._points.hits(name)[-1]) if frozen else process
            process.suspend()
            yield from self._pause(seconds)
        except psutil.NoSuchProcess:
            return False
        finally:
            with suppress(psutil.NoSuchProcess):  # who waits for an engine may have ended it
                process.resume()
        self.tally.freezes[victim] += 1
        self._note(f"freeze {name if frozen else victim} for {seconds} s")
        return True

    def _stop(self, victim: str) -> Life:
        """SIGTERM: it gives back what it holds and leaves."""
        process = yield from self._process(victim)
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        until = time.monotonic() + STOP_S
        while _runs(process):
            if time.monotonic() > until:
                self._failed.append(f"{victim} did not end within {STOP_S} s of SIGTERM")
                process.kill()
                return True
            yield
        self.tally.stops[victim] += 1
        self.tally.points[f"stop.{victim}"] += 1
        self._note(f"stop {victim}")
        return True

    def _full(self, victim: str) -> Life:
        """The disk of the store is full: its file ends in the middle of a command, and with it the process."""
        process = yield from self._process(victim)
        files = list((self.run.dir / "store" / "appendonlydir").glob("*.incr.aof"))
        room = max(path.stat().st_size for path in files) + ROOM_BYTES
        try:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        except ProcessLookupError:
            return False
        until = time.monotonic() + REACH_S
        while _runs(process):
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                return False
            yield
        self.tally.full_disks[victim] += 1
        self.tally.points["store.full"] += 1
        self._note("the disk of the store was full")
        return True

    def _link(self, name: str) -> Life:
        link, _, fault = name.partition(".")
        seconds = FAULTS[fault][0]
        self._links.strike(link, fault)
        try:
            yield from self._pause(seconds)
        finally:
            self._links.heal(link)
        self.tally.links[link] += 1
        self.tally.points[name] += 1
        self._note(f"{fault} {link}" + f" for {seconds} s" * bool(seconds))
        return True

    def _clock(self, name: str) -> Life:
        _, role, way = name.split(".")
        clocks.set_ahead(self._points.directory, role, clocks.HOUR_S if way == "ahead" else -clocks.HOUR_S)
        try:
            yield from self._pause(clocks.JUMP_S)
        finally:
            clocks.set_ahead(self._points.directory, role, 0)
        self.tally.clocks[role] += 1
        self.tally.points[name] += 1
        self._note(f"the clock of {role} an hour {way} for {clocks.JUMP_S} s")
        return True

    def _process(self, victim: str) -> Generator[None, None, psutil.Process]:
        """The victim, as soon as it is up; of several, one."""
        until = time.monotonic() + UP_S
        while not (found := self.run.processes(victim)):
            if time.monotonic() > until:
                raise AssertionError(f"no {victim} within {UP_S} s:\n{self.run.tail()}")
            yield from self._pause(LOOK_EVERY_S)
        return self._rng.choice(found)

    def _note(self, what: str) -> None:
        self._say(f"seed {self.seed} {time.monotonic() - self._began:6.1f} s step {self.run.step():4d}: {what}")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def settle(run: Run, at: points.Points, steps: int = 5) -> Verdict:
    """`run` makes `steps` more steps, ends in order, and is judged."""
    goal = run.step() + steps
    run.wait_for(lambda: run.step() >= goal, within_s=2 * UP_S)
    run.process.send_signal(signal.SIGINT)
    run.finish(within_s=UP_S)
    verdict = judge_run(run, at.directory)
    if left := run.left_behind():
        verdict.failed.append(f"processes left behind: {left}")
    return verdict
