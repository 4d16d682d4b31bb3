"""Whole runs for end-to-end tests: a launcher in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Run:
    """One `polyhead` command on a run directory."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.dir = run_dir
        self.output = run_dir.with_name(f"{run_dir.name}.out")
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", *arguments],
                cwd=ROOT,
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.seen: set[psutil.Process] = set()

    def look(self) -> list[psutil.Process]:
        """The launcher's descendants now; remembered, so that `left_behind` can look for them."""
        try:
            now = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            now = []
        self.seen.update(now)
        return now

    def steps(self) -> list[dict[str, Any]]:
        """Complete lines of metrics.jsonl, in the order written."""
        try:
            text = (self.dir / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def step(self) -> int:
        return max((line["step"] for line in self.steps()), default=0)

    def wait_for(self, what: Callable[[], bool], within_s: float) -> None:
        """Polls `what`, keeping `seen` current. Fails with the launcher's output when it ends or time is up first."""
        deadline = time.monotonic() + within_s
        while not what():
            self.look()
            if self.process.poll() is not None and not what():
                raise AssertionError(f"the run ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {within_s} s (step {self.step()}):\n{self.tail()}")
            time.sleep(0.1)

    def finish(self, within_s: float) -> int:
        """The exit status of the launcher."""
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"did not end within {within_s} s (step {self.step()}):\n{self.tail()}")
            time.sleep(0.1)
        return self.process.returncode

    def left_behind(self) -> list[psutil.Process]:
        """Descendants that outlived the launcher."""
        _, alive = psutil.wait_procs(self.seen, timeout=3)
        return [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]

    def victim(self, role: str) -> psutil.Process | None:
        """The process that fills a role now."""
        marks = {
            "store": "valkey-server",
            "engine": "services.rollout.engines.torch_engine",
            **{name: f"services.{name}" for name in ("buffer", "rollout", "reward", "trainer")},
        }
        for process in self.look():
            try:
                command, title = process.cmdline(), process.name()
            except psutil.Error:
                continue
            if any(part.endswith(marks[role]) for part in command) or title.startswith(
                (f"polyhead-{role}"[:15], marks[role])
            ):
                return process
        return None

    def summary(self) -> dict[str, Any]:
        return json.loads((self.dir / "summary.json").read_text())

    def tail(self) -> str:
        """The ends of the launcher's output and of every log."""
        logs = sorted((self.dir / "logs").glob("*.log"))
        ends = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        return "\n".join([self.output.read_text()[-2000:], *ends])


def surviving(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The line of each step in the surviving history: a replayed step's last line."""
    return {line["step"]: line for line in lines}


def polyhead(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `polyhead` command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *arguments],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}
