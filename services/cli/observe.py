"""What the launcher sees of a run: the buffer's ledger, the replicas' counters, the trainer's metrics."""

from __future__ import annotations

import asyncio
import time
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
# The ledger is recounted for each look: a big store is looked at less often, so that this stays a small load.
LOOK_SHARE = 0.2
END_TRIES = 5

# What the summary, the report and the display read of a step. A long run's metrics stay in its file.
_KEPT = (
    *("step", "reward_mean", "staleness", "staleness_max", "completion_tokens", "overlap_tokens", "multi_span_samples"),
    *("mismatch_kl", "mismatch_kl_fresh", "step_s", "train_s"),
)


class JsonLines:
    """Follows a file of JSON lines that another process appends to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Complete lines since the last call. A line that a crash left torn is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [parsed for line in complete.splitlines() if (parsed := self._parse(line)) is not None]

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        try:
            parsed = orjson.loads(line)
        except orjson.JSONDecodeError:
            log.warning("torn_line", path=str(self._path), bytes=len(line))
            return None
        return parsed if isinstance(parsed, dict) else None


class Observer:
    """Collects, once a second, all that the progress display and the summary need."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self._address = config.buffer.address
        self._buffer: BufferClient | None = None
        self._ledger_s = 0.0
        self._supervisor = supervisor
        self._metrics = JsonLines(config.run.dir / "metrics.jsonl")
        self._pushes = JsonLines(config.run.dir / "pushes.jsonl")
        self.steps: dict[int, dict[str, Any]] = {}
        """Metrics of each step, the columns above; after a recovery the replayed line wins."""
        self.last_step = 0
        self.pushes: list[dict[str, Any]] = []
        self.ledger: pb.GetLedgerResponse | None = None
        self.complete = False
        """Whether the last look was at the buffer after everybody else had left."""
        self.replicas: dict[str, pb.Replica] = {}
        """The last word of every replica that was ever seen."""
        self.most_rollouts = 0
        """Rollout replicas at one time. A killed one and its successor count once."""
        self.most_engines = 0
        """Of one replica."""
        self.engine_names: dict[str, None] = {}
        """Every kind and version of engine that was seen."""
        self._pids: dict[str, dict[int, None]] = defaultdict(dict)

    async def watch(self, shown: Callable[[Observer], None]) -> None:
        """Looks and shows until cancelled."""
        while True:
            await self.look()
            shown(self)
            await asyncio.sleep(max(LOOK_EVERY_S, self._ledger_s / LOOK_SHARE))

    async def look_at_the_end(self) -> None:
        """The look that the summary is made of; `complete` says whether the buffer answered."""
        for _ in range(END_TRIES):
            if await self.look():
                self.complete = True
                break
        if self._buffer is not None:
            await self._buffer.close()

    async def look(self) -> bool:
        """One look. False when the buffer does not answer: it is asked again at the next one."""
        for line in self._metrics.read_new():
            self.steps[line["step"]] = {key: line.get(key) for key in _KEPT}
            self.last_step = max(self.last_step, line["step"])
        self.pushes += self._pushes.read_new()
        for child in (*self._supervisor.children, *self._supervisor.ended):
            self._pids[child.role] |= dict.fromkeys(child.pids)
        if self._buffer is None:
            self._buffer = BufferClient(self._address, retry_for_s=0.5)
        began, self._ledger_s = time.monotonic(), 0.0
        try:
            self.ledger = await self._buffer.get_ledger()
            self._ledger_s = time.monotonic() - began
            replicas = await self._buffer.list_replicas()
        except PolyheadError as error:
            log.info("buffer_not_seen", reason=str(error))
            return False
        self._supervisor.note_serving({each.pid for each in replicas if each.state == pb.REPLICA_STATE_SERVING})
        for replica in replicas:
            self.replicas[replica.replica_id] = replica
            self.most_engines = max(self.most_engines, len(replica.engines))
            self.engine_names |= {engine.name: None for engine in replica.engines if engine.name}
            for name, pid in replica.child_pids.items():
                self._pids[name][pid] = None
        rollouts = {_slot(replica) for replica in replicas if replica.role == pb.ROLE_ROLLOUT and _lives(replica)}
        self.most_rollouts = max(self.most_rollouts, len(rollouts))
        return True

    @property
    def pids(self) -> dict[str, list[int]]:
        """Role to every process that has filled it, restarts included."""
        return {role: list(pids) for role, pids in self._pids.items()}

    @property
    def tokens_lost(self) -> int:
        """What rollout replicas that vanished without a farewell had not saved when last heard of."""
        return int(
            sum(replica.stats.get("tokens_unsaved", 0.0) for replica in self.replicas.values() if _lives(replica))
        )

    def total(self, role: pb.Role, stat: str) -> float:
        """A counter summed over every replica of a role, dead ones included."""
        return sum(replica.stats.get(stat, 0.0) for replica in self.replicas.values() if replica.role == role)


def _lives(replica: pb.Replica) -> bool:
    """Whether it has not said farewell."""
    return replica.state != pb.REPLICA_STATE_DEAD


def _slot(replica: pb.Replica) -> str:
    """Role and index: what a process has in common with the one that took its place."""
    return replica.replica_id.partition(".")[0]
