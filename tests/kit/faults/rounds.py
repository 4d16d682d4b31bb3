"""One run and the strikes on it."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.kit.faults import points
from tests.kit.faults.judge import Verdict, judge_run
from tests.kit.faults.matrix import points_of
from tests.kit.runs import Run
from tests.kit.systems import small_train

VICTIMS = ("store", "buffer", "rollout", "reward", "trainer", "engine")
# An armed point that nobody reaches in this time is left for another.
REACH_S = 12.0
UP_S = 60.0
PROGRESS_S = 12.0
# Some are longer than a lease (3 s) and than a replica's registration (4 s).
FREEZES_S = (0.5, 1.5, 5.0)
# Between two strikes of one victim: a service that is never up for 20 s is given up when it has died eight times.
APART_S = 26.0
KINDS = ("armed",) * 8 + ("random", "freeze")
# Points that only a trainer which starts comes to.
AT_START = ("acquire_epoch", "recover", "AcquireEpoch", "Recover")


@dataclass
class Tally:
    """What was struck."""

    kills: Counter[str] = field(default_factory=Counter)
    freezes: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    """Kills by armed point; those of the store as ``store@<point of the buffer>``."""

    def strikes(self, victim: str) -> int:
        return self.kills[victim] + self.freezes[victim]

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.freezes += other.freezes
        self.points += other.points


class Shares:
    """Gives out points, those taken least so far first. Rounds that run side by side share one."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, victim: str, rng: random.Random, avoid: Counter[str]) -> str:
        """`avoid` counts against a point what this round alone knows of it."""
        with self._lock:
            cost = {name: self._taken[name] + avoid[name] for name in points_of(victim)}
            name = rng.choice([name for name, count in cost.items() if count == min(cost.values())])
            self._taken[name] += 1
            return name

    def give_back(self, name: str) -> None:
        with self._lock:
            self._taken[name] -= 1

    def missing(self, victim: str, wanted: int) -> int:
        """Hits until every point of `victim` has been taken `wanted` times."""
        with self._lock:
            return sum(max(0, wanted - self._taken[name]) for name in points_of(victim))


class Round:
    """One run and its strikes. `say` gets a line per strike."""

    def __init__(
        self, directory: Path, seed: int, shares: Shares | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.seed = seed
        self.tally = Tally()
        self._shares = shares or Shares()
        self._unreached: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._say = say
        self._points = points.Points(directory / "faults")
        environment = self._points.environment()
        self.run = Run(directory / "run", *small_train(directory), "--run.seed", str(seed), environment=environment)
        self._struck_at: dict[str, float] = {}
        self._began = time.monotonic()

    def strike(self, victims: Sequence[str], deadline: float, stop: threading.Event) -> None:
        """One strike for each of `victims`, in order; ends earlier at `deadline` (monotonic) or when `stop` is set."""
        self.run.wait_for(lambda: self.run.step() >= 2, within_s=2 * UP_S)
        for victim in victims:
            self._rest(victim, deadline, stop)
            self._see_progress(deadline)
            if stop.is_set() or time.monotonic() > deadline:
                return
            self._strike(victim, self._rng.choice(KINDS))
            self._struck_at[victim] = time.monotonic()

    def settle(self, steps: int = 5) -> Verdict:
        """The run makes `steps` more steps, ends in order, and is judged."""
        return settle(self.run, self._points, steps)

    def _rest(self, victim: str, deadline: float, stop: threading.Event) -> None:
        until = min(deadline, self._struck_at.get(victim, -APART_S) + APART_S)
        while (left := until - time.monotonic()) > 0 and not stop.wait(min(left, 0.5)):
            self.run.look()

    def _see_progress(self, deadline: float) -> None:
        """Waits for a step, so that most strikes hit a system at work; not for ever: some hit one that recovers."""
        goal, until = self.run.step() + 1, min(deadline, time.monotonic() + PROGRESS_S)
        while self.run.step() < goal and time.monotonic() < until:
            time.sleep(0.1)
            self.run.look()

    def _strike(self, victim: str, kind: str) -> None:
        if kind == "freeze":
            self._freeze(victim)
        elif kind == "random" or not self._kill_at_point(victim):
            self._kill(victim)

    def _kill(self, victim: str) -> None:
        try:
            self._process(victim).kill()
        except psutil.NoSuchProcess:
            self._note(f"{victim} ended by itself first")
            return
        self.tally.kills[victim] += 1
        self._note(f"kill {victim} at a random time")

    def _kill_at_point(self, victim: str) -> bool:
        """False when nobody reached the point."""
        name = self._shares.take(victim, self._rng, self._unreached)
        if not self._carried_out(victim, name, "kill"):
            self._shares.give_back(name)
            return False
        self.tally.kills[victim] += 1
        self.tally.points[name] += 1
        self._note(f"kill {name}")
        return True

    def _carried_out(self, victim: str, name: str, action: str) -> bool:
        """Arms a point; whether somebody came to it."""
        point = name.partition("@")[2] or name
        whom = f" {self._process('store').pid}" if victim == "store" else ""
        self._points.arm(point, action + whom)
        if point.split(".")[1] in AT_START:
            with suppress(psutil.NoSuchProcess):
                self._process("trainer").kill()
                self.tally.kills["trainer"] += 1
        deadline = time.monotonic() + REACH_S
        while self._points.is_armed(point) and time.monotonic() < deadline:
            time.sleep(0.05)
            self.run.look()
        if self._points.disarm(point):
            self._unreached[name] += 1
            self._note(f"nobody came to {name}")
            return False
        return True

    def _freeze(self, victim: str) -> None:
        """At a point or at a random time, whichever the seed says."""
        seconds = self._rng.choice(FREEZES_S)
        name = self._rng.choice(points_of(victim)) if self._rng.random() < 0.5 else ""
        process = self._process(victim)
        if name and self._carried_out(victim, name, "freeze"):
            if victim != "store":
                process = psutil.Process(self._points.hits(name)[-1])
        else:
            name = ""
            process.suspend()
        time.sleep(seconds)
        with suppress(psutil.NoSuchProcess):  # who waits for an engine may have ended it
            process.resume()
        self.tally.freezes[victim] += 1
        self._note(f"freeze {name or victim} for {seconds} s")

    def _process(self, victim: str) -> psutil.Process:
        """The victim, as soon as it is up."""
        found: list[psutil.Process] = []

        def up() -> bool:
            with suppress(psutil.NoSuchProcess):  # it was there a moment ago
                process = self.run.victim("engine-0" if victim == "engine" else victim)
                found[:] = [process] if process is not None else []
            return bool(found)

        self.run.wait_for(up, within_s=UP_S)
        return found[0]

    def _note(self, what: str) -> None:
        self._say(f"seed {self.seed} {time.monotonic() - self._began:6.1f} s step {self.run.step():4d}: {what}")


def settle(run: Run, at: points.Points, steps: int = 5) -> Verdict:
    """`run` makes `steps` more steps, ends in order, and is judged."""
    goal = run.step() + steps
    run.wait_for(lambda: run.step() >= goal, within_s=3 * UP_S)
    run.process.send_signal(signal.SIGINT)
    run.finish(within_s=2 * UP_S)
    verdict = judge_run(run, at.directory)
    if left := run.left_behind():
        verdict.lost.append(f"processes left behind: {left}")
    return verdict
