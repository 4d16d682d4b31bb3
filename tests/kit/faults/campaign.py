"""Strikes running systems until every victim has had its share: ``python -m tests.kit.faults.campaign`` (make chaos).

A round is one run with its own seed: strikes on each victim, the network and the clocks; then an orderly end and the
judge. `--systems` processes make rounds side by side, and share nothing but what is left to be struck. The summary is
written after each round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import stamina.instrumentation

from services.common.process import die_with_parent
from tests.kit.faults import matrix, rivals
from tests.kit.faults.judge import Verdict
from tests.kit.faults.rounds import Round, Stop, Tally
from tests.kit.faults.shares import HITS, OTHERS, VICTIMS, WHOLE, Manager, Shares
from tests.kit.systems import small_inputs

# Strikes of one round: what was struck and not judged counts for nothing.
MOST = 45
# A round is not begun for less.
WORTH_S = 30.0
# Seeds of the rounds with two trainers, behind those of the others.
RIVALS_FROM = 900
# What the summary keeps of the log of a violation; the rest is on stderr, and its run stays.
KEPT_LINES = 30


@dataclass
class Summary:
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    freezes: dict[str, int] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    """By SIGTERM."""
    full_disks: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    """Faults of the network."""
    clocks: dict[str, int] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    """Strikes by point."""
    points_hit_less_than_3_times: list[str] = field(default_factory=list)
    crash_matrix: dict[str, dict[str, int]] = field(default_factory=dict)
    """Strikes by row and stage."""
    lost: int = 0
    doubled: int = 0
    ledger_imbalance: int = 0
    steps: int = 0
    rounds: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all processes of the runs but those with two trainers."""
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Lines of the outside ledgers by kind."""
    closed: dict[str, int] = field(default_factory=dict)
    """Samples by closed state, in all runs."""
    violations: list[str] = field(default_factory=list)
    interrupted: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.ledger_imbalance or self.violations)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _salvaged(round_: Round) -> Verdict:
    try:
        return round_.salvage()
    except Exception as error:
        return Verdict(failed=[f"nothing to judge was left: {type(error).__name__}: {error}"])


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Judged:
    """One round that has ended."""

    seed: int
    tally: Tally
    verdict: Verdict
    violation: str = ""
    """What went wrong, with the ends of the logs."""
    cpu_s: float = 0.0
    """Of the run's processes."""


@dataclass
class System:
    """Makes one round after the other, in a process of its own."""

    number: int
    systems: int
    seed: int
    deadline: float
    directory: Path
    shares: Shares
    stop: Stop
    judged: Queue[Judged]
    whole: bool

    def work(self) -> None:
        die_with_parent(os.getppid())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who set up the campaign
        # A buffer that is away is no news here.
        stamina.instrumentation.set_on_retry_hooks([])
        for number in range(self.number, HITS if self.whole else 1, self.systems):
            if not self._over:
                self._rivals(number)
        while not self._over and (following := self.shares.next_round()) is not None:
            self._round(following)

    @property
    def _over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self.deadline - WORTH_S

    def _round(self, number: int) -> None:
        seed = self.seed + number
        directory = self._new_directory(seed)
        # Every other run has two buffers on its store.
        round_ = Round(directory, seed, self.shares, _say, buffers=1 + number % 2)
        before = _children_cpu_s()
        try:
            round_.strike(self.deadline, self.stop, MOST)
            verdict = round_.settle()
            violation = "" if verdict.clean else round_.run.tail()
        except Exception as error:  # a run that ended or stood still is what the campaign is after
            verdict, violation = _salvaged(round_), f"{type(error).__name__}: {error}"
        self._report(directory, Judged(seed, round_.tally, verdict, violation, _children_cpu_s() - before))

    def _rivals(self, number: int) -> None:
        seed, point = self.seed + RIVALS_FROM + number, rivals.POINTS[number % len(rivals.POINTS)]
        directory, verdict, violation, tally = self._new_directory(seed), Verdict(), "", Tally()
        try:
            outcome = rivals.two_trainers(directory, seed, point)
            tally.freezes["trainer"] += 1
            tally.points["rivals"] += 1
            verdict = outcome.verdict
            _say(f"seed {seed}: two trainers, the first frozen at {point}: {outcome.said()}")
            violation = "" if outcome.clean else outcome.said()
        except Exception as error:
            violation = f"two trainers, the first frozen at {point}: {type(error).__name__}: {error}"
        self._report(directory, Judged(seed, tally, verdict, violation))

    def _new_directory(self, seed: int) -> Path:
        directory = self.directory / f"round-{seed}"
        directory.mkdir(parents=True)
        return directory

    def _report(self, directory: Path, judged: Judged) -> None:
        self.judged.put(judged)
        if not judged.violation:
            shutil.rmtree(directory)


