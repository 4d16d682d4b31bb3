"""`polyhead status` and `polyhead down`: talk to the run that a directory belongs to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from polyhead.v1 import buffer_pb2 as pb
from services.cli.lock import holder
from services.cli.progress import lost, queues, waiting
from services.common.buffer_client import BufferClient
from services.common.config import load
from services.common.errors import ConfigError, UnavailableError
from services.common.versions import Version

RUNS = Path("runs")
STOP_WITHIN_S = 180.0


def print_status(run_dir: Path | None) -> int:
    """Prints the ledger and the replicas of a running system. Raises UnavailableError when it does not answer."""
    run_dir = find_run(run_dir)
    config = load(run_dir / "config.toml")
    ledger, replicas = asyncio.run(_ask(config.buffer.address))
    console = Console(highlight=False)
    console.print(
        f"{config.run.name}: step {ledger.step}/{config.run.num_rollout}, epoch {ledger.epoch}, "
        f"published {Version.from_proto(ledger.published)}, "
        f"live groups {ledger.live_groups}/{ledger.live_groups_limit}, ledger imbalance {ledger.imbalance}",
        soft_wrap=True,
    )
    console.print(queues(ledger))
    if lost(ledger):
        console.print(f"lost     {lost(ledger)}", soft_wrap=True)
    for phrase in waiting(ledger):
        console.print(f"waiting  {phrase}", soft_wrap=True)
    console.print(replica_table(replicas))
    for replica in replicas:
        if replica.trouble:
            console.print(f"{replica.replica_id}: {replica.trouble}", soft_wrap=True, markup=False)
    return 0


def stop_run(run_dir: Path | None) -> int:
    """Asks the launcher to stop and waits until it is gone."""
    run_dir = find_run(run_dir)
    pid = holder(run_dir)
    if pid is None:
        raise UnavailableError("no launcher is running", field=str(run_dir))
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WITHIN_S
    while time.monotonic() < deadline:
        if holder(run_dir) is None:
            return 0
        time.sleep(0.2)
    raise UnavailableError(f"process {pid} did not stop within {STOP_WITHIN_S:.0f} s", field=str(run_dir))


async def _ask(address: str) -> tuple[pb.GetLedgerResponse, list[pb.Replica]]:
    async with BufferClient(address, retry_for_s=2.0) as buffer:
        return await buffer.get_ledger(), await buffer.list_replicas()


def replica_table(replicas: Sequence[pb.Replica]) -> Table:
    """A row per replica, below it one per engine."""
    table = Table("replica", "state", "version", "pid", "address", "helpers", box=None)
    for replica in sorted(replicas, key=lambda one: one.replica_id):
        helpers = dict(replica.child_pids)
        engines = [(engine, helpers.pop(f"engine-{engine.index}", None)) for engine in replica.engines]
        others = " ".join(f"{name}:{pid}" for name, pid in sorted(helpers.items()))
        table.add_row(replica.replica_id, *_standing(replica), str(replica.pid), replica.address, others)
        for engine, pid in engines:
            table.add_row(f"  engine-{engine.index}", *_standing(engine), str(pid or ""), "", engine.name)
    return table


def _standing(one: pb.Replica | pb.Engine) -> tuple[str, str]:
    """State and version."""
    state = pb.ReplicaState.Name(one.state).removeprefix("REPLICA_STATE_").lower()
    return state, str(Version.from_proto(one.weight_version)) if one.HasField("weight_version") else ""


def find_run(run_dir: Path | None) -> Path:
    """`run_dir` if it holds a run, the newest one by default. Raises ConfigError."""
    if run_dir is None:
        runs = sorted(RUNS.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise ConfigError("holds no run", field=str(RUNS))
        return runs[-1].parent
    if not (run_dir / "config.toml").exists():
        raise ConfigError("holds no run (no config.toml)", field=str(run_dir))
    return run_dir
