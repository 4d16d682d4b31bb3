"""Two trainers (row 25 of the crash matrix): the first freezes at a point, a second takes over, the first comes back.

The first has to end as fenced, which ends its launcher's run; the same command then goes on from what the second left.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.kit.faults import points, witness
from tests.kit.faults.judge import Verdict
from tests.kit.faults.rounds import UP_S, settle
from tests.kit.runs import ROOT, Run
from tests.kit.systems import small_train

# Where the first freezes: what it does next is a stale commit, a stale push, or more training and then the commit.
POINTS = ("trainer.CommitStep.before", "trainer.push_bucket.before", "trainer.gradient_clip.before")
FENCED = 3
# At these the first has trained a step that it has not committed yet.
UNCOMMITTED = {"trainer.CommitStep.before", "trainer.gradient_clip.before"}
# Steps that the second makes before the first comes back.
STEPS = 3


@dataclass
class Outcome:
    status: int
    """The launcher's, when the first trainer had come back: FENCED."""
    late_commits: int
    """Steps that were acknowledged to the first after it came back, at a point where there must be none."""
    verdict: Verdict

    @property
    def clean(self) -> bool:
        return self.status == FENCED and not self.late_commits and self.verdict.clean

    def said(self) -> str:
        return f"status {self.status}, {self.late_commits} late commits; {self.verdict}"


def two_trainers(directory: Path, seed: int, point: str) -> Outcome:
    """Raises AssertionError when the second does not take over, or the first does not end."""
    at = points.Points(directory / "faults")
    # A replica that waits for a bucket of the frozen trainer gives it up after this long.
    command = [*small_train(directory), "--run.seed", str(seed), "--trainer.weights.timeout_s", "8"]
    run = Run(directory / "run", *command, environment=at.environment())
    run.wait_for(lambda: run.step() >= 3, within_s=2 * UP_S)
    at.arm(point, "freeze")
    run.wait_for(lambda: bool(at.hits(point)), within_s=UP_S)
    first = at.hits(point)[-1]
    epoch, commits = max(line["epoch"] for line in run.steps()), _commits(at, first)
    with (run.dir / "logs" / "trainer-1.log").open("wb") as log:
        rival = subprocess.Popen(
            [sys.executable, "-m", "services.trainer", "-c", str(run.dir / "config.toml"), "--index", "1"],
            cwd=ROOT,
            env=run.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        run.wait_for(lambda: len(_of_later_epochs(run, epoch)) >= STEPS, within_s=2 * UP_S)
        psutil.Process(first).resume()
        status = run.finish(within_s=2 * UP_S)
    finally:
        rival.kill()
        rival.wait()
    late_commits = _commits(at, first) - commits if point in UNCOMMITTED else 0
    run = Run(directory / "run", *command, environment=at.environment())
    return Outcome(status, late_commits, settle(run, at))


def _of_later_epochs(run: Run, epoch: int) -> list[int]:
    return [line["step"] for line in run.steps() if line["epoch"] > epoch]


def _commits(at: points.Points, pid: int) -> int:
    """Steps that a trainer's process was acknowledged."""
    lines = witness.read(at.directory / "witness")
    return sum(line["kind"] == "committed" and line["by"] == f"trainer-{pid}" for line in lines)
