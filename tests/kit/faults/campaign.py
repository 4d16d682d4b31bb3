"""Strikes running systems until every victim has had its share: ``python -m tests.kit.faults.campaign`` (make chaos).

A round is one run with its own seed: strikes at armed points, at random times and by freezing; then an orderly end and
the judge. Rounds follow each other, `--systems` at a time. The summary is written after each round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import stamina.instrumentation

from tests.kit.faults import points
from tests.kit.faults.judge import Verdict, judge_run
from tests.kit.runs import Run
from tests.kit.systems import small_inputs, small_train

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
# Of a stage, before others have their turn again.
HITS = 3
# Points that only a trainer which starts comes to.
AT_START = ("acquire_epoch", "recover", "AcquireEpoch", "Recover")
# Points of the buffer at which the store is killed instead: a script is about to run, or has run and was not answered.
STORE_POINTS = points.names("buffer")


@dataclass
class Tally:
    """What was struck, over all rounds."""

    kills: Counter[str] = field(default_factory=Counter)
    freezes: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    """By armed point; those of the store as ``store@<point of the buffer>``."""

    def strikes(self, victim: str) -> int:
        return self.kills[victim] + self.freezes[victim]

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.freezes += other.freezes
        self.points += other.points


def points_of(victim: str) -> list[str]:
    """Names under which strikes at armed points are counted."""
    return [f"store@{name}" for name in STORE_POINTS] if victim == "store" else points.names(victim)


class Round:
    """One run and its strikes. `say` gets a line per strike."""

    def __init__(self, directory: Path, seed: int, before: Tally, say: Any = print) -> None:
        self.seed = seed
        self.tally = Tally()
        self._before = before
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
        goal = self.run.step() + steps
        self.run.wait_for(lambda: self.run.step() >= goal, within_s=3 * UP_S)
        self.run.process.send_signal(signal.SIGINT)
        self.run.finish(within_s=2 * UP_S)
        verdict = judge_run(self.run, self._points.directory)
        if left := self.run.left_behind():
            verdict.lost.append(f"processes left behind: {left}")
        return verdict

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
        if kind == "armed" and self._at_point(victim):
            return
        process = self._process(victim)
        try:
            if kind == "freeze":
                self._freeze(victim, process)
                return
            process.kill()
        except psutil.NoSuchProcess:
            self._note(f"{victim} ended by itself first")
            return
        self.tally.kills[victim] += 1
        self._note(f"kill {victim} at a random time")

    def _at_point(self, victim: str) -> bool:
        """Arms one of the points hit least so far. False when nobody reached it."""
        names = points_of(victim)
        counts = {name: self._before.points[name] + self.tally.points[name] for name in names}
        name = self._rng.choice([name for name in names if counts[name] == min(counts.values())])
        point = name.partition("@")[2] or name
        action = f"kill {self._process('store').pid}" if victim == "store" else "kill"
        self._points.arm(point, action)
        if point.split(".")[1] in AT_START:
            self._process("trainer").kill()
            self.tally.kills["trainer"] += 1
        deadline = time.monotonic() + REACH_S
        while (self._points.directory / "armed" / point).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            self.run.look()
        if self._points.disarm(point):
            self._before.points[name] += 1  # so that others come first; what is counted is `self.tally`
            self._note(f"nobody came to {name}")
            return False
        self.tally.kills[victim] += 1
        self.tally.points[name] += 1
        self._note(f"kill {name}")
        return True

    def _freeze(self, victim: str, process: psutil.Process) -> None:
        seconds = self._rng.choice(FREEZES_S)
        process.suspend()
        time.sleep(seconds)
        process.resume()
        self.tally.freezes[victim] += 1
        self._note(f"freeze {victim} for {seconds} s")

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


@dataclass
class Summary:
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    freezes: dict[str, int] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    points_hit_less_than_3_times: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    ledger_imbalance: int = 0
    steps: int = 0
    rounds: int = 0
    seconds: float = 0.0
    acknowledged: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.ledger_imbalance or self.violations)


class Campaign:
    """Rounds until each victim had `strikes` strikes or the time is up."""

    def __init__(self, strikes: int, systems: int, minutes: float, seed: int, directory: Path, report: Path) -> None:
        """Rounds live in `directory`; the summary so far is in `report` after each."""
        self._report = report
        self._strikes = strikes
        self._systems = systems
        self._seed = seed
        self._directory = directory
        self._began = time.monotonic()
        self._deadline = self._began + 60 * minutes
        self._tally = Tally()
        self._planned: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._rounds = 0
        self.stop = threading.Event()
        self.summary = Summary(seed, conditions={"cores": os.cpu_count(), "systems": systems, "strikes": strikes})

    def run(self) -> Summary:
        with ThreadPoolExecutor(self._systems) as workers:
            for ended in [workers.submit(self._keep_striking) for _ in range(self._systems)]:
                ended.result()
        return self.summary

    def _keep_striking(self) -> None:
        while not self.stop.is_set() and time.monotonic() < self._deadline:
            with self._lock:
                number, self._rounds = self._rounds, self._rounds + 1
                before = Tally(points=Counter(self._tally.points))
                left = {victim: self._strikes - self._planned[victim] for victim in VICTIMS}
                plan = plan_round(left, random.Random(self._seed + number))
                self._planned.update(plan)
            if not plan:
                return
            self._one(self._seed + number, plan, before)

    def _one(self, seed: int, plan: Sequence[str], before: Tally) -> None:
        directory = self._directory / f"round-{seed}"
        directory.mkdir(parents=True)
        round_ = Round(directory, seed, before, lambda line: print(line, flush=True))
        verdict, violation = Verdict(), ""
        try:
            round_.strike(plan, self._deadline, self.stop)
            verdict = round_.settle()
        except Exception as error:  # a run that ended or stood still is what the campaign is after
            violation = f"seed {seed}: {type(error).__name__}: {error}"
            round_.run.process.kill()
        with self._lock:
            self._planned.subtract(plan)
            self._planned.update({victim: round_.tally.strikes(victim) for victim in VICTIMS})
            self._record(seed, round_.tally, verdict, violation)
        if verdict.clean and not violation:
            shutil.rmtree(directory)

    def _record(self, seed: int, tally: Tally, verdict: Verdict, violation: str) -> None:
        self._tally.add(tally)
        said = self.summary
        said.kills, said.freezes, said.points = (
            dict(sorted(each.items())) for each in (self._tally.kills, self._tally.freezes, self._tally.points)
        )
        every = [name for victim in VICTIMS for name in points_of(victim)]
        said.points_hit_less_than_3_times = [name for name in every if self._tally.points[name] < HITS]
        said.lost += len(verdict.lost)
        said.doubled += len(verdict.doubled)
        said.ledger_imbalance += abs(verdict.imbalance)
        said.steps += verdict.steps
        said.rounds += 1
        said.seconds = round(time.monotonic() - self._began, 1)
        said.acknowledged = dict(Counter(said.acknowledged) + verdict.acknowledged)
        if violation or not verdict.clean:
            said.violations.append(violation or f"seed {seed}: {verdict}")
            print(said.violations[-1], file=sys.stderr, flush=True)
        self._report.write_text(json.dumps(asdict(said), indent=1) + "\n")
        print(f"seed {seed}: {str(verdict).splitlines()[0]}", flush=True)


def plan_round(left: dict[str, int], rng: random.Random, most: int = 60) -> list[str]:
    """Whom to strike, in turns over all victims that have strikes left."""
    plan: list[str] = []
    left = dict(left)
    while len(plan) < most and any(count > 0 for count in left.values()):
        turn = [victim for victim, count in left.items() if count > 0]
        rng.shuffle(turn)
        plan += turn
        for victim in turn:
            left[victim] -= 1
    return plan[:most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strikes", type=int, default=100, help="of each victim")
    parser.add_argument("--systems", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=42.0, help="of striking")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/chaos/summary.json"))
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="rounds-", dir=arguments.json.parent)).resolve()
    small_inputs(directory / "inputs")
    systems, minutes, seed = arguments.systems, arguments.minutes, arguments.seed
    campaign = Campaign(arguments.strikes, systems, minutes, seed, directory, arguments.json)
    signal.signal(signal.SIGINT, lambda *_: campaign.stop.set())
    # A buffer that is away is no news here.
    stamina.instrumentation.set_on_retry_hooks([])
    summary = campaign.run()
    shutil.rmtree(directory / "inputs")
    with suppress(OSError):
        directory.rmdir()  # what is left in it are the runs of rounds with violations
    brief = ("seed", "kills", "freezes", "lost", "doubled", "ledger_imbalance", "rounds", "steps", "seconds")
    print(json.dumps({name: asdict(summary)[name] for name in brief}))
    print(f"stages hit less than {HITS} times: {len(summary.points_hit_less_than_3_times)}; {arguments.json}")
    return 0 if summary.clean else 1


if __name__ == "__main__":
    sys.exit(main())
