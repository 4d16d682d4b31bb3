"""What the launcher sees of a run: the buffer's ledger, the replicas' counters, the trainer's metrics."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.cli.supervisor import Supervisor
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import PolyheadError

log = structlog.get_logger()

LOOK_EVERY_S = 1.0


class JsonLines:
    """Follows a file of JSON lines that another process appends to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Complete lines since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [orjson.loads(line) for line in complete.splitlines()]


class Observer:
    """Collects, once a second, all that the progress display and the summary need."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self._address = config.buffer.address
        self._supervisor = supervisor
        self._metrics = JsonLines(config.run.dir / "metrics.jsonl")
        self._pushes = JsonLines(config.run.dir / "pushes.jsonl")
        self.steps: dict[int, dict[str, Any]] = {}
        """The metrics of each step; after a recovery the replayed line wins."""
        self.pushes: list[dict[str, Any]] = []
        self.ledger: pb.GetLedgerResponse | None = None
        self.replicas: dict[str, pb.Replica] = {}
        """The last word of every replica that was ever seen."""
        self.alive: set[str] = set()
        self._pids: dict[str, dict[int, None]] = defaultdict(dict)

    async def watch(self, shown: Callable[[Observer], None]) -> None:
        """Looks and shows until cancelled."""
        while True:
            await self.look()
            shown(self)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """One look. A buffer that does not answer is waited for at the next one."""
        for line in self._metrics.read_new():
            self.steps[line["step"]] = line
        self.pushes += self._pushes.read_new()
        for child in self._supervisor.children:
            self._pids[child.role] |= dict.fromkeys(child.pids)
        try:
            async with BufferClient(self._address, retry_for_s=0.5) as buffer:
                self.ledger = await buffer.get_ledger()
                replicas = await buffer.list_replicas()
        except PolyheadError as error:
            log.info("buffer_not_seen", reason=str(error))
            return
        self.alive = {replica.replica_id for replica in replicas}
        for replica in replicas:
            self.replicas[replica.replica_id] = replica
            for name, pid in replica.child_pids.items():
                self._pids[name][pid] = None

    @property
    def pids(self) -> dict[str, list[int]]:
        """Role to every process that has filled it, restarts included."""
        return {role: list(pids) for role, pids in self._pids.items()}

    def total(self, role: pb.Role, stat: str) -> float:
        """A counter summed over every replica of a role, dead ones included."""
        return sum(replica.stats.get(stat, 0.0) for replica in self.replicas.values() if replica.role == role)
