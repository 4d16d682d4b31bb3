"""Whole runs for end-to-end tests: a launcher in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import load
from services.common.errors import PolyheadError
from services.common.process import die_with_parent

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
LOOK_S = 0.2


class Run:
    """One `polyhead` command on a run directory."""

    def __init__(self, run_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is added to this process's; directories in its PYTHONPATH go first."""
        self.dir = run_dir
        self.output = run_dir.with_name(f"{run_dir.name}.out")
        self.environment = _environment(environment or {})
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is the test's to pass on; a test that is killed leaves no run behind.
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        self.seen: set[psutil.Process] = set()
        self._step = self._read = 0

    def look(self) -> list[psutil.Process]:
        """The launcher's descendants now; remembered, so that `left_behind` can look for them."""
        try:
            now = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            now = []
        self.seen.update(now)
        return now

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Complete lines of a .jsonl file of the run, in the order written."""
        try:
            text = (self.dir / f"{name}.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self) -> list[dict[str, Any]]:
        return self.lines("metrics")

    def step(self) -> int:
        """The highest step trained. Only what was written since the last call is read."""
        with suppress(FileNotFoundError), (self.dir / "metrics.jsonl").open("rb") as file:
            file.seek(self._read)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read += len(whole)
            self._step = max([self._step, *(json.loads(line)["step"] for line in whole.splitlines())])
        return self._step

    def wait_for(self, what: Callable[[], bool], within_s: float) -> None:
        """Polls `what`, keeping `seen` current. Fails with the launcher's output when it ends or time is up first."""
        deadline = time.monotonic() + within_s
        while not what():
            self.look()
            if self.process.poll() is not None and not what():
                raise AssertionError(f"the run ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {within_s} s (step {self.step()}):\n{self.tail()}")
            time.sleep(LOOK_S)

    def finish(self, within_s: float) -> int:
        """The exit status of the launcher."""
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"did not end within {within_s} s (step {self.step()}):\n{self.tail()}")
            time.sleep(LOOK_S)
        return self.process.returncode

    def left_behind(self) -> list[psutil.Process]:
        """Descendants that outlived the launcher."""
        _, alive = psutil.wait_procs(self.seen, timeout=3)
        return [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]

    def replicas(self) -> list[pb.Replica]:
        """The rollout replicas that have not said farewell, as the registry knows them; none while it is away."""
        listed = self._ask(lambda buffer: buffer.list_replicas(pb.ROLE_ROLLOUT)) or []
        return [replica for replica in listed if replica.state != pb.REPLICA_STATE_DEAD]

    def ledger(self) -> pb.GetLedgerResponse | None:
        """None while the buffer is away."""
        return self._ask(lambda buffer: buffer.get_ledger())

    def samples(self, state: sample_pb2.SampleState) -> list[pb.ListedSample]:
        """The first thousand samples in a state; none while the buffer is away."""
        listed = self._ask(lambda buffer: buffer.list_samples(state, limit=1000))
        return list(listed.samples) if listed is not None else []

    def _ask(self, what: Callable[[BufferClient], Awaitable[T]]) -> T | None:
        async def ask() -> T:
            async with BufferClient(load(self.dir / "config.toml").buffer.address, retry_for_s=1.0) as buffer:
                return await what(buffer)

        try:
            return asyncio.run(ask())
        except PolyheadError:
            return None

    def child(self, name: str) -> int:
        """The pid of a rollout replica's helper, "engine-0" or "router", as soon as it is one that runs."""
        found: list[int] = []

        def look() -> bool:
            ours = {process.pid for process in self.look()}
            found[:] = [pid for replica in self.replicas() if (pid := replica.child_pids.get(name)) in ours]
            return bool(found)

        self.wait_for(look, within_s=60)
        return found[0]

    def requests(self) -> list[Request]:
        """What the engines logged of requests that got a slot, by time: `rollout.engine.args` has log-requests.

        Those of samples: an engine that is asked for its health generates too, under an id without dots.
        """
        logs = [log.read_text(errors="replace").splitlines() for log in (self.dir / "logs").glob("engine-*.log")]
        starts: dict[str, Request] = {}
        for line in (line for log in logs for line in log if '"request_' in line):
            said = json.loads(line)
            if "." not in said["rid"]:
                continue
            at = datetime.fromisoformat(said["timestamp"]).timestamp()
            if said["event"] == "request_started":
                starts[said["rid"]] = Request(said["rid"], at, said["prompt"], said["weight_version"])
            elif (ended := starts.get(said["rid"])) is not None:  # else it was ended before it got a slot
                ended.ended_at, ended.tokens, ended.reason = at, said["tokens"], said["reason"]
        return sorted(starts.values(), key=lambda request: request.started_at)

    def victim(self, role: str) -> psutil.Process | None:
        """The process that fills a role now; for an engine or router, as soon as the registry knows it."""
        if role == "router" or role.startswith("engine-"):
            return psutil.Process(self.child(role))
        return next(iter(self.processes(role)), None)

    def processes(self, role: str) -> list[psutil.Process]:
        """All that fill a role now; "engine" for every engine."""
        found = []
        for process in self.look():
            try:
                ours = role == "engine" or process.ppid() == self.process.pid
                alive = process.status() != psutil.STATUS_ZOMBIE
                if ours and alive and _fills(role, process.cmdline(), process.name()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def summary(self) -> dict[str, Any]:
        return json.loads((self.dir / "summary.json").read_text())

    def tail(self) -> str:
        """The ends of the launcher's output and of every log."""
        logs = sorted((self.dir / "logs").glob("*.log"))
        ends = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        return "\n".join([self.output.read_text()[-2000:], *ends])


@dataclass
class Request:
    """One request to an engine. Times are in seconds since the epoch."""

    rid: str
    """Sample, lease, and which request it was under that lease."""
    started_at: float
    prompt: int
    """Tokens; of a resumed sample, those of its partial completion too."""
    weight_version: str
    """When it got its slot."""
    ended_at: float | None = None
    """None: its engine died before."""
    tokens: int = 0
    reason: str = ""

    @property
    def sample_id(self) -> str:
        return self.rid.rsplit(".", 2)[0]


def _fills(role: str, command: Sequence[str], title: str) -> bool:
    mark = {"store": "valkey-server", "engine": "services.rollout.engines.torch_engine"}.get(role, f"services.{role}")
    return any(part.endswith(mark) for part in command) or title.startswith((f"polyhead-{role}"[:15], mark))


def surviving(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The line of each step in the surviving history: a replayed step's last line."""
    return {line["step"]: line for line in lines}


def polyhead(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `polyhead` command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *arguments],
        cwd=ROOT,
        env=_environment({}),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    paths = [added.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "protos")]
    return {**os.environ, **added, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