class Campaign:
    """Rounds until each victim had `strikes` strikes and each point HITS, or the time is up."""

    def __init__(self, strikes: int, systems: int, minutes: float, seed: int, directory: Path, target: Path) -> None:
        """Runs are made in `directory`, the summary in `target`."""
        self._systems = systems
        self._directory = directory
        self._target = target
        self._strikes = strikes
        self._began = time.monotonic()
        self._deadline = self._began + 60 * minutes
        self._tally = Tally()
        self._context = multiprocessing.get_context("spawn")
        self.stop = self._context.Event()
        cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)
        conditions = {"cores": cores, "load_at_start": load, "systems": systems, "strikes": strikes}
        self.summary = Summary(seed, conditions=conditions)

    def run(self) -> Summary:
        judged: Queue[Judged] = self._context.Queue()
        with Manager(ctx=self._context) as manager:
            shares = manager.Shares(self._strikes, self.summary.seed)
            working = [self._start(number, shares, judged) for number in range(self._systems)]
            while any(worker.is_alive() for worker in working) or not judged.empty():
                with suppress(queue.Empty):
                    self._record(judged.get(timeout=0.5))
        for number, worker in enumerate(working):
            if worker.exitcode:
                self.summary.violations.append(f"system {number} ended with {worker.exitcode}")
        self.summary.interrupted = self.stop.is_set()
        self.summary.write(self._target)
        return self.summary

    def _start(self, number: int, shares: Shares, judged: Queue[Judged]) -> Any:
        system = System(
            number,
            self._systems,
            self.summary.seed,
            self._deadline,
            self._directory,
            shares,
            self.stop,
            judged,
            whole=self._strikes >= WHOLE,
        )
        worker = self._context.Process(target=system.work)
        worker.start()
        return worker

    def _record(self, judged: Judged) -> None:
        self._tally.add(judged.tally)
        said, verdict = self.summary, judged.verdict
        for name, counts in vars(self._tally).items():
            setattr(said, name, dict(sorted(counts.items())))
        every = [name for victim in (*VICTIMS, *OTHERS) for name in matrix.points_of(victim)]
        said.points_hit_less_than_3_times = [name for name in every if self._tally.points[name] < HITS]
        said.crash_matrix = matrix.hits(self._tally.points)
        said.lost += len(verdict.lost)
        said.doubled += len(verdict.doubled)
        said.ledger_imbalance += abs(verdict.imbalance)
        said.steps += verdict.steps
        said.rounds += 1
        said.seconds = round(time.monotonic() - self._began, 1)
        said.cpu_seconds = round(said.cpu_seconds + judged.cpu_s, 1)
        said.acknowledged = dict(Counter(said.acknowledged) + verdict.acknowledged)
        said.closed = dict(Counter(said.closed) + verdict.closed)
        _say(f"seed {judged.seed}: {str(verdict).splitlines()[0]}")
        if judged.violation or not verdict.clean:
            print(f"seed {judged.seed}: {verdict}\n{judged.violation}", file=sys.stderr, flush=True)
            kept = "\n".join(judged.violation.splitlines()[:KEPT_LINES])
            said.violations.append(f"seed {judged.seed}: {verdict}\n{kept}")
        said.write(self._target)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strikes", type=int, default=100, help="of each victim")
    parser.add_argument("--systems", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=42.0, help="until the last strike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/chaos/summary.json"))
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="rounds-", dir=arguments.json.parent)).resolve()
    small_inputs(directory / "inputs")
    campaign = Campaign(
        arguments.strikes, arguments.systems, arguments.minutes, arguments.seed, directory, arguments.json
    )
    signal.signal(signal.SIGINT, lambda *_: campaign.stop.set())
    summary = campaign.run()
    shutil.rmtree(directory / "inputs")
    with suppress(OSError):
        directory.rmdir()  # what is left in it are the runs of rounds with violations
    said = asdict(summary)
    brief = ("seed", "kills", "freezes", "lost", "doubled", "ledger_imbalance", "rounds", "steps", "seconds")
    print(json.dumps({name: said[name] for name in brief}))
    print(f"points hit less than {HITS} times: {len(summary.points_hit_less_than_3_times)}; {arguments.json}")
    return 0 if summary.clean else 1


if __name__ == "__main__":
    sys.exit(main())
