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

import stamina.instrumentation

from tests.kit.faults import matrix, rivals
from tests.kit.faults.judge import Verdict
from tests.kit.faults.rounds import VICTIMS, Round, Shares, Tally
from tests.kit.systems import small_inputs

# Of each point, and of each stage of the crash matrix.
HITS = 3
# Strikes of one round: a run that is struck for ever would never be judged.
MOST = 60
# Seeds of the rounds with two trainers, behind those of the others.
RIVALS_FROM = 900
# What the summary keeps of a violation; the rest is on stderr, and its run stays.
KEPT_LINES = 30


@dataclass
class Summary:
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    freezes: dict[str, int] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    """Kills by point."""
    points_hit_less_than_3_times: list[str] = field(default_factory=list)
    crash_matrix: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kills by row and stage."""
    lost: int = 0
    doubled: int = 0
    ledger_imbalance: int = 0
    steps: int = 0
    rounds: int = 0
    seconds: float = 0.0
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


class Campaign:
    """Rounds until each victim had `strikes` strikes and each point HITS, or the time is up."""

    def __init__(self, strikes: int, systems: int, minutes: float, seed: int, directory: Path, target: Path) -> None:
        """Runs are made in `directory`, the summary in `target`."""
        self._strikes = strikes
        self._systems = systems
        self._seed = seed
        self._directory = directory
        self._target = target
        self._began = time.monotonic()
        self._deadline = self._began + 60 * minutes
        self._tally = Tally()
        self._planned: Counter[str] = Counter()
        self._shares = Shares()
        self._lock = threading.Lock()
        self._rounds = 0
        self._rivals = 0
        self.stop = threading.Event()
        self.summary = Summary(seed, conditions={"cores": os.cpu_count(), "systems": systems, "strikes": strikes})

    def run(self) -> Summary:
        with ThreadPoolExecutor(self._systems) as workers:
            for ended in [workers.submit(self._work) for _ in range(self._systems)]:
                ended.result()
        self.summary.interrupted = self.stop.is_set()
        self.summary.write(self._target)
        return self.summary

    def _work(self) -> None:
        while not self._over and self._next_rivals():
            pass
        while not self._over and self._next_round():
            pass

    @property
    def _over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self._deadline

    def _next_round(self) -> bool:
        """False when nothing is left to be struck."""
        with self._lock:
            number, self._rounds = self._rounds, self._rounds + 1
            left = {victim: self._strikes - self._planned[victim] for victim in VICTIMS}
            if not any(count > 0 for count in left.values()):
                left = {victim: self._shares.missing(victim, self._wanted) for victim in VICTIMS}
            plan = plan_round(left, random.Random(self._seed + number))
            self._planned.update(plan)
        if plan:
            self._one(self._seed + number, plan)
        return bool(plan)

    @property
    def _wanted(self) -> int:
        """Of each point: a short campaign does not go on until it has been to all of them."""
        return HITS if self._strikes >= 100 else 0

    def _one(self, seed: int, plan: Sequence[str]) -> None:
        directory = self._new_directory(seed)
        round_ = Round(directory, seed, self._shares, lambda line: print(line, flush=True))
        verdict, violation = Verdict(), ""
        try:
            round_.strike(plan, self._deadline, self.stop)
            verdict = round_.settle()
            if not verdict.clean:
                violation = f"{verdict}\n{round_.run.tail()}"
        except Exception as error:  # a run that ended or stood still is what the campaign is after
            violation = f"{type(error).__name__}: {error}"
            round_.run.process.kill()
        with self._lock:
            self._planned.subtract(plan)
            self._planned.update({victim: round_.tally.strikes(victim) for victim in VICTIMS})
            self._record(seed, round_.tally, verdict, violation)
        if not violation:
            shutil.rmtree(directory)

    def _next_rivals(self) -> bool:
        with self._lock:
            number, self._rivals = self._rivals, self._rivals + 1
        wanted = HITS if self._wanted else 1
        if number >= wanted:
            return False
        seed, point = self._seed + RIVALS_FROM + number, rivals.POINTS[number % len(rivals.POINTS)]
        directory, verdict, violation, tally = self._new_directory(seed), Verdict(), "", Tally()
        try:
            outcome = rivals.two_trainers(directory, seed, point)
            tally.freezes["trainer"] += 1
            tally.points["rivals"] += 1
            verdict = outcome.verdict
            print(f"seed {seed}: two trainers, the first frozen at {point}: {outcome.said()}", flush=True)
            violation = "" if outcome.clean else outcome.said()
        except Exception as error:
            violation = f"two trainers, the first frozen at {point}: {type(error).__name__}: {error}"
        with self._lock:
            self._record(seed, tally, verdict, violation)
        if not violation:
            shutil.rmtree(directory)
        return True

    def _new_directory(self, seed: int) -> Path:
        directory = self._directory / f"round-{seed}"
        directory.mkdir(parents=True)
        return directory

    def _record(self, seed: int, tally: Tally, verdict: Verdict, violation: str) -> None:
        self._tally.add(tally)
        said = self.summary
        said.kills, said.freezes, said.points = (
            dict(sorted(each.items())) for each in (self._tally.kills, self._tally.freezes, self._tally.points)
        )
        every = [name for victim in VICTIMS for name in matrix.points_of(victim)]
        said.points_hit_less_than_3_times = [name for name in every if self._tally.points[name] < HITS]
        said.crash_matrix = matrix.hits(self._tally.points)
        said.lost += len(verdict.lost)
        said.doubled += len(verdict.doubled)
        said.ledger_imbalance += abs(verdict.imbalance)
        said.steps += verdict.steps
        said.rounds += 1
        said.seconds = round(time.monotonic() - self._began, 1)
        said.acknowledged = dict(Counter(said.acknowledged) + verdict.acknowledged)
        said.closed = dict(Counter(said.closed) + verdict.closed)
        if violation:
            print(f"seed {seed}: {violation}", file=sys.stderr, flush=True)
            said.violations.append("\n".join(f"seed {seed}: {violation}".splitlines()[:KEPT_LINES]))
        print(f"seed {seed}: {str(verdict).splitlines()[0]}", flush=True)
        said.write(self._target)


def plan_round(left: dict[str, int], rng: random.Random, most: int = MOST) -> list[str]:
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
    parser.add_argument("--minutes", type=float, default=45.0)
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
    # A buffer that is away is no news here.
    stamina.instrumentation.set_on_retry_hooks([])
    summary = campaign.run()
    shutil.rmtree(directory / "inputs")
    with suppress(OSError):
        directory.rmdir()  # what is left in it are the runs of rounds with violations
    brief = ("seed", "kills", "freezes", "lost", "doubled", "ledger_imbalance", "rounds", "steps", "seconds")
    print(json.dumps({name: asdict(summary)[name] for name in brief}))
    print(f"points hit less than {HITS} times: {len(summary.points_hit_less_than_3_times)}; {arguments.json}")
    return 0 if summary.clean else 1


if __name__ == "__main__":
    sys.exit(main())
